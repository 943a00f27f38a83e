"""The first pass of logit_loss over a row, and how a row becomes tiles (docs/losses.md, section 1).

A row of an odd vocabulary starts anywhere: the body begins at the first 16-byte boundary and ends at the last, so that
all its loads are 16 bytes wide, and the few columns before and behind it make one small tile of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdistil.kernels.triton.numerics import expm1_near, log1p


@triton.jit
def _split(x):
    """The upper 12 bits of a float32's 24, and the rest: products of two such numbers are exact."""
    upper = (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return upper, x - upper


@triton.jit
def _difference(s, t):
    """s - t rounded, and what the rounding left off."""
    x = s - t
    back = x - s
    return x, (s - (x - back)) - (t + back)


@triton.jit
def _tempered(z, shift, inv, inv_low):
    """(z - shift) / T: an exact product, 2^-12 of it, 2^-24 of it; inv + inv_low is 1 / T with twice the digits."""
    x, error = _difference(z, shift)
    high, low = _split(x)
    inv_high, inv_rest = _split(inv)
    beyond, inv_beyond = _difference(inv_rest, -inv_low)
    inv_middle, inv_last = _split(beyond)
    middle, left = _difference(high * inv_middle, -(low * inv_high))
    return high * inv_high, middle, (low * inv_middle + x * (inv_last + inv_beyond)) + (error * inv + left)


@triton.jit
def _scores(s, t, inv_s, inv_t, low_s, low_t, shift, shift_t, EQUAL: tl.constexpr):
    """The difference of the scores s / T_s and t / T_t less that of the shift's column, or of the logits less the shift
    where the temperatures agree: with the rounding of its own size alone. 0 where both sides are -inf. The selections
    come last, behind the multiplications: fused with what is subtracted afterwards these would round otherwise.

    EQUAL: 0, 1 (one temperature) or 2: s - t itself stands in the place of s."""
    if EQUAL == 2:
        d = (s - shift) * inv_s
    elif EQUAL:
        x, error = _difference(s, t)
        d = ((x - shift) + tl.where(error == error, error, 0.0)) * inv_s  # NaN where x is infinite
    else:
        a, middle_a, rest_a = _tempered(s, shift, inv_s, low_s)
        b, middle_b, rest_b = _tempered(t, shift_t, inv_t, low_t)
        x, error = _difference(a, b)
        middle, middle_error = _difference(middle_a, middle_b)
        x, left = _difference(x, -middle)
        fine = x + ((left + error) + (middle_error + (rest_a - rest_b)))
        rough = (s - shift) * inv_s - (t - shift_t) * inv_t
        d = tl.where(tl.abs(fine) < float("inf"), fine, rough)
    return tl.where((s == float("-inf")) & (t == float("-inf")), 0.0, d)


@triton.jit
def _load(s_ptr, t_ptr, columns, mask, inv_s, inv_t, low_s, low_t, shift, shift_t, EQUAL: tl.constexpr):
    """Logits of student and teacher as they are, and their scores' difference."""
    s = tl.load(s_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    t = tl.load(t_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    d = _scores(s, t, inv_s, inv_t, low_s, low_t, shift, shift_t, EQUAL)
    return s + t if EQUAL == 2 else s, t, d


@triton.jit
def _guess_among_many(s_ptr, t_ptr, V, inv_s, inv_t, EQUAL: tl.constexpr):
    """What stands on both sides in one of sixteen columns that most of them agree with (of those that both sides have),
    else zeros."""
    lanes = tl.arange(0, 16)
    s = tl.load(s_ptr + lanes * V // 16).to(tl.float32)
    t = tl.load(t_ptr + lanes * V // 16).to(tl.float32)
    if EQUAL == 2:
        t = tl.zeros((16,), tl.float32)
    d = s * inv_s - t * inv_t
    usable = tl.abs(d) < 1e6
    agree = usable[None, :] & (tl.abs(d[None, :] - d[:, None]) <= tl.abs(d)[:, None] / 8.0)
    alike = tl.where(usable, tl.sum(agree.to(tl.int32), 1), 0)
    most = tl.max(alike, 0)
    chosen = (lanes == tl.min(tl.where(alike == most, lanes, 16), 0)) & (2 * most > tl.sum(usable.to(tl.int32), 0))
    return tl.sum(tl.where(chosen, s, 0.0), 0), tl.sum(tl.where(chosen, t, 0.0), 0)


@triton.jit
def _guess(s_ptr, t_ptr, V, live, inv_s, inv_t, EQUAL: tl.constexpr):
    """The column of a shift that two of three agree about; where none do and one of them is not on both sides, one that
    most of sixteen agree about; else 0 (rules/pair.h: guess_shift)."""
    s0 = tl.load(s_ptr + V // 4, mask=live, other=0.0).to(tl.float32)
    t0 = tl.load(t_ptr + V // 4, mask=live, other=0.0).to(tl.float32)
    s1 = tl.load(s_ptr + V // 2, mask=live, other=0.0).to(tl.float32)
    t1 = tl.load(t_ptr + V // 2, mask=live, other=0.0).to(tl.float32)
    s2 = tl.load(s_ptr + V * 3 // 4, mask=live, other=0.0).to(tl.float32)
    t2 = tl.load(t_ptr + V * 3 // 4, mask=live, other=0.0).to(tl.float32)
    if EQUAL == 2:
        t0 = tl.full((), 0.0, tl.float32)
        t1 = t0
        t2 = t0
    d0, d1, d2 = s0 * inv_s - t0 * inv_t, s1 * inv_s - t1 * inv_t, s2 * inv_s - t2 * inv_t
    d2 = tl.where(V < 3, float("nan"), d2)  # no column is one of two that agree
    second, first = _agreed(d0, d1, d2)
    s = tl.where(second, s1, tl.where(first, s0, 0.0))
    t = tl.where(second, t1, tl.where(first, t0, 0.0))
    usable = (tl.abs(d0) < 1e6) & (tl.abs(d1) < 1e6) & (tl.abs(d2) < 1e6)
    if ((second | first | usable) == 0) & live:
        s, t = _guess_among_many(s_ptr, t_ptr, V, inv_s, inv_t, EQUAL)
    if EQUAL:
        return s - t, tl.full((), 0.0, tl.float32)
    else:
        return s, t


@triton.jit
def _move(largest, own, ref, total, difference, to, to_own, to_ref, inv_s, inv_t):
    """S and X relative to another largest column: X + S = sum e^(a - own) scales, and X stays a small number where the
    student is near. Up to the first finite teacher logit there is mass of the student alone."""
    factor = tl.exp((largest - to) * inv_t)
    both = tl.exp((own - to_own) * inv_s)
    r = ref - to_ref
    growth = tl.where(tl.abs(r) <= 1.0, factor * expm1_near(r), both - factor)
    moved = tl.where(difference == 0.0, 0.0, difference * both)  # not 0 * inf
    return tl.where(total == 0.0, 0.0, total * factor), moved + tl.where(total == 0.0, 0.0, total * growth)


@triton.jit
def _add_masses(
    a, b, d, inv_s, inv_t, low_s, low_t, shift, shift_t, largest, own, ref, total, difference, unmatched, lost,
    EQUAL: tl.constexpr,
):  # fmt: skip
    """One more tile in S = sum e^(b-m) and X = sum e^(b-m) expm1(d - ref), where m, own and ref are b, a and d of the
    teacher's largest column so far: else a confident teacher's own column, nearly all of X, would cancel later. Where d
    is of no use there (unmatched: 1), they are of a student's logit at which it is 0, but for that logit's rounding.
    lost: 1 where the student's mass was a small part of S, a rounding of X, and is what counts in the next column's
    units, or was infinite (csrc/cpu/logit_statistics.h)."""
    top = tl.max(b, 0)
    if (top > largest) | (largest == float("-inf")):
        at_top = tl.max(tl.where(b == top, d, float("-inf")), 0)
        own_top = tl.max(tl.where((b == top) & (d == at_top), a, float("-inf")), 0)
        usable = tl.abs(at_top) <= 1e6
        level = shift + (top - shift_t) * inv_t / inv_s
        at_level = _scores(level, top, inv_s, inv_t, low_s, low_t, shift, shift_t, EQUAL != 0)
        to_own = tl.where(top == float("-inf"), tl.maximum(own, tl.max(a, 0)), tl.where(usable, own_top, level))
        unmatched = tl.where(top == float("-inf"), unmatched, tl.where(usable, 0.0, 1.0))
        grows = total * tl.exp((own - to_own) * inv_s)
        loses = (difference < -0.875 * total) & (grows > 1.0) & (total > 0.0)
        lost = tl.where(loses | ((tl.abs(difference) < float("inf")) == 0), 1.0, lost)
        at_top = tl.where(top != float("-inf"), tl.where(usable, at_top, at_level), 0.0)
        total, difference = _move(largest, own, ref, total, difference, top, to_own, at_top, inv_s, inv_t)
        largest = top
        own = to_own
        ref = at_top
    m = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.exp((b - m) * inv_t)
    # Infinite where it overflows: a maximum found later cannot make a number of it.
    other = tl.exp((a - tl.where(own == float("-inf"), 0.0, own)) * inv_s)
    c = d - ref
    x = tl.where(tl.abs(c) <= 1.0, weight * expm1_near(c), other - weight)
    return largest, own, ref, total + tl.sum(weight, 0), difference + tl.sum(x, 0), unmatched, lost


@triton.jit
def _misplaced(ref, total, difference):
    """Whether the differences still hold a constant that costs them digits: ref is far from 0 and all columns' d near
    it, as the mean of the others' expm1(d - ref) says. Of a teacher that leaves the others no mass one cannot tell."""
    others = total - 1.0
    r = tl.abs(ref)
    alike = (r > 0.0) & (tl.abs(difference) <= others * r / 32.0)
    return tl.where(others < 1e-6, r > 1.0 / 64.0, alike)


@triton.jit
def _add_common(s_ptr, t_ptr, columns, mask, inv_s, inv_t, largest, own, EQUAL: tl.constexpr):
    """One more tile in the teacher's largest logit among the columns that both sides have, and what stands in the
    student's place there."""
    s = tl.load(s_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    t = tl.load(t_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    d = s * inv_s if EQUAL == 2 else s * inv_s - t * inv_t
    t = tl.where(tl.abs(d) < 1e6, t, float("-inf"))
    top = tl.max(t, 0)
    if top > largest:
        own = tl.max(tl.where(t == top, s, float("-inf")), 0)
        largest = top
    return largest, own


@triton.jit
def _agreed(first, second, third):
    """Whether another one of three differences agrees with the second; with the first (rules/pair.h: guess_shift)."""
    near = tl.abs(second) / 8.0
    agree = (tl.abs(first - second) <= near) | (tl.abs(third - second) <= near)
    with_first = (tl.abs(third - first) <= tl.abs(first) / 8.0) & (tl.abs(first) < 1e6)
    return agree & (tl.abs(second) < 1e6), with_first


@triton.jit
def _add_tile(
    s_ptr, t_ptr, columns, mask, inv_s, inv_t, low_s, low_t, shift, shift_t, largest, own, ref, total, difference,
    unmatched, lost, top_s, top_t, EQUAL: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """`_add_masses`; with TOP also the student's largest logit, and the teacher's there."""
    a, b, d = _load(s_ptr, t_ptr, columns, mask, inv_s, inv_t, low_s, low_t, shift, shift_t, EQUAL)
    if TOP:
        top_a = tl.max(a, 0)
        if top_a > (top_s + top_t if EQUAL == 2 else top_s):
            top_t = tl.max(tl.where(a == top_a, b, float("-inf")), 0)
            if EQUAL == 2:
                top_s = tl.max(tl.where((a == top_a) & (b == top_t), d, float("-inf")), 0) / inv_s + shift
            else:
                top_s = top_a
    largest, own, ref, total, difference, unmatched, lost = _add_masses(
        a, b, d, inv_s, inv_t, low_s, low_t, shift, shift_t, largest, own, ref, total, difference, unmatched, lost,
        EQUAL,
    )  # fmt: skip
    return largest, own, ref, total, difference, unmatched, lost, top_s, top_t


@triton.jit
def _add_to_lse_tile(a, inv_s, largest, total):
    """One more tile in the student's own maximum and sum of exponentials."""
    new = tl.maximum(largest, tl.max(a, 0))
    m = tl.where(new == float("-inf"), 0.0, new)
    old = tl.where(total == 0.0, 0.0, total * tl.exp((largest - m) * inv_s))
    return new, old + tl.sum(tl.exp((a - m) * inv_s), 0)


@triton.jit
def _add_to_lse(s_ptr, t_ptr, columns, mask, inv_s, largest, total, EQUAL: tl.constexpr):
    """`_add_to_lse_tile` from memory."""
    a = tl.load(s_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    if EQUAL == 2:
        a += tl.load(t_ptr + columns, mask=mask, other=float("-inf")).to(tl.float32)
    return _add_to_lse_tile(a, inv_s, largest, total)


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
def _statistics(
    student_ptr, teacher_ptr, row, V, student_stride, teacher_stride, live, inv_s, inv_t, low_s, low_t,
    PART: tl.constexpr, EQUAL: tl.constexpr, TOP: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LogitStat but for the centre, in its order; a row that does not count is not read. Where the guessed shift left a
    constant that costs the differences digits, the pass is done again with that of the teacher's largest column, or of
    the largest that both sides have, where none was guessed; before that, where X lost its digits on the way, measured
    by the row's largest column from the beginning. The student's own softmax costs a pass of its own where
    the rows lie too far apart for D' or ref is large (its rounding would be p's), and in a PART of a row, which may
    have no teacher mass at all."""
    head, body = _layout(row, student_stride, V, VEC)
    edge, exists = _edge(head, body, V, VEC)
    at_edge = exists & live
    end = tl.where(live, body, 0)
    s_row = student_ptr + row * student_stride
    t_row = teacher_ptr + row * teacher_stride
    s_body = _body(student_ptr, row, student_stride, VEC)
    t_body = _body(teacher_ptr, row, teacher_stride, VEC)
    lanes = tl.arange(0, BLOCK)
    shift, shift_t = _guess(s_row, t_row, V, live, inv_s, inv_t, EQUAL)
    nothing = tl.full((), 0.0, tl.float32)
    infinite = nothing + float("-inf")
    largest, own, ref, total, difference = infinite, infinite, nothing, nothing, nothing
    unmatched, lost, top_s, top_t = nothing, nothing, infinite, infinite
    tries = 0
    while tries < 3:
        largest, own, ref, total, difference, unmatched, lost, top_s, top_t = _add_tile(
            s_row, t_row, edge, at_edge, inv_s, inv_t, low_s, low_t, shift, shift_t, largest, own, ref, nothing,
            nothing, unmatched, nothing, infinite, infinite, EQUAL, TOP,
        )  # fmt: skip
        for begin in range(0, end, BLOCK):
            columns = begin + lanes
            largest, own, ref, total, difference, unmatched, lost, top_s, top_t = _add_tile(
                s_body, t_body, columns, columns < end, inv_s, inv_t, low_s, low_t, shift, shift_t, largest, own, ref,
                total, difference, unmatched, lost, top_s, top_t, EQUAL, TOP,
            )  # fmt: skip
        repeat = (lost != 0.0) & (tries == 0)
        settled = (repeat == 0) & (tries < 2)
        again = _misplaced(ref, total, difference) & (unmatched == 0.0) & settled
        if EQUAL:
            shift = tl.where(again, own - largest, shift)
        else:
            shift = tl.where(again, own, shift)
            shift_t = tl.where(again, largest, shift_t)
        if (unmatched != 0.0) & (shift == 0.0) & (shift_t == 0.0) & settled:
            common_t, common_s = _add_common(s_row, t_row, edge, at_edge, inv_s, inv_t, infinite, nothing, EQUAL)
            for begin in range(0, end, BLOCK):
                columns = begin + lanes
                common_t, common_s = _add_common(
                    s_body, t_body, columns, columns < end, inv_s, inv_t, common_t, common_s, EQUAL
                )
            again = common_t > float("-inf")
            shift = tl.where(again, common_s - common_t if EQUAL == 1 else common_s, shift)
            if EQUAL == 0:
                shift_t = tl.where(again, common_t, shift_t)
        if again:
            largest, own, ref, unmatched = infinite, infinite, nothing, nothing
        tries = tl.where(repeat, 1, tl.where(again, 2, 3))
    ratio = difference / total
    near = (ratio > -0.9) & (ratio < 1e3)
    log_ratio = tl.where(near, log1p(tl.where(near, ratio, 0.0)), float("inf"))
    own_max = own
    own_log = log_ratio + tl.log(total)
    if live & (PART | (near == 0) | (tl.abs(ref) > 20.0)):
        own_max, mass = _add_to_lse(s_row, t_row, edge, at_edge, inv_s, float("-inf"), 0.0, EQUAL)
        for begin in range(0, end, BLOCK):
            columns = begin + lanes
            own_max, mass = _add_to_lse(s_body, t_body, columns, columns < end, inv_s, own_max, mass, EQUAL)
        own_log = tl.log(mass)
    if not TOP:
        top_s, top_t = nothing, nothing
    return largest, 1.0 / total, shift, log_ratio, ref, own_max, own_log, top_s, top_t, shift_t
