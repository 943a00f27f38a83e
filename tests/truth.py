"""What is right: the textbook formulas of docs/losses.md in numbers of 31 digits, row by row.

None of fastdistil's forms is used here, so that a fault in their algebra cannot hide: p - q is a difference, KL a sum of
terms of either sign. Inputs are float64 arrays that hold the very inputs of the loss. tests/test_truth.py compares with
mpmath's 50 digits.
"""

from __future__ import annotations

from typing import Any

import double_double as D
import numpy as np
from double_double import DD, NEVER

Array = Any  # numpy.ndarray of float64

# The bound of log(p / q) in gradients where the teacher's probability is 0 (docs/losses.md, section 1).
LARGEST_SLOPE = 1e4


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


def _centred(p: DD, slope: DD) -> Array:
    return (p * (slope - (p * slope).sum(keepdims=True))).double()


def cross_entropy(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Of the rows' labels, (...,) and its gradient in the logits."""
    lp = log_softmax(tempered(logits, 1.0))
    one = np.arange(logits.shape[-1]) == labels[..., None]
    value = -np.take_along_axis(lp.double(), labels[..., None], -1)[..., 0]
    return np.where(value >= -NEVER, np.inf, value), (D.exp(lp) - one.astype(np.float64)).double()
