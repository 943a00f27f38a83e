"""linear_logit_loss: logits of two heads, every backend, divergence and dtype, against autograd in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from conftest import DEVICE, available
from judge import EXACT_VALUE, SLACK, Outcome, error, judge, judge_exact
from test_logit import textbook
from torch import Tensor
from torch.nn import functional

import fastdistil as fd
from fastdistil.contracts.logit import DIVERGENCES
from fastdistil.ops import linear_mse
from fastdistil.ops.linear_logit import linear_logit_rows, linear_logit_total
from fastdistil.ops.logit_terms import chunk_rows, pack

BACKENDS = available("reference", "cpu", "triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# N, D_s, D_t, V and biases: several chunks of odd size, one row, no rows, equal widths
SHAPES = {
    "wider teacher": (13, 12, 20, 101, True),
    "equal widths": (7, 16, 16, 67, False),
    "one row": (1, 3, 5, 7, True),
    "no rows": (0, 8, 8, 9, False),
}


def draw(shape: tuple[int, int, int, int, bool], dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """student hidden, weight (and bias); the teacher's as keywords."""
    rows, size_s, size_t, columns, biased = shape

    def random(*sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*sizes, dtype=torch.float64)).to(DEVICE, dtype)

    student = [random(rows, size_s), random(columns, size_s, scale=2 / size_s**0.5)]
    teacher = {
        "teacher_hidden": random(rows, size_t),
        "teacher_weight": random(columns, size_t, scale=2 / size_t**0.5),
        "teacher_bias": random(columns) if biased else None,
    }
    return student + [random(columns)] * biased, teacher


def weights(rows: int) -> Tensor:
    weight = torch.arange(1.0, rows + 1, device=DEVICE)
    weight[1::4] = 0
    return weight


def ours(hidden: Tensor, matrix: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    teacher = (options.pop("teacher_hidden"), options.pop("teacher_weight"))
    return fd.linear_logit_loss(hidden, matrix, *teacher, student_bias=bias, **options)


def plain(
    hidden: Tensor,
    matrix: Tensor,
    bias: Tensor | None = None,
    *,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    weight: Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
) -> Tensor:
    """The weighted mean by whole logits."""
    t_t = teacher_temperature or temperature
    z_s = functional.linear(hidden, matrix, bias)
    z_t = functional.linear(teacher_hidden, teacher_weight, teacher_bias)
    rows = textbook(z_s, z_t, divergence, beta, temperature, t_t) * temperature * t_t
    w = torch.ones_like(rows) if weight is None else weight.to(rows.dtype)
    return (w * rows).sum() / w.sum().clamp(min=1e-30)


def widened(options: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}


def outcome(function: Any, inputs: list[Tensor], factor: float = 1.0) -> Outcome:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    return Outcome(value.detach(), torch.autograd.grad(value, inputs, torch.full_like(value, factor)))


@pytest.mark.pairs(3, "divergence", "shape", "dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_textbook(backend: str, divergence: str, shape: Any, dtype: torch.dtype) -> None:
    inputs, teacher = draw(shape, dtype)
    options = teacher | {"divergence": divergence, "temperature": 2.0, "weight": weights(shape[0])}
    options |= {"teacher_temperature": 1.5} if divergence == "jsd" else {}
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match="backend is 'triton', which has no float64 kernel"):
            ours(*inputs, backend=backend, **options)
        return
    factor = 64.0  # keeps float16's gradients in its range
    truth = outcome(partial(plain, **widened(options)), [x.double() for x in inputs], factor)
    eager = outcome(partial(plain, **options), inputs, factor)
    small = 5 * 4 * 2 * 112  # chunks of five rows, three of them in the longest case
    found = outcome(partial(ours, backend=backend, chunk_bytes=small, **options), inputs, factor)
    judge(found, truth, eager, dtype)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("backend", available("reference", "cpu", "cuda"))
def test_16_bit_heads_near_convergence(backend: str, divergence: str) -> None:
    """KL about 1e-3, where logits of 16 bits are 8 to 140% off: within 0.5% after the gradients' rounding (judge_exact)
    and 0.1% before, which reduction in float32 shows."""
    rows, size, columns = 64, 256, 16_000
    teacher_hidden = torch.randn(rows, size, device=DEVICE).bfloat16()
    teacher_weight = (0.1 * torch.randn(columns, size, device=DEVICE)).bfloat16()
    hidden = (teacher_hidden + 0.03 * torch.randn_like(teacher_hidden)).bfloat16()
    options: dict[str, Any] = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "teacher_bias": None}
    inputs, common = [hidden, teacher_weight.clone()], {"divergence": divergence}
    truth = outcome(partial(plain, **widened(options), **common), [x.double() for x in inputs])
    assert 1e-4 < truth.value < 4e-3
    found = outcome(partial(ours, backend=backend, **options, **common), inputs)
    judge_exact(Outcome(truth.value, found.gradients), truth, torch.bfloat16)
    assert error(found.value, truth.value) <= SLACK[torch.bfloat16] / 4
    scale = torch.full((rows,), 1 / rows, device=DEVICE)
    constants = pack((DIVERGENCES.index(divergence), 0.5, 1.0, 1.0, 1.0), (1.0, 0.0, 1.0, 0.0))
    terms = (scale, None, None, None, constants, False)
    heads = (*inputs, None, teacher_hidden, teacher_weight, None)
    _, _, *kept = linear_logit_total.op(*heads, *terms, 1 << 21, backend, True, "", [True, True, False], False)
    for gradient, wanted in zip(kept[:2], truth.gradients, strict=True):
        assert gradient.dtype == torch.float32 and error(gradient, wanted) <= 1e-3


