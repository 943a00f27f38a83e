"""The gradient of a relation, A = scale * x x^T: both sides of it in one walk (losses.md, section 4).

A is symmetric, so the scores of a tile serve its row side and, transposed, its column side:
dx_i = scale * sum_j (dA_ij + dA_ji) x_j, where dA_ji takes the statistics of row j. It replaces `attention_dq_kernel`,
`attention_dk_kernel` and the addition of what they return. A head of S tokens of d elements of e bytes, student and
teacher, in blocks of M rows, moves
    two walks, dQ + dK:  2 * (1 + S/M) * 2 S d e  to read x,  8 S d to write, 12 S d to add,
    one walk, dx:            (1 + S/M) * 2 S d e  to read x,  4 S d to write
bytes, and a pair of tiles costs 3 products instead of 6, 4 instead of 8 in float32's difference form. M is the same
for 16 bits (64), for float32 at d = 128 (16) and for gfx942 (32). For float32 at d <= 64 it is 16 instead of 32, lest
registers spill: there x is read as often as before, and what is saved is half of the products and four fifths of the
gradients' traffic. A block's own rows come again among the columns, one tile in S/N: taking these from the registers
would save less than the branch costs in code. The two walks of the forward pass stay: a row's statistics must be
complete before its values.

With the means taken off (CENTRED), x = y + mean, the scores of row i are A_ij = scale * x_i . y_j, which is no longer
symmetric: it is scale * y_i . y_j, which is, plus scale * mean . y_j, a number a token that `shift_ptr` has.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdistil.kernels.triton.attention_tiles import (
    differences,
    dot_accumulate,
    dscores,
    key_operands,
    load_mean,
    load_rows,
    load_stats,
    scores,
    seen_keys,
)


@triton.jit
def attention_dx_kernel(
    qs_ptr, qt_ptr, mean_s_ptr, mean_t_ptr, shift_ptr, key_mask_ptr, end_ptr, scale_ptr, stats_ptr, dq_ptr,
    qs_b, qs_h, qs_n, qt_b, qt_h, qt_n,
    heads, length, plane, scale_s, scale_t,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, DIFFERENCE: tl.constexpr,
    CENTRED: tl.constexpr, SIZE_S: tl.constexpr, SIZE_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: dx (contiguous float32) of BLOCK_M rows of one head. end_ptr: (B,), behind it nothing counts. With
    CENTRED shift_ptr: (2, B, H, S), what the means add to the teacher's scores of each key and to their difference."""
    WIDE: tl.constexpr = qs_ptr.dtype.element_ty == tl.float32
    head = tl.program_id(1).to(tl.int64)
    ib, ih = head // heads, head % heads
    qs_ptr += ib * qs_b + ih * qs_h
    qt_ptr += ib * qt_b + ih * qt_h
    key_mask_ptr += ib * length
    scale_ptr += head * length
    stats_ptr += head * length
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < length
    row_scale = tl.load(scale_ptr + rows, mask=inside, other=0.0)
    row_asks = row_scale != 0
    row_seen = seen_keys(key_mask_ptr, length, rows, length, HAS_MASK)
    used = row_asks | row_seen
    mean_s = load_mean(mean_s_ptr, head, SIZE_S, PAD_S, CENTRED)
    mean_t = load_mean(mean_t_ptr, head, SIZE_T, PAD_T, CENTRED)
    l1, l2, l3 = key_operands(
        load_rows(qs_ptr, qs_n, rows, length, used, SIZE_S, PAD_S),
        load_rows(qt_ptr, qt_n, rows, length, used, SIZE_T, PAD_T),
        mean_s,
        mean_t,
        DIFFERENCE,
        CENTRED,
    )
    if DIFFERENCE:
        l1 = l2 * scale_s + l3 * (scale_s - scale_t)
        l3 = l3 * scale_t
        l2 = l3
    if CENTRED:
        shift_ptr += head * length
        row_b = tl.load(shift_ptr + rows, mask=inside, other=0.0)
        row_c = tl.load(shift_ptr + plane + rows, mask=inside, other=0.0)
        sum_back = tl.zeros((BLOCK_M,), tl.float32)
    max_a, log_mass_a, max_b, log_mass_b, log_ratio, top = load_stats(stats_ptr + rows, plane, inside)
    mean = tl.load(stats_ptr + 6 * plane + rows, mask=inside, other=0.0)
    at_top = tl.load(stats_ptr + 7 * plane + rows, mask=inside, other=0.0)
    end = tl.where(tl.max(used.to(tl.int32), 0) > 0, tl.load(end_ptr + ib), 0)

    dx = tl.zeros((BLOCK_M, PAD_S), tl.float32)
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        scale = tl.load(scale_ptr + columns, mask=columns < length, other=0.0)
        asks = scale != 0
        seen = seen_keys(key_mask_ptr, length, columns, length, HAS_MASK)
        x_s = load_rows(qs_ptr, qs_n, columns, length, asks | seen, SIZE_S, PAD_S)
        x_t = load_rows(qt_ptr, qt_n, columns, length, asks | seen, SIZE_T, PAD_T)
        r1, r2, r3 = key_operands(x_s, x_t, mean_s, mean_t, DIFFERENCE, CENTRED)
        b, c = scores(l1, l2, l3, r1, r2, r3, scale_s, scale_t, DIFFERENCE, PRECISION)
        forth = row_asks[:, None] & seen[None, :]
        back = row_seen[:, None] & asks[None, :]
        if CAUSAL:
            forth = forth & (columns[None, :] <= rows[:, None])
            back = back & (rows[:, None] <= columns[None, :])
        if KIND == "score_mse":
            d = 2.0 * (tl.where(forth, c * row_scale[:, None], 0.0) + tl.where(back, c * scale[None, :], 0.0))
        else:
            b_forth, c_forth, b_back, c_back = b, c, b, c
            if CENTRED:
                column_b = tl.load(shift_ptr + columns, mask=columns < length, other=0.0)
                column_c = tl.load(shift_ptr + plane + columns, mask=columns < length, other=0.0)
                b_forth, c_forth = b + column_b[None, :], c + column_c[None, :]
                b_back, c_back = b + row_b[:, None], c + row_c[:, None]
            _, _, e, p = differences(
                b_forth, c_forth, forth, max_a[:, None], log_mass_a[:, None], max_b[:, None], log_mass_b[:, None],
                log_ratio[:, None], top[:, None], WIDE,
            )  # fmt: skip
            d = dscores(p, e, at_top[:, None], mean[:, None], KIND) * row_scale[:, None]
            at = stats_ptr + columns
            other_a, log_other_a, other_b, log_other_b, other_ratio, other_top = load_stats(at, plane, columns < length)
            other_mean = tl.load(at + 6 * plane, mask=columns < length, other=0.0)
            other_at_top = tl.load(at + 7 * plane, mask=columns < length, other=0.0)
            _, _, e, p = differences(
                b_back, c_back, back, other_a[None, :], log_other_a[None, :], other_b[None, :], log_other_b[None, :],
                other_ratio[None, :], other_top[None, :], WIDE,
            )  # fmt: skip
            d_back = dscores(p, e, other_at_top[None, :], other_mean[None, :], KIND) * scale[None, :]
            d += d_back
            if CENTRED:
                sum_back += tl.sum(d_back, 1)
        dx = dot_accumulate(dx, d, r1, PRECISION)

    if CENTRED:  # the mean's part: of the row's own gradients, whose sum is 0, it has none
        dx += sum_back[:, None] * mean_s
    out = dq_ptr + (head * length + rows)[:, None] * SIZE_S + tl.arange(0, PAD_S)[None, :]
    tl.store(out, dx * scale_s, mask=inside[:, None] & (tl.arange(0, PAD_S) < SIZE_S)[None, :])
