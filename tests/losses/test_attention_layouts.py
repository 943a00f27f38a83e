"""attention_loss on packed sequences, grouped keys and means over heads: against the textbook formula, all maps whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import BACKENDS, KINDS, draw, outcome, textbook
from conftest import DEVICE
from judge import Outcome, judge, judge_exact
from torch import Tensor

from fastdistil import attention_loss
from fastdistil.ops.attention import attention_mean

LENGTHS = (5, 0, 33, 1, 12)  # of the packed sequences, one of them empty


def _packed(x: Tensor) -> Tensor:
    """(1, H, total, d) -> (total, H, d)."""
    return x[0].transpose(0, 1)


def _one_by_one(kind: str, causal: bool, *tensors: Tensor) -> Tensor:
    """The mean over all sequences, each by itself."""
    total, count = tensors[0].new_zeros(()), 0
    for part in zip(*(x.split(LENGTHS, 2) for x in tensors), strict=True):
        n, heads = part[0].shape[2], part[0].shape[1]
        terms = heads * (n if kind == "prob_kl" else n * (n + 1) // 2 if causal else n * n)
        if n:
            total, count = total + terms * textbook(*part, kind, None, causal), count + terms
    return total / count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences(backend: str, kind: str, causal: bool, dtype: torch.dtype) -> None:
    tensors, _ = draw((1, 2, sum(LENGTHS), 16, 16, False, causal), dtype)
    ends = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0).to(torch.int32)
    truth = outcome(lambda *x: _one_by_one(kind, causal, *x), [x.double() for x in tensors], 256.0)
    eager = outcome(lambda *x: _one_by_one(kind, causal, *x), tensors, 256.0)
    options: dict[str, Any] = {"kind": kind, "causal": causal, "cu_seqlens": ends, "backend": backend}
    found = outcome(lambda *x: attention_loss(*map(_packed, x), **options), tensors, 256.0)
    judge(found, truth, eager, dtype)
    rows = attention_loss(*map(_packed, tensors), reduction="none", **options)
    assert rows.shape == (2, sum(LENGTHS))


@pytest.mark.parametrize("groups", [(2, 4), (4, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_query_keys(backend: str, kind: str, causal: bool, groups: tuple[int, int]) -> None:
    """H = 4 query heads on 4, 2 or 1 key heads, which need not agree between student and teacher."""
    tensors, mask = draw((2, 4, 21, 16, 16, True, causal), torch.float32)
    tensors = [tensors[0], tensors[1][:, : groups[0]], tensors[2], tensors[3][:, : groups[1]]]

    def whole(*x: Tensor) -> Tensor:
        keys = [k.repeat_interleave(4 // k.shape[1], 1) for k in (x[1], x[3])]
        return textbook(x[0], keys[0], x[2], keys[1], kind, mask, causal)

    truth, eager = (outcome(whole, [x.to(dtype) for x in tensors]) for dtype in (torch.float64, torch.float32))
    found = outcome(lambda *x: attention_loss(*x, kind=kind, mask=mask, causal=causal, backend=backend), tensors)
    judge(found, truth, eager, torch.float32)


def _mean(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, kind: str, mask: Tensor | None, causal: bool) -> Tensor:
    """The mean as losses.md defines it for means over heads, by autograd."""
    length = q_s.shape[2]
    real = torch.ones(q_s.shape[0], length, dtype=torch.bool, device=q_s.device) if mask is None else mask
    visible = real[:, None, :] & real[:, :, None]
    visible = visible.tril() if causal else visible
    scores = [
        q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / q.shape[-1] ** 0.5
        for q, k in ((q_s, k_s), (q_t, k_t))
    ]
    if kind == "score_mse":
        return torch.where(visible, scores[0].mean(1) - scores[1].mean(1), 0.0).square().sum() / int(visible.sum())
    p, q = (a.masked_fill(~visible[:, None], torch.finfo(a.dtype).min).softmax(-1).mean(1) for a in scores)
    if kind == "prob_mse":
        return torch.where(visible, p - q, 0.0).square().sum() / int(visible.sum())
    return torch.where(visible, q * (q / p.clamp(min=1e-30)).log(), 0.0).sum() / int(real.sum())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_over_heads(backend: str, kind: str, causal: bool) -> None:
    """4 student heads (on 2 key heads) of size 8 against 6 teacher heads of size 16."""
    (q_s, k_s, *_), mask = draw((2, 4, 21, 8, 8, True, causal), torch.float32)
    (*_, q_t, k_t), _ = draw((2, 6, 21, 16, 16, True, causal), torch.float32)
    tensors = [q_s, k_s[:, :2], q_t, k_t]
    truth, eager = (
        outcome(lambda *x: _mean(*x, kind, mask, causal), [x.to(dtype) for x in tensors])
        for dtype in (torch.float64, torch.float32)
    )
    options: dict[str, Any] = {"kind": kind, "mask": mask, "causal": causal, "heads": "mean", "backend": backend}
    found = outcome(lambda *x: attention_loss(*x, **options), tensors)
    judge(found, truth, eager, torch.float32)
    rows = attention_loss(*tensors, reduction="none", **options)
    assert rows.shape == (2, 1, 21)


@pytest.mark.parametrize("noise", [1e-2, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_over_heads_near_convergence(backend: str, kind: str, noise: float) -> None:
    tensors, mask = draw((2, 2, 37, 16, 16, True, False), torch.float32, noise)
    truth = outcome(lambda *x: _mean(*x, kind, mask, False), [x.double() for x in tensors])
    found = outcome(lambda *x: attention_loss(*x, kind=kind, mask=mask, heads="mean", backend=backend), tensors)
    judge_exact(found, truth, torch.float32)


@pytest.mark.parametrize("kind", ["prob_mse", "prob_kl"])
def test_mean_over_different_heads_without_a_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is hidden, by blocks of 8 rows, with grouped keys on both sides."""
    monkeypatch.setattr(attention_mean, "BLOCK_ELEMENTS", {"cpu": 2 * 2 * 37 * 8, "gpu": 2 * 2 * 37 * 8})
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 16), (1, 16), (4, 24), (2, 24))
    tensors = [torch.randn(2, heads, 37, d, generator=generator).to(DEVICE) for heads, d in sizes]

    def truth(*x: Tensor) -> Tensor:
        whole = (y.repeat_interleave(n, 1) for y, n in zip(x, (1, 2, 1, 2), strict=True))
        return _mean(*whole, kind, None, False)

    found = outcome(lambda *x: attention_loss(*x, kind=kind, heads="mean"), tensors)
    wide = outcome(truth, [x.double() for x in tensors])
    judge(found, wide, outcome(truth, tensors), torch.float32)


