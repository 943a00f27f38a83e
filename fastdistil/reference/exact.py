"""Softmax differences that keep their relative precision when student and teacher almost agree (losses.md, section 1).

Notation: `a` student scores, `b` teacher scores, `p` and `q` their softmaxes over the last axis, `A` and `B` their
logsumexps, `delta = (a - A) - (b - B)`. Everything follows from `c = a - b`, which the caller forms as exactly as it
can, and from `D = A - B`, which is never formed as a difference of two rounded logsumexps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


def scaled_expm1(log_weight: Tensor, x: Tensor) -> Tensor:
    """exp(log_weight) * expm1(x), also where the first factor underflows while the second overflows."""
    weight = torch.exp(log_weight)
    return torch.where(x.abs() > 1, torch.exp(log_weight + x) - weight, weight * torch.expm1(x.clamp(-1, 1)))


def log_mass_ratio(b: Tensor, c: Tensor) -> Tensor:
    """D = logsumexp(b + c) - logsumexp(b) over the last axis (kept), -inf entries of `b` being invisible.

    X = sum(exp(b) * expm1(c)) is the difference of the two masses, so D = log1p(X / mass of b), or, where the student
    has the smaller mass, D = -log1p(-X / mass of a): the argument of log1p is never negative, hence never ill
    conditioned. Where X overflows, the maxima lie so far apart that the plain difference is good enough.
    """
    a = b + c
    max_a, max_b = (x.amax(-1, keepdim=True).nan_to_num(neginf=0.0) for x in (a, b))
    mass_a, mass_b = torch.exp(a - max_a).sum(-1, keepdim=True), torch.exp(b - max_b).sum(-1, keepdim=True)
    excess = scaled_expm1(b - max_b, c).sum(-1, keepdim=True)  # in units of exp(max_b)
    ratio = torch.where(excess >= 0, excess / mass_b, -excess * torch.exp(max_b - max_a) / mass_a)
    exact = torch.where(excess >= 0, torch.log1p(ratio), -torch.log1p(ratio))
    plain = (max_a - max_b) + torch.log(mass_a / mass_b)
    return torch.where(torch.isfinite(ratio), exact, plain)


def softmax_difference(b: Tensor, c: Tensor, visible: Tensor | None = None) -> SoftmaxDifference:
    """b, c: (..., V) teacher scores and student minus teacher; visible: bool, broadcastable to them, True = counts."""
    if visible is not None:
        b, c = b.masked_fill(~visible, float("-inf")), c.masked_fill(~visible, 0.0)
    log_q = b - torch.logsumexp(b, -1, keepdim=True)
    delta = c - log_mass_ratio(b, c)
    found = SoftmaxDifference(torch.exp(log_q), delta, scaled_expm1(log_q, delta))
    if visible is None:
        return found
    return SoftmaxDifference(*(x.masked_fill(~visible, 0.0) for x in found))


def forward_kl_rows(difference: SoftmaxDifference) -> Tensor:
    """KL(q || p) of each row as a sum of non-negative terms q * (expm1(delta) - delta)."""
    q, delta, p_minus_q = difference
    small = q * expm1_minus_x(delta.clamp(-1, 1))
    return torch.where(delta.abs() > 1, p_minus_q - torch.where(q > 0, q * delta, 0.0), small).sum(-1)
