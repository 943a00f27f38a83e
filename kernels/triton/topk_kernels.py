"""The kernels of topk_logit_loss and their device functions: one program a row (docs/losses.md, section 1a).

Floor: (1 read + 1 write) x N x V x bytes an element over the copy bandwidth; the second read of a row comes from L2.
Named columns are ascending, so that each tile of the row knows which ones are its own by a pointer that only moves on:
one comparison of the tile for each, K x BLOCK in all beside some 40 V.

What decides the precision is float64: differences of scores of the K + 1 outcomes, and near convergence the sum over
the other columns. Exponentials of small numbers are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdistil.kernels.triton.logit_statistics import _body, _layout
from fastdistil.kernels.triton.topk_outcomes import (
    _known,
    _log1p_small,
    _log_add,
    _log_ratio,
    _named,
    _outcomes,
)


@triton.jit
def _next(chosen_ptr, at, K):
    return tl.load(chosen_ptr + at, mask=at < K, other=2147483647)


@triton.jit
def _blank(z, columns, chosen_ptr, at, K, end):
    """z with -inf at the named columns before `end`, and the first entry that is not before it."""
    column = _next(chosen_ptr, at, K)
    while column < end:
        z = tl.where(columns == column, float("-inf"), z)
        at += 1
        column = _next(chosen_ptr, at, K)
    return z, at


@triton.jit
def _add_rest(ptr, columns, mask, chosen_ptr, at, K, end, offset, largest, total, inv_t):
    """One more tile in the largest logit outside of the named columns and the sum of e^((z - largest) / T)."""
    z = tl.load(ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    z, at = _blank(z, columns + offset, chosen_ptr, at, K, end)
    new = tl.maximum(largest, tl.max(z, 0))
    m = tl.where(new == float("-inf"), 0.0, new)
    total = tl.where(total == 0.0, 0.0, total * tl.exp((largest - m) * inv_t)) + tl.sum(tl.exp((z - m) * inv_t), 0)
    return at, new, total


@triton.jit
def _add_wide(ptr, columns, mask, chosen_ptr, at, K, end, offset, largest, total, inv_t):
    """The same sum in float64, `largest` being known."""
    z = tl.load(ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    z, at = _blank(z, columns + offset, chosen_ptr, at, K, end)
    return at, total + tl.sum(tl.exp((z.to(tl.float64) - largest) * inv_t), 0)


@triton.jit
def _rest(
    student_ptr, chosen_ptr, row, V, K, stride, live, largest, inv_t, WIDE: tl.constexpr, VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Largest logit outside of the named columns (-inf where there is none) and the sum of e^((z - largest) / T); with
    WIDE the sum alone, in float64. The row's head and tail, before and behind its 16-byte body, are tiles of their own.
    """
    head, body = _layout(row, stride, V, VEC)
    head = tl.where(live, head, 0)
    end = tl.where(live, body, 0)
    tail = tl.where(live, V, 0)
    start = student_ptr + row * stride
    aligned = _body(student_ptr, row, stride, VEC)
    few = tl.arange(0, VEC)
    lanes = tl.arange(0, BLOCK)
    behind = head + end + few
    first = head * 0  # a tensor: the loops change it
    if WIDE:
        total = tl.sum(tl.zeros((VEC,), tl.float64), 0)
        at, total = _add_wide(start, few, few < head, chosen_ptr, first, K, head, 0, largest, total, inv_t)
        for begin in range(0, end, BLOCK):
            stop = head + tl.minimum(begin + BLOCK, end)
            at, total = _add_wide(
                aligned, begin + lanes, begin + lanes < end, chosen_ptr, at, K, stop, head, largest, total, inv_t
            )
        at, total = _add_wide(start, behind, behind < tail, chosen_ptr, at, K, tail, 0, largest, total, inv_t)
    else:
        at, largest, total = _add_rest(start, few, few < head, chosen_ptr, first, K, head, 0, float("-inf"), 0.0, inv_t)
        for begin in range(0, end, BLOCK):
            stop = head + tl.minimum(begin + BLOCK, end)
            at, largest, total = _add_rest(
                aligned, begin + lanes, begin + lanes < end, chosen_ptr, at, K, stop, head, largest, total, inv_t
            )
        at, largest, total = _add_rest(start, behind, behind < tail, chosen_ptr, at, K, tail, 0, largest, total, inv_t)
    return largest, total


