"""What is right: the textbook formulas of docs/losses.md in numbers of 31 digits, row by row.

None of fastdistil's forms is used here, so that a fault in their algebra cannot hide: p - q is a difference, KL a sum of
terms of either sign. Inputs are float64 arrays that hold the very inputs of the loss. tests/losses/test_rows.py compares with
mpmath's 50 digits.
"""

from __future__ import annotations

import math
from typing import Any

import double_double as D
import numpy as np
import torch
from double_double import DD, NEVER

Array = Any  # numpy.ndarray of float64

# The bound of log(p / q) in gradients where the teacher's probability is 0 (docs/losses.md, section 1).
LARGEST_SLOPE = 1e4
SMALLEST_NORMAL = 2.0**-126  # of float32


def log_softmax(x: DD) -> DD:
    """Over the last axis; absent columns are at NEVER and stay there."""
    above = x - x.max()
    found = above - D.log(D.exp(above).sum(keepdims=True))
    return D.where(x.hi <= NEVER, NEVER, found)


def tempered(logits: Array, temperature: float) -> DD:
    """logits / temperature, columns of -inf at NEVER."""
    absent = np.isneginf(logits)
    return D.where(absent, NEVER, DD(np.where(absent, 0.0, logits)) / temperature)


def divergence(name: str, beta: float, a: DD, b: DD) -> tuple[Array, Array]:
    """The value of each row (...,) and its gradient in the tempered student logits a (..., V)."""
    if name == "mse":
        d = a - b
        return ((d * d).sum() / float(a.shape[-1])).double(), (d * (2.0 / a.shape[-1])).double()
    return of_log_probabilities(name, beta, log_softmax(a), log_softmax(b))


def of_log_probabilities(name: str, beta: float, lp: DD, lq: DD) -> tuple[Array, Array]:
    """The same from log p and log q; absent columns are at NEVER."""
    p, q = D.exp(lp), D.exp(lq)
    no_p, no_q = p.hi == 0, q.hi == 0
    if name == "tvd":
        gap = p - q
        sign = np.sign(gap.hi)
        return (DD(0.5 * np.abs(gap.hi), 0.5 * gap.lo * sign).sum()).double(), _centred(p, DD(0.5 * sign))
    if name == "nla":
        return _negative_log_acceptance(lp, lq)
    if name == "lk_hybrid":
        share = D.exp(D.exp(_log_sum(D.where((lp - lq).hi < 0, lp, lq))) * -beta)[..., None]
        kl, tvd = of_log_probabilities("forward_kl", 0.5, lp, lq), of_log_probabilities("tvd", 0.5, lp, lq)
        rest = D.dd(1.0) - share
        value = (share[..., 0] * kl[0] + rest[..., 0] * tvd[0]).double()
        return np.where(np.isinf(kl[0]), np.inf, value), (share * kl[1] + rest * tvd[1]).double()
    if name == "forward_kl" or (name == "skew_kl" and beta == 0):
        value = (q * (lq - lp)).sum().double()
        return np.where((no_p & (lp.hi <= NEVER) & ~no_q).any(-1), np.inf, value), (p - q).double()
    if name == "reverse_kl" or (name == "skew_reverse_kl" and beta == 0):
        delta = lp - lq
        value = (p * delta).sum().double()
        bounded = D.where(np.abs(delta.hi) > LARGEST_SLOPE, np.sign(delta.hi) * LARGEST_SLOPE, delta)
        return np.where((no_q & (lq.hi <= NEVER) & ~no_p).any(-1), np.inf, value), _centred(p, bounded)
    rest = D.dd(1.0) - beta
    if name == "skew_reverse_kl":
        m = p * beta + q * rest
        delta = lp - D.where(m.hi < 1e-290, lp, D.log(m))
        value = (p * delta).sum().double()
        return value, _centred(p, delta - p * beta / D.where(m.hi < 1e-290, 1.0, m))
    m = q * beta + p * rest
    lm = D.log(m)
    if name == "skew_kl":
        r = rest * p * q / D.where(m.hi < 1e-290, 1.0, m)
        return (q * (lq - lm)).sum().double(), (p * r.sum(keepdims=True) - r).double()
    assert name == "jsd", name
    delta = lp - D.where(m.hi < 1e-290, lp, lm)
    own = (p * delta).sum(keepdims=True)
    value = ((q * (lq - D.where(m.hi < 1e-290, lq, lm))).sum() * beta + own[..., 0] * rest).double()
    return value, (rest * p * (delta - own)).double()


