"""What is the CPU kernels' own: instruction sets, threads."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from attention_cases import near_scores, outcome
from attention_cases import textbook as attention_textbook
from judge import EXACT_VALUE, SLACK, error, judge_exact
from test_logit import textbook

import fastdistil as fd
from fastdistil import _C
from fastdistil.contracts.logit import DIVERGENCES


@pytest.fixture
def restored() -> Iterator[None]:
    isa, threads = _C.isa(), torch.get_num_threads()
    yield
    _C.use_isa(isa)
    torch.set_num_threads(threads)


# Row 1 has an infinite logit; in row 2, at 900 from everything, the centred rules' p (slope - centre) is all rounding.
FINITE = [0, 3, 4]


def losses(dtype: torch.dtype, divergence: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    teacher = 4 * torch.randn(5, 1029)
    student = (teacher + torch.randn(5, 1029)).to(dtype)
    student[1, 7], student[2, 3] = -math.inf, 900.0
    student.requires_grad_()
    value = fd.logit_loss(student, teacher.to(dtype), divergence=divergence, reduction="none", backend="cpu")
    return value.detach(), torch.autograd.grad(value[[0, 2, 3, 4]].sum(), student)[0]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_instruction_sets_agree(restored: None, dtype: torch.dtype, divergence: str) -> None:
    """Sums run in another order, so the last digits may differ; nothing else may."""
    assert "generic" in _C.isas()
    _C.use_isa("generic")
    value, gradient = losses(dtype, divergence)
    for isa in _C.isas():
        _C.use_isa(isa)
        assert _C.isa() == isa
        other_value, other_gradient = losses(dtype, divergence)
        assert error(other_value, value) <= SLACK[torch.float32]
        assert error(other_gradient[FINITE], gradient[FINITE]) <= SLACK[dtype]
        assert torch.equal(other_gradient.isfinite(), gradient.isfinite())


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_x87_registers_stay_clean(restored: None, dtype: torch.dtype, isa: str) -> None:
    """Code that uses MMX registers without clearing them turns every later long double, and libm's fmod, into NaN."""
    _C.use_isa(isa)
    for divergence in DIVERGENCES:
        losses(dtype, divergence)
        value, rest = numpy.longdouble(7) / 2, numpy.longdouble(7) % 3
        assert value == 3.5 and rest == 1, divergence


def test_an_unknown_instruction_set_is_refused(restored: None) -> None:
    with pytest.raises(ValueError, match="use_isa: name is 'mmx'"):
        _C.use_isa("mmx")