@pytest.mark.parametrize("noise", [1e-1, 1e-3])
@pytest.mark.parametrize("widths", [(64, 64), (48, 64)], ids=["equal", "unequal"])
@pytest.mark.parametrize("biased", [False, True])
def test_mse_without_logits_is_exact(biased: bool, widths: tuple[int, int], noise: float) -> None:
    """Value within 1e-5 of float64 however near; a float32 form of the whole logits would lose its digits."""
    rows, columns = 2000, 1500
    inputs, teacher = draw((rows, *widths, columns, biased), torch.float32)
    teacher["teacher_hidden"][:, : widths[0]] = inputs[0]
    teacher["teacher_hidden"][:, widths[0] :] = 0
    teacher["teacher_weight"][:, : widths[0]] = inputs[1]
    if biased:
        teacher["teacher_bias"] = inputs[2] + 0
    inputs = [x * (1 + noise * torch.randn_like(x)) for x in inputs]
    options = teacher | {"divergence": "mse", "temperature": 2.0}
    assert linear_mse.pays(inputs[0], inputs[1], teacher["teacher_hidden"], (True, True, biased))
    truth = outcome(partial(plain, **widened(options)), [x.double() for x in inputs])
    judge_exact(outcome(partial(ours, **options), inputs), truth, torch.float32)


@pytest.mark.parametrize("trained", [True, False], ids=["trained heads", "frozen heads"])
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
def test_mse_without_logits_is_exact_in_another_basis(noise: float, trained: bool) -> None:
    """The logits are alike but no factor is, as where a student learns from scratch at its teacher's width."""
    inputs, teacher = draw((2000, 64, 64, 1500, True), torch.float32)
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, device=DEVICE)).Q
    inputs[0], inputs[1] = ((teacher[f"teacher_{x}"].double() @ basis).float() for x in ("hidden", "weight"))
    inputs = [x * (1 + noise * torch.randn_like(x)) for x in (*inputs[:2], teacher["teacher_bias"])]
    options, count = teacher | {"divergence": "mse"}, 3 if trained else 1
    linear_mse.forget()
    assert linear_mse.pays(inputs[0], inputs[1], teacher["teacher_hidden"], (True, trained, trained))
    heads, wide = inputs[count:], [x.double() for x in inputs]
    truth = outcome(lambda *x: plain(*x, *wide[count:], **widened(options)), wide[:count])
    for _ in range(2):  # the second finds both float32's and float64's Gram matrices
        judge_exact(outcome(lambda *x: ours(*x, *heads, **options), inputs[:count]), truth, torch.float32)
    linear_mse.forget()


