"""topk_logit_loss and linear_topk_logit_loss of a student whose vocabulary is another one (vocab_map)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE, available
from judge import SMALLEST, error, judge, judge_exact
from test_logit import F64, outcome
from topk_cases import CASES, formula, known
from torch import Tensor

import fastdistil as fd

BACKENDS = available("reference", "cpu", "triton")
ROWS, COLUMNS, TEACHER_COLUMNS, K = 4, 150, 170, 12


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student logits, values, indices and a map that leaves out some columns of either side."""
    teacher = 3 * torch.randn(ROWS, TEACHER_COLUMNS, dtype=F64)
    vocab_map = torch.randperm(TEACHER_COLUMNS)[:COLUMNS]
    vocab_map[torch.arange(COLUMNS) % 4 == 1] = -1
    student = (teacher[:, vocab_map] + 0.5 * torch.randn(ROWS, COLUMNS, dtype=F64)).to(DEVICE, dtype)
    values, indices = known(teacher.to(DEVICE), K, dtype=F64 if dtype == F64 else torch.float32)
    return student, values, indices, vocab_map.to(DEVICE)


def mapped(x: tuple[Tensor, Tensor, Tensor, Tensor], tail: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mapped columns alone, teacher entries a row of other columns padded with -inf: by loops."""
    student, values, indices, vocab_map = (y.cpu() for y in x)
    kept = (vocab_map >= 0).nonzero()[:, 0]
    places = {int(vocab_map[v]): i for i, v in enumerate(kept.tolist())}
    u, columns = torch.full(values.shape, -torch.inf, dtype=F64), torch.zeros_like(indices)
    for r in range(len(values)):
        lost = sum(float(v.exp()) for v, i in zip(values[r].double(), indices[r], strict=True) if int(i) not in places)
        for k, (v, i) in enumerate(zip(values[r].double(), indices[r].tolist(), strict=True)):
            if i in places:
                u[r, k], columns[r, k] = (
                    v - (0 if tail == "renormalize" else torch.log1p(torch.tensor(-lost))),
                    places[i],
                )
    return student[:, kept].to(DEVICE), u.to(DEVICE), columns.to(DEVICE)


@pytest.mark.parametrize(("tail", "divergence"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_loss_of_the_mapped_columns(backend: str, tail: str, divergence: str) -> None:
    x = problem()
    options: dict[str, Any] = {"tail": tail, "divergence": divergence, "beta": 0.3, "temperature": 2.0}
    found = outcome(
        lambda s: fd.topk_logit_loss(s, *x[1:3], vocab_map=x[3], reduction="none", backend=backend, **options), x[0]
    )
    student, u, columns = mapped(x, tail)
    truth = outcome(
        lambda s: fd.topk_logit_loss(s, u, columns, reduction="none", backend="reference", **options), student.double()
    )
    kept = x[3] >= 0
    assert 0 < (u == -torch.inf).sum() < u.numel()
    assert not found.gradients[0][:, ~kept].any()
    found.gradients = (found.gradients[0][:, kept],)
    judge_exact(found, truth, torch.float32)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "zero"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_labels_in_place_and_from_a_head(backend: str, tail: str) -> None:
    """The labels' term runs over all student columns; a head whose product is exact gives the same, softcap and all."""
    student, values, indices, vocab_map = problem()
    labels = torch.tensor([0, 1, -100, 149], device=DEVICE)
    weight = torch.tensor([1.0, 2.0, 1.0, 0.0], device=DEVICE)
    options: dict[str, Any] = {"tail": tail, "vocab_map": vocab_map, "weight": weight}
    mixed: dict[str, Any] = {"labels": labels, "label_weight": 0.3}

    def whole(s: Tensor) -> Tensor:
        divergence = fd.topk_logit_loss(s, values, indices, **options, backend="reference")
        entropy = torch.nn.functional.cross_entropy(s, labels, reduction="none")
        return 0.7 * divergence + 0.3 * (entropy * weight)[:2].sum() / 3.0

    def head(s: Tensor, **more: Any) -> Tensor:
        w = torch.eye(COLUMNS, dtype=s.dtype, device=DEVICE)
        return fd.linear_topk_logit_loss(s, w, values, indices, **options, **more)

    truth = outcome(whole, student.double())
    for inplace in (False, True):
        found = outcome(
            lambda s, i=inplace: fd.topk_logit_loss(
                s * 1, values, indices, inplace_backward=i, **options, **mixed, backend=backend
            ),
            student,
        )
        judge_exact(found, truth, torch.float32)
    judge_exact(outcome(lambda s: head(s, **mixed, backend=backend), student), truth, torch.float32)
    for more in ({}, mixed):
        capped = outcome(lambda s, m=more: head(s, student_softcap=5.0, **m, backend=backend), student)
        plain = outcome(
            lambda s, m=more: fd.topk_logit_loss(
                5 * torch.tanh(s / 5), values, indices, **options, **m, backend="reference"
            ),
            student.double(),
        )
        judge_exact(capped, plain, torch.float32)


@pytest.mark.parametrize("tail", ["bucket", "zero"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_mapped_columns_are_named(backend: str, tail: str) -> None:
    """Then there is no tail, whatever rounding says."""
    student, teacher = torch.randn(3, 9, device=DEVICE), torch.randn(3, 20, device=DEVICE)
    vocab_map = torch.tensor([4, -1, 7, 19, 0, -1, 3, 11, 12], device=DEVICE)
    kept = vocab_map >= 0
    log_q = teacher.double().log_softmax(-1)[:, vocab_map[kept]]
    indices = vocab_map[kept].expand(3, 7)
    found = outcome(
        lambda s: fd.topk_logit_loss(
            s, log_q, indices, tail=tail, vocab_map=vocab_map, reduction="none", backend=backend
        ),
        student,
    )
    u = log_q.log_softmax(-1) if tail == "bucket" else log_q
    places = torch.arange(7, device=DEVICE).expand(3, 7)

    def plain(s: Tensor) -> Tensor:
        return formula(s[:, kept], u, places, "zero", "forward_kl")

    judge(found, outcome(plain, student.double()), outcome(plain, student), torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: str) -> None:
    student, values, indices, vocab_map = problem(F64)

    def loss(s: Tensor) -> Tensor:
        return fd.topk_logit_loss(s, values, indices, vocab_map=vocab_map, reduction=reduction)

    assert torch.autograd.gradcheck(loss, student[:, :].clone().requires_grad_())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(reduction: str) -> None:
    student, values, indices, vocab_map = problem()

    def function(s: Tensor) -> Tensor:
        return fd.topk_logit_loss(2.0 * s, values, indices, vocab_map=vocab_map, reduction=reduction).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    judge_exact(outcome(compiled, student), outcome(function, student), torch.float32)


@pytest.mark.parametrize("tail", ["bucket", "zero"])
def test_a_teacher_without_a_partner_and_nan(tail: str) -> None:
    student, values, indices, _ = problem()
    nowhere = torch.full((COLUMNS,), -1, device=DEVICE)
    nowhere[3] = TEACHER_COLUMNS + 1  # a column that no row names
    none = fd.topk_logit_loss(student, values, indices, tail=tail, vocab_map=nowhere, reduction="none")
    assert (none.abs() <= SMALLEST).all()
    values[1, 2] = torch.nan
    some = fd.topk_logit_loss(student, values, indices, tail=tail, vocab_map=nowhere, reduction="none")
    assert some.isnan().tolist() == [False, True, False, False]
    assert error(some[[0, 2, 3]], none[[0, 2, 3]]) == 0


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"vocab_map": [0, 1, 2, 3, 4]}, TypeError, "vocab_map is list, expected a torch.Tensor"),
    ({"vocab_map": torch.zeros(4).long()}, ValueError, r"vocab_map has shape \(4,\), expected \(5,\)"),
    ({"vocab_map": torch.tensor([0, 1, 2, 1, -1])}, ValueError, "vocab_map holds 1 for more than one column"),
    ({"vocab_map": torch.full((5,), -1)}, ValueError, "vocab_map maps no column"),
    ({"teacher_indices": torch.tensor([[0, -1]])}, ValueError, "teacher_indices holds -1 in row 0, entry 1"),
    ({"teacher_indices": torch.tensor([[9, 9]])}, ValueError, "teacher_indices holds 4 twice in row 0"),
    ({"teacher_values": torch.tensor([[1.0, 1.0]])}, ValueError, "teacher_values has probabilities that sum to 5.4"),
]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="entries are checked on a CPU alone")
@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_bad_calls(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    good = {
        "teacher_values": torch.full((1, 2), -2.0),
        "teacher_indices": torch.tensor([[0, 9]]),
        "vocab_map": torch.tensor([0, 3, -1, 7, 9]),
    }
    with pytest.raises(kind, match=f"^topk_logit_loss: {message}"):
        fd.topk_logit_loss(torch.zeros(1, 5), **(good | options))


@pytest.mark.parametrize("name", ["return_stats", "group", "teacher_temperature"])
@pytest.mark.parametrize("function", [fd.topk_logit_loss, fd.linear_topk_logit_loss])
def test_what_a_stored_teacher_cannot_give_is_refused(function: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__}.. got an unexpected keyword argument '{name}'"):
        function(*problem()[:3], **{name: None})
