"""Custom ops of linear_projected_logit_loss: the rows of projected.py, whose logits are products of hidden states and
heads, formed in float32 for a few rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.backends import choose
from fastdistil.ops.families import Found, family
from fastdistil.ops.linear_logit import Flags, StudentHead
from fastdistil.ops.logit_terms import cap, unpack
from fastdistil.ops.precision import with_exact_products
from fastdistil.ops.products import product
from fastdistil.ops.projected import Projection, run_projected, terms_of


class _Heads(StudentHead):
    """Logits of two heads in row_scale's dtype, and their gradient."""

    def __init__(
        self,
        student: tuple[Tensor, Tensor, Tensor | None],
        teacher: tuple[Tensor, Tensor, Tensor | None],
        teacher_caps: tuple[float, float],
        scale: Tensor,
        wanted: Flags,
        projection: Projection,
        labelled: bool,
    ) -> None:
        super().__init__(*student, scale, wanted, None if labelled else projection.vocab_map)
        self.teacher, self.teacher_weight, self.teacher_bias = teacher
        self.projection, self.teacher_caps, self.scale = projection, teacher_caps, scale
        self.teacher_columns = projection.teacher_columns

    def teacher_logits(self, rows: slice) -> Tensor:
        states = self.teacher[rows]
        found = product(states, self.teacher_weight, self.scale.new_empty(len(states), len(self.teacher_weight)))
        if self.teacher_bias is not None:
            found += self.teacher_bias
        cap(found, *self.teacher_caps)
        return found

    def fill(self, rows: slice, student: Tensor, teacher: Tensor) -> None:
        narrow = self.scale.new_empty(student.shape)
        self.logits(rows, narrow)
        student.copy_(narrow)
        del narrow  # before the teacher's
        self.projection.logarithms(self.teacher_logits(rows), teacher)

    def back(self, rows: slice, gradient: Tensor) -> None:
        super().back(rows, gradient.to(self.scale.dtype))


@with_exact_products
def _compute(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    offsets: Tensor,
    columns: Tensor,
    weights: Tensor,
    row_scale: Tensor,
    labels: Tensor | None,
    label_scale: Tensor | None,
    constants: list[float],
    renormalize: bool,
    chunk_bytes: int,
    backend: str,
    dense: bool,
    wanted: list[bool],
    rounded: bool,
) -> Found:
    """Rows (N,) times their scales and the gradients of their sum that are `wanted`, in row_scale's dtype."""
    choose(backend, row_scale.device, torch.float64)  # raises where it cannot
    rule, caps, _ = unpack(constants)
    projection = Projection(offsets, columns, weights, len(teacher_weight), rule["teacher_temperature"])
    terms = terms_of(labels, label_scale, projection, *caps[:2])
    student, teacher, scale = student_hidden, teacher_hidden, row_scale
    kept = None if dense else terms.counts(row_scale).nonzero()[:, 0]
    if kept is not None and len(kept) < len(row_scale):
        student, teacher, scale, terms = student[kept], teacher[kept], scale[kept], terms.rows(kept)
    else:
        kept = None
    source = _Heads(
        (student, student_weight, student_bias), (teacher, teacher_weight, teacher_bias), caps[2:], scale,
        (wanted[0], wanted[1], wanted[2]), projection, labels is not None,
    )  # fmt: skip
    itemsize = scale.element_size()
    # The products, and the gradient in the products' dtype.
    per_row = projection.bytes_per_row(itemsize) + itemsize * (source.columns + projection.teacher_columns)
    rows = run_projected(source, scale, rule, terms, renormalize, per_row, chunk_bytes, backend, any(wanted))
    found = source.gradients
    if kept is None:
        return Found(rows, found)

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(len(row_scale), *x.shape[1:]).index_copy_(0, kept, x)

    return Found(spread(rows), (None if found[0] is None else spread(found[0]), *found[1:]))


# student_hidden (N, D_s), student_weight (V_s, D_s), student_bias (V_s,), teacher_hidden (N, D_t), teacher_weight (V_t,
# D_t), teacher_bias (V_t,), offsets (V_s + 1,), columns and weights (entries,) of M, row_scale (N,) float32 (float64
# for float64 inputs), labels (N,) int64, label_scale (N,) as row_scale, `constants` of logit_terms.pack -> rows (N,)
# times their scales.
TENSORS = "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor teacher_hidden"
TENSORS += ", Tensor teacher_weight, Tensor? teacher_bias, Tensor offsets, Tensor columns, Tensor weights"
TENSORS += ", Tensor row_scale, Tensor? labels, Tensor? label_scale"
OPTIONS = "float[] constants, bool renormalize, int chunk_bytes, str backend, bool dense"
GRADIENTS = ("student_hidden", "student_weight", "student_bias")
linear_projected_rows, linear_projected_total, _ = family(
    "linear_projected", "linear_projected_logit_loss", TENSORS, OPTIONS, _compute, GRADIENTS
)
