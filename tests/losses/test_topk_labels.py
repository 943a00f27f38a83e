"""topk_logit_loss with labels, and over logits that may be overwritten."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conftest import DEVICE, available
from judge import SLACK, Outcome, error, judge
from test_logit import DTYPES, draw, skip_float64
from topk_cases import formula, known
from torch import Tensor
from torch.nn import functional

import fastdistil as fd
from fastdistil.contracts.topk import TAILS
from fastdistil.ops.topk import topk_rows, topk_rows_overwrite_, topk_total

BACKENDS = available("reference", "cpu", "triton")
ROWS, COLUMNS, K = 6, 97, 9
ALPHA = 0.3


def problem(dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    student, teacher = draw(ROWS, COLUMNS, dtype)
    values, indices = known(teacher, K)
    labels = torch.randint(COLUMNS, (ROWS,), device=DEVICE)
    labels[1], labels[4] = -100, indices[4, 0]
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0, 1.0], device=DEVICE)
    student[2] = torch.nan  # does not count
    return student, {"teacher_values": values, "teacher_indices": indices, "labels": labels, "weight": weight}


def ours(student: Tensor, x: dict[str, Any], **options: Any) -> Tensor:
    options = {"temperature": 2.0, "label_weight": ALPHA} | x | options
    return fd.topk_logit_loss(student, options.pop("teacher_values"), options.pop("teacher_indices"), **options)


def plain(student: Tensor, x: dict[str, Any], tail: str, alpha: float) -> Tensor:
    keep = x["weight"] != 0
    z, weight, labels = student[keep], x["weight"][keep].to(student.dtype), x["labels"][keep]
    rows = 4.0 * formula(z, x["teacher_values"][keep], x["teacher_indices"][keep], tail, "forward_kl", t=2.0)
    counts = weight * (labels != -100)
    entropy = functional.cross_entropy(z, labels, reduction="none")
    return (1 - alpha) * (weight * rows).sum() / weight.sum() + alpha * (counts * entropy).sum() / counts.sum()


def outcome(function: Any, student: Tensor, factor: float = 64.0) -> Outcome:
    leaf = student.detach().clone().requires_grad_()
    value = function(leaf)
    return Outcome(value.detach(), torch.autograd.grad(value, leaf, torch.full_like(value, factor)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("alpha", [ALPHA, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_formula(backend: str, alpha: float, tail: str, dtype: torch.dtype) -> None:
    skip_float64(backend, dtype)
    student, x = problem(dtype)
    x["teacher_values"] = x["teacher_values"].float()
    truth = outcome(lambda s: plain(s, x, tail, alpha), student.double())
    eager = outcome(lambda s: plain(s, x, tail, alpha), student)
    found = outcome(lambda s: ours(s, x, tail=tail, label_weight=alpha, backend=backend), student)
    judge(found, truth, eager, dtype)
    assert not found.gradients[0][2].any()


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "head"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_of_rows_of_weight_0_may_be_anything(backend: str, linear: bool) -> None:
    student, x = problem(torch.float32)
    x["weight"][4] = 0.0
    wild = x | {"labels": x["labels"].clone()}
    wild["labels"][[2, 4]] = torch.tensor([COLUMNS, -(2**62)], device=DEVICE)

    def loss(z: Tensor, x: dict[str, Any]) -> Tensor:
        if not linear:
            return ours(z, x, backend=backend)
        options = {"temperature": 2.0, "label_weight": ALPHA, "backend": backend} | x
        known = (options.pop("teacher_values"), options.pop("teacher_indices"))
        return fd.linear_topk_logit_loss(z, torch.eye(COLUMNS, device=DEVICE), *known, **options)

    found, expected = (outcome(partial(loss, x=labels), student) for labels in (wild, x))
    assert torch.equal(found.value, expected.value)
    assert torch.equal(found.gradients[0], expected.gradients[0])
    assert error(found.value, plain(student.double(), x, "bucket", ALPHA)) <= SLACK[torch.float32]
    if DEVICE.type == "cpu":
        wild["weight"] = torch.ones(ROWS)
        with pytest.raises(ValueError, match=f"labels has {COLUMNS}, expected 0 to {COLUMNS - 1} or ignore_index"):
            loss(student.nan_to_num(), wild)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_backward_writes_over_the_logits(dtype: torch.dtype, reduction: str, labelled: bool) -> None:
    student, x = problem(dtype)
    options: dict[str, Any] = {"reduction": reduction}
    if not labelled:
        del x["labels"]
        options["label_weight"] = 0.0
    logits: list[Tensor] = []

    def overwritten(s: Tensor) -> Tensor:
        logits.append(s.clone())
        return ours(logits[0], x, inplace_backward=True, **options)

    wanted = outcome(lambda s: ours(s, x, **options), student, 1.0)
    found = outcome(overwritten, student, 1.0)
    assert error(found.value, wanted.value) <= SLACK[torch.float32]
    overwrites = found.gradients[0].data_ptr() == logits[0].data_ptr()
    assert overwrites == (dtype != torch.float16)  # whose gradient waits for the incoming one
    assert error(found.gradients[0], wanted.gradients[0]) <= SLACK[dtype]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_gradients_do_not_underflow_before_they_are_scaled(backend: str, inplace: bool) -> None:
    student, x = problem(torch.float16)
    options: dict[str, Any] = {"num_items": 1e5, "inplace_backward": inplace}  # 65536: what a GradScaler begins with
    found = outcome(lambda s: 65536.0 * ours(s.clone(), x, backend=backend, **options), student)
    x["teacher_values"] = x["teacher_values"].double()
    truth = outcome(lambda s: 65536.0 * ours(s.clone(), x, backend="reference", **options), student.double())
    assert error(found.gradients[0], truth.gradients[0]) <= SLACK[torch.float16]


def test_a_second_backward() -> None:
    student, x = problem(torch.float32)
    leaf = student.requires_grad_()
    value = ours(leaf, x)
    first, second, tripled = (torch.autograd.grad(f * value, leaf, retain_graph=True)[0] for f in (1, 1, 3))
    assert torch.equal(first, second)
    assert error(tripled, 3 * first) <= SLACK[torch.float32]
    value = ours(leaf.clone(), x, inplace_backward=True)
    torch.autograd.grad(value, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="^topk_logit_loss: a second backward came through inplace_backward=True"):
        torch.autograd.grad(value, leaf)
    with pytest.raises(ValueError, match="^topk_logit_loss: inplace_backward came with student_logits that are a leaf"):
        ours(leaf, x, inplace_backward=True)


def test_opcheck() -> None:
    student, x = problem(torch.float32)
    scales = (x["weight"], x["labels"].clamp(min=0), x["weight"])
    vocab_map = torch.arange(student.shape[1], device=DEVICE)
    arguments = (
        x["teacher_values"],
        x["teacher_indices"],
        torch.log1p(-x["teacher_values"].exp().sum(-1)),
        *scales,
        vocab_map,
        [0.0, 0.5, 0.0, 2.0, 4.0, 1.0, 0.0],
        "auto",
    )
    torch.library.opcheck(topk_rows.op, (student.clone().requires_grad_(), *arguments))
    torch.library.opcheck(topk_total.op, (student.clone().requires_grad_(), *arguments, [True], True))
    torch.library.opcheck(topk_rows_overwrite_, (student, *arguments))


def test_bad_labels() -> None:
    student, x = problem(torch.float32)
    with pytest.raises(ValueError, match=r"^topk_logit_loss: labels has shape \(2,\), expected \(6,\)"):
        ours(student, x | {"labels": x["labels"][:2]})
    with pytest.raises(ValueError, match="^topk_logit_loss: label_weight is 0.3 without labels"):
        ours(student, x | {"labels": None})