def test_mse_of_heads_of_inference_mode() -> None:
    """They have no version that would tell of a change: nothing of them is kept."""
    inputs, teacher = draw((50, 16, 16, 400, True), torch.float32)
    linear_mse.forget()
    for factor in (1.0, 2.0):
        with torch.inference_mode():
            heads = [x * factor for x in inputs]
            options = {name: x * factor for name, x in teacher.items()} | {"divergence": "mse"}
            found = ours(*heads, **options)
        truth = plain(*(x.double() for x in heads), **widened(options))
        assert error(found, truth) <= EXACT_VALUE
    assert heads[1] not in linear_mse._frozen


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("widths", [(48, 48), (48, 64)], ids=["equal", "unequal"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained heads", "frozen heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mse_without_logits_under_another_default_dtype(
    dtype: torch.dtype, trained: bool, widths: tuple[int, int]
) -> None:
    inputs, teacher = draw((2000, *widths, 1500, True), dtype)
    linear_mse.forget()
    options = teacher | {"divergence": "mse"}
    count = 3 if trained else 1  # hidden states, weight, bias
    assert linear_mse.pays(inputs[0], inputs[1], teacher["teacher_hidden"], (True, trained, trained))
    heads, wide = inputs[count:], [x.double() for x in inputs]
    truth = outcome(lambda *x: plain(*x, *wide[count:], **widened(options)), wide[:count])
    for _ in range(2):  # frozen heads' Gram matrices are kept from the first
        found = outcome(lambda *x: ours(*x, *heads, **options), inputs[:count])
        assert found.value.dtype == torch.float32
        judge_exact(found, truth, dtype)


def test_mse_of_frozen_heads_keeps_the_gram_matrices() -> None:
    """They are used again, and never after a head has changed, whichever way it was written to."""
    inputs, teacher = draw((50, 16, 16, 400, True), torch.float32)
    hidden, (matrix, bias) = inputs[0], inputs[1:]
    linear_mse.forget()

    def check() -> None:
        options = teacher | {"divergence": "mse"}
        truth = outcome(lambda h: plain(h, matrix.double(), bias.double(), **widened(options)), [hidden.double()])
        judge_exact(outcome(lambda h: ours(h, matrix, bias, **options), [hidden]), truth, torch.float32)

    check()
    (kept,) = linear_mse._frozen[matrix].values()
    check()
    assert list(linear_mse._frozen[matrix].values()) == [kept]
    changes = [lambda: matrix.add_(1.0), lambda: teacher["teacher_weight"].mul_(2.0), lambda: bias.zero_()]
    changes += [lambda: matrix.data.mul_(0.5), lambda: teacher["teacher_bias"].data.add_(1.0)][
        : 2 * (DEVICE.type == "cpu")
    ]
    for change in changes:
        change()
        check()
    linear_mse.forget()


@pytest.mark.parametrize("divergence", ["forward_kl", "mse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_and_what_needs_a_gradient(backend: str, divergence: str) -> None:
    inputs, teacher = draw(SHAPES["equal widths"], torch.float32)
    weight = weights(SHAPES["equal widths"][0])
    common: dict[str, Any] = teacher | {"backend": backend, "weight": weight, "divergence": divergence}
    mean, items = outcome(partial(ours, **common), inputs), float(weight.sum())
    rows = ours(*inputs, reduction="none", **common)
    assert rows.shape == weight.shape and not rows[weight == 0].any()
    others = [
        lambda *x: ours(*x, reduction="sum", **common) / items,
        lambda *x: (ours(*x, reduction="none", **common) / items).sum(),
        lambda *x: ours(*x, num_items=torch.tensor(items, device=DEVICE), **common),
        lambda *x: ours(*x, num_items=2 * items, **common) * 2,
        lambda h, w: ours(
            h[None], w, **(common | {"teacher_hidden": teacher["teacher_hidden"][None], "weight": weight[None]})
        ),
    ]
    for other in others:
        judge_exact(outcome(other, inputs), mean, torch.float32)
    for i, wanted in enumerate(mean.gradients):  # one side at a time
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        value = ours(*leaves, **common)
        assert error(torch.autograd.grad(value, leaves[i])[0], wanted) <= SLACK[torch.float32]
    with torch.no_grad():
        assert error(ours(*inputs, **common), mean.value) <= SLACK[torch.float32]


def test_autocast_does_not_round_the_logits() -> None:
    inputs, teacher = draw(SHAPES["wider teacher"], torch.float32)
    expected = outcome(partial(ours, **teacher), inputs)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = outcome(partial(ours, **teacher), inputs)
    assert torch.equal(found.value, expected.value)
    assert all(torch.equal(a, b) for a, b in zip(found.gradients, expected.gradients, strict=True))


def test_dtypes_may_differ() -> None:
    inputs, teacher = draw(SHAPES["wider teacher"], torch.float32)
    low = {k: v.half() for k, v in teacher.items()}
    mixed = [inputs[0].bfloat16(), *inputs[1:]]
    found = outcome(partial(ours, **low), mixed)
    expected = outcome(partial(ours, **{k: v.float() for k, v in low.items()}), [mixed[0].float(), *inputs[1:]])
    assert error(found.value, expected.value) <= SLACK[torch.float32]
    assert [g.dtype for g in found.gradients] == [torch.bfloat16, torch.float32, torch.float32]


def test_opcheck() -> None:
    inputs, teacher = draw((4, 3, 5, 9, True), torch.float32)
    scale = torch.rand(4, device=DEVICE)
    hidden, matrix, bias = (x.requires_grad_() for x in inputs)
    heads = (hidden, matrix, bias, *teacher.values())
    terms = (scale, torch.tensor([3, 0, 8, 1], device=DEVICE), torch.rand(4, device=DEVICE))
    vocab_map = torch.tensor([2, -1, 0, 3, 4, 8, 8, -1, 1], device=DEVICE)
    constants = pack((0, 0.5, 2.0, 2.0, 4.0), (0.5, 30.0, 1.0, 0.0))
    arguments = (*heads, *terms, vocab_map, constants, True, 1 << 20, "auto", False, "")
    torch.library.opcheck(linear_logit_rows.op, arguments)
    torch.library.opcheck(linear_logit_total.op, (*arguments, [True, True, True], False))
    torch.library.opcheck(linear_logit_total.op, (*arguments, [True, False, False], True))


def test_a_chunk_fits_in_its_bytes() -> None:
    for rows, columns, size, allowed in ((512, 119_547, 4, 124_000_000), (5, 10, 4, 1), (4096, 32_000, 8, 10**8)):
        step = chunk_rows(rows, columns, size, allowed)
        assert 1 <= step <= rows and (step == 1 or 2 * step * columns * size <= allowed)
    assert chunk_rows(512, 119_547, 4, 124_000_000) == 128


_PEAK = """
import torch, fastdistil as fd
torch.manual_seed(0)
torch.set_num_threads(1)
heads = [torch.randn(256, 64), torch.randn(60_001, 64), torch.randn(256, 96), torch.randn(60_001, 96)]
def run(n):
    h, w = heads[0][:n].requires_grad_(), heads[1].requires_grad_()
    loss = fd.linear_logit_loss(h, w, heads[2][:n], heads[3], chunk_bytes=8_000_000)
    return torch.autograd.grad(loss, (h, w))
run(16)
open("/proc/self/clear_refs", "w").write("5")
status = lambda key: int(next(x for x in open("/proc/self/status") if x.startswith(key)).split()[1]) * 1024
before = status("VmRSS")
gradients = run(256)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")
def test_memory_is_the_gradients_and_a_chunk() -> None:
    """Eager keeps 256 x 60,001 logits four times over: 246 MB."""
    peak = int(subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True).stdout)
    gradients = 4 * (60_001 * 64 + 256 * 64)
    assert peak <= gradients + 8_000_000 + 6_000_000, f"{peak:,} bytes"


HEADS = (torch.zeros(4, 3), torch.zeros(9, 3), torch.zeros(4, 5), torch.zeros(9, 5))
BAD = [
    (0, torch.zeros(4, 3, dtype=torch.int64), {}, TypeError, "student_hidden has dtype torch.int64"),
    (0, [1.0], {}, TypeError, "student_hidden is list, expected a torch.Tensor"),
    (0, torch.zeros(()), {}, ValueError, r"student_hidden has shape \(\), expected \(..., D\)"),
    (
        1,
        torch.zeros(9, 4),
        {},
        ValueError,
        r"student_weight has shape \(9, 4\), expected \(V, 3\) to match student_hidden",
    ),
    (
        1,
        torch.zeros(8, 3),
        {},
        ValueError,
        r"teacher_weight has shape \(9, 5\), expected \(8, D_t\) to match student_weight",
    ),
    (
        1,
        torch.zeros(9, 3, device="meta"),
        {},
        ValueError,
        "student_weight is on meta, expected .* to match student_hid",
    ),
    (
        2,
        torch.zeros(4, 5, device="meta"),
        {},
        ValueError,
        "teacher_weight is on .*, expected meta to match teacher_hid",
    ),
    (
        3,
        torch.zeros(9, 5, device="meta"),
        {},
        ValueError,
        "teacher_weight is on meta, expected .* to match teacher_hid",
    ),
    (2, torch.zeros(2, 2, 5), {}, ValueError, r"teacher_hidden has shape \(2, 2, 5\), expected \(4, D_t\)"),
    (3, torch.zeros(9, 5, requires_grad=True), {}, ValueError, "teacher_weight requires grad, expected a constant"),
    (0, None, {"student_bias": torch.zeros(8)}, ValueError, r"student_bias has shape \(8,\), expected \(9,\)"),
    (0, None, {"chunk_bytes": 0}, ValueError, "chunk_bytes is 0, expected a whole number of bytes"),
    (0, None, {"chunk_bytes": 1e6}, ValueError, "chunk_bytes is 1000000.0, expected a whole number"),
    (0, None, {"divergence": "kl"}, ValueError, "divergence is 'kl', expected one of"),
    (0, None, {"temperature": 0}, ValueError, "temperature is 0.0, expected more than 0"),
    (0, None, {"beta": 1.0, "divergence": "jsd"}, ValueError, "beta is 1.0 for jsd"),
    (0, None, {"weight": torch.ones(5)}, ValueError, r"weight has shape \(5,\)"),
]


@pytest.mark.parametrize(("position", "value", "options", "kind", "message"), BAD)
def test_bad_calls(position: int, value: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    heads: list[Any] = [x.to(DEVICE) for x in HEADS]
    if value is not None:
        moves = isinstance(value, Tensor) and value.device.type != "meta"
        heads[position] = value.to(DEVICE) if moves else value
    with pytest.raises(kind, match=message):
        fd.linear_logit_loss(*heads, **options)
