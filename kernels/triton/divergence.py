"""The divergences of two softmax rows as Triton functions: csrc/rules/divergence.h once more, for any GPU.

share(p, q, delta, gap, turn, beta, rest, own, other, log_ratio, scale) gets student and teacher probabilities,
delta = log p - log q and gap = p - q (both exact) and returns the columns' shares of the row's value and their slopes.
A direct rule's gradient in the tempered student logit is its slope; a centred rule's is p (slope - sum(p slope)).

rest is 1 - beta, formed in float64. A mixture's slopes are relative to an origin (`origin`), of which own, other,
log_ratio and scale tell (of rules without a mixture log_ratio is the origin's delta); turn is the delta less the
origin's. At delta 0 they are the two weights, 0 and 1.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from fastdistil.kernels.triton.numerics import excess, growth, log_both


@triton.jit
def _bounded(delta):
    """Finite even where one side is 0, so that e^delta stays below float32's largest number."""
    return tl.minimum(tl.maximum(delta, -80.0), 80.0)


@triton.jit
def _beyond(turn):
    """How far -turn lies beyond that, which a logarithm of what grows has to add again."""
    return tl.minimum(tl.maximum(-turn - 80.0, 0.0), 1e4)


@triton.jit
def origin(own, other, delta):
    """Where slopes are 0, of a mixture m = own p + other q, with u = m/p and x = q/p: own p/m, other q/m, ln u and
    x / u^2."""
    less_one, x = growth(-delta)
    u = own + other * x
    log_ratio, _ = log_both(other * less_one, u)
    return own / u, other * x / u, log_ratio, x / (u * u)


@triton.jit
def origin_of_slopes(p, q, delta, gap, by_scores, beta, rest, RULE: tl.constexpr, MIXTURE: tl.constexpr):
    """Where a centred rule's slopes are taken from: the student's largest column, here with all that a rule needs of
    it, whose slope would else be nearly the mean that is subtracted from it (rules/pair.h: row_terms); by_scores: its
    scores have a difference. Whether turns are such differences, less that column's; what is subtracted from delta
    where they are not; the slope there; the origin (`origin`)."""
    zero = tl.full((), 0.0, tl.float32)
    own, other, log_own, curve = 1.0, 0.0, 0.0, 1.0
    if MIXTURE is not None:
        zero = tl.where(delta == delta, tl.minimum(tl.maximum(delta, 0.0), 60.0), delta)
        by_scores = by_scores & (zero == delta)
        if MIXTURE == "beta":
            own, other, log_own, curve = origin(beta, rest, zero)
        else:
            own, other, log_own, curve = origin(rest, beta, zero)
    else:
        log_own = tl.where(by_scores, delta, 0.0)
    turn = tl.where(by_scores, 0.0, delta - zero)
    _, anchor = RULE(p, q, delta, gap, turn, beta, rest, own, other, log_own, curve)
    return by_scores, zero, anchor, own, other, log_own, curve


@triton.jit
def forward_kl(p, q, delta, gap, turn, beta, rest, own, other, log_ratio, scale):
    return excess(q, gap, delta), gap


@triton.jit
def reverse_kl(p, q, delta, gap, turn, beta, rest, own, other, log_ratio, scale):
    return excess(p, -gap, -delta), tl.minimum(tl.maximum(turn, -1e4 - log_ratio), 1e4 - log_ratio)


@triton.jit
def jsd(p, q, delta, gap, turn, beta, rest, own, other, log_ratio, scale):
    forth, whole = growth(_bounded(delta))
    m_over_q, _ = log_both(rest * forth, beta + rest * whole)
    back, whole = growth(_bounded(-turn))
    turned, _ = log_both(other * back, own + other * whole)
    turned += _beyond(turn)
    value = beta * excess(q, rest * gap, m_over_q) + rest * excess(p, -beta * gap, log_ratio + turned)
    return value, -rest * turned


