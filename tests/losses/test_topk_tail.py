"""topk_logit_loss and linear_topk_logit_loss: the tail's mass, handed in or not.

Values are stored in float32 or 16 bits, so 1 - sum q_k has no digits where it is small; the logarithm of the tail's mass,
stored beside them, has. Truth is 50-digit arithmetic on the very numbers that the loss gets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import DEVICE, available
from judge import EXACT_VALUE, SMALLEST, Outcome, error, judge_exact
from test_logit import F64, outcome
from topk_cases import digits, known
from torch import Tensor

import fastdistil as fd
from fastdistil.contracts.logit import DIVERGENCES

BACKENDS = available("reference", "cpu", "triton")
CASES = [*(("bucket", d) for d in DIVERGENCES if d != "mse"), ("zero", "forward_kl")]

# 2^-24 max(1, sum q |log q|) for float32; 16-bit values were rounded from a sum in float32.
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, F64: 2.0**-53}


def tail_of(teacher: Tensor, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    z = teacher.double()
    return (z.scatter(-1, indices, -math.inf).logsumexp(-1) - z.logsumexp(-1)).to(dtype)


def loss(s: Tensor, teacher: tuple[Tensor, Tensor, Tensor | None], **options: Any) -> Tensor:
    """The rows."""
    values, indices, rest = teacher
    return fd.topk_logit_loss(s, values, indices, teacher_tail=rest, reduction="none", **options)


def head_loss(s: Tensor, teacher: tuple[Tensor, Tensor, Tensor], **options: Any) -> Tensor:
    """The same of a head whose product is exact."""
    values, indices, rest = teacher
    head = torch.eye(s.shape[-1], device=DEVICE, dtype=s.dtype)
    return fd.linear_topk_logit_loss(s, head, values, indices, teacher_tail=rest, reduction="none", **options)


# The teacher's tail is 1.7e-9, its stored values sum to more than 1.
TEACHER = torch.tensor([[7.915477752685547, 6.601404666900635, 7.403347015380859, -11.580986976623535]])
STUDENT = torch.tensor([[8.015478134155273, 6.501404762268066, 7.453347206115723, -11.380987167358398]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tail_below_the_rounding_of_the_values(backend: str) -> None:
    student, teacher = STUDENT.to(DEVICE), TEACHER.to(DEVICE)
    values, indices = teacher.log_softmax(-1).topk(3)
    assert values.double().exp().sum() > 1
    options = {"divergence": "reverse_kl", "backend": backend}
    tail = tail_of(teacher, indices)
    found = outcome(partial(loss, teacher=(values, indices, tail), **options), student)
    assert found.value.item() == pytest.approx(2.114217e-3, rel=EXACT_VALUE)
    rest = tail_of(teacher, indices, F64)
    judge_exact(found, digits(student, values, indices, "bucket", "reverse_kl", rest), torch.float32)
    without = outcome(partial(loss, teacher=(values, indices, None), **options), student)
    judge_exact(without, digits(student, values, indices, "bucket", "reverse_kl"), torch.float32)
    # As docs/losses.md says: the floor f for the tail q_r costs p_r log(f / q_r) + f.
    p_rest, floor = student.double().softmax(-1)[0, 3].item(), 2.0**-24 * 1.2
    allowed = p_rest * (math.log(floor) - rest.item()) + floor
    assert abs(without.value.item() - 2.114217e-3) < allowed < 1e-6


@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("top", [0.3, 1 - 1e-7])
def test_the_floor_is_the_rounding_of_the_values(top: float, dtype: torch.dtype) -> None:
    """A teacher that says nothing of its tail, 3 of 5 columns: its values alone sum to 1 and more."""
    others = torch.tensor([0.6, 0.4], dtype=F64) * (1 - top)
    values = torch.cat((torch.tensor([top], dtype=F64), others)).log().to(dtype)[None]
    values[:, 1] += 0.01 * values[:, 1].abs() if top == 0.3 else 0  # sum q_k > 1
    indices, student = torch.tensor([[0, 1, 2]], device=DEVICE), torch.tensor([[2.0, 0.5, 0.1, -1.0, -3.0]], dtype=F64)
    u = values[0].double()
    stored = 1 - u.exp().sum()
    floor = max(UNITS[dtype] * (u.exp() * u.abs()).sum().item(), min(UNITS[dtype], 2.0**-24))
    rest = torch.tensor([max(stored.item(), floor)], dtype=F64).log()
    for backend in available("reference", "cpu"):
        for divergence in ("forward_kl", "reverse_kl"):
            teacher = (values.to(DEVICE), indices, None)
            found = outcome(partial(loss, teacher=teacher, divergence=divergence, backend=backend), student.to(DEVICE))
            judge_exact(found, digits(student, values, indices, "bucket", divergence, rest), F64)


@pytest.mark.parametrize(("k", "std", "dtype"), [(1024, 8.0, torch.float32), (64, 8.0, torch.bfloat16), (2999, 20.0, torch.float16)])  # fmt: skip
@pytest.mark.parametrize("backend", available("reference", "cpu"))
def test_ordinary_stored_teachers_are_never_infinite(backend: str, k: int, std: float, dtype: torch.dtype) -> None:
    logits = std * torch.randn(64, 3000, device=DEVICE)
    student = logits + 0.1 * torch.randn(64, 3000, device=DEVICE)
    values, indices = logits.log_softmax(-1).topk(k)
    values = values.to(dtype)
    assert (values.double().exp().sum(-1) >= 1).any()
    for divergence in (d for d in DIVERGENCES if d != "mse"):
        teacher = (values, indices, None)
        found = outcome(partial(loss, teacher=teacher, divergence=divergence, backend=backend), student)
        assert found.value.isfinite().all() and found.gradients[0].isfinite().all()


def stored(columns: int, k: int, top: float, std: float, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student (1, V), and a teacher's values, indices and tail in float32: `top` is the probability of one column."""
    z = std * torch.randn(1, columns, dtype=F64)
    z[0, 3] = -math.inf
    z[0, 3] = z.logsumexp(-1) + math.log(top) - math.log1p(-top)
    student = (z + noise * torch.randn(1, columns, dtype=F64)).float().to(DEVICE)
    values, indices = known(z.to(DEVICE), k, dtype=torch.float32)
    return student, values, indices, tail_of(z.to(DEVICE), indices)


