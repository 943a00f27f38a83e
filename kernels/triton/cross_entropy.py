"""Cross entropy in Triton: one program a row of float32 logits, which it reads twice.

Floor: (1 read + 1 read and write of the gradient) x N x V x 4 bytes over the copy bandwidth; the second read of the
logits comes from L2 (0.5 MB a row at V 119,547).
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdistil.kernels.triton.numerics import FUSION, log1p
from torch import Tensor


@triton.jit
def _softmax(z_ptr, V, BLOCK: tl.constexpr):
    """The row's maximum and the sum of exp(z - maximum) over all other columns: where one is far above the rest,
    1 + others has no digits of them."""
    lanes = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    others = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, V, BLOCK):
        columns = begin + lanes
        z = tl.load(z_ptr + columns, mask=columns < V, other=float("-inf"))
        above = z > largest
        new = tl.where(above, z, largest)
        share = tl.exp(tl.where(above, largest, z) - tl.where(new == float("-inf"), 0.0, new))
        others = tl.where(above, others * share, others) + share
        largest = new
    top = tl.max(largest, 0)
    unit = tl.where(largest == float("-inf"), 0.0, largest)
    others += tl.where(lanes == tl.min(tl.where(largest == top, lanes, BLOCK), 0), 0.0, 1.0)
    return top, tl.sum(tl.where(largest == float("-inf"), 0.0, others * tl.exp(unit - top)), 0)


@triton.jit
def label_slope(z, top, others):
    """p - 1 of the label, whose logit is z: of a row that is sure of it, what all other columns have."""
    sure = (z == top) & (top > float("-inf"))
    return tl.where(sure, -others, tl.exp(z - top) - (1.0 + others)) / (1.0 + others)


@triton.jit
def cross_entropy_kernel(
    logits_ptr, labels_ptr, scale_ptr, loss_ptr, gradient_ptr, whole_ptr, V, logits_stride, gradient_stride,
    GRADIENT: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss (N,) and, with GRADIENT, gradient (N, V) += scale times the row's cross entropy and its gradient; PART: the
    columns of a row that has others elsewhere; whole_ptr (N, 2) has the whole row's largest logit and the sum of
    exp(z - largest) over all other columns."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + row)
    if scale != 0.0:
        z_ptr = logits_ptr + row * logits_stride
        if PART:
            top = tl.load(whole_ptr + 2 * row)
            others = tl.load(whole_ptr + 2 * row + 1)
        else:
            top, others = _softmax(z_ptr, V, BLOCK)
        label = tl.load(labels_ptr + row)
        exists = (label >= 0) & (label < V)
        own = tl.load(z_ptr + label, mask=exists, other=float("nan"))
        if PART:
            share = tl.where(exists, top - own, 0.0)
        else:  # a label that is no column shows as NaN: reading there would not be allowed
            share = log1p(others) + (top - own)
        tl.store(loss_ptr + row, tl.load(loss_ptr + row) + scale * share)
        if GRADIENT:
            g_ptr = gradient_ptr + row * gradient_stride
            factor = scale / (1.0 + others)
            there = scale * label_slope(own, top, others)
            lanes = tl.arange(0, BLOCK)
            for begin in range(0, V, BLOCK):
                columns = begin + lanes
                z = tl.load(z_ptr + columns, mask=columns < V, other=float("-inf"))
                g = tl.load(g_ptr + columns, mask=columns < V, other=0.0)
                g += tl.where(columns == label, there, factor * tl.exp(z - top))
                tl.store(g_ptr + columns, g, mask=columns < V)


def cross_entropy_config(columns: int) -> tuple[int, dict[str, int]]:
    """Columns a tile, four a thread: one 16-byte load. Not yet tuned on a GPU."""
    block = min(max(triton.next_power_of_2(columns), 128), 2048)
    return block, {"num_warps": max(1, block // 256)} | FUSION


def cross_entropy_rows(
    logits: Tensor,
    labels: Tensor,
    row_scale: Tensor,
    loss: Tensor,
    gradient: Tensor | None,
    whole: Tensor | None = None,
) -> None:
    """As fastdistil.reference.cross_entropy.cross_entropy_rows, for float32."""
    rows, columns = logits.shape
    block, options = cross_entropy_config(columns)
    if rows:
        cross_entropy_kernel[(rows,)](
            logits, labels.contiguous(), row_scale, loss, logits if gradient is None else gradient,
            row_scale if whole is None else whole.contiguous(), columns,
            logits.stride(0), logits.stride(0) if gradient is None else gradient.stride(0),
            GRADIENT=gradient is not None, PART=whole is not None, BLOCK=block, **options,
        )  # fmt: skip


def aot_cases() -> list[dict[str, object]]:
    block, options = cross_entropy_config(119_547)
    pointers = {
        "logits_ptr": "*fp32",
        "labels_ptr": "*i64",
        "scale_ptr": "*fp32",
        "loss_ptr": "*fp32",
        "gradient_ptr": "*fp32",
        "whole_ptr": "*fp32",
    }
    return [
        {
            "name": f"cross_entropy_kernel{'' if gradient else '-forward'}{'-part' * part}",
            "kernel": cross_entropy_kernel,
            "signature": pointers | {"V": "i32", "logits_stride": "i32", "gradient_stride": "i32"},
            "constants": {"GRADIENT": gradient, "PART": part, "BLOCK": block},
            "options": options,
            "divisible": [*pointers, "logits_stride", "gradient_stride"],
        }
        for gradient, part in ((True, False), (False, False), (True, True))
    ]