@triton.jit
def skew_kl(p, q, delta, gap, turn, beta, rest, own, other, log_ratio, scale):
    forth, whole = growth(_bounded(delta))
    m_over_q, _ = log_both(rest * forth, beta + rest * whole)
    back, whole = growth(_bounded(-turn))
    return excess(q, rest * gap, m_over_q), -rest * rest * (scale * (back / (own + other * whole)))


@triton.jit
def skew_reverse_kl(p, q, delta, gap, turn, beta, rest, own, other, log_ratio, scale):
    back, whole = growth(_bounded(-turn))
    y = other * back
    u = own + other * whole
    log, log_excess = log_both(y, u)
    log += _beyond(turn)
    v = y / tl.maximum(u, 1e-30)
    # -beta p/m - ln(m/p): own v - ln u, where u is near 1 as a sum of two terms of one sign
    near = -log_excess - other * v
    slope = tl.where(tl.abs(y) <= 0.25, near, own * v - log)
    return excess(p, -rest * gap, log_ratio + log), slope


@triton.jit
def tvd(p, q, delta, gap, turn, beta, rest, own, other, log_ratio, scale):
    return 0.5 * tl.abs(gap), tl.where(delta > 0.0, 0.5, tl.where(delta < 0.0, -0.5, 0.0))


@triton.jit
def mse(p, q, delta, gap, turn, beta, rest, own, other, log_ratio, scale):
    """No softmax: delta is a - b, q is 1/V."""
    return delta * delta * q, 2.0 * delta * q


# The same with the origin at delta 0, for callers whose slopes need no other (top-k).
@triton.jit
def plain_forward_kl(p, q, delta, gap, beta):
    return forward_kl(p, q, delta, gap, delta, beta, 1.0 - beta, 1.0 - beta, beta, 0.0, 1.0)


@triton.jit
def plain_reverse_kl(p, q, delta, gap, beta):
    return reverse_kl(p, q, delta, gap, delta, beta, 1.0 - beta, 1.0 - beta, beta, 0.0, 1.0)


@triton.jit
def plain_jsd(p, q, delta, gap, beta):
    return jsd(p, q, delta, gap, delta, beta, 1.0 - beta, 1.0 - beta, beta, 0.0, 1.0)


@triton.jit
def plain_skew_kl(p, q, delta, gap, beta):
    return skew_kl(p, q, delta, gap, delta, beta, 1.0 - beta, 1.0 - beta, beta, 0.0, 1.0)


@triton.jit
def plain_skew_reverse_kl(p, q, delta, gap, beta):
    return skew_reverse_kl(p, q, delta, gap, delta, beta, 1.0 - beta, beta, 1.0 - beta, 0.0, 1.0)


@triton.jit
def plain_tvd(p, q, delta, gap, beta):
    return tvd(p, q, delta, gap, delta, beta, 1.0 - beta, 1.0 - beta, beta, 0.0, 1.0)


@triton.jit
def plain_mse(p, q, delta, gap, beta):
    return mse(p, q, delta, gap, delta, beta, 1.0 - beta, 1.0 - beta, beta, 0.0, 1.0)


class Rule(NamedTuple):
    relative: triton.JITFunction
    share: triton.JITFunction  # with the origin at delta 0
    centred: bool
    mixture: str | None = None  # the student's weight in it
    softmax: bool = True


# In the order of fastdistil.contracts.logit.DIVERGENCES.
RULES = (
    Rule(forward_kl, plain_forward_kl, centred=False),
    Rule(reverse_kl, plain_reverse_kl, centred=True),
    Rule(jsd, plain_jsd, centred=True, mixture="rest"),
    Rule(skew_kl, plain_skew_kl, centred=True, mixture="rest"),
    Rule(skew_reverse_kl, plain_skew_reverse_kl, centred=True, mixture="beta"),
    Rule(tvd, plain_tvd, centred=True),
    Rule(mse, plain_mse, centred=False, softmax=False),
)
