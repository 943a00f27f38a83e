"""The kernels of the losses between two attention maps: a tile at a time, never S x S in memory (losses.md, section 4).

`attention_fwd_kernel` walks a block of query rows over the keys for the statistics of the rows (the teacher's logsumexp
and D = A - B, both online); `attention_value_kernel` and `attention_dq_kernel` walk the same way again for values and
gradients, `attention_dk_kernel` walks a block of keys over the query rows. Each output is written by one program, no
atomics, so that equal inputs give equal bits. Where the inputs are float32 and the head sizes agree, the scores'
difference is formed as [X_s - X_t, X_t] [Y_s, Y_s - Y_t]^T (X = scale * Q, Y = K) and stays exact near convergence;
16-bit inputs are their own rounding, there the difference of two float32 accumulators is enough. At a key that has
nearly all of a row's probability p - q is a statistic of the row: it has no digits in any other form. From float32 keys
their means are taken off first, but for score_mse (CENTRED): a part that all keys have in common no softmax sees.
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
    query_operands,
    scores,
    seen_keys,
    sequence_of,
    walk,
)
from fastdistil.kernels.triton.exact import add_to_masses, forward_kl_terms, log_mass_ratio


@triton.jit
def attention_fwd_kernel(
    qs_ptr, ks_ptr, qt_ptr, kt_ptr, mean_s_ptr, mean_t_ptr,
    key_mask_ptr, key_end_ptr, begin_ptr, end_ptr, scale_ptr, stats_ptr,
    qs_b, qs_h, qs_n, ks_b, ks_h, ks_n, qt_b, qt_h, qt_n, kt_b, kt_h, kt_n,
    heads, group_s, group_t, length, plane, scale_s, scale_t,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, DIFFERENCE: tl.constexpr,
    CENTRED: tl.constexpr, SIZE_S: tl.constexpr, SIZE_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: the statistics of BLOCK_M query rows of one head. stats[:6]: see log_mass_ratio."""
    WIDE: tl.constexpr = qs_ptr.dtype.element_ty == tl.float32
    head = tl.program_id(1).to(tl.int64)
    ib, ih = head // heads, head % heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = tl.load(scale_ptr + head * length + rows, mask=rows < length, other=0.0)
    keep = scale != 0
    q_s = load_rows(qs_ptr + ib * qs_b + ih * qs_h, qs_n, rows, length, keep, SIZE_S, PAD_S)
    q_t = load_rows(qt_ptr + ib * qt_b + ih * qt_h, qt_n, rows, length, keep, SIZE_T, PAD_T)
    l1, l2, l3 = query_operands(q_s, q_t, scale_s, scale_t, DIFFERENCE)
    ks_ptr += ib * ks_b + ih // group_s * ks_h
    kt_ptr += ib * kt_b + ih // group_t * kt_h
    mean_s = load_mean(mean_s_ptr, head // group_s, SIZE_S, PAD_S, CENTRED)  # the groups divide the heads of a sequence
    mean_t = load_mean(mean_t_ptr, head // group_t, SIZE_T, PAD_T, CENTRED)
    key_mask_ptr += ib * length
    end = tl.load(key_end_ptr + ib) if HAS_MASK else length
    if CAUSAL:
        end = tl.minimum(end, (tl.program_id(0) + 1) * BLOCK_M)
    first, last = sequence_of(begin_ptr, end_ptr, rows, length, PACKED)
    begin, end = walk(first, last, keep, end, BLOCK_N, PACKED)

    max_a = tl.full((BLOCK_M,), -1e30, tl.float32)
    max_b = tl.full((BLOCK_M,), -1e30, tl.float32)
    mass_a = tl.zeros((BLOCK_M,), tl.float32)
    mass_b = tl.zeros((BLOCK_M,), tl.float32)
    excess = tl.zeros((BLOCK_M,), tl.float32)
    ref = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        real = seen_keys(key_mask_ptr, end, columns, length, HAS_MASK)
        r1, r2, r3 = key_operands(
            load_rows(ks_ptr, ks_n, columns, length, real, SIZE_S, PAD_S),
            load_rows(kt_ptr, kt_n, columns, length, real, SIZE_T, PAD_T),
            mean_s,
            mean_t,
            DIFFERENCE,
            CENTRED,
        )
        b, c = scores(l1, l2, l3, r1, r2, r3, scale_s, scale_t, DIFFERENCE, PRECISION)
        visible = real[None, :] & keep[:, None]
        if CAUSAL:
            visible = visible & (columns[None, :] <= rows[:, None])
        if PACKED:
            visible = visible & (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
        b = tl.where(visible, b, -float("inf"))
        c = tl.where(visible, c, 0.0)
        max_a, mass_a, max_b, ref, mass_b, excess = add_to_masses(b, c, max_a, mass_a, max_b, ref, mass_b, excess)
    max_a, log_mass_a, max_b, log_mass_b, log_ratio, top = log_mass_ratio(max_a, mass_a, max_b, ref, mass_b, excess)
    if not WIDE:  # see `differences`
        max_b += log_mass_b
    at = head * length + rows
    tl.store(stats_ptr + at, max_a, mask=rows < length)
    tl.store(stats_ptr + plane + at, log_mass_a, mask=rows < length)
    tl.store(stats_ptr + 2 * plane + at, max_b, mask=rows < length)
    tl.store(stats_ptr + 3 * plane + at, log_mass_b, mask=rows < length)
    tl.store(stats_ptr + 4 * plane + at, log_ratio, mask=rows < length)
    tl.store(stats_ptr + 5 * plane + at, top, mask=rows < length)


@triton.jit
def attention_value_kernel(
    qs_ptr, ks_ptr, qt_ptr, kt_ptr, mean_s_ptr, mean_t_ptr,
    key_mask_ptr, key_end_ptr, begin_ptr, end_ptr, scale_ptr, rows_ptr, stats_ptr,
    qs_b, qs_h, qs_n, ks_b, ks_h, ks_n, qt_b, qt_h, qt_n, kt_b, kt_h, kt_n,
    heads, group_s, group_t, length, plane, scale_s, scale_t,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, DIFFERENCE: tl.constexpr,
    CENTRED: tl.constexpr, SIZE_S: tl.constexpr, SIZE_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: the values of BLOCK_M rows of one head; for prob_mse also P_s - P_t at the key that has nearly all of
    P_s, 0 where none has, and the sum of P_s times the slopes relative to it, stats[7] and stats[6]."""
    WIDE: tl.constexpr = qs_ptr.dtype.element_ty == tl.float32
    head = tl.program_id(1).to(tl.int64)
    ib, ih = head // heads, head % heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < length
    at = head * length + rows
    scale = tl.load(scale_ptr + at, mask=inside, other=0.0)
    keep = scale != 0
    q_s = load_rows(qs_ptr + ib * qs_b + ih * qs_h, qs_n, rows, length, keep, SIZE_S, PAD_S)
    q_t = load_rows(qt_ptr + ib * qt_b + ih * qt_h, qt_n, rows, length, keep, SIZE_T, PAD_T)
    l1, l2, l3 = query_operands(q_s, q_t, scale_s, scale_t, DIFFERENCE)
    max_a, log_mass_a, max_b, log_mass_b, log_ratio, top = load_stats(stats_ptr + at, plane, inside)
    ks_ptr += ib * ks_b + ih // group_s * ks_h
    kt_ptr += ib * kt_b + ih // group_t * kt_h
    mean_s = load_mean(mean_s_ptr, head // group_s, SIZE_S, PAD_S, CENTRED)  # the groups divide the heads of a sequence
    mean_t = load_mean(mean_t_ptr, head // group_t, SIZE_T, PAD_T, CENTRED)
    key_mask_ptr += ib * length
    end = tl.load(key_end_ptr + ib) if HAS_MASK else length
    if CAUSAL:
        end = tl.minimum(end, (tl.program_id(0) + 1) * BLOCK_M)
    first, last = sequence_of(begin_ptr, end_ptr, rows, length, PACKED)
    begin, end = walk(first, last, keep, end, BLOCK_N, PACKED)

    value = tl.zeros((BLOCK_M,), tl.float32)
    at_top = tl.zeros((BLOCK_M,), tl.float32)
    others = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        real = seen_keys(key_mask_ptr, end, columns, length, HAS_MASK)
        r1, r2, r3 = key_operands(
            load_rows(ks_ptr, ks_n, columns, length, real, SIZE_S, PAD_S),
            load_rows(kt_ptr, kt_n, columns, length, real, SIZE_T, PAD_T),
            mean_s,
            mean_t,
            DIFFERENCE,
            CENTRED,
        )
        b, c = scores(l1, l2, l3, r1, r2, r3, scale_s, scale_t, DIFFERENCE, PRECISION)
        visible = real[None, :] & keep[:, None]
        if CAUSAL:
            visible = visible & (columns[None, :] <= rows[:, None])
        if PACKED:
            visible = visible & (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
        if KIND == "score_mse":
            value += tl.sum(tl.where(visible, c * c, 0.0), 1)
        else:
            q, delta, e, p = differences(
                b, c, visible, max_a[:, None], log_mass_a[:, None], max_b[:, None], log_mass_b[:, None],
                log_ratio[:, None], top[:, None], WIDE,
            )  # fmt: skip
            if KIND == "prob_mse":
                value += tl.sum(e * e, 1)
                at_top += tl.sum(tl.where(p > 0.75, e, 0.0), 1)
                rest = tl.where(p > 0.75, 0.0, p)
                others += tl.sum(rest, 1)
                mean += tl.sum(rest * e, 1)
            else:
                value += tl.sum(forward_kl_terms(q, delta, e), 1)

    tl.store(rows_ptr + at, tl.where(keep, value * scale, 0.0), mask=inside)
    if KIND == "prob_mse":
        tl.store(stats_ptr + 6 * plane + at, mean - at_top * others, mask=inside)
        tl.store(stats_ptr + 7 * plane + at, at_top, mask=inside)


@triton.jit
def attention_dq_kernel(
    qs_ptr, ks_ptr, qt_ptr, kt_ptr, mean_s_ptr, mean_t_ptr,
    key_mask_ptr, key_end_ptr, begin_ptr, end_ptr, scale_ptr, stats_ptr, dq_ptr,
    qs_b, qs_h, qs_n, ks_b, ks_h, ks_n, qt_b, qt_h, qt_n, kt_b, kt_h, kt_n,
    heads, group_s, group_t, length, plane, scale_s, scale_t,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, DIFFERENCE: tl.constexpr,
    CENTRED: tl.constexpr, SIZE_S: tl.constexpr, SIZE_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: dstudent_q (contiguous float32) of BLOCK_M query rows of one head, scale_s * dA K_s."""
    WIDE: tl.constexpr = qs_ptr.dtype.element_ty == tl.float32
    head = tl.program_id(1).to(tl.int64)
    ib, ih = head // heads, head % heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < length
    at = head * length + rows
    scale = tl.load(scale_ptr + at, mask=inside, other=0.0)
    keep = scale != 0
    q_s = load_rows(qs_ptr + ib * qs_b + ih * qs_h, qs_n, rows, length, keep, SIZE_S, PAD_S)
    q_t = load_rows(qt_ptr + ib * qt_b + ih * qt_h, qt_n, rows, length, keep, SIZE_T, PAD_T)
    l1, l2, l3 = query_operands(q_s, q_t, scale_s, scale_t, DIFFERENCE)
    max_a, log_mass_a, max_b, log_mass_b, log_ratio, top = load_stats(stats_ptr + at, plane, inside)
    mean = tl.load(stats_ptr + 6 * plane + at, mask=inside, other=0.0)
    at_top = tl.load(stats_ptr + 7 * plane + at, mask=inside, other=0.0)
    ks_ptr += ib * ks_b + ih // group_s * ks_h
    kt_ptr += ib * kt_b + ih // group_t * kt_h
    mean_s = load_mean(mean_s_ptr, head // group_s, SIZE_S, PAD_S, CENTRED)  # the groups divide the heads of a sequence
    mean_t = load_mean(mean_t_ptr, head // group_t, SIZE_T, PAD_T, CENTRED)
    key_mask_ptr += ib * length
    end = tl.load(key_end_ptr + ib) if HAS_MASK else length
    if CAUSAL:
        end = tl.minimum(end, (tl.program_id(0) + 1) * BLOCK_M)
    first, last = sequence_of(begin_ptr, end_ptr, rows, length, PACKED)
    begin, end = walk(first, last, keep, end, BLOCK_N, PACKED)

    dq = tl.zeros((BLOCK_M, PAD_S), tl.float32)
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        real = seen_keys(key_mask_ptr, end, columns, length, HAS_MASK)
        r1, r2, r3 = key_operands(
            load_rows(ks_ptr, ks_n, columns, length, real, SIZE_S, PAD_S),
            load_rows(kt_ptr, kt_n, columns, length, real, SIZE_T, PAD_T),
            mean_s,
            mean_t,
            DIFFERENCE,
            CENTRED,
        )
        b, c = scores(l1, l2, l3, r1, r2, r3, scale_s, scale_t, DIFFERENCE, PRECISION)
        visible = real[None, :] & keep[:, None]
        if CAUSAL:
            visible = visible & (columns[None, :] <= rows[:, None])
        if PACKED:
            visible = visible & (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])
        if KIND == "score_mse":
            d = tl.where(visible, 2.0 * c, 0.0)
        else:
            _, _, e, p = differences(
                b, c, visible, max_a[:, None], log_mass_a[:, None], max_b[:, None], log_mass_b[:, None],
                log_ratio[:, None], top[:, None], WIDE,
            )  # fmt: skip
            d = dscores(p, e, at_top[:, None], mean[:, None], KIND)
        dq = dot_accumulate(dq, d, r1, PRECISION)

    out = dq_ptr + at[:, None] * SIZE_S + tl.arange(0, PAD_S)[None, :]
    tl.store(out, dq * (scale * scale_s)[:, None], mask=inside[:, None] & (tl.arange(0, PAD_S) < SIZE_S)[None, :])


@triton.jit
def attention_dk_kernel(
    qs_ptr, ks_ptr, qt_ptr, kt_ptr, mean_s_ptr, mean_t_ptr,
    key_mask_ptr, row_end_ptr, begin_ptr, end_ptr, scale_ptr, stats_ptr, dk_ptr,
    qs_b, qs_h, qs_n, ks_b, ks_h, ks_n, qt_b, qt_h, qt_n, kt_b, kt_h, kt_n,
    heads, group_s, group_t, length, plane, scale_s, scale_t,
    KIND: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, PACKED: tl.constexpr, DIFFERENCE: tl.constexpr,
    CENTRED: tl.constexpr, SIZE_S: tl.constexpr, SIZE_T: tl.constexpr, PAD_S: tl.constexpr, PAD_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program: dstudent_k (contiguous float32) of BLOCK_N keys for one query head, scale_s * dA^T Q_s; all tiles
    transposed, so that dA^T leaves the scores' registers as the left operand of the next product."""
    WIDE: tl.constexpr = qs_ptr.dtype.element_ty == tl.float32
    head = tl.program_id(1).to(tl.int64)
    ib, ih = head // heads, head % heads
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < length
    real = seen_keys(key_mask_ptr + ib * length, length, columns, length, HAS_MASK)
    r1, r2, r3 = key_operands(
        load_rows(ks_ptr + ib * ks_b + ih // group_s * ks_h, ks_n, columns, length, real, SIZE_S, PAD_S),
        load_rows(kt_ptr + ib * kt_b + ih // group_t * kt_h, kt_n, columns, length, real, SIZE_T, PAD_T),
        load_mean(mean_s_ptr, head // group_s, SIZE_S, PAD_S, CENTRED),
        load_mean(mean_t_ptr, head // group_t, SIZE_T, PAD_T, CENTRED),
        DIFFERENCE,
        CENTRED,
    )
    qs_ptr += ib * qs_b + ih * qs_h
    qt_ptr += ib * qt_b + ih * qt_h
    scale_ptr += head * length
    stats_ptr += head * length
    end = tl.load(row_end_ptr + ib)  # query rows behind it have scale 0
    first, last = sequence_of(begin_ptr, end_ptr, columns, length, PACKED)
    begin, end = walk(first, last, real, end, BLOCK_M, PACKED)
    if CAUSAL:
        begin = tl.maximum(begin, tl.program_id(0) * BLOCK_N // BLOCK_M * BLOCK_M)

    dk = tl.zeros((BLOCK_N, PAD_S), tl.float32)
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        scale = tl.load(scale_ptr + rows, mask=rows < length, other=0.0)
        keep = scale != 0
        max_a, log_mass_a, max_b, log_mass_b, log_ratio, top = load_stats(stats_ptr + rows, plane, rows < length)
        mean = tl.load(stats_ptr + 6 * plane + rows, mask=rows < length, other=0.0)
        at_top = tl.load(stats_ptr + 7 * plane + rows, mask=rows < length, other=0.0)
        q_s = load_rows(qs_ptr, qs_n, rows, length, keep, SIZE_S, PAD_S)
        l1, l2, l3 = query_operands(
            q_s, load_rows(qt_ptr, qt_n, rows, length, keep, SIZE_T, PAD_T), scale_s, scale_t, DIFFERENCE
        )
        b, c = scores(r1, r2, r3, l1, l2, l3, scale_s, scale_t, DIFFERENCE, PRECISION)
        visible = real[:, None] & keep[None, :]
        if CAUSAL:
            visible = visible & (columns[:, None] <= rows[None, :])
        if PACKED:
            visible = visible & (rows[None, :] >= first[:, None]) & (rows[None, :] < last[:, None])
        if KIND == "score_mse":
            d = tl.where(visible, 2.0 * c, 0.0) * scale[None, :]
        else:
            _, _, e, p = differences(
                b, c, visible, max_a[None, :], log_mass_a[None, :], max_b[None, :], log_mass_b[None, :],
                log_ratio[None, :], top[None, :], WIDE,
            )  # fmt: skip
            d = dscores(p, e, at_top[None, :], mean[None, :], KIND) * scale[None, :]
        dk = dot_accumulate(dk, d, q_s, PRECISION)

    out = dk_ptr + (head * length + columns)[:, None] * SIZE_S + tl.arange(0, PAD_S)[None, :]
    tl.store(out, dk * scale_s, mask=inside[:, None] & (tl.arange(0, PAD_S) < SIZE_S)[None, :])