@triton.jit
def _spread_tile(
    s_ptr, g_ptr, columns, exists, live, chosen_ptr, named_ptr, at, K, end, offset, largest, factor, dloss, inv_t
):  # fmt: skip
    """One tile of the gradient: factor e^((z - largest) / T), and the K entries at the named columns."""
    z = tl.load(s_ptr + columns, mask=exists & live, other=float("-inf")).to(tl.float32)
    g = factor * tl.exp(tl.minimum((z - largest) * inv_t, 0.0))
    column = _next(chosen_ptr, at, K)
    while column < end:
        g = tl.where(columns + offset == column, (tl.load(named_ptr + at) * dloss).to(tl.float32), g)
        at += 1
        column = _next(chosen_ptr, at, K)
    tl.store(g_ptr + columns, tl.where(live, g, 0.0).to(g_ptr.dtype.element_ty), mask=exists)
    return at


@triton.jit
def _spread(
    student_ptr, gradient_ptr, chosen_ptr, stats_ptr, row, V, K, student_stride, gradient_stride, live, dloss, inv_t,
    STATS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row's gradient from its statistics, times dloss; zeros where the row does not count."""
    head, body = _layout(row, student_stride, V, VEC)
    s_row, g_row = student_ptr + row * student_stride, gradient_ptr + row * gradient_stride
    s_body = _body(student_ptr, row, student_stride, VEC)
    g_body = _body(gradient_ptr, row, gradient_stride, VEC)
    largest = tl.load(stats_ptr).to(tl.float32)
    factor = (tl.load(stats_ptr + 1) * dloss).to(tl.float32)
    named = stats_ptr + STATS
    few = tl.arange(0, VEC)
    lanes = tl.arange(0, BLOCK)
    behind = head + body + few
    first = head * 0
    at = _spread_tile(
        s_row, g_row, few, few < head, live, chosen_ptr, named, first, K, head, 0, largest, factor, dloss, inv_t
    )
    for begin in range(0, body, BLOCK):
        columns = begin + lanes
        stop = head + tl.minimum(begin + BLOCK, body)
        at = _spread_tile(
            s_body, g_body, columns, columns < body, live, chosen_ptr, named, at, K, stop, head, largest, factor, dloss,
            inv_t,
        )  # fmt: skip
    _spread_tile(s_row, g_row, behind, behind < V, live, chosen_ptr, named, at, K, V, 0, largest, factor, dloss, inv_t)


@triton.jit
def topk_fwd_kernel(
    student_ptr, values_ptr, chosen_ptr, rest_ptr, scale_ptr, loss_ptr, stats_ptr, gradient_ptr,
    V, K, student_stride, gradient_stride, inv_high, inv_low, value_factor, beta, rest,
    RULE: tl.constexpr, CENTRED: tl.constexpr, MIXTURE: tl.constexpr, TAIL: tl.constexpr, GRADIENT: tl.constexpr,
    STATS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    """loss (N,), stats (N, STATS + K) and, with GRADIENT, gradient (N, V), all times the row's scale. TAIL: index into
    fastdistil.contracts.topk.TAILS; 1/T is inv_high + inv_low, rest 1 - beta."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + row)
    live = scale != 0.0
    inv_t = tl.full((), inv_high, tl.float64) + tl.full((), inv_low, tl.float64)
    chosen_ptr += row * K
    values_ptr += row * K
    stats_ptr += row * (STATS + K)
    s_row = student_ptr + row * student_stride
    largest, mass = _rest(student_ptr, chosen_ptr, row, V, K, student_stride, live, 0.0, inv_high, False, VEC, BLOCK)
    largest = tl.where(mass == 0.0, 0.0, largest)
    top_a, own_u, sum_a, top_u, ref, sum_u = _named(s_row, values_ptr, chosen_ptr, V, K, inv_t, KBLOCK)
    known = tl.exp(top_u) * sum_u
    nowhere = tl.full((), float("-inf"), tl.float64)
    omega = nowhere
    if TAIL == 0:
        omega = tl.load(rest_ptr + row)
    if TAIL == 2:
        q_rest = tl.load(rest_ptr + row)
        omega = tl.log(tl.where((q_rest < 0.0) | (mass == 0.0), 0.0, q_rest))
    lse_u = _log_add(top_u, sum_u, omega)
    mass = mass.to(tl.float64)
    rho = largest.to(tl.float64) * inv_t + tl.log(mass)
    lse_a = _log_add(top_a, sum_a, rho)
    if TAIL != 1 and tl.abs((rho - lse_a) - (omega - lse_u)) < 0.1:  # then the sum's rounding is all of it
        wide = largest.to(tl.float64)
        _, mass = _rest(student_ptr, chosen_ptr, row, V, K, student_stride, live, wide, inv_t, True, VEC, BLOCK)
        rho = wide * inv_t + tl.log(mass)
        lse_a = _log_add(top_a, sum_a, rho)
    own_u = tl.where(rho > top_a, omega, own_u)
    own_a = tl.maximum(top_a, rho)
    if TAIL == 0 and omega > top_u:
        top_u = omega
        ref = rho - omega
    top_u = tl.where(top_u == float("-inf"), 0.0, top_u)
    ref = tl.where(tl.abs(ref) < 1e6, ref, 0.0)
    weight, excess = _known(s_row, values_ptr, chosen_ptr, V, tl.where(live, K, 0), top_u, ref, inv_t, KBLOCK)
    log_ratio = _log_ratio(rho, omega, top_u, ref, weight, excess)
    teacher, slope_ratio = lse_u, log_ratio
    share = tl.where(live, (scale * value_factor).to(tl.float64), 0.0)
    part = share * inv_t
    if TAIL == 2:  # the gradient is that of "renormalize" times the known mass
        part *= known
        teacher = _log_add(tl.where(sum_u == 0.0, nowhere, top_u), sum_u, nowhere)
        slope_ratio = _log_ratio(rho, nowhere, top_u, ref, weight, excess)
    value, slope = _outcomes(
        s_row, values_ptr, chosen_ptr, stats_ptr + STATS, V, tl.where(live, K, 0), rho, omega, own_a, own_u, ref, lse_a,
        lse_u, log_ratio, teacher, slope_ratio, part, inv_t, beta, rest, RULE, CENTRED, MIXTURE, TAIL == 2,
        KBLOCK,
    )  # fmt: skip
    value = value.to(tl.float64)
    nothing = live == 0
    if TAIL == 2:
        nothing = nothing | (sum_u == 0.0)
        log_known = tl.where(tl.abs(q_rest) < 1e-3, _log1p_small(-q_rest), tl.log(known))
        value = tl.where(omega == float("-inf"), known * (value + log_known), value)
    tl.store(loss_ptr + row, tl.where(nothing, 0.0, value * share).to(tl.float32))
    tl.store(stats_ptr, largest.to(tl.float64))
    tl.store(stats_ptr + 1, tl.where(nothing | (mass == 0.0), 0.0, slope / mass.to(tl.float32) * part))
    if GRADIENT:
        tl.debug_barrier()  # the K gradients were written by other threads than those that read them
        _spread(
            student_ptr, gradient_ptr, chosen_ptr, stats_ptr, row, V, K, student_stride, gradient_stride, live, 1.0,
            inv_high, STATS, VEC, BLOCK,
        )  # fmt: skip


@triton.jit
def topk_bwd_kernel(
    student_ptr, chosen_ptr, scale_ptr, dloss_ptr, stats_ptr, gradient_ptr,
    V, K, student_stride, gradient_stride, inv_high,
    KEEP_UNIT: tl.constexpr, STATS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient (N, V) from the forward's statistics; with KEEP_UNIT rows whose dloss is 1 are left alone."""
    row = tl.program_id(0).to(tl.int64)
    live = tl.load(scale_ptr + row) != 0.0
    dloss = tl.load(dloss_ptr + row)
    if (dloss != 1.0) | (not KEEP_UNIT):
        _spread(
            student_ptr, gradient_ptr, chosen_ptr + row * K, stats_ptr + row * (STATS + K), row, V, K, student_stride,
            gradient_stride, live, dloss, inv_high, STATS, VEC, BLOCK,
        )  # fmt: skip
