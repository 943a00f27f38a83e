"""The kernels of logit_loss and their device functions: one program a row (docs/losses.md, section 1).

Floor: (2 reads + 1 write) x N x V x bytes an element over the copy bandwidth. This form reads each row twice (a centred
rule with a gradient three times); at V 119,547 in bf16 both rows are 0.5 MB, so the later reads come from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdistil.kernels.triton.cross_entropy import label_slope
from fastdistil.kernels.triton.divergence import origin_of_slopes
from fastdistil.kernels.triton.logit_statistics import _body, _edge, _layout, _load, _scores, _statistics
from fastdistil.kernels.triton.numerics import expm1_near, log1p


@triton.jit
def _column(
    a, b, d, largest, inv_sum, log_sum, log_ratio, ref, own_max, own_log, inv_s, inv_t
):  # fmt: skip
    """Student and teacher probability of each column, log p - log q, p - q."""
    log_weight = (b - largest) * inv_t
    q = tl.exp(log_weight) * inv_sum
    c = (d - ref) - log_ratio
    log_q = log_weight - log_sum
    log_p = (a - own_max) * inv_s - own_log
    # Each difference has a rounding of its own size: of small terms, what is left of them may be smaller yet. At the
    # teacher's largest column d and ref are one number.
    size = tl.where(d == ref, tl.abs(log_ratio), tl.abs(d) + tl.abs(ref + log_ratio))
    better = (size <= tl.abs(log_p) + tl.abs(log_q)) | ((tl.abs(c) <= 1.0) & (size <= 20.0))
    delta = tl.where(better, c, log_p - log_q)
    near = tl.abs(delta) <= 1.0
    p = tl.exp(tl.where(near, delta, log_p)) * tl.where(near, q, 1.0)
    return p, q, delta, tl.where(near, q * expm1_near(delta), p - q)


@triton.jit
def _tile(
    s_ptr, t_ptr, g_ptr, columns, exists, live, factor, largest, inv_sum, log_sum, shift, shift_t, log_ratio, centre,
    ref, own_max, own_log, inv_s, inv_t, low_s, low_t, beta, rest, by_scores, zero, top_a, top_b, anchor, own, other,
    log_own, curve, label, label_max, label_factor, label_there,
    RULE: tl.constexpr, CENTRED: tl.constexpr, SOFTMAX: tl.constexpr, EQUAL: tl.constexpr, WRITE: tl.constexpr,
    LABELS: tl.constexpr,
):  # fmt: skip
    """One tile's shares of value and centre; with WRITE its gradient, zeros where the row does not count, and with
    LABELS that of the cross entropy on top (`label` as `columns` count)."""
    mask = exists & live
    a, b, d = _load(s_ptr, t_ptr, columns, mask, inv_s, inv_t, low_s, low_t, shift, shift_t, EQUAL)
    if SOFTMAX:
        p, q, delta, gap = _column(a, b, d, largest, inv_sum, log_sum, log_ratio, ref, own_max, own_log, inv_s, inv_t)
    else:
        p, q, delta, gap = a, inv_sum, d, d
    turn = delta
    if CENTRED:
        # Of the two forms of a difference from the top's, that with the smaller terms.
        from_top, teacher = (a - top_a) * inv_s, (b - top_b) * inv_t
        by_d = tl.abs(d) + tl.abs(zero) <= tl.abs(from_top) + tl.abs(teacher)
        turn = tl.where(by_scores, tl.where(by_d, d - zero, from_top - teacher), delta - zero)
    value, slope = RULE(p, q, delta, gap, turn, beta, rest, own, other, log_own, curve)
    p, value, slope = tl.where(mask, p, 0.0), tl.where(mask, value, 0.0), tl.where(mask, slope, 0.0)
    if CENTRED:
        slope -= anchor
    if WRITE:
        g = p * (slope - centre) if CENTRED else slope
        g = tl.where(live, g * factor, 0.0)
        if LABELS:
            z = tl.load(s_ptr + columns, mask=exists & (label_factor != 0.0), other=float("-inf")).to(tl.float32)
            g += tl.where(columns == label, label_there, label_factor * tl.exp(z - label_max))
        tl.store(g_ptr + columns, g.to(g_ptr.dtype.element_ty), mask=exists)
    return tl.sum(value, 0), tl.sum(p * slope, 0) if CENTRED else 0.0


@triton.jit
def _origin(
    top_s, top_t, largest, inv_sum, log_sum, shift, shift_t, log_ratio, ref, own_max, own_log, inv_s, inv_t, low_s,
    low_t, beta, rest, RULE: tl.constexpr, MIXTURE: tl.constexpr, EQUAL: tl.constexpr,
):  # fmt: skip
    """`origin_of_slopes` of the student's largest column, and what is subtracted from d or delta."""
    d = _scores(top_s, top_t, inv_s, inv_t, low_s, low_t, shift, shift_t, EQUAL)
    top = top_s + top_t if EQUAL == 2 else top_s
    p, q, delta, gap = _column(top, top_t, d, largest, inv_sum, log_sum, log_ratio, ref, own_max, own_log, inv_s, inv_t)
    by_scores, zero, anchor, own, other, log_own, curve = origin_of_slopes(
        p, q, delta, gap, tl.abs(d) < 1e6, beta, rest, RULE, MIXTURE
    )
    return by_scores, tl.where(by_scores, d, zero), anchor, own, other, log_own, curve


