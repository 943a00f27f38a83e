"""Matrix products that accumulate in float32 (float64 for float64), whatever the dtype of their factors."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of the right factor that one product on a CPU takes. They stay in the cache while they are converted, where they
# have 16 bits (whose products are slower there than float32 ones), and so do the columns that they make: over a whole
# vocabulary the BLAS strides through its result (128 x 768 x 119,547 in float32: 115 GFLOP/s against 155).
CPU_ROWS = 512
# Rows of a head that are gathered at a time on a GPU.
GATHERED_ROWS = 8192


def product(left: Tensor, right: Tensor, out: Tensor, chosen: Tensor | None = None) -> Tensor:
    """out (n, m) = left (n, k) @ right (m, k).T; out is float32 or float64 and may have padded rows.

    With `chosen` (m,) int64 the rows right[chosen] are meant; a negative entry leaves anything in its column."""
    fast = multiplied_low(left, right, out.dtype)
    left = left if fast else left.to(out.dtype)
    if chosen is None and left.device.type != "cpu" and (fast or right.dtype == out.dtype):
        return _low(left, right.T, out) if fast else torch.mm(left, right.T, out=out)
    rows = CPU_ROWS if left.device.type == "cpu" else GATHERED_ROWS
    for some in _slices(right if chosen is None else chosen, rows):
        part = right[some] if chosen is None else right[chosen[some].clamp(min=0)]
        if fast:
            _low(left, part.T, out[:, some])
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
    return _low(low, right, out).mul_(factor)


def add_product(left: Tensor, right: Tensor, out: Tensor, first: bool) -> Tensor:
    """out (m, k) += left (n, m).T @ right (n, k), or = for the `first` of several; rounded as in `product_back`."""
    if left.device.type == "cpu" or right.dtype == out.dtype:
        return out.addmm_(left.T, right.to(out.dtype), beta=0 if first else 1)
    low, factor = rounded(left, right.dtype)
    if first:
        return _low(low.T, right, out).mul_(factor)
    return out.addcmul_(_low(low.T, right, torch.empty_like(out)), factor)


def rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in a 16-bit dtype, and the factor () that gives it back its size: float16 has not the range of a gradient."""
    largest = x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
    return (x / largest).to(dtype), largest


def _slices(x: Tensor, rows: int) -> list[slice]:
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]


def multiplied_low(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether tensor cores multiply these into `dtype`: two 16-bit factors of one dtype on a GPU."""
    return left.device.type != "cpu" and left.dtype == right.dtype != dtype


def _low(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """The product of two 16-bit matrices, kept in float32 from the accumulator on."""
    if hasattr(torch.ops.aten.mm, "dtype_out"):  # torch 2.8
        torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)
        return out
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)
