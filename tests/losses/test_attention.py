"""attention_loss against the textbook formulas in float64: every backend, dtype, rule, mask and reduction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import BACKENDS, DTYPES, KINDS, SHAPES, draw, outcome, textbook
from conftest import DEVICE
from judge import SLACK, Outcome, error, judge, judge_exact

from fastdistil import attention_loss
from fastdistil.ops import attention_low_rank as low_rank


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_textbook(backend: str, kind: str, shape: Any, dtype: torch.dtype) -> None:
    tensors, mask = draw(shape, dtype)
    causal = shape[-1]
    if backend == "triton" and dtype == torch.float64 and (kind != "score_mse" or causal):
        with pytest.raises(ValueError, match="backend is 'triton', which has no float64 kernel"):
            attention_loss(*tensors, kind=kind, mask=mask, causal=causal, backend=backend)
        return
    factor = 256.0
    truth = outcome(lambda *x: textbook(*x, kind, mask, causal), [x.double() for x in tensors], factor)
    eager = outcome(lambda *x: textbook(*x, kind, mask, causal), tensors, factor)
    found = outcome(
        lambda *x: attention_loss(*x, kind=kind, mask=mask, causal=causal, backend=backend), tensors, factor
    )
    assert found.value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    judge(found, truth, eager, dtype)


# Less noise than 0.1 is below the spacing of bfloat16.
NEAR = [(torch.bfloat16, 1e-1), *((torch.float32, noise) for noise in (1e-1, 1e-2, 1e-3, 1e-4))]


@pytest.mark.parametrize(("dtype", "noise"), NEAR, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_near_convergence(backend: str, kind: str, noise: float, dtype: torch.dtype) -> None:
    for shape in ((2, 2, 50, 16, 16, True, False), (1, 2, 40, 32, 32, False, True)):
        tensors, mask = draw(shape, dtype, noise)
        wide = [x.double() for x in tensors]
        truth = outcome(lambda *x: textbook(*x, kind, mask, shape[-1]), wide, 256.0)  # noqa: B023
        found = outcome(
            lambda *x: attention_loss(*x, kind=kind, mask=mask, causal=shape[-1], backend=backend),  # noqa: B023
            tensors,
            256.0,
        )
        judge_exact(found, truth, dtype)


# Triton adds the student's scores up from the teacher's and the difference: far from the teacher that is three
# roundings to eager's one, and prob_mse's gradient, which is lost in saturated rows anyway, shows it.
FAR = [(b, k) for b in BACKENDS for k in ("prob_mse", "prob_kl") if (b, k) != ("triton", "prob_mse")]


@pytest.mark.parametrize(("backend", "kind"), FAR)
def test_student_far_from_teacher(backend: str, kind: str) -> None:
    """Scores so far apart that exp of their difference overflows: finite, and as right as the eager formula."""
    tensors, _ = draw((1, 2, 33, 16, 16, False, False), torch.float32)
    tensors = [2 * tensors[0], 2 * tensors[1], *tensors[2:]]
    assert float((tensors[0] @ tensors[1].mT - tensors[2] @ tensors[3].mT).abs().max()) / 4 > 60
    truth = outcome(lambda *x: textbook(*x, kind, None, False), [x.double() for x in tensors])
    eager = outcome(lambda *x: textbook(*x, kind, None, False), tensors)
    found = outcome(lambda *x: attention_loss(*x, kind=kind, backend=backend), tensors)
    judge(found, truth, eager, torch.float32)


def test_scores_a_part_of_the_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, mask = draw((5, 2, 37, 16, 16, True, False), torch.float32)
    arguments = (*tensors, mask, torch.rand(5, 2, 37, device=DEVICE), 0.25, 0.5)
    for need_grad in (True, False):
        whole = low_rank.score_mse(*arguments, need_grad)
        monkeypatch.setattr(low_rank, "CHUNK_BYTES", 2 * 11 * 8 * tensors[0][:1].numel())
        parts = low_rank.score_mse(*arguments, need_grad)
        for one, other in zip(parts, whole, strict=True):
            if other is None:
                assert one is None and not need_grad
            else:
                assert one is not None and error(one, other) <= SLACK[torch.float32]
        monkeypatch.undo()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_agree(backend: str, kind: str) -> None:
    tensors, mask = draw(SHAPES["padded"], torch.float32)
    assert mask is not None
    options: dict[str, Any] = {"kind": kind, "mask": mask, "backend": backend}
    rows = attention_loss(*tensors, reduction="none", **options)
    assert rows.shape == (2, 2, 37)
    assert (rows[~mask[:, None].expand_as(rows)] == 0).all() and (rows[mask[:, None].expand_as(rows)] > 0).all()
    count = mask.sum(1).float()
    terms = 2 * (count.sum() if kind == "prob_kl" else count.square().sum())
    mean = outcome(lambda *x: attention_loss(*x, **options), tensors)
    total = outcome(lambda *x: attention_loss(*x, reduction="sum", **options), tensors, 1 / float(terms))
    factor = 1 / float(terms)
    by_row = outcome(lambda *x: (attention_loss(*x, reduction="none", **options) * factor).sum(), tensors)
    scaled = Outcome(total.value / terms, total.gradients)
    for other in (scaled, by_row):
        judge_exact(other, mean, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(attention_loss(*tensors, **options), mean.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", ["each", "mean"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulated_over_batches(backend: str, heads: str, kind: str) -> None:
    """The losses of a batch's sequences, each divided by the items of all, add up to the batch's own."""
    tensors, mask = draw(SHAPES["padded"], torch.float32)
    assert mask is not None
    count = mask.sum(1).float()
    items = count.sum() if kind == "prob_kl" else count.square().sum()
    options: dict[str, Any] = {"kind": kind, "heads": heads, "backend": backend}
    whole = outcome(lambda *x: attention_loss(*x, mask=mask, **options), tensors)

    def in_parts(*x: torch.Tensor) -> torch.Tensor:
        first, second = (
            attention_loss(*(y[i : i + 1] for y in x), mask=mask[i : i + 1], num_items=n, **options)
            for i, n in enumerate((items, float(items)))
        )
        return first + second

    judge_exact(outcome(in_parts, tensors), whole, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_queries_count_on_request(backend: str, kind: str) -> None:
    """BiStil keeps padded query rows: their keys are still the real ones."""
    tensors, mask = draw(SHAPES["padded"], torch.float32)
    truth = outcome(lambda *x: textbook(*x, kind, mask, False, queries=False), [x.double() for x in tensors])
    eager = outcome(lambda *x: textbook(*x, kind, mask, False, queries=False), tensors)
    found = outcome(lambda *x: attention_loss(*x, kind=kind, mask=mask, mask_queries=False, backend=backend), tensors)
    judge(found, truth, eager, torch.float32)


@pytest.mark.parametrize("kind", ["prob_mse", "prob_kl"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_attends_to_itself(backend: str, kind: str) -> None:
    """Both maps are 1: the truth is 0, so the slack is absolute here."""
    tensors, _ = draw((2, 1, 1, 16, 16, False, False), torch.float32)
    found = outcome(lambda *x: attention_loss(*x, kind=kind, backend=backend), tensors)
    for x in (found.value, *found.gradients):
        assert float(x.detach().abs().max()) < SLACK[torch.float32]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything(backend: str, kind: str, causal: bool) -> None:
    tensors, mask = draw(SHAPES["padded"], torch.float32)
    assert mask is not None
    options: dict[str, Any] = {"kind": kind, "mask": mask, "causal": causal, "backend": backend}
    clean = outcome(lambda *x: attention_loss(*x, **options), tensors)
    hidden = ~mask[:, None, :, None]
    dirty = [x.masked_fill(hidden, value) for x, value in zip(tensors, (torch.nan, torch.inf) * 2, strict=True)]
    found = outcome(lambda *x: attention_loss(*x, **options), dirty)
    assert torch.equal(found.value, clean.value)
    for g, expected in zip(found.gradients, clean.gradients, strict=True):
        assert torch.equal(g, expected)
        assert (g.masked_select(hidden) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_item_in_any_batch(backend: str) -> None:
    tensors, mask = draw(SHAPES["padded"], torch.float32)
    assert mask is not None
    none = torch.tensor(0, device=mask.device)
    options: dict[str, Any] = {"mask": torch.zeros_like(mask), "num_items": none, "backend": backend}
    found = outcome(lambda *x: attention_loss(*x, **options), tensors)
    assert all((x == 0).all() for x in (found.value, *found.gradients))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_real_token(backend: str, reduction: str) -> None:
    tensors, _ = draw(SHAPES["padded"], torch.float32)
    mask = torch.zeros(2, 37, dtype=torch.bool, device=DEVICE)
    for kind in KINDS:
        tensors[0].fill_(torch.nan)
        q, k = (x.clone().requires_grad_() for x in tensors[:2])
        value = attention_loss(q, k, *tensors[2:], kind=kind, mask=mask, reduction=reduction, backend=backend)
        assert (value == 0).all()
        value.sum().backward()
        assert q.grad is not None and k.grad is not None
        assert (q.grad == 0).all() and (k.grad == 0).all()
