"""Softmax differences that keep their relative precision when student and teacher almost agree (losses.md, section 1).

Notation: `a` student scores, `b` teacher scores, `p` and `q` their softmaxes over the last axis, `A` and `B` their
logsumexps, `delta = (a - A) - (b - B)`. Everything follows from `c = a - b`, which the caller forms as exactly as it
can, and from `D = A - B`, which is never formed as a difference of two rounded logsumexps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# A larger difference of scores carries more rounding itself than the plain difference of two probabilities.
LARGEST_EXACT = 16.0


class SoftmaxDifference(NamedTuple):
    """What a row rule needs of two softmaxes; entries that are not visible hold 0 in all three."""

    q: Tensor  # teacher's probabilities
    delta: Tensor  # log p - log q
    p_minus_q: Tensor  # q * expm1(delta)


def expm1_minus_x(x: Tensor) -> Tensor:
    """expm1(x) - x, by its Taylor series where |x| < 0.5 (14 terms: below 1e-17 of the first), plainly beyond."""
    series = torch.ones_like(x)
    for n in range(15, 2, -1):
        series = 1 + series * x / n
    return torch.where(x.abs() < 0.5, 0.5 * x * x * series, torch.expm1(x) - x)


def scaled_expm1(log_weight: Tensor, x: Tensor, log_product: Tensor | None = None) -> Tensor:
    """exp(log_weight) * expm1(x), as exp(log_product) - exp(log_weight) where |x| > 1: there the first factor may
    underflow while the second overflows. log_product: log_weight + x, where it is known better than as their sum."""
    weight = torch.exp(log_weight)
    log_product = log_weight + x if log_product is None else log_product
    return torch.where(x.abs() > 1, torch.exp(log_product) - weight, weight * torch.expm1(x.clamp(-1, 1)))


def log_mass_ratio(b: Tensor, c: Tensor, a: Tensor | None = None) -> Tensor:
    """D = logsumexp(b + c) - logsumexp(b) over the last axis (kept), -inf entries of `b` being invisible.

    `a` is b + c, for callers whose student has mass where b is -inf.

    X = sum(exp(b) * expm1(c)) is the difference of the two masses, so D = log1p(X / mass of b), or, where the student
    has the smaller mass, D = -log1p(-X / mass of a): the argument of log1p is never negative, hence never ill
    conditioned. Where X overflows, the maxima lie so far apart that the plain difference is good enough.
    """
    a = b + c if a is None else a
    max_a, max_b = (x.amax(-1, keepdim=True).nan_to_num(neginf=0.0) for x in (a, b))
    mass_a, mass_b = torch.exp(a - max_a).sum(-1, keepdim=True), torch.exp(b - max_b).sum(-1, keepdim=True)
    excess = scaled_expm1(b - max_b, c, a - max_b).sum(-1, keepdim=True)  # in units of exp(max_b)
    ratio = torch.where(excess >= 0, excess / mass_b, -excess * torch.exp(max_b - max_a) / mass_a)
    exact = torch.where(excess >= 0, torch.log1p(ratio), -torch.log1p(ratio))
    plain = (max_a - max_b) + torch.log(mass_a / mass_b)
    return torch.where(torch.isfinite(ratio), exact, plain)


def usable_reference(b: Tensor, c: Tensor) -> Tensor:
    """c at the largest teacher score of each row (..., 1), 0 where that is not finite. Relative to it the D of a
    confident teacher is small, and leaves delta its digits."""
    found = c.gather(-1, b.argmax(-1, keepdim=True))
    return torch.where(found.abs() < 1e6, found, 0.0)


def softmax_difference(
    b: Tensor, c: Tensor, visible: Tensor | None = None, a: Tensor | None = None
) -> SoftmaxDifference:
    """b, c: (..., V) teacher scores and student minus teacher; visible: bool, broadcastable to them, True = counts.

    a: student scores where they are known better than as b + c, which matters where the two are far apart: there p - q
    is the plain difference, with p from `a` and summing to 1.
    """
    a = b + c if a is None else a
    if visible is not None:
        a, b = (x.masked_fill(~visible, float("-inf")) for x in (a, b))
        c = c.masked_fill(~visible, 0.0)
    reference = usable_reference(b, c)
    a, c = a - reference, c - reference
    log_p, log_q = torch.log_softmax(a, -1), torch.log_softmax(b, -1)  # unlike x - logsumexp(x), exact for large scores
    p, q = log_p.exp(), log_q.exp()
    delta = c - log_mass_ratio(b, c)
    near = (delta.abs() <= 1) & (c.abs() <= LARGEST_EXACT)
    delta = torch.where(near | (q == 0), delta, log_p - log_q)
    found = SoftmaxDifference(q, delta, torch.where(near, q * torch.expm1(delta.clamp(-1, 1)), p - q))
    if visible is None:
        return found
    return SoftmaxDifference(*(x.masked_fill(~visible, 0.0) for x in found))


def forward_kl_rows(difference: SoftmaxDifference) -> Tensor:
    """KL(q || p) of each row as a sum of non-negative terms q * (expm1(delta) - delta)."""
    q, delta, p_minus_q = difference
    small = q * expm1_minus_x(delta.clamp(-1, 1))
    return torch.where(delta.abs() > 1, p_minus_q - torch.where(q > 0, q * delta, 0.0), small).sum(-1)


def through_softmax(p: Tensor, slopes: Tensor, q: Tensor) -> Tensor:
    """p * (slopes - sum(p * slopes)), the gradient in the scores of p (..., V), from the slopes in p itself.

    The slopes are taken relative to that at the largest q of the row: it changes nothing but that a sharp row's own,
    whose probability is 1 - 1e-7, is not the difference of a number and its mean.
    """
    slopes = slopes - slopes.gather(-1, q.argmax(-1, keepdim=True))
    return p * (slopes - (p * slopes).sum(-1, keepdim=True))
