"""A gradient times the incoming gradient, in place. Where that is 1, the usual case, nothing is read or written.

The host cannot look at the factor without waiting for the GPU, so that a plain `mul_` would always cost 2 x bytes: two
fifths of all that a loss which overwrites its logits moves.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdistil.kernels.triton.numerics import FUSION
from torch import Tensor

PIECE = 1 << 16  # elements of a program, where one factor serves them all


@triton.jit
def scale_kernel(x_ptr, factor_ptr, x_stride, factor_stride, columns, count, BLOCK: tl.constexpr):
    """Row r of x (`columns` wide, one program) times factor[r]; elements from `count` on do not exist."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row * factor_stride)
    if factor != 1.0:
        begin = row * x_stride
        end = tl.minimum(columns, count - begin)
        for start in range(0, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + begin + at, mask=at < end, other=0.0)
            tl.store(x_ptr + begin + at, x.to(tl.float32) * factor, mask=at < end)


def scale_config(columns: int) -> tuple[int, dict[str, int]]:
    """Columns a step, eight a thread. Not yet tuned on a GPU."""
    block = min(max(triton.next_power_of_2(columns), 256), 2048)
    return block, {"num_warps": block // 256} | FUSION


def scale_(x: Tensor, factor: Tensor) -> None:
    """x, any dtype but float64, times `factor` float32: () with a contiguous x, or (N,) with x (N, V) of dense rows."""
    if x.numel() == 0:
        return
    if factor.ndim:
        rows, columns = x.shape
        strides, count = (x.stride(0), factor.stride(0)), rows * x.stride(0)
    else:
        count = x.numel()
        rows, columns = triton.cdiv(count, PIECE), min(PIECE, count)
        strides = (columns, 0)
    block, options = scale_config(columns)
    scale_kernel[(rows,)](x, factor, *strides, columns, count, BLOCK=block, **options)


def aot_cases() -> list[dict[str, object]]:
    block, options = scale_config(PIECE)
    return [
        {
            "name": f"scale_kernel-{dtype}",
            "kernel": scale_kernel,
            "signature": {
                "x_ptr": f"*{dtype}", "factor_ptr": "*fp32", "x_stride": "i32", "factor_stride": "i32",
                "columns": "i32", "count": "i64",
            },
            "constants": {"BLOCK": block},
            "options": options,
            "divisible": ["x_ptr", "factor_ptr", "x_stride", "columns", "count"],
        }
        for dtype in ("fp32", "bf16", "fp16")
    ]  # fmt: skip