@pytest.mark.parametrize("top", [0.3, 1 - 1e-7])
@pytest.mark.parametrize("noise", [1e-3, 1.0])
@pytest.mark.parametrize(("tail", "divergence"), CASES)
def test_exact_with_a_tail(tail: str, divergence: str, noise: float, top: float) -> None:
    for std, k in ((1.0, 5), (8.0, 12)):
        student, values, indices, rest = stored(13, k, top, std, noise)
        truth = digits(student, values, indices, tail, divergence, rest)
        for backend in BACKENDS:
            options: dict[str, Any] = {"tail": tail, "divergence": divergence, "beta": 0.3, "backend": backend}
            found = outcome(partial(loss, teacher=(values, indices, rest), **options), student)
            judge_exact(found, truth, torch.float32)
            linear = outcome(partial(head_loss, teacher=(values, indices, rest.double()), **options), student)
            judge_exact(linear, truth, torch.float32)


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d not in ("mse", "forward_kl")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_sure_of_what_its_teacher_does_not_favour(backend: str, divergence: str) -> None:
    """The gradient at that outcome, a named column or the tail, is the sum of the others', not a rounded difference."""
    for column in (1, 9):
        student = torch.tensor([[0.3, -1.2, 0.7, 0.1, 2.0, -0.4, 0.2, 1.1, -2.0, 0.5]])
        student[0, column] = 19.0
        values, indices = torch.randn(1, 10).log_softmax(-1)[:, :6], torch.arange(6)[None]
        truth = digits(student, values, indices, "bucket", divergence)
        teacher = (values.to(DEVICE), indices.to(DEVICE), None)
        options: dict[str, Any] = {"divergence": divergence, "beta": 0.3, "backend": backend}
        found = outcome(partial(loss, teacher=teacher, **options), student.to(DEVICE))
        judge_exact(found, truth, torch.float32)


