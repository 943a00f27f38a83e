"""Matrix products that accumulate in float32 (float64 for float64), whatever the dtype of their factors."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Rows of the right factor that one product on a CPU takes. They stay in the cache while they are converted, where they
# have 16 bits (whose products are slower there than float32 ones), and so do the columns that they make: over a whole
# vocabulary the BLAS strides through its result (128 x 768 x 119,547 in float32: 115 GFLOP/s against 155).
CPU_ROWS = 512
# Rows of a head that are gathered at a time on a GPU.
GATHERED_ROWS = 8192

# How many times as long a product in float64 takes as in float32 (without TF32): data sheets, not a record.
_CPU, _NVIDIA, _AMD, _OTHER = 2.0, {(8, 0): 1.0, (9, 0): 1.0, (10, 0): 2.0}, ("gfx90a", "gfx942", "gfx950"), 32.0


def product(left: Tensor, right: Tensor, out: Tensor, chosen: Tensor | None = None) -> Tensor:
    """out (n, m) = left (n, k) @ right (m, k).T; out is float32 or float64 and may have padded rows.

    With `chosen` (m,) int64 the rows right[chosen] are meant; a negative entry leaves anything in its column."""
    fast = multiplied_low(left, right, out.dtype)
    left = left if fast else left.to(out.dtype)
    if chosen is None and left.device.type != "cpu" and (fast or right.dtype == out.dtype):
        return low_product(left, right.T, out.dtype, out) if fast else torch.mm(left, right.T, out=out)
    rows = CPU_ROWS if left.device.type == "cpu" else GATHERED_ROWS
    for some in _slices(right if chosen is None else chosen, rows):
        part = right[some] if chosen is None else right[chosen[some].clamp(min=0)]
        if fast:
            low_product(left, part.T, out.dtype, out[:, some])
        else:
            torch.mm(left, part.to(out.dtype).T, out=out[:, some])
    return out


def product_back(left: Tensor, right: Tensor, out: Tensor, chosen: Tensor | None = None) -> Tensor:
    """out (n, k) = left (n, m) @ right (m, k); left and out are float32 or float64.

    With `chosen` (c,) int64 only these columns of left and rows of right are read. Else, on a GPU, left is rounded once
    to right's dtype where that has 16 bits."""
    if chosen is not None:
        out.zero_()
        for rows in _slices(chosen, CPU_ROWS if left.device.type == "cpu" else GATHERED_ROWS):
            out.addmm_(left[:, chosen[rows]], right[chosen[rows]].to(out.dtype))
        return out
    if right.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if left.device.type == "cpu":
        out.zero_()
        for rows in _slices(right, CPU_ROWS):
            out.addmm_(left[:, rows], right[rows].to(out.dtype))
        return out
    low, factor = rounded(left, right.dtype)
    return low_product(low, right, out.dtype, out).mul_(factor)


def add_product(left: Tensor, right: Tensor, out: Tensor, first: bool) -> Tensor:
    """out (m, k) += left (n, m).T @ right (n, k), or = for the `first` of several; rounded as in `product_back`."""
    if left.device.type == "cpu" or right.dtype == out.dtype:
        return out.addmm_(left.T, right.to(out.dtype), beta=0 if first else 1)
    low, factor = rounded(left, right.dtype)
    if first:
        return low_product(low.T, right, out.dtype, out).mul_(factor)
    return out.addcmul_(low_product(low.T, right, out.dtype), factor)


def rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in a 16-bit dtype, and the factor () that gives it back its size: float16 has not the range of a gradient."""
    largest = x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
    return (x / largest).to(dtype), largest


def _slices(x: Tensor, rows: int) -> list[slice]:
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]


def multiplied_low(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether tensor cores multiply these into `dtype`: two 16-bit factors of one dtype on a GPU."""
    return left.device.type != "cpu" and left.dtype == right.dtype != dtype


def multiplied(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right accumulated and returned in `dtype`; a float32 `left` is rounded once to a 16-bit right's."""
    if right.dtype == dtype:
        return left @ right
    if left.dtype == right.dtype:
        return low_product(left, right, dtype)
    low, factor = rounded(left, right.dtype)
    return low_product(low, right, dtype).mul_(factor)


def low_product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """left @ right of 16-bit factors, kept in `dtype` from the accumulator on, returned in it or written to `out`."""
    op, into = (torch.ops.aten.mm.dtype, {}) if out is None else (torch.ops.aten.mm.dtype_out, {"out": out})
    found: Tensor = op(left, right, dtype, **into)
    return found


@cache
def float64_cost(device: torch.device) -> float:
    """A float64 matrix product's time, in float32 ones."""
    if device.type == "cpu":
        return _CPU
    if device.type != "cuda":
        return _OTHER
    if torch.version.hip is not None:
        return 1.0 if torch.cuda.get_device_properties(device).gcnArchName.startswith(_AMD) else _OTHER
    return _NVIDIA.get(torch.cuda.get_device_capability(device), _OTHER)


def float64_is_fast(device: torch.device) -> bool:
    """Whether float64 costs so little more that exactness is not worth another way."""
    return float64_cost(device) <= 2.0