def test_the_number_of_threads_changes_nothing(restored: None) -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(losses(torch.float32, "jsd"))
    for value, gradient in found[1:]:
        assert torch.equal(value, found[0][0]) or value.isnan().any()
        assert torch.equal(gradient.nan_to_num(), found[0][1].nan_to_num())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_one_openmp_runtime_is_shared_with_torch() -> None:
    """Two runtimes would keep two pools of threads, and alternating with torch.mm would oversubscribe the cores. In a
    process of its own: what else is installed may bring another one, as scikit-learn does, beside which ours counts.
    The first call is one that needs no torch: the extension is to find torch's runtime all the same, not the system's."""
    code = """if True:
        import fastdistil as fd
        assert fd.backends()["cpu"] is True
        import torch
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))
        fd.logit_loss(torch.ones(64, 999), torch.zeros(64, 999), backend="cpu")
        names = ("libgomp", "libiomp", "libomp")
        print(*{line.split()[-1] for line in open("/proc/self/maps") if any(n in line for n in names)}, sep="\\n")
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = Path(torch.__file__).parent / "lib/libgomp.so.1"  # in torch's wheels, not where torch was built here
    assert len(run.stdout.split()) == 1, run.stdout
    assert not own.exists() or Path(run.stdout.strip()).samefile(own)


@pytest.mark.skipif(not _C.pool_available(), reason="this system cannot take kept memory back")
def test_large_gradients_use_their_memory_again() -> None:
    """A freed gradient's memory serves the next one, whose numbers owe nothing to what was there; a live one's never."""
    torch.use_deterministic_algorithms(False)  # as outside of the tests: nothing fills fresh memory
    teacher = torch.randn(96, 100_003)  # 38 MB
    students = [(teacher + noise).requires_grad_() for noise in torch.randn(2, 96, 1)]
    students[1].data[::2] *= 2

    def gradient(student: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(fd.logit_loss(student, teacher, backend="cpu"), student)[0]

    fd.empty_cache()
    assert _C.pool_held() == 0
    first = gradient(students[0])
    kept, address = first.clone(), first.data_ptr()
    other = gradient(students[1])
    assert other.data_ptr() != address and torch.equal(first, kept)
    del first
    held = _C.pool_held()
    assert held >= kept.nbytes
    again = gradient(students[1])
    assert again.data_ptr() == address and torch.equal(again, other)
    assert _C.pool_held() < held
    del again, other
    fd.empty_cache()
    assert _C.pool_held() == 0


@pytest.mark.skipif(not _C.pool_available(), reason="this system cannot take kept memory back")
def test_how_much_memory_is_kept() -> None:
    """Four blocks of any size, more of them up to 256 MiB; the oldest go first."""
    mega = 1 << 20
    fd.empty_cache()
    small = [_C.PooledMemory(8 * mega) for _ in range(10)]
    small.clear()
    assert _C.pool_held() == 80 * mega
    large = [_C.PooledMemory(200 * mega) for _ in range(6)]  # not touched, hence not there
    del large[:2]
    assert _C.pool_held() == 2 * 200 * mega + 2 * 8 * mega
    large.clear()
    assert _C.pool_held() == 4 * 200 * mega
    fd.empty_cache()
    assert _C.pool_held() == 0


def test_small_gradients_are_not_pooled() -> None:
    fd.empty_cache()
    losses(torch.float32, "forward_kl")
    assert _C.pool_held() == 0


@pytest.mark.parametrize("columns", [1, 2, 13, 15, 16, 17, 511, 512, 513, 528, 1031])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_columns_behind_a_row_have_no_part_in_it(divergence: str, columns: int) -> None:
    """The kernel pads its last block; far rows, whose D is large, are where a column of no mass could still count."""
    generator = torch.Generator().manual_seed(columns)
    teacher = torch.randn(4, columns, generator=generator)
    student = torch.randn(4, columns, generator=generator)
    student[1] -= 150 * torch.rand(columns, generator=generator)
    teacher[2] += 150 * torch.rand(columns, generator=generator)
    student[3] += 3000
    found = []
    for dtype in (torch.float32, torch.float64, torch.float32):
        memory = torch.full((4, columns + 5), math.nan, dtype=dtype)
        view = memory[:, 2 : columns + 2].copy_(student).requires_grad_()
        if found:
            value = textbook(view, teacher.to(dtype), divergence, 0.5, 1.0, 1.0)
        else:
            value = fd.logit_loss(view, teacher, divergence=divergence, reduction="none", backend="cpu")
        found.append((value.detach(), torch.autograd.grad(value.sum(), view)[0]))
    for ours, truth, eager in zip(*found, strict=True):
        assert torch.equal(ours.isfinite(), truth.isfinite())
        unit = torch.ones(1)  # what a row of probabilities is measured by: a float32 holds no 1e-40
        ours, truth, eager = (torch.cat((unit, x[truth.isfinite()].double())) for x in (ours, truth, eager))
        # The student's softmax is exp of a sum with D, which is up to 150 here: rounded at 2^-24 * 150 = 9e-6.
        assert error(ours, truth) <= 2 * error(eager, truth) + EXACT_VALUE


def maps(dtype: torch.dtype, kind: str, causal: bool, noise: float) -> list[torch.Tensor]:
    """Rows and gradients of attention_loss, with padding, grouped keys and sizes that no tile divides."""
    torch.manual_seed(0)
    teacher = [torch.randn(2, heads, 150, 20) for heads in (4, 2)]
    q, k = ((x + noise * torch.randn_like(x)).to(dtype).requires_grad_() for x in teacher)
    mask = torch.rand(2, 150) > 0.2
    options = {"kind": kind, "causal": causal, "mask": mask, "reduction": "none", "backend": "cpu"}
    rows = fd.attention_loss(q, k, *(x.to(dtype) for x in teacher), **options)
    return [rows.detach(), *torch.autograd.grad(rows.sum(), (q, k))]


@pytest.mark.parametrize("noise", [1e-2, 1.0, 20.0])  # exact difference, plain difference, rows far apart
@pytest.mark.parametrize(("kind", "causal"), [("prob_mse", True), ("prob_kl", False), ("score_mse", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_instruction_sets_agree_on_attention(
    restored: None, dtype: torch.dtype, kind: str, causal: bool, noise: float
) -> None:
    """Sums run in another order; where rows are saturated, a digit or two of prob_mse's gradient are rounding."""
    _C.use_isa("generic")
    expected = maps(dtype, kind, causal, noise)
    loose = 100 if noise > 1 else 4
    for isa in _C.isas():
        _C.use_isa(isa)
        for found, want in zip(maps(dtype, kind, causal, noise), expected, strict=True):
            assert found.isfinite().all()
            assert (
                error(found, want)
                <= loose * SLACK[torch.float32 if dtype == torch.bfloat16 and found.dtype != dtype else dtype]
            )


@pytest.mark.parametrize("length", [21, 100])  # tiles, and for score_mse the low-rank form
@pytest.mark.parametrize("sizes", [(16, 16), (20, 24)], ids=str)
@pytest.mark.parametrize("kind", ["prob_mse", "prob_kl", "score_mse"])
def test_every_instruction_set_is_exact_in_another_basis(
    restored: None, kind: str, sizes: tuple[int, int], length: int
) -> None:
    tensors = near_scores(sizes, length, 1, 1e-3)
    truth = outcome(lambda *x: attention_textbook(*x, kind, None, False), [x.double() for x in tensors])
    for isa in _C.isas():
        _C.use_isa(isa)
        judge_exact(outcome(lambda *x: fd.attention_loss(*x, kind=kind), tensors), truth, torch.float32)


@pytest.mark.parametrize("kind", ["prob_mse", "prob_kl", "score_mse"])
def test_the_number_of_threads_changes_nothing_in_attention(restored: None, kind: str) -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(maps(torch.float32, kind, False, 1.0))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))
