"""attention_loss and relation_loss where a softmax is blind or sharp: keys that have a vector in common (the bias of a
key projection), attention sinks of the student's own, and a key far off among keys that agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import near_scores, outcome, textbook
from conftest import DEVICE, available
from judge import Outcome, judge_exact
from torch import Tensor

from fastdistil import attention_loss, relation_loss

BACKENDS = available("reference", "cpu", "triton")
EVERY_ELEMENT = available("reference", "cpu")  # Triton's interpreter takes a second a call
KINDS = ("prob_mse", "prob_kl")
HEADS, LENGTH = 2, 37


def _common(size: float, width: int = 16, heads: int = HEADS) -> Tensor:
    return size * torch.randn(1, heads, 1, width, device=DEVICE)


def _draw(noise: float, width: int = 16, length: int = LENGTH) -> list[Tensor]:
    """student_q, student_k, teacher_q, teacher_k of two heads."""
    teacher = [torch.randn(1, HEADS, length, width, device=DEVICE) for _ in range(2)]
    return [*(x + noise * torch.randn_like(x) for x in teacher), *teacher]


def _mask() -> Tensor:
    mask = torch.ones(1, LENGTH, dtype=torch.bool, device=DEVICE)
    mask[0, 3] = mask[0, 30:] = False
    return mask


def _judge(
    backend: str, kind: str, tensors: list[Tensor], mask: Tensor | None = None, causal: bool = False, **options: Any
) -> None:
    heads = tensors[0].shape[1]
    truth = outcome(
        lambda *x: textbook(*(y.repeat_interleave(heads // y.shape[1], 1) for y in x), kind, mask, causal),
        [x.double() for x in tensors],
    )
    options = {"kind": kind, "mask": mask, "causal": causal, "backend": backend, **options}
    judge_exact(outcome(lambda *x: attention_loss(*x, **options), tensors), truth, tensors[0].dtype)


@pytest.mark.parametrize("side", ["student", "teacher", "both", "same"])
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", EVERY_ELEMENT)
def test_common_vector(backend: str, kind: str, size: float, side: str) -> None:
    tensors = _draw(1e-3)
    one = _common(size)
    other = _common(size) if side == "both" else one
    if side != "teacher":
        tensors[1] = tensors[1] + one
    if side != "student":
        tensors[3] = tensors[3] + other
    _judge(backend, kind, tensors)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_common_vector_of_masked_and_grouped_keys(backend: str, kind: str, causal: bool) -> None:
    tensors = _draw(1e-3)
    tensors[1], tensors[3] = tensors[1][:, :1] + 10 * _common(1.0, heads=1), tensors[3][:, :1] + _common(1.0, heads=1)
    mask = _mask()
    _judge(backend, kind, tensors, mask, causal)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_no_key_is_no_part_of_the_mean(backend: str, kind: str) -> None:
    tensors, mask = _draw(1e-3), _mask()
    options: dict[str, Any] = {"kind": kind, "mask": mask, "reduction": "none", "backend": backend}
    clean = attention_loss(*tensors, **options)
    for x in tensors:
        x[:, :, 31:33] = torch.nan
    assert torch.equal(attention_loss(*tensors, **options), clean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", EVERY_ELEMENT)
def test_a_bad_key_spoils_the_rows_that_see_it(backend: str, kind: str) -> None:
    tensors = _draw(1e-3)
    tensors[1] = tensors[1] + 10
    tensors[1][:, 0, 20] = torch.inf
    tensors[3][:, 1, 20] = torch.nan
    rows = attention_loss(*tensors, kind=kind, causal=True, reduction="none", backend=backend)
    assert rows[..., :20].isfinite().all() and rows[..., 20:].isnan().all()


@pytest.mark.parametrize("noise", [1e-2, 1e-4])
@pytest.mark.parametrize("sizes", [(16, 16), (24, 16)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", EVERY_ELEMENT)
def test_common_vector_in_another_basis(backend: str, kind: str, sizes: tuple[int, int], noise: float) -> None:
    tensors = near_scores(sizes, LENGTH, 1, noise)
    tensors[1] = tensors[1] + 5 * _common(1.0, sizes[0])
    _judge(backend, kind, tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_common_vector_of_packed_sequences(backend: str, kind: str) -> None:
    tensors = [x[0].transpose(0, 1).contiguous() for x in _draw(1e-3)]
    tensors[1] = tensors[1] + _common(3.0)[0].transpose(0, 1)
    offsets = torch.tensor([0, 10, 10, 37], dtype=torch.int32, device=DEVICE)

    def rows(*x: Tensor, backend: str = backend) -> Tensor:
        return attention_loss(*x, kind=kind, cu_seqlens=offsets, backend=backend)

    def one_by_one(*x: Tensor) -> Tensor:
        parts = ([y[a:b].transpose(0, 1)[None] for y in x] for a, b in ((0, 10), (10, 37)))
        items = (10, 27) if kind == "prob_kl" else (100, 27**2)
        losses = [textbook(*part, kind, None, False) * n for part, n in zip(parts, items, strict=True)]
        return torch.stack(losses).sum() / sum(items)

    truth = outcome(one_by_one, [x.double() for x in tensors])
    judge_exact(outcome(rows, tensors), truth, torch.float32)


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("widths", [(32, 32), (48, 32)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_common_vector_of_a_relation(backend: str, kind: str, widths: tuple[int, int], size: float) -> None:
    """As keys the tokens' common vector is not seen, as queries it is: small ones, lest it be all that is."""
    near = widths[0] == widths[1]
    if not near and backend == "triton":
        pytest.skip("its tiles subtract float32 scores where the widths differ")
    teacher = torch.randn(1, LENGTH, widths[1], device=DEVICE)
    student = teacher if near else torch.nn.functional.pad(teacher, (0, 16)) * 1.5**0.25
    heads = 2 if near else 1
    student = student + 1e-3 * torch.randn_like(student)
    common = 0.1 * size * torch.randn(1, 1, widths[1], device=DEVICE)
    teacher = teacher + common
    student = student + (common if near else torch.nn.functional.pad(common, (0, 16)) * 1.5**0.25)
    mask = torch.arange(LENGTH, device=DEVICE)[None] % 9 != 4

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def rows(x: Tensor) -> Tensor:
        return relation_loss(x, teacher, relation_heads=heads, kind=kind, mask=mask, backend=backend)

    def truth(x: Tensor) -> Tensor:
        t = split(teacher.double())
        return textbook(split(x), split(x), t, t, kind, mask, False)

    def of(function: Any, x: Tensor) -> Outcome:
        x = x.detach().clone().requires_grad_()
        value = function(x)
        return Outcome(value, torch.autograd.grad(value, (x,)))

    judge_exact(of(rows, student), of(truth, student.double()), torch.float32)