def _log_sum(x: DD) -> DD:
    """ln of the sum of e^x, NEVER where nothing is there."""
    top = D.where(x.max().hi <= NEVER, 0.0, x.max())
    total = D.exp(x - top).sum()
    return D.where(total.hi == 0, NEVER, D.log(D.where(total.hi == 0, 1.0, total)) + top[..., 0])


def _negative_log_acceptance(lp: DD, lq: DD) -> tuple[Array, Array]:
    """-ln(sum min(p, q)); the gradient p S - p / alpha where p < q, S the sum of p / alpha there, of ties the half."""
    sign = np.sign((lp - lq).hi)
    log_alpha = _log_sum(D.where(sign < 0, lp, lq))
    none = log_alpha.hi <= NEVER / 2
    share = D.where(none[..., None] | (sign > 0), 0.0, D.exp(lp - log_alpha[..., None])) * np.where(sign < 0, 1.0, 0.5)
    gradient = (D.exp(lp) * share.sum(keepdims=True) - share).double()
    return np.where(none, np.inf, (log_alpha * -1.0).double()), np.where(none[..., None], 0.0, gradient)


def infinite_by_underflow(name: str, beta: float, a: DD, b: DD) -> Array:
    """Rows (...,) whose value is infinite only for the sake of probabilities below float32's smallest normal number,
    which may be taken for 0: then it is the sum of the others."""
    lp, lq = log_softmax(a), log_softmax(b)
    if name == "reverse_kl" or (name == "skew_reverse_kl" and beta == 0):
        there, absent = lp.hi, lq.hi <= NEVER
    elif name in ("forward_kl", "lk_hybrid") or (name == "skew_kl" and beta == 0):
        there, absent = lq.hi, lp.hi <= NEVER
    else:
        return np.zeros(lp.hi.shape[:-1], bool)
    return ~(absent & (there >= math.log(SMALLEST_NORMAL))).any(-1) & (absent & (there > NEVER)).any(-1)


def _centred(p: DD, slope: DD) -> Array:
    return (p * (slope - (p * slope).sum(keepdims=True))).double()


def cross_entropy(z: DD, labels: Array) -> tuple[Array, Array]:
    """Of the rows' labels, (...,) and its gradient in the logits z."""
    lp = log_softmax(z)
    one = np.arange(z.shape[-1]) == labels[..., None]
    value = -np.take_along_axis(lp.double(), labels[..., None], -1)[..., 0]
    return np.where(value >= -NEVER, np.inf, value), (D.exp(lp) - one.astype(np.float64)).double()


def tail_of(u: Array, ulp: float) -> tuple[DD, Array]:
    """What K logarithms of probabilities (N, K) leave of 1, and the rounding that it has where they have theirs."""
    q = D.exp(D.where(np.isneginf(u), NEVER, np.maximum(u, -1e9)))
    floor = np.maximum(ulp * (q.double() * np.abs(np.where(q.hi > 0, u, 0.0))).sum(-1), min(ulp, 2.0**-24))
    return 1.0 - q.sum(), floor


