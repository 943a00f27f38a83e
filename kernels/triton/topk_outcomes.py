"""The K + 1 outcomes of topk_logit_loss: scores of student and teacher, their exact difference, value and gradient.

Scores are float64, and so is what is taken from them where the student is far from its teacher. Where it is near, and a
teacher may be sure of one outcome, no difference of logsumexps has digits: docs/losses.md, section 1, as in
logit_statistics.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdistil.kernels.triton.divergence import origin_of_slopes
from fastdistil.kernels.triton.numerics import expm1_near


@triton.jit
def _log1p_small(x):
    """ln(1 + x) for |x| <= 1e-3, within 2e-13."""
    return x * (1.0 - x * (0.5 - x * (1.0 / 3.0 - 0.25 * x)))


@triton.jit
def _log_add(top, total, other):
    """log(total e^top + e^other) in float64."""
    m = tl.maximum(top, other)
    unit = tl.where(m == float("-inf"), 0.0, m)
    near = tl.where(total == 0.0, 0.0, total * tl.exp(tl.where(total == 0.0, 0.0, top - unit)))
    return m + tl.log(near + tl.exp(other - unit))


@triton.jit
def _entries(student_ptr, values_ptr, chosen_ptr, lanes, V, K, inv_t):
    """Scores of student and teacher (float64) at some of the K named columns; -inf where an entry is not there."""
    column = tl.load(chosen_ptr + lanes, mask=lanes < K, other=V)
    u = tl.load(values_ptr + lanes, mask=lanes < K, other=float("-inf"))
    z = tl.load(student_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
    return z.to(tl.float64) * inv_t, u


@triton.jit
def _named(student_ptr, values_ptr, chosen_ptr, V, K, inv_t, KBLOCK: tl.constexpr):
    """Of the named columns: the largest student score, u there and the mass relative to it; the largest u, a - u there
    and the sum of e^u relative to it."""
    lanes = tl.arange(0, KBLOCK)
    top_a = tl.max(tl.full((KBLOCK,), float("-inf"), tl.float64), 0)
    top_u, ref, own_u = top_a, top_a, top_a
    for begin in range(0, K, KBLOCK):
        a, u = _entries(student_ptr, values_ptr, chosen_ptr, begin + lanes, V, K, inv_t)
        largest, likeliest = tl.max(u, 0), tl.max(a, 0)
        at_top = tl.max(tl.where((u == largest) & (u != float("-inf")), a - u, float("-inf")), 0)
        ref = tl.where(largest > top_u, at_top, ref)
        own_u = tl.where(likeliest > top_a, tl.max(tl.where(a == likeliest, u, float("-inf")), 0), own_u)
        top_a = tl.maximum(top_a, likeliest)
        top_u = tl.maximum(top_u, largest)
    sum_a = tl.sum(tl.zeros((KBLOCK,), tl.float64), 0)
    sum_u = sum_a
    unit_a, unit_u = tl.where(top_a == float("-inf"), 0.0, top_a), tl.where(top_u == float("-inf"), 0.0, top_u)
    for begin in range(0, K, KBLOCK):
        a, u = _entries(student_ptr, values_ptr, chosen_ptr, begin + lanes, V, K, inv_t)
        sum_a += tl.sum(tl.exp(a - unit_a), 0)
        sum_u += tl.sum(tl.exp(u - unit_u), 0)
    return top_a, own_u, sum_a, top_u, ref, sum_u


@triton.jit
def _difference(a, u):
    """a - u, 0 where neither side has mass."""
    return tl.where((a == float("-inf")) & (u == float("-inf")), 0.0, a - u)


@triton.jit
def _mass(a, u, top, ref):
    """An outcome's share of S = sum e^(u - top) and of X = sum e^(a - top - ref) - S."""
    weight = tl.exp((u - top).to(tl.float32))
    c = (_difference(a, u) - ref).to(tl.float32)
    near = tl.abs(c) <= 1.0
    other = tl.exp(((a - top) - ref).to(tl.float32)) - weight
    return weight, tl.where(near, weight * expm1_near(tl.where(near, c, 0.0)), other)


@triton.jit
def _known(student_ptr, values_ptr, chosen_ptr, V, K, top, ref, inv_t, KBLOCK: tl.constexpr):
    """The named columns' S and X."""
    lanes = tl.arange(0, KBLOCK)
    total, difference = 0.0, 0.0
    for begin in range(0, K, KBLOCK):
        a, u = _entries(student_ptr, values_ptr, chosen_ptr, begin + lanes, V, K, inv_t)
        weight, x = _mass(a, u, top, ref)
        total += tl.sum(weight, 0)
        difference += tl.sum(x, 0)
    return total, difference


@triton.jit
def _log_ratio(rho, omega, top, ref, total, difference):
    """D - ref, D = lse(a) - lse(u), from the named columns' S and X and the rest's two scores; infinite where it is so
    large that the difference of float64 logsumexps has the digits."""
    weight, x = _mass(rho, omega, top, ref)
    ratio = (difference + x) / (total + weight)
    return tl.where(tl.abs(ratio) <= 1e-3, _log1p_small(ratio), float("inf"))