@pytest.mark.parametrize("teachers", [None, 0, 1], ids=["student alone", "elsewhere", "the same key"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks(backend: str, kind: str, teachers: int | None) -> None:
    """The student's queries have all but about 1e-5 of their probability on key 1; the teacher's none, or another."""
    tensors = _draw(1.0)
    for q, k, at in ((*tensors[:2], 1), (*tensors[2:], teachers)):
        if at is None:
            continue
        q *= 0.3
        k[:, :, at] = torch.sign(k[:, :, at])
        q += (15.0 if q is tensors[0] else 12.0) * k[:, :, [at]] / 4
    _judge(backend, kind, tensors, _mask())


@pytest.mark.parametrize("noise", [1e-1, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", EVERY_ELEMENT)
def test_a_key_far_off(backend: str, kind: str, noise: float) -> None:
    """Of no probability on either side, but 60 and more apart: the others still agree."""
    tensors = _draw(noise)
    for q in tensors[0], tensors[2]:
        q += 3
    tensors[1][:, :, 5], tensors[3][:, :, 5] = -8.0, -16.0
    _judge(backend, kind, tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", EVERY_ELEMENT)
def test_means_over_heads(backend: str, kind: str) -> None:
    """A common vector where the heads are as many, and means that agree where the teacher has each head twice."""
    for repeats in (1, 2):
        tensors = _draw(1e-3)
        tensors[1] = tensors[1] + _common(3.0)
        tensors[2:] = [x.repeat(1, repeats, 1, 1) for x in tensors[2:]]
        for mask in (None, _mask()):
            real = torch.ones(1, LENGTH, dtype=torch.bool, device=DEVICE) if mask is None else mask
            seen = real[:, None, None, :]

            def mean(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor) -> Tensor:
                hidden, both = ~seen, real[:, None] & real[..., None]  # noqa: B023
                p, q = (
                    (x @ y.mT / 4).masked_fill(hidden, -torch.inf).softmax(-1).mean(1)
                    for x, y in ((q_s, k_s), (q_t, k_t))
                )
                if kind == "prob_mse":
                    return torch.where(both, p - q, 0.0).square().sum() / int(both.sum())
                terms = torch.where(both, q * (q.clamp(min=1e-300).log() - p.clamp(min=1e-300).log()), 0.0)
                return terms.sum() / int(real.sum())  # noqa: B023

            truth = outcome(mean, [x.double() for x in tensors])
            options: dict[str, Any] = {"kind": kind, "heads": "mean", "mask": mask, "backend": backend}
            judge_exact(outcome(lambda *x: attention_loss(*x, **options), tensors), truth, torch.float32)  # noqa: B023


def test_scores_see_the_common_vector() -> None:
    """score_mse keeps it, and the digits of the rest, in its tiles and without a map."""
    for length, size in ((21, 3.0), (170, 3.0), (170, 100.0)):
        tensors = _draw(1e-3, length=length)
        both = _common(size)
        tensors[1], tensors[3] = tensors[1] + both, tensors[3] + both
        truth = outcome(lambda *x: textbook(*x, "score_mse", None, False), [x.double() for x in tensors])
        found = outcome(lambda *x: attention_loss(*x, kind="score_mse"), tensors)
        judge_exact(found, truth, torch.float32)