@pytest.mark.parametrize("beta", [1 - 1e-4, 1 - 1e-6])
@pytest.mark.parametrize("backend", BACKENDS)
def test_jsd_near_beta_1(backend: str, beta: float) -> None:
    student, values, indices, rest = stored(13, 5, 0.3, 2.0, 0.1)
    truth = digits(student, values, indices, "bucket", "jsd", rest, beta=beta)
    options: dict[str, Any] = {"divergence": "jsd", "beta": beta, "backend": backend}
    judge_exact(outcome(partial(loss, teacher=(values, indices, rest), **options), student), truth, torch.float32)


@pytest.mark.parametrize("tail", ["bucket", "zero"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tail_with_a_vocabulary_map(backend: str, tail: str) -> None:
    """Of the mapped columns, what is known sums to 1; the tail is that of the stored entries, mapped or not. The first
    row's teacher is sure of a column that the student does not have: only the tail's own logarithm tells what is left."""
    teacher = torch.randn(2, 12, dtype=F64, device=DEVICE)
    teacher[0, 2] = 25.0
    values, indices = known(teacher, 5, dtype=F64)
    rest = tail_of(teacher, indices, F64)
    vocab_map = torch.tensor([7, 0, -1, 3, 9, 11, 5, 4, 8], device=DEVICE)
    student = torch.randn(2, 9, device=DEVICE)
    options: dict[str, Any] = {"tail": tail, "vocab_map": vocab_map, "backend": backend}
    found = outcome(partial(loss, teacher=(values, indices, rest), **options), student)
    for row in range(2):
        kept = [(v, (vocab_map == i).nonzero()[0, 0].item()) for v, i in zip(values[row], indices[row], strict=True) if (vocab_map == i).any()]  # fmt: skip
        u, columns = torch.stack([v for v, _ in kept])[None], torch.tensor([[c for _, c in kept]])
        left = torch.cat((u[0], rest[row : row + 1])).logsumexp(-1)
        masked = student[row : row + 1].double().cpu().masked_fill(vocab_map.cpu() < 0, -math.inf)
        truth = digits(masked, (u - left).cpu(), columns, tail, "forward_kl", (rest[row : row + 1] - left).cpu())  # fmt: skip
        judge_exact(Outcome(found.value[row : row + 1], (found.gradients[0][row : row + 1],)), truth, torch.float32)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tail_and_no_entries(backend: str) -> None:
    """-inf: nothing is outside. All columns, or all mapped ones, named: nothing is, whatever the tail says. Rows without
    entries, which padding leaves, say nothing."""
    student, teacher = torch.randn(2, 7, device=DEVICE), torch.randn(2, 7, device=DEVICE)
    options: dict[str, Any] = {"reduction": "none", "backend": backend}
    values, indices = known(teacher, 7, dtype=F64)
    nothing = torch.full((2,), -math.inf, device=DEVICE)
    whole = fd.topk_logit_loss(student, values, indices, divergence="reverse_kl", **options)
    assert torch.equal(whole, fd.topk_logit_loss(student, values, indices, teacher_tail=nothing, divergence="reverse_kl", **options))  # fmt: skip
    assert whole.isfinite().all()
    assert error(whole, fd.logit_loss(student, teacher, divergence="reverse_kl", **options)) < EXACT_VALUE
    five = (values[:, :5].log_softmax(-1), indices[:, :5])
    assert fd.topk_logit_loss(student, *five, teacher_tail=nothing, divergence="reverse_kl", **options).isinf().all()
    forward = fd.topk_logit_loss(student, *five, teacher_tail=nothing, **options)
    assert error(forward, fd.topk_logit_loss(student, *five, tail="renormalize", **options)) < EXACT_VALUE
    for tail in (nothing, torch.zeros(2, device=DEVICE)):
        empty = fd.topk_logit_loss(student, torch.full_like(values, -math.inf), indices, teacher_tail=tail, **options)
        assert (empty.abs() <= SMALLEST).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64], ids=str)
