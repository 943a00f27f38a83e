"""attention_loss and relation_loss where a teacher's query has all but 1e-7 of its probability on one key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, available
from judge import EXACT_GRADIENT, Outcome, error, judge_exact, judge_sharp
from torch import Tensor

from fastdistil import attention_loss, relation_loss

BACKENDS = available("reference", "cpu", "triton")
KINDS = ("prob_kl", "prob_mse")
SIZE = 64

# S, mask, causal, where each query's key is: at tiles' edges of 16, 32 and 64, first, last, and everywhere.
SHAPES = {
    "anywhere": (48, False, False, "anywhere"),
    "first": (33, False, False, "first"),
    "last": (65, False, False, "last"),
    "causal": (50, False, True, "anywhere"),
    "padded": (47, True, False, "anywhere"),
    "padded, causal": (34, True, True, "anywhere"),
    "two keys": (2, False, False, "last"),
}


def _signs(*shape: int) -> Tensor:
    """1 and -1: the scores of their multiples are exact in float32, so that no error is that of a product's rounding,
    which is the relative error of a sharp map's small probabilities."""
    return torch.randint(2, shape, device=DEVICE) * 2.0 - 1


def _draw(
    length: int, masked: bool, causal: bool, where: str, noise: float, heads: int = 1
) -> tuple[list[Tensor], Tensor | None]:
    """Student's and teacher's Q and K (1, heads, S, 64): each query points at one of the keys that it sees."""
    real = torch.ones(length, dtype=torch.bool, device=DEVICE)
    if masked:
        real[1::7] = False
        real[length - 5 :] = False
    keys = _signs(1, heads, length, SIZE)
    seen = [[k for k in range(length) if bool(real[k]) and (k <= i or not causal)] for i in range(length)]
    choice = {"anywhere": lambda s: s[int(torch.randint(len(s), ()))], "first": lambda s: s[0], "last": lambda s: s[-1]}
    top = torch.tensor([choice[where](s) for s in seen], device=DEVICE)
    others = (keys[:, :, top] @ keys.mT / SIZE**0.5).scatter(-1, top[None, None, :, None].expand(1, heads, -1, 1), -8.0)
    # The nearest other key is 17 below: 1e-7 for all of them together.
    steep = (17 / (SIZE**0.5 - others.amax(-1)) * 16).ceil() / 16
    teacher = [keys[:, :, top] * steep[..., None], keys]
    student = [x + noise * torch.randn_like(x) for x in teacher]
    return [*student, *teacher], real[None] if masked else None


def _outcome(rows: Any, tensors: list[Tensor], weights: Tensor) -> Outcome:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    found = rows(*leaves)
    found = found * weights.to(found.dtype)
    return Outcome(found, torch.autograd.grad(found.sum(), leaves))


def _weights(rows: Any, teacher: list[Tensor]) -> Tensor:
    """1 / the loss of each row for a student that is the teacher but for 5% of its scores, lest the least sharp rows be
    all that counts; 1 where there is but one key."""
    found = rows(1.05 * teacher[0].double(), *(x.double() for x in teacher[1:]))
    return torch.where(found > 1e-40, 1 / found, 1.0)


def _judge_attention(backend: str, tensors: list[Tensor], **options: Any) -> None:
    """student_q, student_k, teacher_q, teacher_k; the truth is the reference in float64 (see test_the_truth)."""

    def rows(q: Tensor, k: Tensor, backend: str = "reference") -> Tensor:
        teacher = [x.to(q.dtype) for x in tensors[2:]]
        return attention_loss(q, k, *teacher, reduction="none", backend=backend, **options)

    weights = _weights(rows, tensors[2:])
    truth = _outcome(rows, [x.double() for x in tensors[:2]], weights)
    judge_exact(_outcome(lambda q, k: rows(q, k, backend), tensors[:2], weights), truth, tensors[0].dtype)


