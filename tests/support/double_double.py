"""Numbers of 31 digits for whole arrays: an unevaluated sum of two float64, |lo| at most half an ulp of hi.

With them a textbook formula keeps 15 digits where it cancels in float64, so that the truth needs no clever form. The
algorithms are Dekker's (1971) and those of the QD library (Hida, Li, Bailey 2001). tests/losses/test_rows.py compares them with mpmath.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # numpy.ndarray of float64

NEVER = -1e15  # the logarithm of 0, so that 0 * log(0) is 0
SPLIT = 134217729.0  # 2^27 + 1


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    s = a + b
    v = s - a
    return s, (a - (s - v)) + (b - v)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    p = a * b
    t = SPLIT * a
    a1 = t - (t - a)
    t = SPLIT * b
    b1 = t - (t - b)
    a2, b2 = a - a1, b - b1
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


def _made(hi: Array, lo: Array) -> DD:
    s = hi + lo
    return DD(s, lo - (s - hi))


class DD:
    """An array of finite numbers; other operands may be DD, arrays of float64 or numbers."""

    __slots__ = ("hi", "lo")
    __array_ufunc__ = None  # numpy's operators leave it to ours

    def __init__(self, hi: Array, lo: Array | None = None) -> None:
        self.hi = np.asarray(hi, np.float64)
        self.lo = np.zeros_like(self.hi) if lo is None else lo

    def __add__(self, other: Any) -> DD:
        other = dd(other)
        s, e = _two_sum(self.hi, other.hi)
        t, f = _two_sum(self.lo, other.lo)
        e = e + t
        s, e = s + e, e - ((s + e) - s)
        return _made(s, e + f)

    __radd__ = __add__

    def __neg__(self) -> DD:
        return DD(-self.hi, -self.lo)

    def __sub__(self, other: Any) -> DD:
        return self + -dd(other)

    def __rsub__(self, other: Any) -> DD:
        return -self + other

    def __mul__(self, other: Any) -> DD:
        other = dd(other)
        p, e = _two_product(self.hi, other.hi)
        return _made(p, e + (self.hi * other.lo + self.lo * other.hi))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> DD:
        other = dd(other)
        first = self.hi / other.hi
        rest = self - other * first
        second = rest.hi / other.hi
        third = (rest - other * second).hi / other.hi
        return _made(first, second) + third

    def __rtruediv__(self, other: Any) -> DD:
        return dd(other) / self

    def __getitem__(self, key: Any) -> DD:
        return DD(self.hi[key], self.lo[key])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.hi.shape

    def squared(self) -> DD:
        p = self.hi * self.hi
        t = SPLIT * self.hi
        a1 = t - (t - self.hi)
        a2 = self.hi - a1
        return _made(p, ((a1 * a1 - p) + 2 * a1 * a2 + a2 * a2) + 2 * self.hi * self.lo)

    def scaled(self, power_of_two: float) -> DD:
        return DD(self.hi * power_of_two, self.lo * power_of_two)

    def sum(self, axis: int = -1, keepdims: bool = False) -> DD:
        hi, lo = np.moveaxis(self.hi, axis, -1), np.moveaxis(self.lo, axis, -1)
        x = DD(hi, lo)
        if x.shape[-1] == 0:
            x = DD(np.zeros((*x.shape[:-1], 1)))
        while (n := x.shape[-1]) > 1:
            half = n // 2
            pairs = x[..., :half] + x[..., half : 2 * half]
            x = pairs if n % 2 == 0 else where_last(pairs, x[..., -1:])
        return DD(np.moveaxis(x.hi, -1, axis), np.moveaxis(x.lo, -1, axis)) if keepdims else x[..., 0]

    def max(self) -> DD:
        """Over the last axis, kept."""
        at = np.argmax(self.hi + 0.0, -1)[..., None]
        return DD(np.take_along_axis(self.hi, at, -1), np.take_along_axis(self.lo, at, -1))

    def double(self) -> Array:
        return self.hi + self.lo


def dd(x: Any) -> DD:
    return x if isinstance(x, DD) else DD(x)


def where_last(x: DD, y: DD) -> DD:
    """Side by side on the last axis."""
    return DD(np.concatenate((x.hi, y.hi), -1), np.concatenate((x.lo, y.lo), -1))


def where(condition: Array, x: Any, y: Any) -> DD:
    x, y = dd(x), dd(y)
    return DD(np.where(condition, x.hi, y.hi), np.where(condition, x.lo, y.lo))


def sqrt(x: DD) -> DD:
    root = np.sqrt(x.hi)
    safe = np.where(root > 0, root, 1.0)
    square = DD(*_two_product(root, root))
    return where(root > 0, DD(root) + (x - square).hi / (2 * safe), 0.0)


LN2 = DD(np.float64(0.6931471805599453), np.float64(2.3190468138462996e-17))
_SQUARINGS = 9


def _inverse(n: int) -> DD:
    return DD(np.float64(1.0)) / float(n)


_INVERSES = {n: _inverse(n) for n in (6, 24, 120)}


def _reduced(r: DD) -> DD:
    """expm1 of |r| < 7e-4."""
    h = r.hi
    tail = (1 / 720 + h * (1 / 5040 + h * (1 / 40320 + h / 362880))) * h
    s = r * (_INVERSES[120] + tail) + _INVERSES[24]
    s = r * s + _INVERSES[6]
    s = r * s + 0.5
    return r * r * s + r


def exp(x: DD) -> DD:
    """0 below -745; x is at most 700."""
    assert not (x.hi > 700).any(), "too large for exp"
    inside = x.hi > -745
    power = np.rint(np.where(inside, x.hi, 0.0) / 0.6931471805599453)
    r = where(inside, x, 0.0) - LN2 * power
    s = _reduced(r.scaled(2.0**-_SQUARINGS))
    for _ in range(_SQUARINGS):
        s = s.scaled(2.0) + s.squared()
    half = np.trunc(power / 2)  # 2^power itself may be subnormal or beyond
    found = (s + 1.0).scaled(np.exp2(half)).scaled(np.exp2(power - half))
    return where(inside, found, 0.0)


def log(x: DD) -> DD:
    """Of numbers above 1e-300; -1e15, which stands for minus infinity, of smaller ones."""
    positive = x.hi > 1e-300
    safe = where(positive, x, 1.0)
    first = np.log(safe.hi)
    found = (safe * exp(DD(-first)) - 1.0) + first
    return where(positive, found, NEVER)
