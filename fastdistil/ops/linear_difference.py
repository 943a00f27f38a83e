"""The logits of two heads as the teacher's and their exact difference, for a student that is near its teacher.

A float32 product is off by 5e-7 of its own size, whatever it is compared with: of two products that differ by 1e-3 of
their size, 5e-4 of the difference is rounding. So the difference is not formed from them:

    one head          Z_s - Z_t = (h_s - h_t) W^T, as many products as before
    nearly one head   [h_s - h_t, h_t] [W_s, W_s - W_t]^T, one product more, where a block of the heads is not equal
    other heads       both products in float64, subtracted, rounded once

(docs/losses.md, section 2). Which one it is: the heads' memory tells at once that they are one; else, on a CPU, where
the answer costs no wait, some columns of some rows are computed first.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from fastdistil.ops.products import CPU_ROWS, multiplied_low, product

# A difference that is smaller than this part of what it is formed from has lost five bits and more.
NEAR = 1 / 32
# What is computed to find out: columns of rows, evenly spread.
_SAMPLED_ROWS, _SAMPLED_COLUMNS = 8, 128

Head = tuple[Tensor, Tensor | None]  # weight (V, D), bias (V,)


class Form(Enum):
    ONE_HEAD = auto()
    NEAR_HEADS = auto()
    FLOAT64 = auto()


def form_of(
    hidden: tuple[Tensor, Tensor], heads: tuple[Head, Head], vocab_map: Tensor | None, dtype: torch.dtype, free: bool
) -> Form | None:
    """The form that the two sides' logits ask for, None where two products do, in `dtype`. Does not wait for a GPU.

    free: as for `Difference`; such a constant then does not count as a difference."""
    (w_s, b_s), (w_t, b_t) = heads
    on_cpu = w_s.device.type == "cpu"
    # Where only the teacher's logit is -inf, teacher and difference would not tell the student's.
    if vocab_map is None and _is(w_s, w_t):
        if on_cpu:
            return Form.ONE_HEAD if _is(b_s, b_t) or (_finite(b_s) and _finite(b_t)) else None
        # Tensor cores take no difference of 16-bit states, which are 2^-9 of themselves apart at least, or equal.
        return Form.ONE_HEAD if _is(b_s, b_t) and not multiplied_low(hidden[0], w_s, dtype) else None
    if not on_cpu or dtype != torch.float32 or len(hidden[0]) == 0:
        return None
    if vocab_map is not None:
        mapped = vocab_map >= 0
        b_s, b_t = None if b_s is None else b_s[mapped], None if b_t is None else b_t[vocab_map[mapped]]
    return _sampled(hidden, heads, vocab_map, free) if _finite(b_s) and _finite(b_t) else None


def _sampled(
    hidden: tuple[Tensor, Tensor], heads: tuple[Head, Head], vocab_map: Tensor | None, free: bool
) -> Form | None:
    """In float32, whose rounding is far below what is asked."""
    (weight_s, bias_s), (weight_t, bias_t) = heads
    h_s, h_t = (h[:: -(-len(h) // _SAMPLED_ROWS)].float() for h in hidden)
    columns: Any  # as are the partners, what indexes rows of a head
    partners: Any
    if vocab_map is None:
        columns = partners = slice(None, None, -(-len(weight_s) // _SAMPLED_COLUMNS))
    else:
        columns = (vocab_map >= 0).nonzero()[:, 0]
        columns = columns[:: max(1, -(-len(columns) // _SAMPLED_COLUMNS))]
        partners = vocab_map[columns]
    w_s, w_t = weight_s[columns].float(), weight_t[partners].float()
    z_t = h_t @ w_t.T
    difference = h_s @ w_s.T - z_t
    if bias_s is not None:
        difference += bias_s[columns]
    if bias_t is not None:
        z_t += bias_t[partners]
        difference -= bias_t[partners]
    if free:
        difference -= difference.mean(1, keepdim=True)
    near = _squares(difference) < NEAR**2 * _squares(z_t)  # no row that is NaN is
    if 2 * int(near.sum()) < len(near):
        return None
    if w_s.shape == w_t.shape:
        apart = w_s - w_t
        halves = _squares((h_s - h_t) @ w_s.T) + _squares(h_t @ apart.T)
        kept = difference[near].square().sum() >= NEAR**2 * halves[near].sum()
        if kept and apart.square().sum() <= NEAR**2 * w_t.square().sum():
            return Form.NEAR_HEADS
    return Form.FLOAT64


class Difference:
    """Fills rows of a teacher's logits Z_t and of a difference Z_s - Z_t, (n, V_s) each.

    With `free` both may be off by a constant of their own for each row: a softmax does not see it, and in a difference
    that lies around it the digits would be its."""

    def __init__(
        self, form: Form, hidden: tuple[Tensor, Tensor], heads: tuple[Head, Head], vocab_map: Tensor | None, free: bool
    ) -> None:
        self.form, (self.student, self.teacher), self.vocab_map = form, hidden, vocab_map
        (self.student_weight, student_bias), (self.teacher_weight, teacher_bias) = heads
        self.teacher_bias = None if teacher_bias is None else _rows(teacher_bias, vocab_map)
        self.bias = None if vocab_map is None and _is(student_bias, teacher_bias) else self._apart(student_bias, free)
        self.blocks = [slice(start, start + CPU_ROWS) for start in range(0, len(self.student_weight), CPU_ROWS)]
        self.equal: list[bool | None] = [None] * len(self.blocks)  # found out by the first chunk that comes by
        self.origin: tuple[Tensor, Tensor] | None = None  # rows of both heads, whose logits are the constants
        if form is Form.FLOAT64 and free:
            at = torch.zeros(1, dtype=torch.int64) if vocab_map is None else (vocab_map >= 0).to(torch.uint8).argmax()
            at = at.reshape(1)
            self.origin = self.student_weight[at].double(), self._teacher_rows(at).double()

    def _apart(self, student_bias: Tensor | None, free: bool) -> Tensor | None:
        """b_s - b_t in float64, around 0 where it may be."""
        if student_bias is None and self.teacher_bias is None:
            return None
        zero = torch.zeros((), dtype=torch.float64, device=self.student_weight.device)
        b_s, b_t = (zero if x is None else x.double() for x in (student_bias, self.teacher_bias))
        apart = b_s - b_t
        if free:
            apart -= (apart if self.vocab_map is None else apart[self.vocab_map >= 0]).mean()
        return apart

    def fill(self, rows: slice, difference: Tensor, teacher: Tensor) -> None:
        dtype = teacher.dtype
        h_s, h_t = self.student[rows], self.teacher[rows]
        if self.form is Form.ONE_HEAD:
            product(h_s.to(dtype) - h_t.to(dtype), self.student_weight, difference)
            product(h_t, self.student_weight, teacher)
        elif self.form is Form.NEAR_HEADS:
            self._fill_near(h_s.to(dtype) - h_t.to(dtype), h_t.to(dtype), difference, teacher)
        else:
            self._fill_in_float64(h_s.double(), h_t.double(), difference, teacher)
        if self.bias is not None and self.form is not Form.FLOAT64:
            difference += self.bias.to(dtype)
        if self.teacher_bias is not None:
            teacher += self.teacher_bias

    def _fill_near(self, moved: Tensor, h_t: Tensor, difference: Tensor, teacher: Tensor) -> None:
        for i, some in enumerate(self.blocks):
            w_s = w_t = self.student_weight[some].to(teacher.dtype)
            if not self.equal[i]:
                w_t = self._teacher_rows(some).to(teacher.dtype)
                if self.equal[i] is None:
                    self.equal[i] = torch.equal(w_s, w_t)
            torch.mm(moved, w_s.T, out=difference[:, some])
            torch.mm(h_t, w_t.T, out=teacher[:, some])
            if not self.equal[i]:
                difference[:, some].addmm_(h_t, (w_s - w_t).T)

    def _fill_in_float64(self, h_s: Tensor, h_t: Tensor, difference: Tensor, teacher: Tensor) -> None:
        for some in self.blocks:
            z_s = h_s @ self.student_weight[some].double().T
            z_t = h_t @ self._teacher_rows(some).double().T
            if self.origin is not None:
                z_s -= h_s @ self.origin[0].T
                z_t -= h_t @ self.origin[1].T
            teacher[:, some] = z_t
            apart = z_s.sub_(z_t)
            difference[:, some] = apart if self.bias is None else apart.add_(self.bias[some])

    def _teacher_rows(self, some: slice | Tensor) -> Tensor:
        return _rows(self.teacher_weight, self.vocab_map, some)


def _rows(of_teacher: Tensor, vocab_map: Tensor | None, some: slice | Tensor = slice(None)) -> Tensor:
    """The teacher's entries for `some` of the student's columns; anything where there is none."""
    return of_teacher[some] if vocab_map is None else of_teacher[vocab_map[some].clamp(min=0)]


def _is(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are the same numbers in the same memory, or nothing."""
    if a is None or b is None:
        return a is b
    return a.data_ptr() == b.data_ptr() and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def _finite(bias: Tensor | None) -> bool:
    return bias is None or bool(bias.isfinite().all())


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(1)
