"""The divergences of two softmax rows as Triton functions: csrc/rules/divergence.h once more, for any GPU.

share(p, q, delta, gap, beta) gets student and teacher probabilities, delta = log p - log q and gap = p - q (both
exact) and returns the columns' shares of the row's value and their slopes. A direct rule's gradient in the tempered
student logit is its slope; a centred rule's is p (slope - sum(p slope)).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from fastdistil.kernels.triton.numerics import excess, expm1, log1p


@triton.jit
def _bounded(delta):
    """Finite even where one side is 0, so that e^delta stays below float32's largest number."""
    return tl.minimum(tl.maximum(delta, -80.0), 80.0)


@triton.jit
def forward_kl(p, q, delta, gap, beta):
    return excess(q, gap, delta), gap


@triton.jit
def reverse_kl(p, q, delta, gap, beta):
    return excess(p, -gap, -delta), tl.minimum(tl.maximum(delta, -1e4), 1e4)


@triton.jit
def jsd(p, q, delta, gap, beta):
    rest = 1.0 - beta
    m_over_q = log1p(rest * expm1(_bounded(delta)))
    m_over_p = log1p(beta * expm1(_bounded(-delta)))
    value = beta * excess(q, rest * gap, m_over_q) + rest * excess(p, -beta * gap, m_over_p)
    return value, -rest * m_over_p


@triton.jit
def skew_kl(p, q, delta, gap, beta):
    rest = 1.0 - beta
    back = expm1(_bounded(-delta))  # q/p - 1
    value = excess(q, rest * gap, log1p(rest * expm1(_bounded(delta))))
    return value, -rest * rest * back / (1.0 + beta * back)


@triton.jit
def skew_reverse_kl(p, q, delta, gap, beta):
    rest = 1.0 - beta
    back = tl.where(delta > 1e30, -1.0, expm1(_bounded(-delta)))
    skewed = rest * back  # m/p - 1
    m_over_p = log1p(skewed)
    slope = beta * skewed / tl.maximum(1.0 + skewed, 1e-30) - tl.minimum(tl.maximum(m_over_p, -1e4), 1e4)
    return excess(p, -rest * gap, m_over_p), slope


@triton.jit
def tvd(p, q, delta, gap, beta):
    return 0.5 * tl.abs(gap), tl.where(gap > 0.0, 0.5, tl.where(gap < 0.0, -0.5, 0.0))


@triton.jit
def mse(p, q, delta, gap, beta):
    """No softmax: delta is a - b, q is 1/V."""
    return delta * delta * q, 2.0 * delta * q


class Rule(NamedTuple):
    share: triton.JITFunction
    centred: bool
    softmax: bool = True


# In the order of fastdistil.ops.logit_rule.DIVERGENCES.
RULES = (
    Rule(forward_kl, centred=False),
    Rule(reverse_kl, centred=True),
    Rule(jsd, centred=True),
    Rule(skew_kl, centred=True),
    Rule(skew_reverse_kl, centred=True),
    Rule(tvd, centred=True),
    Rule(mse, centred=False, softmax=False),
)