def topk(
    name: str, beta: float, tail: str, a: DD, u: Array, columns: Array, given: Array | None, ulp: float
) -> tuple[Array, Array]:
    """From a teacher of K known columns (docs/losses.md, section 1a): a (N, V) the student's tempered logits, u (N, K)
    logarithms of probabilities, columns (N, K) where they belong, -1 for entries without a column, given (N,) the
    logarithm of all other columns' mass or None, ulp the rounding of a stored value near 1."""
    n, v = a.shape
    q = D.exp(D.where(np.isneginf(u), NEVER, np.maximum(u, -1e9)))
    kept = D.where(columns < 0, 0.0, q)
    there = (columns >= 0) & ~np.isneginf(u)
    if given is None:
        rest, floor = tail_of(u, ulp)
        rest = D.where(rest.hi < floor, floor, rest)
    else:
        rest = D.exp(D.where(np.isneginf(given), NEVER, np.maximum(given, -1e9)))
    if tail == "renormalize":
        rest = DD(np.zeros(n))
    whole = there.sum(-1) == v
    if tail == "bucket":
        rest = D.where(whole, 0.0, rest)
    every = np.arange(n)[:, None]
    lp = log_softmax(a)
    at = np.maximum(columns, 0)
    chosen = np.zeros((n, v), bool)
    np.logical_or.at(chosen, (np.broadcast_to(every, at.shape)[there], at[there]), True)
    p = D.exp(lp)
    if tail == "zero":
        partial = (columns < 0).any(-1) | (given is not None)
        unit = D.where(partial, kept.sum() + rest, 1.0)
        share = kept / unit[:, None]
        lq = D.where(there, DD(np.where(there, u, 0.0)) - D.log(unit)[:, None], NEVER)
        value = D.where(there, share * (lq - lp[every, at]), 0.0).sum().double()
        gradient = p * share.sum(keepdims=True)
        scattered = DD(np.zeros((n, v)), np.zeros((n, v)))
        scattered.hi[np.broadcast_to(every, at.shape)[there], at[there]] = share.hi[there]
        scattered.lo[np.broadcast_to(every, at.shape)[there], at[there]] = share.lo[there]
        return value, (gradient - scattered).double()
    # The logarithm of the others' sum, which itself may underflow.
    others = D.where(chosen, NEVER, lp)
    largest = D.where(others.max().hi <= NEVER, 0.0, others.max())
    above = D.exp(others - largest)
    some = above.hi.max(-1, keepdims=True) > 0
    lp_rest = D.where(some, D.log(D.where(some, above.sum(keepdims=True), 1.0)) + largest, NEVER)
    outcomes_p = D.where_last(D.where(there, lp[every, at], NEVER), lp_rest)
    # From the logarithms themselves: a probability may be too small for any number.
    log_rest = D.log(rest)
    if given is not None:
        log_rest = D.where(log_rest.hi <= NEVER, np.where((rest.hi == 0) & (tail == "bucket") & ~whole & ~np.isneginf(given), given, NEVER), log_rest)  # fmt: skip
    known = D.where_last(D.where(there, np.where(there, u, 0.0), NEVER), log_rest[:, None])
    lq = D.where(known.hi <= NEVER, NEVER, known - D.log(kept.sum() + rest)[:, None])
    value, slope = of_log_probabilities(name, beta, outcomes_p, lq)
    share = D.exp(D.where(chosen | ~some, NEVER, lp - lp_rest)).double()
    gradient = np.where(chosen, 0.0, slope[:, -1:] * share)
    gradient[np.broadcast_to(every, at.shape)[there], at[there]] = slope[:, :-1][there]
    return value, gradient


def hidden(form: str, h: DD, t: DD) -> tuple[Array, Array]:
    """Values (N,) and gradients in h (N, D)."""
    if form == "kl":
        return divergence("forward_kl", 0.5, h, t)
    if form == "mse":
        return divergence("mse", 0.5, h, t)
    h, length_h = _unit(h)
    t, _ = _unit(t)
    cos = (h * t).sum(keepdims=True)
    empty = (h.hi == 0).all(-1) | (t.hi == 0).all(-1)
    gradient = np.where(empty[:, None], 0.0, ((h * cos - t) / length_h).double())
    return np.where(empty, 1.0, (1.0 - cos)[:, 0].double()), gradient


