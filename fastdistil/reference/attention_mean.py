"""Losses between the means over the heads of two attention maps (losses.md, section 4): the judge of all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdistil.reference.attention import without_mean
from fastdistil.reference.exact import expm1_minus_x, softmax_difference, through_softmax


class Keys(NamedTuple):
    """Of all heads (B, H, S, d), each less its mean over the keys, which no softmax sees; 0 where masked."""

    student: Tensor
    teacher: Tensor
    difference: Tensor | None  # student minus teacher less its own mean, where the two have one shape


class Means(NamedTuple):
    """Of the maps of some query rows; entries that are not visible hold 0."""

    p: Tensor  # the student's, head by head
    q: Tensor  # the teacher's mean over the heads
    e: Tensor  # the student's mean minus the teacher's


def keys(student_k: Tensor, teacher_k: Tensor, real: Tensor | None, same_shape: bool) -> Keys:
    """real: (B, 1, S, 1) bool, or None for all; the keys hold zeros elsewhere."""
    difference = None
    if same_shape:
        difference = without_mean(student_k.double() - teacher_k.double(), real).to(student_k.dtype)
    return Keys(without_mean(student_k, real), without_mean(teacher_k, real), difference)


def means(
    student_q: Tensor,
    teacher_q: Tensor,
    keys: Keys,
    visible: Tensor,
    student_scale: float,
    teacher_scale: float,
) -> Means:
    """student_q: (B, H_s, R, d_s) for R query rows; teacher_q: likewise with H_t and d_t; visible: (B, R, S) bool. All
    floating tensors in one dtype, finite where something is visible and where it is not."""
    seen = visible[:, None]
    a, b = student_scale * student_q @ keys.student.mT, teacher_scale * teacher_q @ keys.teacher.mT
    p = a.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0.0)
    if keys.difference is not None:  # head by head, so that the difference of the means is exact, too
        dx = student_scale * (student_q - teacher_q) + (student_scale - teacher_scale) * teacher_q
        c = dx @ keys.student.mT + teacher_scale * teacher_q @ keys.difference.mT
        difference = softmax_difference(b, c, seen, a)
        return Means(p, difference.q.mean(1), difference.p_minus_q.mean(1))
    q = b.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0.0).mean(1)
    return Means(p, q, p.mean(1) - q)


def attention(
    student_q: Tensor,
    keys: Keys,
    means: Means,
    visible: Tensor,
    row_scale: Tensor,
    kind: str,
    student_scale: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows of the loss times `row_scale`, and the gradients of their sum.

    student_q, keys, means, visible: as in `means`; row_scale: (B, R), rows with 0 are skipped. kind: "prob_mse" or
    "prob_kl", between the (B, R, S) means. Returns rows (B, R), dstudent_q, dstudent_k; None without `need_grad`.
    """
    p, q, e = means
    rows, dmean = compare(kind, q, e, None if kind == "prob_mse" else p.mean(1), row_scale)
    if not need_grad:
        return rows, None, None
    dmean = (dmean.masked_fill(~visible, 0.0) / p.shape[1])[:, None]
    dscores = through_softmax(p, dmean.expand_as(p), p)
    return rows, student_scale * dscores @ keys.student, student_scale * dscores.mT @ student_q


def compare(kind: str, q: Tensor, e: Tensor, mean: Tensor | None, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B, R) of the loss times row_scale, and the gradient in the student's mean (B, R, S), from the teacher's
    mean q, the difference e of the means and, for prob_kl, the student's mean."""
    if kind == "prob_mse":
        rows, dmean = e.square().sum(-1), 2 * e
    else:
        assert mean is not None
        tiny = torch.finfo(e.dtype).tiny
        growth = torch.where(q > 0, e / q, 1e30).clamp(max=1e30)  # p / q - 1
        near = growth.abs() < 0.5
        delta = torch.where(near, torch.log1p(growth), (mean.clamp(min=tiny) / q.clamp(min=tiny)).log())
        rows = torch.where(near, q * expm1_minus_x(delta.clamp(-1, 1)), e - q * delta).sum(-1)
        # d rows / d p = 1 - q / p up to a constant, which the softmax takes out again
        dmean = e / mean.clamp(min=tiny)
    return torch.where(row_scale != 0, row_scale * rows, 0.0), dmean * row_scale[..., None]
