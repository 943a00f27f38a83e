"""uld_loss and linear_uld_loss: sorted probabilities against the formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE
from held import MIB, held_mib
from judge import Outcome, judge, judge_exact
from test_logit import DTYPES, F64, outcome
from torch import Tensor
from torch.nn.functional import linear, pad

import fastdistil as fd

F32 = torch.float32
WIDTHS = [(300, 200), (200, 300), (257, 257), (1, 5), (5, 1), (1, 1)]


def formula(s: Tensor, t: Tensor, t_s: float = 1.0, t_t: float = 1.0) -> Tensor:
    """The rows' values as one writes them; ties in the order of the columns."""
    p, q = (s / t_s).softmax(-1), (t / t_t).softmax(-1)
    order = s.sort(stable=True, dim=-1, descending=True).indices
    p, q = p.gather(-1, order), q.sort(-1, descending=True).values
    width = max(p.shape[-1], q.shape[-1])
    return (pad(p, (0, width - p.shape[-1])) - pad(q, (0, width - q.shape[-1]))).abs().sum(-1)


def draw(rows: int, widths: tuple[int, int], dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    student, teacher = (4 * torch.randn(rows, width, dtype=F64) for width in widths)
    return student.to(DEVICE, dtype), teacher.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_against_the_formula(widths: tuple[int, int], dtype: torch.dtype) -> None:
    student, teacher = draw(5, widths, dtype)
    found = outcome(
        lambda s: fd.uld_loss(s, teacher, temperature=2.0, teacher_temperature=1.5, reduction="none"), student
    )
    truth = outcome(lambda s: formula(s.double(), teacher.double(), 2.0, 1.5), student)
    judge(found, truth, outcome(lambda s: formula(s.float(), teacher.float(), 2.0, 1.5), student), dtype)


@pytest.mark.parametrize(("dtype", "noise"), [(F32, 1e-1), (F32, 1e-3), (F32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_exact_near_convergence(dtype: torch.dtype, noise: float) -> None:
    """A student that is its teacher in another order of columns, but for noise: eager's signs of p - q are lost."""
    teacher = (4 * torch.randn(2, 30_011, dtype=F64)).to(DEVICE, dtype)
    student = teacher.double() + noise * torch.randn(2, 30_011, dtype=F64).to(DEVICE)
    student = student[:, torch.randperm(30_011).to(DEVICE)].to(dtype)
    found = outcome(lambda s: fd.uld_loss(s, teacher, reduction="none"), student)
    judge_exact(found, outcome(lambda s: formula(s.double(), teacher.double()), student), dtype)


@pytest.mark.parametrize("height", [10.0, 20.0, 40.0])
def test_a_confident_student_keeps_its_gradient(height: float) -> None:
    """p = 1 - 1e-17 at most: that column's gradient is the sum of all others'."""
    student, teacher = draw(4, (13, 17))
    student[:, 3] += height
    found = outcome(lambda s: fd.uld_loss(s, teacher, reduction="none"), student)
    truth = outcome(lambda s: formula(s.double(), teacher.double()), student)
    gradient = truth.gradients[0].clone()
    gradient[:, 3] = 0
    gradient[:, 3] = -gradient.sum(-1)
    judge_exact(found, Outcome(truth.value, (gradient,)), F32)


def test_ties() -> None:
    """Equal probabilities on both sides push nothing; equal student logits have one value in any order of columns, and
    gradients that differ by the same order."""
    zeros = torch.zeros(1, 4, device=DEVICE)
    same = outcome(lambda s: fd.uld_loss(s, zeros), zeros)
    assert same.value == 0 and not same.gradients[0].any()
    student = torch.tensor([[1.0, 0.0, 1.0, -1.0]], device=DEVICE)
    teacher = torch.tensor([[2.0, 0.5, 0.0, 0.0]], device=DEVICE)
    order = torch.tensor([2, 3, 0, 1], device=DEVICE)
    first, second = (outcome(lambda s: fd.uld_loss(s, teacher), s) for s in (student, student[:, order]))
    assert torch.equal(first.value, second.value)
    # Rank 0 has p < q, rank 1 p > q: whichever of the two columns comes first is pushed up.
    assert first.gradients[0][0, 0] < 0 < first.gradients[0][0, 2]
    assert torch.equal(first.gradients[0][:, [2, 3, 0, 1]][:, [2, 1, 0, 3]], second.gradients[0])


def test_columns_that_nobody_has() -> None:
    """-inf is a probability of 0, which is what the shorter row is continued with."""
    student, teacher = draw(3, (20, 30))
    longer = pad(student, (2, 8), value=-torch.inf)
    found = outcome(lambda s: fd.uld_loss(s, pad(teacher, (5, 0), value=-torch.inf), reduction="none"), longer)
    wanted = outcome(lambda s: fd.uld_loss(s, teacher, reduction="none"), student)
    judge_exact(Outcome(found.value, (found.gradients[0][:, 2:-8],)), wanted, F32)
    assert not found.gradients[0][:, :2].any() and not found.gradients[0][:, -8:].any()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_broken_row_is_seen(side: str) -> None:
    student, teacher = draw(3, (20, 30))
    (student if side == "student" else teacher)[1, 2] = torch.nan
    found = outcome(lambda s: fd.uld_loss(s, teacher, reduction="none"), student)
    assert found.value.isnan().tolist() == found.gradients[0].isnan().all(-1).tolist() == [False, True, False]


def test_factors() -> None:
    """Of a row's probabilities, as TRL's GOLD has them; the student's has a gradient."""
    student, teacher = draw(6, (40, 50), F64)
    own, other = torch.rand(6, dtype=F64, device=DEVICE), torch.rand(6, dtype=F64, device=DEVICE)

    def plain(s: Tensor, factor: Tensor) -> Tensor:
        p, q = (x.softmax(-1).sort(-1, descending=True).values for x in (s, teacher))
        return (pad(p * factor[:, None], (0, 10)) - q * other[:, None]).abs().sum(-1).mean()

    def ours(s: Tensor, factor: Tensor) -> Tensor:
        return fd.uld_loss(s, teacher, student_factor=factor, teacher_factor=other)

    found, truth = (_of(function, student, own) for function in (ours, plain))
    judge(found, truth, truth, F64)


def _of(function: Any, *inputs: Tensor) -> Outcome:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return Outcome(value.detach(), torch.autograd.grad(value.sum(), leaves))


@pytest.mark.parametrize("chunk_bytes", [1, 10_000, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_heads(dtype: torch.dtype, chunk_bytes: int | None) -> None:
    shapes = ((13, 7), (83, 7), (83,), (13, 9), (70, 9), (70,))
    h_s, w_s, b_s, h_t, w_t, b_t = (torch.randn(*shape, dtype=F64).to(DEVICE, dtype) for shape in shapes)
    weight = torch.arange(13, device=DEVICE) % 4
    options: dict[str, Any] = {"student_logit_scale": 1.5, "student_softcap": 5.0, "teacher_softcap": 4.0}

    def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fd.linear_uld_loss(
            h, w, h_t, w_t, student_bias=b, teacher_bias=b_t, weight=weight, chunk_bytes=chunk_bytes, **options
        )

    def plain(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        s, t = (
            5 * torch.tanh(1.5 * linear(h, w, b) / 5),
            4 * torch.tanh(linear(*(x.to(h) for x in (h_t, w_t, b_t))) / 4),
        )
        return (formula(s, t) * weight).sum() / weight.sum()

    wide = _of(plain, *(x.double() for x in (h_s, w_s, b_s)))
    judge(_of(ours, h_s, w_s, b_s), wide, _of(plain, h_s, w_s, b_s), dtype)


def test_memory_is_the_gradient_and_a_few_rows(tmp_path: Path) -> None:
    """Eager holds both softmaxes, both sorted, the permutations, the difference and their gradients."""
    student, teacher = torch.randn(64, 30_000, requires_grad=True), torch.randn(64, 32_000)
    gradient = student.numel() * 4 / MIB
    ours = held_mib(lambda: fd.uld_loss(student, teacher).backward(), tmp_path / "ours.json")
    student.grad = None
    eager = held_mib(lambda: formula(student, teacher).sum().backward(), tmp_path / "eager.json")
    assert gradient <= ours < gradient + 18 < 0.5 * eager


def test_memory_of_two_heads_is_a_chunk(tmp_path: Path) -> None:
    hidden, head = torch.randn(256, 8, requires_grad=True), torch.randn(30_000, 8)
    other = torch.randn(256, 8), torch.randn(32_000, 8)
    found = held_mib(
        lambda: fd.linear_uld_loss(hidden, head, *other, chunk_bytes=4 * MIB).backward(), tmp_path / "trace.json"
    )
    assert found < 4 + 18 < 256 * 30_000 * 4 / MIB


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"student_logits": [1.0]}, TypeError, "student_logits is list, expected a torch.Tensor"),
        ({"student_logits": torch.ones(2, 3).int()}, TypeError, "student_logits has dtype torch.int32"),
        ({"student_logits": torch.ones(2, 0)}, ValueError, r"student_logits has shape \(2, 0\), expected \(\.\.\., V\)"),
        ({"teacher_logits": torch.ones(3, 4)}, ValueError, r"teacher_logits has shape \(3, 4\), expected \(2, V_t\)"),
        ({"teacher_logits": torch.ones(2, 4, requires_grad=True)}, ValueError, "teacher_logits requires grad"),
        ({"temperature": 0}, ValueError, "temperature is 0.0, expected more than 0"),
        ({"teacher_temperature": -1}, ValueError, "teacher_temperature is -1.0, expected more than 0"),
        ({"student_factor": torch.ones(3)}, ValueError, r"student_factor has shape \(3,\), expected \(2,\)"),
        ({"student_factor": torch.ones(2).int()}, TypeError, "student_factor has dtype torch.int32"),
        ({"teacher_factor": torch.ones(2, requires_grad=True)}, ValueError, "teacher_factor requires grad"),
        ({"weight": torch.ones(3)}, ValueError, r"weight has shape \(3,\), expected \(2,\)"),
        ({"backend": "cpu"}, ValueError, "backend 'cpu' has no uld kernels"),
    ],
)  # fmt: skip
def test_bad_calls(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fd.uld_loss(**{"student_logits": torch.ones(2, 3), "teacher_logits": torch.ones(2, 4), **change})


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"student_weight": torch.ones(5, 4)}, ValueError, r"student_weight has shape \(5, 4\), expected \(V, 3\)"),
        ({"teacher_hidden": torch.ones(1, 6)}, ValueError, r"teacher_hidden has shape \(1, 6\), expected \(2, D_t\)"),
        ({"teacher_weight": torch.ones(7, 6, requires_grad=True)}, ValueError, "teacher_weight requires grad"),
        ({"teacher_bias": torch.ones(6)}, ValueError, r"teacher_bias has shape \(6,\), expected \(7,\)"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes is 0, expected a whole number of bytes"),
        ({"student_softcap": -1}, ValueError, "student_softcap is -1.0, expected more than 0"),
    ],
)
def test_bad_heads(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"student_hidden": torch.ones(2, 3), "student_weight": torch.ones(5, 3)}
    given |= {"teacher_hidden": torch.ones(2, 6), "teacher_weight": torch.ones(7, 6)}
    with pytest.raises(kind, match=message):
        fd.linear_uld_loss(**given | change)