@triton.jit
def _column(a, u, lse_a, lse_u, ref, log_ratio):
    """p, q, delta and gap of an outcome, all 0 where neither side has mass."""
    d = _difference(a, u)
    c = (d - ref).to(tl.float32) - log_ratio
    none = (a == float("-inf")) & (u == float("-inf"))
    c = tl.where(tl.abs(c) <= 1.0, c, (a - lse_a) - (u - lse_u))
    delta = tl.where(none, 0.0, c).to(tl.float32)
    p, q = tl.exp(a - lse_a).to(tl.float32), tl.exp(u - lse_u).to(tl.float32)
    near = tl.abs(delta) <= 1.0
    return p, q, delta, tl.where(near, q * expm1_near(tl.where(near, delta, 0.0)), p - q)


@triton.jit
def _slope(
    a, u, p, q, delta, gap, own_a, own_u, by_scores, zero, anchor, beta, rest, own, other, log_own, curve,
    RULE: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """An outcome's share of the value, and its slope; of a centred rule relative to that of the student's largest
    outcome (own_a, own_u), exactly 0 there: the gradient of a student that is sure of it, the difference of that slope
    and almost the same mean, would be rounding. The turn of divergence.py is a difference of scores where it can be."""
    turn = delta
    if CENTRED:
        turn = tl.where(by_scores, (_difference(a, u) - (own_a - own_u)).to(tl.float32), delta - zero)
    value, slope = RULE(p, q, delta, gap, turn, beta, rest, own, other, log_own, curve)
    if CENTRED:
        slope = tl.where((a == own_a) & (u == own_u), 0.0, slope - anchor)
    return value, slope


@triton.jit
def _outcomes(
    student_ptr, values_ptr, chosen_ptr, named_ptr, V, K, rho, omega, own_a, own_u, ref, lse_a, lse_u, log_ratio,
    slope_lse, slope_ratio, scale, inv_t, beta, rest, RULE: tl.constexpr, CENTRED: tl.constexpr, MIXTURE: tl.constexpr,
    ZERO: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    """The row's value and the gradient in rho, without scale; the K gradients, times scale, go to named_ptr.

    ZERO: with forward_kl, the value without the rest's term q (-delta), sum q_k (-delta_k) = sum excess_k + gap_rest,
    or as it stands where the teacher knows less than half; the gradient is against a teacher of the K columns alone,
    whose log-mass and D are slope_lse and slope_ratio."""
    lanes = tl.arange(0, KBLOCK)
    by_scores, zero, anchor = False, 0.0, 0.0
    own, other, log_own, curve = 1.0, 0.0, 0.0, 1.0
    if CENTRED:
        # Names of their own: what a loop below makes anew in another shape may not exist before it.
        p_own, q_own, delta_own, gap_own = _column(own_a, own_u, lse_a, lse_u, ref, log_ratio)
        by_scores, zero, anchor, own, other, log_own, curve = origin_of_slopes(
            p_own, q_own, delta_own, gap_own, tl.abs(own_a - own_u) < 1e6, beta, rest, RULE, MIXTURE
        )
    p_rest, q_rest, delta_rest, gap_rest = _column(rho, omega, lse_a, lse_u, ref, log_ratio)
    value, slope_rest = _slope(
        rho, omega, p_rest, q_rest, delta_rest, gap_rest, own_a, own_u, by_scores, zero, anchor, beta, rest, own, other,
        log_own, curve, RULE, CENTRED,
    )  # fmt: skip
    if ZERO:
        value = tl.where(q_rest > 0.5, 0.0, gap_rest)
        slope_rest = p_rest
    centre = p_rest * slope_rest
    for begin in range(0, K, KBLOCK):
        a, u = _entries(student_ptr, values_ptr, chosen_ptr, begin + lanes, V, K, inv_t)
        p, q, delta, gap = _column(a, u, lse_a, lse_u, ref, log_ratio)
        v, slope = _slope(
            a, u, p, q, delta, gap, own_a, own_u, by_scores, zero, anchor, beta, rest, own, other, log_own, curve, RULE,
            CENTRED,
        )  # fmt: skip
        if ZERO:
            v = tl.where(q_rest > 0.5, tl.where(q == 0.0, 0.0, -q * delta), v)
        value += tl.sum(v, 0)
        centre += tl.sum(p * slope, 0)
    for begin in range(0, K, KBLOCK):
        a, u = _entries(student_ptr, values_ptr, chosen_ptr, begin + lanes, V, K, inv_t)
        p, q, delta, gap = _column(a, u, lse_a, slope_lse, ref, slope_ratio)
        _, slope = _slope(
            a, u, p, q, delta, gap, own_a, own_u, by_scores, zero, anchor, beta, rest, own, other, log_own, curve, RULE,
            CENTRED,
        )  # fmt: skip
        g = p * (slope - centre) if CENTRED else slope
        tl.store(named_ptr + begin + lanes, g * scale, mask=begin + lanes < K)
    return value, p_rest * (slope_rest - centre) if CENTRED else slope_rest
