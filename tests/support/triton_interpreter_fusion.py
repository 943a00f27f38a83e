"""Test-only: multiplications and additions fused in Triton's interpreter, as GPUs fuse them under enable_fp_fusion.

A product keeps what it was before its rounding, and a sum or difference that takes the product directly takes that
instead. A compiler may fuse less than all of them; of two products it fuses one, as here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as I
from triton_interpreter_fast import DIRECT

Binary = Callable[[Any, Any, Any], Any]


def _wide(handle: Any, exact: bool) -> np.ndarray:
    return getattr(handle, "exact", handle.data).astype(np.float64) if exact else handle.data.astype(np.float64)


def _product(plain: Binary) -> Binary:
    def multiply(self: Any, lhs: Any, rhs: Any) -> Any:
        result = plain(self, lhs, rhs)
        if lhs.dtype.scalar == tl.float32:
            result.exact = lhs.data.astype(np.float64) * rhs.data  # 48 bits at most
        return result

    return multiply


def _sum(plain: Binary, operation: Callable[[np.ndarray, np.ndarray], np.ndarray], fused: list[int]) -> Binary:
    def add(self: Any, lhs: Any, rhs: Any) -> Any:
        result = plain(self, lhs, rhs)
        left, right = hasattr(lhs, "exact"), hasattr(rhs, "exact")
        if left or right:
            exact = operation(_wide(lhs, left), _wide(rhs, right and not left))
            result.data = exact.astype(np.float32)
            fused[0] += 1
        return result

    return add


@contextmanager
def fusing() -> Iterator[list[int]]:
    """Yields a list whose one number counts the fused operations."""
    builder, fused = I.InterpreterBuilder, [0]
    names = ("create_fmul", "create_fadd", "create_fsub")
    before = {name: getattr(builder, name) for name in names}
    builder.create_fmul = _product(before["create_fmul"])
    builder.create_fadd = _sum(before["create_fadd"], np.add, fused)
    builder.create_fsub = _sum(before["create_fsub"], np.subtract, fused)
    DIRECT[0] = False
    try:
        with np.errstate(all="ignore"):
            yield fused
    finally:
        DIRECT[0] = True
        for name, function in before.items():
            setattr(builder, name, function)
