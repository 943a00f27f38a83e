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
from fastdistil.kernels.triton.logit_kernels import _body, _layout
from fastdistil.kernels.triton.numerics import expm1


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
def _wide_expm1(x):
    """e^x - 1 in float64, within 1e-11."""
    s = x * (1.0 / 11.0)
    for i in tl.static_range(9):
        s = (1.0 + s) * x * (1.0 / (10.0 - i))  # float64 division is a call, around which registers spill
    return tl.where(tl.abs(x) < 0.3, (1.0 + s) * x, tl.exp(x) - 1.0)


@triton.jit
def _entries(student_ptr, values_ptr, chosen_ptr, lanes, V, K, inv_t):
    """Scores of student and teacher (float64) at some of the K named columns; -inf where an entry is not there."""
    column = tl.load(chosen_ptr + lanes, mask=lanes < K, other=V)
    u = tl.load(values_ptr + lanes, mask=lanes < K, other=float("-inf"))
    z = tl.load(student_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
    return z.to(tl.float64) * inv_t, u


@triton.jit
def _named(student_ptr, values_ptr, chosen_ptr, V, K, inv_t, KBLOCK: tl.constexpr):
    """Of the named columns: the largest student score and the mass relative to it, the largest u, sum of e^u relative
    to it, and 1 - sum of e^u; how many there are."""
    lanes = tl.arange(0, KBLOCK)
    top_a = tl.max(tl.full((KBLOCK,), float("-inf"), tl.float64), 0)
    top_u = top_a
    count = 0
    for begin in range(0, K, KBLOCK):
        a, u = _entries(student_ptr, values_ptr, chosen_ptr, begin + lanes, V, K, inv_t)
        top_a = tl.maximum(top_a, tl.max(a, 0))
        top_u = tl.maximum(top_u, tl.max(u, 0))
        count += tl.sum((u != float("-inf")).to(tl.int32), 0)
    sum_a = tl.sum(tl.zeros((KBLOCK,), tl.float64), 0)
    sum_u, others = sum_a, sum_a
    unit_a, unit_u = tl.where(top_a == float("-inf"), 0.0, top_a), tl.where(top_u == float("-inf"), 0.0, top_u)
    for begin in range(0, K, KBLOCK):
        a, u = _entries(student_ptr, values_ptr, chosen_ptr, begin + lanes, V, K, inv_t)
        sum_a += tl.sum(tl.exp(a - unit_a), 0)
        sum_u += tl.sum(tl.exp(u - unit_u), 0)
        others += tl.sum(tl.where(u == top_u, 0.0, tl.exp(u)), 0)
    # As many as share the largest u, but for one, are in sum_u and not in others.
    shared = tl.exp(unit_u) * sum_u - others - tl.exp(top_u)
    shared = tl.where(shared < 0.5 * tl.exp(top_u), 0.0, shared)
    return top_a, sum_a, top_u, sum_u, -_wide_expm1(top_u) - others - shared, count


@triton.jit
def _log_add(top, total, other):
    """log(total e^top + e^other) in float64."""
    m = tl.maximum(top, other)
    unit = tl.where(m == float("-inf"), 0.0, m)
    near = tl.where(total == 0.0, 0.0, total * tl.exp(tl.where(total == 0.0, 0.0, top - unit)))
    return m + tl.log(near + tl.exp(other - unit))


@triton.jit
def _column(a, u, lse_a, lse_u):
    """p, q, delta and gap of an outcome, all 0 where neither side has mass."""
    none = (a == float("-inf")) & (u == float("-inf"))
    delta = tl.where(none, 0.0, (a - lse_a) - (u - lse_u)).to(tl.float32)
    p, q = tl.exp(a - lse_a).to(tl.float32), tl.exp(u - lse_u).to(tl.float32)
    near = tl.abs(delta) <= 1.0
    return p, q, delta, tl.where(near, q * expm1(tl.where(near, delta, 0.0)), p - q)


@triton.jit
def _outcomes(
    student_ptr, values_ptr, chosen_ptr, named_ptr, V, K, rho, omega, lse_a, lse_u, scale, inv_t, beta,
    RULE: tl.constexpr, CENTRED: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    """The row's value and the gradient in rho, without scale; the K gradients, times scale, go to named_ptr."""
    lanes = tl.arange(0, KBLOCK)
    p_rest, q_rest, delta_rest, gap_rest = _column(rho, omega, lse_a, lse_u)
    value, slope_rest = RULE(p_rest, q_rest, delta_rest, gap_rest, beta)
    centre = p_rest * slope_rest
    for begin in range(0, K, KBLOCK):
        a, u = _entries(student_ptr, values_ptr, chosen_ptr, begin + lanes, V, K, inv_t)
        p, q, delta, gap = _column(a, u, lse_a, lse_u)
        v, slope = RULE(p, q, delta, gap, beta)
        value += tl.sum(v, 0)
        centre += tl.sum(p * slope, 0)
    for begin in range(0, K, KBLOCK):
        a, u = _entries(student_ptr, values_ptr, chosen_ptr, begin + lanes, V, K, inv_t)
        p, q, delta, gap = _column(a, u, lse_a, lse_u)
        _, slope = RULE(p, q, delta, gap, beta)
        g = p * (slope - centre) if CENTRED else slope
        tl.store(named_ptr + begin + lanes, g * scale, mask=begin + lanes < K)
    return value, p_rest * (slope_rest - centre) if CENTRED else slope_rest


@triton.jit
def topk_fwd_kernel(
    student_ptr, values_ptr, chosen_ptr, scale_ptr, loss_ptr, stats_ptr, gradient_ptr,
    V, K, student_stride, gradient_stride, inv_high, inv_low, value_factor, beta,
    RULE: tl.constexpr, CENTRED: tl.constexpr, TAIL: tl.constexpr, GRADIENT: tl.constexpr, STATS: tl.constexpr,
    VEC: tl.constexpr, BLOCK: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    """loss (N,), stats (N, STATS + K) and, with GRADIENT, gradient (N, V), all times the row's scale. TAIL: index into
    fastdistil.ops.topk_rule.TAILS; 1/T is inv_high + inv_low."""
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
    top_a, sum_a, top_u, sum_u, q_rest, count = _named(s_row, values_ptr, chosen_ptr, V, K, inv_t, KBLOCK)
    omega = tl.full((), float("-inf"), tl.float64)
    if TAIL == 0:
        omega = tl.log(tl.where((q_rest < 0.0) | (count == V), 0.0, q_rest))
    lse_u = _log_add(top_u, sum_u, omega)
    mass = mass.to(tl.float64)
    rho = largest.to(tl.float64) * inv_t + tl.log(mass)
    lse_a = _log_add(top_a, sum_a, rho)
    if TAIL == 0 and tl.abs((rho - lse_a) - (omega - lse_u)) < 0.1:  # then the sum's rounding is all of it
        wide = largest.to(tl.float64)
        _, mass = _rest(student_ptr, chosen_ptr, row, V, K, student_stride, live, wide, inv_t, True, VEC, BLOCK)
        rho = wide * inv_t + tl.log(mass)
        lse_a = _log_add(top_a, sum_a, rho)
    known = tl.exp(top_u) * sum_u
    share = tl.where(live, (scale * value_factor).to(tl.float64), 0.0)
    part = share * inv_t
    if TAIL == 2:
        part *= known
    value, slope = _outcomes(
        s_row, values_ptr, chosen_ptr, stats_ptr + STATS, V, tl.where(live, K, 0), rho, omega, lse_a, lse_u, part,
        inv_t, beta, RULE, CENTRED, KBLOCK,
    )  # fmt: skip
    value = value.to(tl.float64)
    nothing = live == 0
    if TAIL == 2:
        nothing = nothing | (count == 0)
        value = known * value + known * tl.log(known)
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
