"""The kernels of logit_loss and their device functions: one program a row (docs/losses.md, section 1).

Floor: (2 reads + 1 write) x N x V x bytes an element over the copy bandwidth. This form reads each row twice (a centred
rule with a gradient three times); at V 119,547 in bf16 both rows are 0.5 MB, so the later reads come from L2.

A row of an odd vocabulary starts anywhere: the body begins at the first 16-byte boundary and ends at the last, so that
all its loads are 16 bytes wide, and the few columns before and behind it make one small tile of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdistil.kernels.triton.numerics import expm1, log1p


@triton.jit
def _scores(s, t, inv_s, inv_t, shift, EQUAL: tl.constexpr):
    """a, b and d = a - b. With equal temperatures subtract first: floating point subtracts exactly what is close."""
    if EQUAL:
        s -= shift
        d = tl.where(s == t, 0.0, s - t) * inv_s
        return s * inv_s, t * inv_s, d
    else:
        a = s * inv_s - shift
        b = t * inv_t
        return a, b, tl.where(a == b, 0.0, a - b)


@triton.jit
def _row_shift(s, t, inv_s, inv_t, EQUAL: tl.constexpr):
    """The multiple of 1/1024 nearest to the first columns' difference, which KL does not see."""
    offset = s - t if EQUAL else s * inv_s - t * inv_t
    steps = tl.floor(offset * 1024.0 + 0.5)
    return tl.where(tl.abs(steps) < 1e9, steps, 0.0) / 1024.0


