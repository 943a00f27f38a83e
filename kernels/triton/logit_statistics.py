"""The first pass of logit_loss over a row, and how a row becomes tiles (docs/losses.md, section 1).

A row of an odd vocabulary starts anywhere: the body begins at the first 16-byte boundary and ends at the last, so that
all its loads are 16 bytes wide, and the few columns before and behind it make one small tile of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdistil.kernels.triton.exact import move_unit
from fastdistil.kernels.triton.numerics import expm1_near, log1p


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
    s_ptr, t_ptr, columns, mask, inv_s, inv_t, shift, largest, ref, total, difference, EQUAL: tl.constexpr
):  # fmt: skip
    """One more tile in S = sum e^(b-m) and X = sum e^(b-m) expm1(d - ref), where ref is d at the largest b so far (0
    where that is of no use): else a confident teacher's own column, nearly all of X, would cancel later."""
    a, b, d = _load(s_ptr, t_ptr, columns, mask, inv_s, inv_t, shift, EQUAL)
    top = tl.max(b, 0)
    if top > largest:
        at_top = tl.max(tl.where(b == top, d, float("-inf")), 0)
        at_top = tl.where(tl.abs(at_top) <= 1e6, at_top, 0.0)
        total, difference = move_unit(largest, ref, total, difference, top, at_top)
        largest = top
        ref = at_top
    m = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.exp(b - m)
    other = tl.exp((a - m) - ref)  # infinite where it overflows: a maximum found later cannot make a number of it
    c = d - ref
    x = tl.where(tl.abs(c) <= 1.0, weight * expm1_near(c), other - weight)
    return largest, ref, total + tl.sum(weight, 0), difference + tl.sum(x, 0)


@triton.jit
def _add_to_lse(s_ptr, t_ptr, columns, mask, inv_s, inv_t, shift, largest, total, EQUAL: tl.constexpr):
    """One more tile in the student's own maximum and sum of exponentials."""
    a, _, _ = _load(s_ptr, t_ptr, columns, mask, inv_s, inv_t, shift, EQUAL)
    new = tl.maximum(largest, tl.max(a, 0))
    m = tl.where(new == float("-inf"), 0.0, new)
    return new, tl.where(total == 0.0, 0.0, total * tl.exp(largest - m)) + tl.sum(tl.exp(a - m), 0)


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
    student_ptr, teacher_ptr, row, V, student_stride, teacher_stride, live, inv_s, inv_t, PART: tl.constexpr,
    EQUAL: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LogitStat but for the centre, in its order; a row that does not count is not read. The student's own softmax
    costs a pass of its own where the rows lie too far apart for D' or ref is large (its rounding would be p's), and in
    a PART of a row, which may have no teacher mass at all."""
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
    nothing = tl.full((), 0.0, tl.float32)
    largest, ref, total, difference = _add_masses(
        s_row, t_row, edge, at_edge, inv_s, inv_t, shift, nothing + float("-inf"), nothing, nothing, nothing, EQUAL
    )
    for begin in range(0, end, BLOCK):
        columns = begin + lanes
        largest, ref, total, difference = _add_masses(
            s_body, t_body, columns, columns < end, inv_s, inv_t, shift, largest, ref, total, difference, EQUAL
        )
    ratio = difference / total
    near = (ratio > -0.9) & (ratio < 1e3)
    log_ratio = tl.where(near, log1p(tl.where(near, ratio, 0.0)), float("inf"))
    if not PART:  # nothing is close here, and what the shift rounds off would be p's error
        shift = tl.where(near, shift, 0.0)
    own_max = largest + ref  # the student's score there; a large ref in own_log would round its probabilities
    own_log = (ref - (own_max - largest)) + log_ratio + tl.log(total)
    if live & (PART | (near == 0) | (tl.abs(ref) > 20.0)):
        own_max, mass = _add_to_lse(s_row, t_row, edge, at_edge, inv_s, inv_t, shift, float("-inf"), 0.0, EQUAL)
        for begin in range(0, end, BLOCK):
            columns = begin + lanes
            own_max, mass = _add_to_lse(
                s_body, t_body, columns, columns < end, inv_s, inv_t, shift, own_max, mass, EQUAL
            )
        own_log = tl.log(mass)
    return largest, 1.0 / total, shift, log_ratio, ref, own_max, own_log