def _unit(x: DD) -> tuple[DD, DD]:
    """Directions and lengths, which are 1 where x is 0. The largest entry is divided by first: no square overflows."""
    _, power = np.frexp(np.abs(x.hi).max(-1, keepdims=True))
    scale = np.exp2(-power.astype(np.float64))
    x = DD(x.hi * scale, x.lo * scale)
    squared = (x * x).sum(keepdims=True)
    length = D.where(squared.hi > 0, D.sqrt(squared), 1.0)
    return x / length, DD(length.hi / scale, length.lo / scale)


def product(x: Array, y: Array) -> DD:
    """x yᵀ of x (..., N, d) and y (..., M, d), which hold float32 numbers: float64 has their products exactly."""
    return DD(x[..., :, None, :] * y[..., None, :, :]).sum()


def capped(z: DD, scale: float, cap: float) -> tuple[DD, Array]:
    """cap tanh(scale z / cap), or scale z where cap is 0, and the derivative."""
    z = z * scale
    if cap == 0:
        return z, np.full(z.shape, scale)
    x = z / cap
    sign = np.where(x.hi < 0, -1.0, 1.0)
    e = D.exp(DD(x.hi * sign * -2, x.lo * sign * -2))
    tanh = (1.0 - e) / (e + 1.0)
    slope = 4 * e.double() / (1 + e.double()) ** 2
    return DD(tanh.hi * sign, tanh.lo * sign) * cap, scale * slope


def gelu(x: DD) -> tuple[Array, Array]:
    """The exact GELU and its derivative, in float64 (erfc keeps its relative precision)."""
    z = x.double()
    half = 0.5 * torch.special.erfc(torch.from_numpy(-z / math.sqrt(2))).numpy()
    return z * half, half + z * np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def maps(form: str, a: DD, b: DD, visible: Array, mean_of_heads: bool) -> tuple[Array, Array]:
    """Values of the query rows (B, H, S), H = 1 for a mean, and gradients in the student's scores a (B, H_s, S, S)."""
    if form == "score_mse":
        if mean_of_heads:
            d = (a.sum(1) / float(a.shape[1]) - b.sum(1) / float(b.shape[1]))[:, None]
        else:
            d = a - b
        d = D.where(visible, d, 0.0)
        share = 2.0 / a.shape[1] if mean_of_heads else 2.0
        return (d * d).sum().double(), np.broadcast_to((d * share).double(), a.shape)
    seen = visible.any(-1)[..., None]
    lp, lq = (log_softmax(D.where(visible | ~seen, x, NEVER)) for x in (a, b))
    p, q = (D.where(visible, D.exp(x), 0.0) for x in (lp, lq))
    p_, q_ = p, q
    if mean_of_heads:
        p_, q_ = ((x.sum(1) / float(x.shape[1]))[:, None] for x in (p, q))
    if form == "prob_mse":
        d = p_ - q_
        value, slope = (d * d).sum().double(), d * 2.0
    else:
        ratio = D.log(D.where(q_.hi > 0, q_, 1.0)) - D.log(D.where(p_.hi > 0, p_, 1.0))
        value = np.where(((p_.hi == 0) & (q_.hi > 0)).any(-1), np.inf, (q_ * ratio).sum().double())
        slope = (p_ - q_) / D.where(p_.hi > 1e-290, p_, 1.0)  # 1 - q/p: the 1 is centred away
    if not mean_of_heads:
        if form == "prob_kl":  # from the logarithms, which do not underflow
            return (q * D.where(visible, lq - lp, 0.0)).sum().double(), (p - q).double()
        return value, _centred(p, slope)
    slope = slope / float(p.shape[1])
    return value, _centred(p, slope)
