"""relation_loss against MiniLMv2's formula in float64: every backend, kind and shape, and what it says to bad calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import BACKENDS, KINDS, textbook
from conftest import DEVICE
from judge import Outcome, judge, judge_exact
from torch import Tensor

from fastdistil import relation_loss
from fastdistil.ops.attention import attention_rows, attention_total

# B, S, D_s, D_t, relation heads, padded, causal
SHAPES = {
    "padded": (2, 37, 32, 64, 4, True, False),
    "causal": (1, 21, 40, 40, 5, False, True),
    "one head": (2, 9, 16, 24, 1, True, False),
}


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def _draw(shape: Any, dtype: torch.dtype, noise: float = 1.0) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, length, width_s, width_t, _, padded, _ = shape
    teacher = torch.randn(batch, length, width_t, device=DEVICE)
    student = teacher[..., :width_s] + noise * torch.randn(batch, length, width_s, device=DEVICE)
    mask = torch.ones(batch, length, dtype=torch.bool, device=DEVICE) if padded else None
    if mask is not None:
        mask[0, 3] = False
        mask[-1, length // 2 :] = False
    return student.to(dtype), teacher.to(dtype), mask


def _outcome(function: Any, student: Tensor, factor: float = 1.0) -> Outcome:
    x = student.detach().clone().requires_grad_()
    value = function(x)
    return Outcome(value, torch.autograd.grad(value, (x,), torch.full_like(value, factor)))


def _truth(shape: Any, kind: str, teacher: Tensor, mask: Tensor | None) -> Any:
    count, causal = shape[4], shape[6]
    return lambda x: textbook(*[_heads(x, count)] * 2, *[_heads(teacher, count)] * 2, kind, mask, causal)


@pytest.mark.pairs(3, "kind", "shape", "dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_textbook(backend: str, kind: str, shape: Any, dtype: torch.dtype) -> None:
    student, teacher, mask = _draw(shape, dtype)
    truth = _outcome(_truth(shape, kind, teacher.double(), mask), student.double(), 64.0)
    eager = _outcome(_truth(shape, kind, teacher, mask), student, 64.0)
    options: dict[str, Any] = {"relation_heads": shape[4], "kind": kind, "mask": mask, "causal": shape[6]}
    found = _outcome(lambda x: relation_loss(x, teacher, backend=backend, **options), student, 64.0)
    judge(found, truth, eager, dtype)


@pytest.mark.parametrize("noise", [1e-2, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_near_convergence(backend: str, kind: str, noise: float) -> None:
    shape = (2, 37, 32, 32, 2, True, False)
    student, teacher, mask = _draw(shape, torch.float32, noise)
    truth = _outcome(_truth(shape, kind, teacher.double(), mask), student.double())
    found = _outcome(
        lambda x: relation_loss(x, teacher, relation_heads=2, kind=kind, mask=mask, backend=backend), student
    )
    judge_exact(found, truth, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_as_capture_gives_them(backend: str) -> None:
    """(B, H, S, d) is (B, S, D) split: the relation heads need not be the attention heads."""
    student, teacher, mask = _draw(SHAPES["padded"], torch.float32)
    options: dict[str, Any] = {"relation_heads": 2, "mask": mask, "backend": backend}
    expected = _outcome(lambda x: relation_loss(x, teacher, **options), student)
    found = _outcome(lambda x: relation_loss(_heads(x, 8), _heads(teacher, 16), **options), student)
    judge_exact(found, expected, torch.float32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_queries_count_and_keys_end_elsewhere(backend: str, kind: str, causal: bool) -> None:
    """Rows that ask without being seen, in several blocks, with a weight of their own a row."""
    student, teacher, mask = _draw((2, 83, 32, 32, 2, True, causal), torch.float32)
    options: dict[str, Any] = {"relation_heads": 2, "kind": kind, "mask": mask, "causal": causal}
    options |= {"mask_queries": False, "reduction": "none"}
    ramp = torch.linspace(0, 1, 83, device=DEVICE)
    truth = _outcome(
        lambda x: (relation_loss(x, teacher.double(), backend="reference", **options) * ramp).sum(), student.double()
    )
    found = _outcome(lambda x: (relation_loss(x, teacher, backend=backend, **options) * ramp).sum(), student)
    judge_exact(found, truth, torch.float32)


def test_one_gradient_for_both_sides() -> None:
    """The op knows that the queries are the keys, and autograd has nothing to add up."""
    x, t = torch.randn(2, 2, 5, 8, requires_grad=True), torch.randn(2, 2, 5, 8)
    arguments = (x, None, t, None, None, None, torch.ones(2, 2, 5), "prob_kl", False, 0.3, 0.3, "each", "auto")
    total, dx, empty = attention_total.op(*arguments, [True, False], False)
    assert empty.numel() == 0
    total.backward()
    torch.testing.assert_close(x.grad, dx)
    torch.library.opcheck(attention_rows.op, arguments)
    torch.library.opcheck(attention_total.op, (*arguments, [True, False], True))


def test_padding_counts_for_nothing_and_the_default_is_kl() -> None:
    student, teacher, mask = _draw(SHAPES["padded"], torch.float32)
    assert mask is not None
    clean = _outcome(lambda x: relation_loss(x, teacher, relation_heads=4, kind="prob_kl", mask=mask), student)
    dirty = student.masked_fill(~mask[..., None], torch.nan)
    found = _outcome(lambda x: relation_loss(x, teacher, relation_heads=4, mask=mask), dirty)
    assert torch.equal(found.value, clean.value) and torch.equal(found.gradients[0], clean.gradients[0])
    assert (found.gradients[0][~mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_over_batches(kind: str) -> None:
    student, teacher, mask = _draw(SHAPES["padded"], torch.float32)
    assert mask is not None
    count = mask.sum(1).float()
    items = count.sum() if kind == "prob_kl" else count.square().sum()

    def in_parts(x: torch.Tensor) -> torch.Tensor:
        parts = zip(x.split(1), teacher.split(1), mask.split(1), strict=True)
        losses = [relation_loss(s, t, relation_heads=4, kind=kind, mask=m, num_items=items) for s, t, m in parts]
        return torch.stack(losses).sum()

    whole = _outcome(lambda x: relation_loss(x, teacher, relation_heads=4, kind=kind, mask=mask), student)
    judge_exact(_outcome(in_parts, student), whole, torch.float32)


BAD = [
    ({"student": 1}, TypeError, "student is int, expected a torch.Tensor"),
    ({"student": torch.zeros(5, 4)}, ValueError, "student has shape (5, 4), expected (B, S, D) or (B, H, S, d)"),
    ({"teacher": torch.zeros(2, 4, 6)}, ValueError, "teacher has shape (2, 4, 6), expected (2, 5, 6) to match student"),
    (
        {"teacher": torch.zeros(2, 5, 7)},
        ValueError,
        "teacher has shape (2, 5, 7), expected (B, S, D) with D a multiple",
    ),
    ({"teacher": torch.zeros(2, 5, 6, requires_grad=True)}, ValueError, "teacher requires grad, expected a constant"),
    ({"teacher": torch.zeros(2, 5, 6, device="meta")}, ValueError, "teacher is on meta, expected cpu to match student"),
    (
        {"relation_heads": 3},
        ValueError,
        "student has shape (2, 5, 4), expected (B, S, D) with D a multiple of 3, the rel",
    ),
    ({"relation_heads": 0}, ValueError, "relation_heads is 0, expected at least 1"),
    ({"relation_heads": 2.0}, TypeError, "relation_heads is float, expected a whole number"),
    ({"kind": "mse"}, ValueError, "kind is 'mse', expected one of"),
    ({"mask": torch.ones(2, 4).bool()}, ValueError, "mask has shape (2, 4), expected (2, 5), (B, S) of the student"),
    ({"mask": torch.ones(2, 5)}, TypeError, "mask has dtype torch.float32, expected bool"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[message[:30] for _, _, message in BAD])
def test_bad_calls(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"student": torch.zeros(2, 5, 4), "teacher": torch.zeros(2, 5, 6), "relation_heads": 2}
    relation_loss(**good)
    with pytest.raises(kind) as raised:
        relation_loss(**(good | change))
    assert "relation_loss: " + message in str(raised.value)