@triton.jit
def _pass(
    student_ptr, teacher_ptr, gradient_ptr, row, V, student_stride, teacher_stride, gradient_stride, live, factor,
    largest, inv_sum, shift, shift_t, log_ratio, centre, ref, own_max, own_log, top_s, top_t, inv_s, inv_t, low_s,
    low_t, beta, rest, label, label_max, label_factor, label_there,
    RULE: tl.constexpr, CENTRED: tl.constexpr, MIXTURE: tl.constexpr, SOFTMAX: tl.constexpr, EQUAL: tl.constexpr,
    WRITE: tl.constexpr, LABELS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The whole row's value and centre; with WRITE its gradient."""
    log_sum = -tl.log(inv_sum)
    if SOFTMAX:
        # Where the rows lie far apart, D is the difference of their logarithms after all; measured from the shift's
        # column where it is smaller there.
        far = _scores(own_max, largest, inv_s, inv_t, low_s, low_t, shift, shift_t, EQUAL != 0) + (own_log - log_sum)
        ref = tl.where((log_ratio == float("inf")) & (tl.abs(far) < tl.abs(far - ref)), 0.0, ref)
        log_ratio = tl.where(log_ratio == float("inf"), far - ref, log_ratio)
        # A slope may be a number where the teacher's row is none.
        own_log = tl.where((largest != largest) | (inv_sum != inv_sum), float("nan"), own_log)
    by_scores, zero, anchor, own, other, log_own, curve = False, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0
    top_a = top_s + top_t if EQUAL == 2 else top_s
    if CENTRED:
        by_scores, zero, anchor, own, other, log_own, curve = _origin(
            top_s, top_t, largest, inv_sum, log_sum, shift, shift_t, log_ratio, ref, own_max, own_log, inv_s, inv_t,
            low_s, low_t, beta, rest, RULE, MIXTURE, EQUAL,
        )  # fmt: skip
    head, body = _layout(row, student_stride, V, VEC)
    columns, exists = _edge(head, body, V, VEC)
    value, slopes = _tile(
        student_ptr + row * student_stride, teacher_ptr + row * teacher_stride, gradient_ptr + row * gradient_stride,
        columns, exists, live, factor, largest, inv_sum, log_sum, shift, shift_t, log_ratio, centre, ref, own_max,
        own_log, inv_s, inv_t, low_s, low_t, beta, rest, by_scores, zero, top_a, top_t, anchor, own, other, log_own,
        curve, label, label_max, label_factor, label_there, RULE, CENTRED, SOFTMAX, EQUAL, WRITE, LABELS,
    )  # fmt: skip
    s_body = _body(student_ptr, row, student_stride, VEC)
    t_body = _body(teacher_ptr, row, teacher_stride, VEC)
    g_body = _body(gradient_ptr, row, gradient_stride, VEC)
    lanes = tl.arange(0, BLOCK)
    for begin in range(0, body, BLOCK):
        v, f = _tile(
            s_body, t_body, g_body, begin + lanes, begin + lanes < body, live, factor, largest, inv_sum, log_sum,
            shift, shift_t, log_ratio, centre, ref, own_max, own_log, inv_s, inv_t, low_s, low_t, beta, rest, by_scores,
            zero, top_a, top_t, anchor, own, other, log_own, curve, label - head, label_max, label_factor, label_there,
            RULE, CENTRED, SOFTMAX, EQUAL, WRITE, LABELS,
        )  # fmt: skip
        value += v
        slopes += f
    return value, slopes


@triton.jit
def _add_to_own(s_ptr, columns, mask, largest, others, LANES: tl.constexpr):
    """One more tile in the largest of the student's logits as they are, and in the other exponentials' sum."""
    z = tl.load(s_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    lanes = tl.arange(0, LANES)
    top = tl.max(z, 0)
    first = tl.full((), LANES, tl.int32)  # that of the largest, where it is in this tile
    if top > largest:
        others = tl.where(largest == float("-inf"), 0.0, (1.0 + others) * tl.exp(largest - top))
        largest = top
        first = tl.min(tl.where(z == top, lanes, LANES), 0)
    m = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, others + tl.sum(tl.where(lanes == first, 0.0, tl.exp(z - m)), 0)


@triton.jit
def _own_softmax(student_ptr, row, V, stride, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """The row's largest logit and the sum of exp(z - largest) over all other columns."""
    head, body = _layout(row, stride, V, VEC)
    edge, exists = _edge(head, body, V, VEC)
    nothing = tl.full((), 0.0, tl.float32)
    start = student_ptr + row * stride
    largest, others = _add_to_own(start, edge, exists, nothing + float("-inf"), nothing, 2 * VEC)
    s_body = _body(student_ptr, row, stride, VEC)
    lanes = tl.arange(0, BLOCK)
    for begin in range(0, body, BLOCK):
        largest, others = _add_to_own(s_body, begin + lanes, begin + lanes < body, largest, others, BLOCK)
    return largest, others


@triton.jit
def logit_fwd_kernel(
    student_ptr, teacher_ptr, scale_ptr, labels_ptr, label_scale_ptr, loss_ptr, stats_ptr, gradient_ptr,
    V, student_stride, teacher_stride, gradient_stride, inv_s, inv_t, low_s, low_t, value_factor, gradient_factor,
    beta, rest,
    RULE: tl.constexpr, CENTRED: tl.constexpr, MIXTURE: tl.constexpr, SOFTMAX: tl.constexpr, EQUAL: tl.constexpr,
    GRADIENT: tl.constexpr, PHASE: tl.constexpr, LABELS: tl.constexpr, STATS: tl.constexpr, VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """loss (N,), stats (N, STATS) and, with GRADIENT, gradient (N, V), all times the row's scale. PHASE 1 leaves the
    statistics of these columns alone, 2 begins with given ones (logit_args.h). With LABELS the
    cross entropy with labels (N,) is added, times label_scale (N,)."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + row)
    live = scale != 0.0
    stats_ptr += row * STATS
    largest, inv_sum, shift, log_ratio, ref, own_max, own_log = 0.0, 1.0 / V, 0.0, 0.0, 0.0, 0.0, 0.0
    top_s, top_t, shift_t = 0.0, 0.0, 0.0
    value, centre = 0.0, 0.0
    label, label_max, label_factor, label_there, entropy = 0, 0.0, 0.0, 0.0, 0.0
    if LABELS:  # first: it brings the student's row into the cache
        label_share = tl.load(label_scale_ptr + row)
        if label_share != 0.0:
            label = tl.load(labels_ptr + row).to(tl.int32)
            label_max, others = _own_softmax(student_ptr, row, V, student_stride, VEC, BLOCK)
            label_factor = label_share / (1.0 + others)
            exists = (label >= 0) & (label < V)  # a label that is no column shows as NaN
            z = tl.load(student_ptr + row * student_stride + label, mask=exists, other=float("nan")).to(tl.float32)
            label_there = label_share * label_slope(z, label_max, others)
            entropy = label_share * (log1p(others) + (label_max - z))
    if PHASE == 2:
        largest, inv_sum = tl.load(stats_ptr), tl.load(stats_ptr + 1)
        shift, log_ratio = tl.load(stats_ptr + 2), tl.load(stats_ptr + 3)
        ref, own_max, own_log = tl.load(stats_ptr + 5), tl.load(stats_ptr + 6), tl.load(stats_ptr + 7)
        top_s, top_t, shift_t = tl.load(stats_ptr + 8), tl.load(stats_ptr + 9), tl.load(stats_ptr + 10)
    elif SOFTMAX:
        largest, inv_sum, shift, log_ratio, ref, own_max, own_log, top_s, top_t, shift_t = _statistics(
            student_ptr, teacher_ptr, row, V, student_stride, teacher_stride, live, inv_s, inv_t, low_s, low_t,
            PHASE == 1, EQUAL, CENTRED, VEC, BLOCK,
        )  # fmt: skip
        if PHASE == 0:  # a teacher of -inf alone is the caller's error and stays visible
            largest = tl.where(largest == float("-inf"), float("nan"), largest)
    if PHASE != 1:
        value, centre = _pass(
            student_ptr, teacher_ptr, gradient_ptr, row, V, student_stride, teacher_stride, gradient_stride, live,
            scale * gradient_factor, largest, inv_sum, shift, shift_t, log_ratio, 0.0, ref, own_max, own_log, top_s,
            top_t, inv_s, inv_t, low_s, low_t, beta, rest, label, label_max, label_factor, label_there,
            RULE, CENTRED, MIXTURE, SOFTMAX, EQUAL, GRADIENT and not CENTRED, LABELS, VEC, BLOCK,
        )  # fmt: skip
    if GRADIENT and CENTRED and PHASE == 0:
        _pass(
            student_ptr, teacher_ptr, gradient_ptr, row, V, student_stride, teacher_stride, gradient_stride, live,
            scale * gradient_factor, largest, inv_sum, shift, shift_t, log_ratio, centre, ref, own_max, own_log, top_s,
            top_t, inv_s, inv_t, low_s, low_t, beta, rest, label, label_max, label_factor, label_there,
            RULE, CENTRED, MIXTURE, SOFTMAX, EQUAL, True, LABELS, VEC, BLOCK,
        )  # fmt: skip
    tl.store(loss_ptr + row, tl.where(live, value * value_factor * scale, 0.0) + entropy)
    tl.store(stats_ptr, largest)
    tl.store(stats_ptr + 1, inv_sum)
    tl.store(stats_ptr + 2, shift)
    tl.store(stats_ptr + 3, log_ratio)
    tl.store(stats_ptr + 4, centre)
    tl.store(stats_ptr + 5, ref)
    tl.store(stats_ptr + 6, own_max)
    tl.store(stats_ptr + 7, own_log)
    tl.store(stats_ptr + 8, top_s)
    tl.store(stats_ptr + 9, top_t)
    tl.store(stats_ptr + 10, shift_t)


@triton.jit
def logit_bwd_kernel(
    student_ptr, teacher_ptr, scale_ptr, dloss_ptr, stats_ptr, gradient_ptr,
    V, student_stride, teacher_stride, gradient_stride, inv_s, inv_t, low_s, low_t, gradient_factor, beta, rest,
    RULE: tl.constexpr, CENTRED: tl.constexpr, MIXTURE: tl.constexpr, SOFTMAX: tl.constexpr, EQUAL: tl.constexpr,
    KEEP_UNIT: tl.constexpr, STATS: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
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
            tl.load(stats_ptr + 2), tl.load(stats_ptr + 10), tl.load(stats_ptr + 3), tl.load(stats_ptr + 4),
            tl.load(stats_ptr + 5), tl.load(stats_ptr + 6), tl.load(stats_ptr + 7), tl.load(stats_ptr + 8),
            tl.load(stats_ptr + 9), inv_s, inv_t, low_s, low_t, beta, rest, 0, 0.0, 0.0, 0.0,
            RULE, CENTRED, MIXTURE, SOFTMAX, EQUAL, True, False, VEC, BLOCK,
        )  # fmt: skip
