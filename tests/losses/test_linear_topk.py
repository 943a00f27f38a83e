"""linear_topk_logit_loss: a top-k teacher against a head, in chunks, against whole logits in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conftest import DEVICE, available
from judge import SLACK, Outcome, error, judge
from topk_cases import CASES, formula, known
from torch import Tensor
from torch.nn import functional

import fastdistil as fd
from fastdistil.ops.linear_topk import linear_topk_rows, linear_topk_total

BACKENDS = available("reference", "cpu", "triton")
ROWS, SIZE, COLUMNS, K = 13, 9, 83, 6


def draw(
    dtype: torch.dtype = torch.float32, columns: int = COLUMNS, size: int = SIZE, k: int = K
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """hidden, weight and bias; the teacher and row weights as keywords."""
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((ROWS, size), (columns, size), (columns,))]
    values, indices = known(functional.linear(*inputs) + torch.randn(ROWS, columns), k)
    weight = torch.arange(1.0, ROWS + 1)
    weight[::4] = 0
    options = {"teacher_values": values.float(), "teacher_indices": indices, "weight": weight}
    return [x.to(DEVICE, dtype) for x in inputs], {name: x.to(DEVICE) for name, x in options.items()}


def ours(hidden: Tensor, matrix: Tensor, bias: Tensor, **options: Any) -> Tensor:
    teacher = options.pop("teacher_values"), options.pop("teacher_indices")
    return fd.linear_topk_logit_loss(hidden, matrix, *teacher, student_bias=bias, **options)


def plain(hidden: Tensor, matrix: Tensor, bias: Tensor, tail: str, divergence: str, **x: Tensor) -> Tensor:
    rows = formula(
        functional.linear(hidden, matrix, bias), x["teacher_values"], x["teacher_indices"], tail, divergence, t=2.0
    )
    w = x["weight"].to(rows.dtype)
    return 4 * (w * rows).sum() / w.sum()


def outcome(function: Any, inputs: list[Tensor], factor: float = 1.0) -> Outcome:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return Outcome(value.detach(), torch.autograd.grad(value, leaves, torch.full_like(value, factor)))


@pytest.mark.pairs(2, "tail", "dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("tail", "divergence"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_textbook(backend: str, tail: str, divergence: str, dtype: torch.dtype) -> None:
    inputs, x = draw(dtype)
    options: dict[str, Any] = {"tail": tail, "divergence": divergence, "temperature": 2.0, "backend": backend}
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match="backend is 'triton', which has no float64 kernel"):
            ours(*inputs, **options, **x)
        return
    truth = outcome(partial(plain, tail=tail, divergence=divergence, **x), [y.double() for y in inputs])
    eager = outcome(partial(plain, tail=tail, divergence=divergence, **x), inputs)
    judge(outcome(partial(ours, chunk_bytes=5000, **options, **x), inputs), truth, eager, dtype)


@pytest.mark.pairs(2, "reduction", "tail")
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "zero"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_and_a_softcap(backend: str, reduction: str, tail: str) -> None:
    """Against the formula by autograd, a row a chunk; labels on some rows, also on one whose weight is 0."""
    inputs, x = draw()
    labels = torch.randint(COLUMNS, (ROWS,), device=DEVICE)
    labels[1::3] = -100
    options: dict[str, Any] = {
        "labels": labels,
        "label_weight": 0.3,
        "student_logit_scale": 1.5,
        "student_softcap": 4.0,
    }

    def whole(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        z = 4.0 * torch.tanh(functional.linear(h, w, b) * 1.5 / 4.0)
        weight = x["weight"].to(z.dtype)
        rows = 4.0 * formula(z, x["teacher_values"], x["teacher_indices"], tail, "forward_kl", t=2.0)
        entropy = functional.cross_entropy(z, labels, reduction="none")
        if reduction == "none":
            return weight * (0.7 * rows + 0.3 * entropy)
        counts = weight * (labels != -100)
        return 0.7 * (weight * rows).sum() / weight.sum() + 0.3 * (counts * entropy).sum() / counts.sum()

    truth = outcome(whole, [y.double() for y in inputs])
    found = outcome(
        partial(ours, tail=tail, temperature=2.0, reduction=reduction, chunk_bytes=1, backend=backend, **x, **options),
        inputs,
    )
    judge(found, truth, outcome(whole, inputs), torch.float32)


def test_equals_topk_logit_loss_of_the_logits() -> None:
    inputs, x = draw()
    whole = fd.topk_logit_loss(functional.linear(*inputs), **x)
    assert error(ours(*inputs, **x), whole) <= SLACK[torch.float32]


def test_opcheck() -> None:
    inputs, x = draw()
    tensors = (*(y.requires_grad_() for y in inputs), x["teacher_values"], x["teacher_indices"])
    tensors = (*tensors, torch.log1p(-x["teacher_values"].exp().sum(-1)), x["weight"])
    labels = (torch.randint(COLUMNS, (ROWS,), device=DEVICE), x["weight"])
    options = (*labels, None, [0.0, 0.5, 0.0, 2.0, 4.0, 1.5, 3.0], 5000, "auto", False)
    torch.library.opcheck(linear_topk_rows.op, (*tensors, *options))
    torch.library.opcheck(linear_topk_total.op, (*tensors, *options, [True, False, True], False))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_weight": torch.zeros(5, 4)}, ValueError, r"student_weight has shape \(5, 4\), expected \(V, 3\)"),
    ({"student_bias": torch.zeros(4)}, ValueError, r"student_bias has shape \(4,\), expected \(5,\)"),
    (
        {"teacher_values": torch.zeros(2, 6)},
        ValueError,
        r"teacher_values has shape \(2, 6\), expected \(2, K\) with 1 <= K <= 5",
    ),
    (
        {"teacher_indices": torch.zeros(2, 2)},
        TypeError,
        "teacher_indices has dtype torch.float32, expected int32 or int64",
    ),
    ({"teacher_indices": torch.full((2, 2), 5)}, ValueError, "teacher_indices holds 5"),
    ({"tail": "rest"}, ValueError, "tail is 'rest'"),
    ({"tail": "zero", "divergence": "jsd"}, ValueError, "divergence is 'jsd' with tail='zero'"),
    ({"chunk_bytes": 0}, ValueError, "chunk_bytes is 0"),
    (
        {"student_weight": torch.zeros(5, 3, device="meta")},
        ValueError,
        "student_weight is on meta, expected cpu to match student_hidden",
    ),
    (
        {"teacher_values": torch.zeros(2, 2, device="meta")},
        ValueError,
        "teacher_values is on meta, expected cpu to match the student",
    ),
]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="indices are checked on a CPU alone")
@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_bad_calls(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    good = {
        "student_hidden": torch.zeros(2, 3),
        "student_weight": torch.zeros(5, 3),
        "teacher_values": torch.full((2, 2), -2.0),
        "teacher_indices": torch.tensor([[0, 1], [2, 3]]),
    }
    with pytest.raises(kind, match=f"^linear_topk_logit_loss: {message}"):
        fd.linear_topk_logit_loss(**(good | options))