@triton.jit
def _load(s_ptr, t_ptr, columns, mask, inv_s, inv_t, shift, EQUAL: tl.constexpr):
    s = tl.load(s_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    t = tl.load(t_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    return _scores(s, t, inv_s, inv_t, shift, EQUAL)


@triton.jit
def _add_masses(
    s_ptr, t_ptr, columns, mask, inv_s, inv_t, shift, largest, total, difference, EQUAL: tl.constexpr
):  # fmt: skip
    """One more tile in S = sum e^(b-m) and X = sum e^(b-m) expm1(d). The unit is 1 until a finite b was seen."""
    a, b, d = _load(s_ptr, t_ptr, columns, mask, inv_s, inv_t, shift, EQUAL)
    new = tl.maximum(largest, tl.max(b, 0))
    m = tl.where(new == float("-inf"), 0.0, new)
    rescale = tl.exp(tl.where(largest == float("-inf"), 0.0, largest) - m)
    weight = tl.exp(b - m)
    other = tl.exp(a - m)  # infinite where it overflows: a maximum found later cannot make a number of it
    x = tl.where(tl.abs(d) <= 1.0, weight * expm1(tl.where(tl.abs(d) <= 1.0, d, 0.0)), other - weight)
    total = tl.where(total == 0.0, 0.0, total * rescale) + tl.sum(weight, 0)
    difference = tl.where(difference == 0.0, 0.0, difference * rescale) + tl.sum(x, 0)
    return new, total, difference


@triton.jit
def _add_to_lse(s_ptr, t_ptr, columns, mask, inv_s, inv_t, shift, largest, total, EQUAL: tl.constexpr):
    """One more tile in the student's own maximum and sum of exponentials."""
    a, _, _ = _load(s_ptr, t_ptr, columns, mask, inv_s, inv_t, shift, EQUAL)
    new = tl.maximum(largest, tl.max(a, 0))
    m = tl.where(new == float("-inf"), 0.0, new)
    return new, tl.where(total == 0.0, 0.0, total * tl.exp(largest - m)) + tl.sum(tl.exp(a - m), 0)


@triton.jit
def _share(
    a, b, d, mask, largest, inv_sum, log_ratio, beta,
    RULE: tl.constexpr, SOFTMAX: tl.constexpr,
):  # fmt: skip
    """Student probability, value and slope of each column; masked columns give 0."""
    if SOFTMAX:
        q = tl.exp(b - largest) * inv_sum
        p = tl.exp((a - largest) - log_ratio) * inv_sum
        delta = d - log_ratio
        near = tl.abs(delta) <= 1.0
        gap = tl.where(near, q * expm1(tl.where(near, delta, 0.0)), p - q)
    else:
        q = inv_sum
        p = a
        delta = d
        gap = d
    value, slope = RULE(p, q, delta, gap, beta)
    return tl.where(mask, p, 0.0), tl.where(mask, value, 0.0), tl.where(mask, slope, 0.0)


@triton.jit
def _layout(row, stride, V, VEC: tl.constexpr):
    """How many columns stand before the row's first 16-byte boundary, and how many the 16-byte body holds."""
    head = tl.minimum(((VEC - row * stride % VEC) % VEC).to(tl.int32), V)
    return head, (V - head) // VEC * VEC


@triton.jit
def _body(ptr, row, stride, VEC: tl.constexpr):
    """The row's first 16-byte boundary, in a form whose alignment the compiler sees."""
    return ptr + tl.cdiv(row * stride, VEC) * VEC


@triton.jit
def _edge(head, body, V, VEC: tl.constexpr):
    """The columns outside the body, as one tile, relative to the row's start, and which of its lanes exist."""
    lanes = tl.arange(0, 2 * VEC)
    return tl.where(lanes < head, lanes, lanes + body), lanes < V - body


@triton.jit
def _tile(
    s_ptr, t_ptr, g_ptr, columns, exists, live, factor, largest, inv_sum, shift, log_ratio, centre, inv_s, inv_t, beta,
    label, own_max, own_factor, own_scale,
    RULE: tl.constexpr, CENTRED: tl.constexpr, SOFTMAX: tl.constexpr, EQUAL: tl.constexpr, WRITE: tl.constexpr,
    LABELS: tl.constexpr,
):  # fmt: skip
    """One tile's shares of value and centre; with WRITE its gradient, zeros where the row does not count, and with
    LABELS that of the cross entropy on top (`label` as `columns` count)."""
    mask = exists & live
    a, b, d = _load(s_ptr, t_ptr, columns, mask, inv_s, inv_t, shift, EQUAL)
    p, value, slope = _share(a, b, d, mask, largest, inv_sum, log_ratio, beta, RULE, SOFTMAX)
    if WRITE:
        g = p * (slope - centre) if CENTRED else slope
        g = tl.where(live, g * factor, 0.0)
        if LABELS:
            z = tl.load(s_ptr + columns, mask=exists & (own_scale != 0.0), other=float("-inf")).to(tl.float32)
            g += own_factor * tl.exp(z - own_max) - tl.where(columns == label, own_scale, 0.0)
        tl.store(g_ptr + columns, g.to(g_ptr.dtype.element_ty), mask=exists)
    return tl.sum(value, 0), tl.sum(p * slope, 0) if CENTRED else 0.0


@triton.jit
def _pass(
    student_ptr, teacher_ptr, gradient_ptr, row, V, student_stride, teacher_stride, gradient_stride, live, factor,
    largest, inv_sum, shift, log_ratio, centre, inv_s, inv_t, beta, label, own_max, own_factor, own_scale,
    RULE: tl.constexpr, CENTRED: tl.constexpr, SOFTMAX: tl.constexpr, EQUAL: tl.constexpr, WRITE: tl.constexpr,
    LABELS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole row's value and centre; with WRITE its gradient."""
    head, body = _layout(row, student_stride, V, VEC)
    columns, exists = _edge(head, body, V, VEC)
    value, slopes = _tile(
        student_ptr + row * student_stride, teacher_ptr + row * teacher_stride, gradient_ptr + row * gradient_stride,
        columns, exists, live, factor, largest, inv_sum, shift, log_ratio, centre, inv_s, inv_t, beta,
        label, own_max, own_factor, own_scale, RULE, CENTRED, SOFTMAX, EQUAL, WRITE, LABELS,
    )  # fmt: skip
    s_body = _body(student_ptr, row, student_stride, VEC)
    t_body = _body(teacher_ptr, row, teacher_stride, VEC)
    g_body = _body(gradient_ptr, row, gradient_stride, VEC)
    lanes = tl.arange(0, BLOCK)
    for begin in range(0, body, BLOCK):
        v, f = _tile(
            s_body, t_body, g_body, begin + lanes, begin + lanes < body, live, factor, largest, inv_sum, shift,
            log_ratio, centre, inv_s, inv_t, beta, label - head, own_max, own_factor, own_scale,
            RULE, CENTRED, SOFTMAX, EQUAL, WRITE, LABELS,
        )  # fmt: skip
        value += v
        slopes += f
    return value, slopes


@triton.jit
def _statistics(
    student_ptr, teacher_ptr, row, V, student_stride, teacher_stride, live, inv_s, inv_t,
    EQUAL: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The teacher's maximum and 1/sum, the shift, D = log1p(X/S), and where X/S is of no use the student's lse; a row
    that does not count is not read."""
    head, body = _layout(row, student_stride, V, VEC)
    edge, exists = _edge(head, body, V, VEC)
    at_edge = exists & live
    end = tl.where(live, body, 0)
    s_row = student_ptr + row * student_stride
    t_row = teacher_ptr + row * teacher_stride
    s_body = _body(student_ptr, row, student_stride, VEC)
    t_body = _body(teacher_ptr, row, teacher_stride, VEC)
    lanes = tl.arange(0, BLOCK)
    s0 = tl.load(s_row, mask=live, other=0.0).to(tl.float32)
    t0 = tl.load(t_row, mask=live, other=0.0).to(tl.float32)
    shift = _row_shift(s0, t0, inv_s, inv_t, EQUAL)
    largest, total, difference = _add_masses(
        s_row, t_row, edge, at_edge, inv_s, inv_t, shift, float("-inf"), 0.0, 0.0, EQUAL
    )
    for begin in range(0, end, BLOCK):
        columns = begin + lanes
        largest, total, difference = _add_masses(
            s_body, t_body, columns, columns < end, inv_s, inv_t, shift, largest, total, difference, EQUAL
        )
    ratio = difference / total
    near = (ratio > -0.9) & (ratio < 1e30)
    log_ratio = log1p(tl.where(near, ratio, 0.0))
    lse = 0.0
    if live & (near == 0):  # the rows lie so far apart that the plain difference is good enough
        largest_a, total_a = _add_to_lse(s_row, t_row, edge, at_edge, inv_s, inv_t, shift, float("-inf"), 0.0, EQUAL)
        for begin in range(0, end, BLOCK):
            columns = begin + lanes
            largest_a, total_a = _add_to_lse(
                s_body, t_body, columns, columns < end, inv_s, inv_t, shift, largest_a, total_a, EQUAL
            )
        lse = largest_a + tl.log(total_a)
        log_ratio = lse - (largest + tl.log(total))
    return largest, 1.0 / total, shift, log_ratio, lse


@triton.jit
def _add_to_own(s_ptr, columns, mask, largest, total):
    """One more tile in the maximum and the sum of exponentials of the student's logits as they are."""
    z = tl.load(s_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    new = tl.maximum(largest, tl.max(z, 0))
    m = tl.where(new == float("-inf"), 0.0, new)
    return new, tl.where(total == 0.0, 0.0, total * tl.exp(largest - m)) + tl.sum(tl.exp(z - m), 0)


@triton.jit
def _own_softmax(student_ptr, row, V, stride, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """The row's largest logit and its sum of exp(z - largest)."""
    head, body = _layout(row, stride, V, VEC)
    edge, exists = _edge(head, body, V, VEC)
    largest, total = _add_to_own(student_ptr + row * stride, edge, exists, float("-inf"), 0.0)
    s_body = _body(student_ptr, row, stride, VEC)
    lanes = tl.arange(0, BLOCK)
    for begin in range(0, body, BLOCK):
        largest, total = _add_to_own(s_body, begin + lanes, begin + lanes < body, largest, total)
    return largest, total


@triton.jit
def logit_fwd_kernel(
    student_ptr, teacher_ptr, scale_ptr, labels_ptr, label_scale_ptr, loss_ptr, stats_ptr, gradient_ptr,
    V, student_stride, teacher_stride, gradient_stride, inv_s, inv_t, value_factor, gradient_factor, beta,
    RULE: tl.constexpr, CENTRED: tl.constexpr, SOFTMAX: tl.constexpr, EQUAL: tl.constexpr, GRADIENT: tl.constexpr,
    PHASE: tl.constexpr, LABELS: tl.constexpr, STATS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """loss (N,), stats (N, STATS) and, with GRADIENT, gradient (N, V), all times the row's scale. PHASE 1 leaves the
    statistics of these columns alone, 2 begins with given ones (logit_args.h). With LABELS the
    cross entropy with labels (N,) is added, times label_scale (N,)."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + row)
    live = scale != 0.0
    stats_ptr += row * STATS
    largest, inv_sum, shift, log_ratio = 0.0, 1.0 / V, 0.0, 0.0
    value, centre = 0.0, 0.0
    label, own_max, own_factor, own_scale, entropy = 0, 0.0, 0.0, 0.0, 0.0
    if LABELS:  # first: it brings the student's row into the cache
        own_scale = tl.load(label_scale_ptr + row)
        if own_scale != 0.0:
            label = tl.load(labels_ptr + row).to(tl.int32)
            own_max, mass = _own_softmax(student_ptr, row, V, student_stride, VEC, BLOCK)
            own_factor = own_scale / mass
            exists = (label >= 0) & (label < V)  # a label that is no column shows as NaN
            z = tl.load(student_ptr + row * student_stride + label, mask=exists, other=float("nan")).to(tl.float32)
            entropy = own_scale * (tl.log(mass) + (own_max - z))
    if PHASE == 2:
        largest, inv_sum = tl.load(stats_ptr), tl.load(stats_ptr + 1)
        shift, log_ratio = tl.load(stats_ptr + 2), tl.load(stats_ptr + 3)
    elif SOFTMAX:
        largest, inv_sum, shift, log_ratio, lse = _statistics(
            student_ptr, teacher_ptr, row, V, student_stride, teacher_stride, live, inv_s, inv_t, EQUAL, VEC, BLOCK
        )
        if PHASE == 1:
            centre = tl.where(largest == float("-inf"), lse, 0.0)
        else:  # a teacher of -inf alone is the caller's error and stays visible
            largest = tl.where(largest == float("-inf"), float("nan"), largest)
    if PHASE != 1:
        value, centre = _pass(
            student_ptr, teacher_ptr, gradient_ptr, row, V, student_stride, teacher_stride, gradient_stride, live,
            scale * gradient_factor, largest, inv_sum, shift, log_ratio, 0.0, inv_s, inv_t, beta,
            label, own_max, own_factor, own_scale,
            RULE, CENTRED, SOFTMAX, EQUAL, GRADIENT and not CENTRED, LABELS, VEC, BLOCK,
        )  # fmt: skip
    if GRADIENT and CENTRED and PHASE == 0:
        _pass(
            student_ptr, teacher_ptr, gradient_ptr, row, V, student_stride, teacher_stride, gradient_stride, live,
            scale * gradient_factor, largest, inv_sum, shift, log_ratio, centre, inv_s, inv_t, beta,
            label, own_max, own_factor, own_scale, RULE, CENTRED, SOFTMAX, EQUAL, True, LABELS, VEC, BLOCK,
        )  # fmt: skip
    tl.store(loss_ptr + row, tl.where(live, value * value_factor * scale, 0.0) + entropy)
    tl.store(stats_ptr, largest)
    tl.store(stats_ptr + 1, inv_sum)
    tl.store(stats_ptr + 2, shift)
    tl.store(stats_ptr + 3, log_ratio)
    tl.store(stats_ptr + 4, centre)


@triton.jit
def logit_bwd_kernel(
    student_ptr, teacher_ptr, scale_ptr, dloss_ptr, stats_ptr, gradient_ptr,
    V, student_stride, teacher_stride, gradient_stride, inv_s, inv_t, gradient_factor, beta,
    RULE: tl.constexpr, CENTRED: tl.constexpr, SOFTMAX: tl.constexpr, EQUAL: tl.constexpr, KEEP_UNIT: tl.constexpr,
    STATS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient (N, V) from the forward's statistics; with KEEP_UNIT rows whose dloss is 1 are left alone."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + row)
    dloss = tl.load(dloss_ptr + row)
    stats_ptr += row * STATS
    if (dloss != 1.0) | (not KEEP_UNIT):
        _pass(
            student_ptr, teacher_ptr, gradient_ptr, row, V, student_stride, teacher_stride, gradient_stride,
            scale != 0.0, scale * dloss * gradient_factor, tl.load(stats_ptr), tl.load(stats_ptr + 1),
            tl.load(stats_ptr + 2), tl.load(stats_ptr + 3), tl.load(stats_ptr + 4), inv_s, inv_t, beta,
            0, 0.0, 0.0, 0.0, RULE, CENTRED, SOFTMAX, EQUAL, True, False, VEC, BLOCK,
        )  # fmt: skip