@pytest.mark.parametrize("values_dtype", [torch.bfloat16, torch.float16, torch.float32, F64], ids=str)
def test_any_pair_of_dtypes(values_dtype: torch.dtype, dtype: torch.dtype) -> None:
    teacher = torch.randn(3, 40, device=DEVICE)
    student = (teacher + torch.randn(3, 40, device=DEVICE)).to(dtype)
    values, indices = teacher.log_softmax(-1).topk(8)
    values, rest = values.to(values_dtype), tail_of(teacher, indices)
    known_rows = partial(loss, teacher=(values, indices, rest))
    truth = outcome(partial(known_rows, backend="reference"), student.double())
    for name in BACKENDS:
        if name == "triton" and dtype == F64:
            continue
        found = outcome(partial(known_rows, backend=name), student)
        judge_exact(found, truth, dtype)
        assert found.value.dtype == (F64 if dtype == F64 else torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_path_takes_the_tail(backend: str) -> None:
    """Weights over NaN, labels, logits that are overwritten, reductions, and torch.compile: the same rows."""
    student, values, indices, rest = (torch.cat(x) for x in zip(*[stored(33, 6, 0.3, 3.0, 1.0) for _ in range(3)], strict=True))  # fmt: skip
    weight = torch.tensor([1.0, 0.0, 2.0], device=DEVICE)
    rest[1] = math.nan
    teacher: dict[str, Any] = {"teacher_tail": rest, "divergence": "reverse_kl", "weight": weight, "backend": backend}

    def rows(s: Tensor) -> Tensor:
        return fd.topk_logit_loss(s, values, indices, reduction="none", **teacher)

    plain = outcome(rows, student)
    assert plain.value[1] == 0 and plain.value.isfinite().all()
    labels = torch.tensor([0, 1, 2], device=DEVICE)
    mean = Outcome(plain.value.sum() / 3, tuple(g / 3 for g in plain.gradients))

    def half(s: Tensor, **more: Any) -> Tensor:
        with_labels = fd.topk_logit_loss(s, values, indices, labels=labels, label_weight=0.5, **more, **teacher)
        entropy = torch.nn.functional.cross_entropy(s, labels, reduction="none")
        return 2 * with_labels - (weight * entropy).sum() / 3

    others: list[Callable[[Tensor], Tensor]] = [
        lambda s: fd.topk_logit_loss(s * 1, values, indices, inplace_backward=True, **teacher),
        torch.compile(lambda s: fd.topk_logit_loss(1.0 * s, values, indices, **teacher), fullgraph=True, backend="aot_eager"),
        half,
    ]  # fmt: skip
    for other in others:
        found = outcome(other, student)
        assert error(found.value, mean.value) < EXACT_VALUE
        if other is not half:
            judge_exact(found, mean, torch.float32)


U, I = torch.full((4, 3), -2.0), torch.arange(3).repeat(4, 1)
T = torch.log1p(-U.exp().sum(-1))
BAD = [
    ([0.1], {}, TypeError, "teacher_tail is list, expected a torch.Tensor"),
    (T.bfloat16(), {}, TypeError, "teacher_tail has dtype torch.bfloat16, expected float32 or float64"),
    (T[:3], {}, ValueError, r"teacher_tail has shape \(3,\), expected \(4,\) to match the rows of teacher_values"),
    (T[:, None], {}, ValueError, r"teacher_tail has shape \(4, 1\), expected \(4,\)"),
    (T.to("meta"), {}, ValueError, "teacher_tail is on meta, expected cpu"),
    (T.clone().requires_grad_(), {}, ValueError, "teacher_tail requires grad"),
    (T, {"tail": "renormalize"}, ValueError, "teacher_tail came with tail='renormalize', which has none"),
    (T.exp(), {}, ValueError, "teacher_values and teacher_tail have probabilities that sum to 2.2.* in row 0, expected 1"),
    (T - 3, {}, ValueError, "teacher_values and teacher_tail have probabilities that sum to 0.4.* in row 0, expected 1"),
]  # fmt: skip


@pytest.mark.skipif(DEVICE.type != "cpu", reason="entries are checked on a CPU alone")
@pytest.mark.parametrize(("value", "options", "kind", "message"), BAD)
def test_bad_tails(value: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^topk_logit_loss: {message}"):
        fd.topk_logit_loss(torch.zeros(4, 8), U, I, teacher_tail=value, **options)
    with pytest.raises(kind, match=f"^linear_topk_logit_loss: {message}"):
        fd.linear_topk_logit_loss(torch.zeros(4, 2), torch.zeros(8, 2), U, I, teacher_tail=value, **options)
