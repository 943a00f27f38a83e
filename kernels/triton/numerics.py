"""expm1, log1p and their kin for float32 blocks: Triton's core has none, and libdevice's do not run in the interpreter.

Small arguments take a polynomial, larger ones tl.exp and tl.log, which are accurate there (tl.log's error near 1 is
absolute: log(1 + x) would lose a small x).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _excess_series(x):
    """(expm1(x) - x) / x^2 for |x| <= 1: Taylor terms up to x^8 / 10!, the next is below half an ulp."""
    s = 2.7557319e-7 * x + 2.7557319e-6
    s = s * x + 2.4801587e-5
    s = s * x + 1.9841270e-4
    s = s * x + 1.3888889e-3
    s = s * x + 8.3333333e-3
    s = s * x + 4.1666667e-2
    s = s * x + 1.6666667e-1
    return s * x + 0.5


@triton.jit
def expm1_near(x):
    """e^x - 1 with full relative precision for |x| <= 1; of no use beyond."""
    return x + x * x * _excess_series(x)


@triton.jit
def expm1(x):
    """e^x - 1 with full relative precision."""
    return tl.where(tl.abs(x) <= 1.0, expm1_near(x), tl.exp(x) - 1.0)


@triton.jit
def expm1_minus_x(x):
    """e^x - 1 - x with full relative precision."""
    return tl.where(tl.abs(x) <= 1.0, x * x * _excess_series(x), tl.exp(x) - 1.0 - x)


@triton.jit
def log1p(x):
    """ln(1 + x) with full relative precision for x >= -1."""
    s = x / (2.0 + x)
    z = s * s
    t = 1.1111111e-1 * z + 1.4285714e-1
    t = t * z + 2.0e-1
    t = t * z + 3.3333333e-1
    near = 2.0 * s + 2.0 * s * z * t
    return tl.where((x > -0.29) & (x < 0.41), near, tl.log(1.0 + x))


@triton.jit
def growth(x):
    """e^x - 1 and e^x, each with full relative precision, for |x| <= 80."""
    whole = tl.exp(x)
    return tl.where(tl.abs(x) <= 1.0, expm1_near(x), whole - 1.0), whole


@triton.jit
def log_both(y, u):
    """ln(u) and ln(u) - y / u, where y = u - 1 and u >= 0 are both known with full relative precision."""
    s = y / (2.0 + y)
    z = s * s
    t = 1.1111111e-1 * z + 1.4285714e-1
    t = t * z + 2.0e-1
    t = t * z + 3.3333333e-1
    series = 2.0 * z * t
    value = tl.where((y > -0.29) & (y < 0.41), 2.0 * s + s * series, tl.log(u))
    v = y / tl.maximum(u, 1e-30)
    return value, tl.where(tl.abs(y) <= 0.25, s * (v + series), value - v)


@triton.jit
def excess(w, gap, l):
    """w (e^l - 1 - l) >= 0, where gap = w (e^l - 1) is known exactly; 0 * inf counts as 0."""
    near = tl.abs(l) <= 0.35
    series = w * (l * l * _excess_series(tl.where(near, l, 0.0)))
    return tl.where(near, series, gap - tl.where(w == 0.0, 0.0, w * l))