def test_mean_over_heads_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows by blocks of 4 of the 48 give what one block gives; packed sequences are the same as each by itself."""
    monkeypatch.setattr(attention_mean, "BLOCK_ELEMENTS", {"cpu": 2 * 4 * 51, "gpu": 2 * 4 * 51})
    tensors, _ = draw((1, 2, sum(LENGTHS), 16, 16, False, False), torch.float32)
    ends = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0)
    options: dict[str, Any] = {"kind": "prob_kl", "heads": "mean", "reduction": "sum"}
    blocks, whole = (
        outcome(lambda *x: attention_loss(*map(_packed, x), cu_seqlens=ends, backend=backend, **options), tensors)  # noqa: B023
        for backend in ("auto", "reference")
    )
    judge_exact(blocks, whole, torch.float32)

    def one_by_one(*x: Tensor) -> Tensor:
        parts = zip(*(y.split(LENGTHS, 2) for y in x), strict=True)
        return torch.stack([attention_loss(*part, **options) for part in parts if part[0].shape[2]]).sum()

    assert isinstance(whole, Outcome)
    judge_exact(outcome(one_by_one, tensors), whole, torch.float32)


def _good() -> dict[str, Any]:
    return {name: torch.zeros(9, 4, 6) for name in ("student_q", "student_k", "teacher_q", "teacher_k")} | {
        "cu_seqlens": torch.tensor([0, 4, 9])
    }


BAD = [
    ({"cu_seqlens": [0, 9]}, TypeError, "cu_seqlens is list, expected a torch.Tensor"),
    (
        {"cu_seqlens": torch.tensor([0.0, 9.0])},
        TypeError,
        "cu_seqlens has dtype torch.float32, expected int32 or int64",
    ),
    ({"cu_seqlens": torch.tensor([[0, 9]])}, ValueError, "cu_seqlens has shape (1, 2), expected (n + 1,)"),
    ({"cu_seqlens": torch.tensor([0, 8])}, ValueError, "cu_seqlens is [0, 8], expected numbers that rise from 0 to 9"),
    ({"cu_seqlens": torch.tensor([0, 7, 5, 9])}, ValueError, "cu_seqlens is [0, 7, 5, 9], expected numbers that rise"),
    ({"cu_seqlens": torch.tensor([0, 9], device="meta")}, ValueError, "cu_seqlens is on meta, expected cpu to match"),
    ({"cu_seqlens": None}, ValueError, "student_q has shape (9, 4, 6), expected (B, H, S, d), with H > 0 and d > 0"),
    ({"mask": torch.ones(1, 9).bool()}, ValueError, "mask came with cu_seqlens, expected one of them"),
    (
        {"student_k": torch.zeros(9, 3, 6)},
        ValueError,
        "student_k has shape (9, 3, 6), expected (9, 4, 6) to match stude",
    ),
    (
        {"teacher_k": torch.zeros(9, 8, 6)},
        ValueError,
        "teacher_k has shape (9, 8, 6), expected (9, 4, 6) to match teach",
    ),
    (
        {"student_q": torch.zeros(9, 0, 6)},
        ValueError,
        "student_q has shape (9, 0, 6), expected (total, H, d) with cu_s",
    ),
    ({"heads": "all"}, ValueError, "heads is 'all', expected one of 'each', 'mean'"),
    (
        {"teacher_q": torch.zeros(9, 2, 6), "teacher_k": torch.zeros(9, 2, 6)},
        ValueError,
        "teacher_q has shape (9, 2, 6), expected (9, 4, d) to match student_q",
    ),
    (
        {"teacher_q": torch.zeros(8, 2, 6), "teacher_k": torch.zeros(8, 2, 6), "heads": "mean"},
        ValueError,
        "teacher_q has shape (8, 2, 6), expected (9, H, d) to match student_q",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[message[:30] for _, _, message in BAD])
def test_bad_calls(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    attention_loss(**_good())
    with pytest.raises(kind) as raised:
        attention_loss(**(_good() | change))
    assert "attention_loss: " + message in str(raised.value)