@pytest.mark.parametrize("noise", [1e-1, 1e-3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sharp_maps(backend: str, kind: str, shape: Any, noise: float) -> None:
    tensors, mask = _draw(*shape, noise)
    _judge_attention(backend, tensors, kind=kind, mask=mask, causal=shape[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sixteen_bits(backend: str, kind: str, dtype: torch.dtype) -> None:
    tensors, mask = _draw(*SHAPES["padded"], 0.3)
    _judge_attention(backend, [x.to(dtype) for x in tensors], kind=kind, mask=mask)


@pytest.mark.parametrize("noise", [1e-1, 1e-3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sharp_relations(backend: str, kind: str, masked: bool, noise: float) -> None:
    """Every token is its own nearest."""
    teacher = 1.75 * _signs(1, 49, 2 * SIZE)
    student = teacher + noise * torch.randn_like(teacher)
    mask = torch.arange(49, device=DEVICE)[None] % 9 != 4 if masked else None

    def rows(x: Tensor, backend: str = "reference") -> Tensor:
        return relation_loss(
            x, teacher.to(x.dtype), relation_heads=2, kind=kind, mask=mask, reduction="none", backend=backend
        )

    weights = _weights(rows, [teacher])
    truth = _outcome(rows, [student.double()], weights)
    judge_exact(_outcome(lambda x: rows(x, backend), [student], weights), truth, torch.float32)


@pytest.mark.parametrize("noise", [1e-1, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences(backend: str, kind: str, noise: float) -> None:
    """Next to sequences whose scores are as large."""
    parts = [_draw(length, False, False, "anywhere", noise)[0] for length in (20, 25, 15)]
    tensors = [torch.cat(x, 2)[0].transpose(0, 1).contiguous() for x in zip(*parts, strict=True)]
    offsets = torch.tensor([0, 20, 45, 60], dtype=torch.int32, device=DEVICE)
    _judge_attention(backend, tensors, kind=kind, cu_seqlens=offsets)


@pytest.mark.parametrize("noise", [1e-1, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_twins(backend: str, kind: str, noise: float) -> None:
    """Two keys with half of the probability each, at different differences: neither is the row's one sharp key."""
    tensors, _ = _draw(40, False, False, "last", noise)
    tensors[2] = (1.5 * (tensors[3][:, :, [7]] + tensors[3][:, :, [-1]])).expand_as(tensors[2])
    tensors[0] = tensors[2] + noise * torch.randn_like(tensors[2])
    _judge_attention(backend, tensors, kind=kind)


@pytest.mark.parametrize("noise", [1e-1, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_of_heads(backend: str, kind: str, noise: float) -> None:
    tensors, _ = _draw(48, False, False, "anywhere", noise, 2)
    _judge_attention(backend, tensors, kind=kind, heads="mean")


@pytest.mark.parametrize("noise", [1e-1, 1e-3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rounded_scores(backend: str, kind: str, causal: bool, noise: float) -> None:
    """Queries at any angle, rows as sharp as they come: what a trained layer looks like."""
    keys = torch.randn(1, 2, 48, 32, device=DEVICE)
    teacher = [torch.nn.functional.normalize(keys, dim=-1) * size for size in (32**0.5, 20)]
    student = [x + noise * torch.randn_like(x) for x in teacher]

    def total(q: Tensor, k: Tensor, backend: str) -> Tensor:
        exact = [x.to(q.dtype) for x in teacher]
        return attention_loss(q, k, *exact, kind=kind, causal=causal, backend=backend)

    one = torch.ones((), device=DEVICE)
    truth = _outcome(lambda q, k: total(q, k, "reference"), [x.double() for x in student], one)
    judge_sharp(_outcome(lambda q, k: total(q, k, backend), student, one), truth)


@pytest.mark.parametrize("noise", [1e-1, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_truth(kind: str, noise: float) -> None:
    """The reference in float64 against the textbook formula with the extended precision of numpy's long double."""
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("long double is no wider than double here")
    tensors, _ = _draw(48, False, False, "anywhere", noise)
    q_s, k_s, q_t, k_t = (x.cpu().numpy().astype(np.longdouble) for x in tensors)

    def log_softmax(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        scores = np.einsum("bhid,bhjd->bhij", q, k) / np.sqrt(np.longdouble(SIZE))
        scores = scores - scores.max(-1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(q_s, k_s), log_softmax(q_t, k_t)
    p, q = np.exp(log_p), np.exp(log_q)
    assert 1e-8 < np.median(1 - q.max(-1)) < 1e-6
    rows = (q * (log_q - log_p)).sum(-1) if kind == "prob_kl" else np.square(p - q).sum(-1)
    slopes = p - q if kind == "prob_kl" else 2 * p * (p - q - (p * (p - q)).sum(-1, keepdims=True))
    truth = Outcome(*_weighted(rows, slopes, q_s, k_s))
    found = _outcome(
        lambda q, k: attention_loss(
            q, k, *(x.double() for x in tensors[2:]), kind=kind, reduction="none", backend="reference"
        ),
        [x.double() for x in tensors[:2]],
        torch.from_numpy((1 / rows).astype(np.float64)).to(DEVICE),
    )
    # p - q has 19 digits behind 1, of which 1e-7 and the noise take ten: enough for what is asked of float32.
    for ours, theirs in zip((found.value, *found.gradients), (truth.value, *truth.gradients), strict=True):
        assert error(ours, theirs) <= EXACT_GRADIENT[torch.float32]


def _weighted(rows: np.ndarray, slopes: np.ndarray, q_s: np.ndarray, k_s: np.ndarray) -> tuple[Tensor, Any]:
    slopes = slopes / rows[..., None] / np.sqrt(np.longdouble(SIZE))
    dq, dk = np.einsum("bhij,bhjd->bhid", slopes, k_s), np.einsum("bhij,bhid->bhjd", slopes, q_s)
    ones, dq, dk = (torch.from_numpy(x.astype(np.float64)) for x in (rows / rows, dq, dk))
    return ones, (dq, dk)
