"""Custom ops of linear_uld_loss: the logits of two heads of any widths, one chunk of rows at a time.

Two products into float32, the row op of uld_loss, which overwrites the student's logits with their gradient, and two
products back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.backends.memory import new_empty
from fastdistil.ops.families import Found, family
from fastdistil.ops.linear_logit import StudentHead
from fastdistil.ops.logit_terms import ALIGNED_COLUMNS, cap, cap_back
from fastdistil.ops.precision import with_exact_products
from fastdistil.ops.products import product
from fastdistil.ops.uld import kernels


@with_exact_products
def _compute(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    student_factor: Tensor | None,
    teacher_factor: Tensor | None,
    row_scale: Tensor,
    constants: list[float],
    chunk_bytes: int,
    backend: str,
    dense: bool,
    wanted: list[bool],
    rounded: bool,
) -> Found:
    """Rows (N,) times their scales and the gradients of their sum that are `wanted`, in row_scale's dtype."""
    uld_fwd = kernels(backend, row_scale.device).uld_fwd
    temperatures = {"student_temperature": constants[0], "teacher_temperature": constants[1]}
    scale_s, cap_s, scale_t, cap_t = constants[2:]
    kept = None if dense else row_scale.nonzero()[:, 0]
    scale, student, teacher, own, others = row_scale, student_hidden, teacher_hidden, student_factor, teacher_factor
    if kept is not None and len(kept) < len(row_scale):
        scale, student, teacher = scale[kept], student[kept], teacher[kept]
        own, others = (None if x is None else x[kept] for x in (own, others))
    else:
        kept = None
    head = StudentHead(student, student_weight, student_bias, scale, (wanted[0], wanted[1], wanted[2]))
    need, widths = any(wanted[:3]), [head.columns, teacher_weight.shape[0]]
    with_raw = need and cap_s != 0
    widths += widths[:1] if with_raw else []
    rows, step = torch.empty_like(scale), _chunk_rows(len(scale), widths, scale.element_size(), chunk_bytes)
    dfactor = torch.empty_like(scale) if wanted[3] else None
    buffers = [_buffer(scale, step, width) for width in widths]
    for start in range(0, len(scale), step):
        chunk = slice(start, min(start + step, len(scale)))
        z_s, z_t, *raw = (x[: chunk.stop - start] for x in buffers)
        head.logits(chunk, z_s)
        product(teacher[chunk], teacher_weight, z_t)
        if teacher_bias is not None:
            z_t += teacher_bias
        cap(z_s, scale_s, cap_s, raw[0] if raw else None)
        cap(z_t, scale_t, cap_t)
        factors = (None if x is None else x[chunk] for x in (own, others))
        part = None if dfactor is None else dfactor[chunk]
        uld_fwd(z_s, z_t, *factors, scale[chunk], rows[chunk], z_s if need else None, part, **temperatures)
        if need:
            cap_back(z_s, raw[0] if raw else None, scale_s, cap_s)
            head.back(chunk, z_s)
    found = head.gradients
    if kept is None:
        return Found(rows, (*found, dfactor))

    def spread(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.new_zeros(len(row_scale), *x.shape[1:]).index_copy_(0, kept, x)

    all_rows = spread(rows)
    assert all_rows is not None
    return Found(all_rows, (spread(found[0]), *found[1:], spread(dfactor)))


def _buffer(like: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns), every row of which begins at 64 bytes."""
    return new_empty(like, (rows, -(-columns // ALIGNED_COLUMNS) * ALIGNED_COLUMNS))[:, :columns]


def _chunk_rows(rows: int, widths: list[int], itemsize: int, chunk_bytes: int) -> int:
    """Rows a chunk, of which buffers of these columns fit in `chunk_bytes`."""
    padded = sum(-(-width // ALIGNED_COLUMNS) * ALIGNED_COLUMNS for width in widths)
    return max(1, min(rows, chunk_bytes // (padded * itemsize)))


# student_hidden (N, D_s), student_weight (V_s, D_s), student_bias (V_s,), teacher_hidden (N, D_t), teacher_weight (V_t,
# D_t), teacher_bias (V_t,), factors (N,), row_scale (N,) float32 (float64 for float64 inputs), constants: temperatures,
# then logit scale and softcap (0 for none) of the student and of the teacher -> rows (N,) times their scales.
TENSORS = "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor teacher_hidden"
TENSORS += ", Tensor teacher_weight, Tensor? teacher_bias, Tensor? student_factor, Tensor? teacher_factor"
TENSORS += ", Tensor row_scale"
OPTIONS = "float[] constants, int chunk_bytes, str backend, bool dense"
GRADIENTS = ("student_hidden", "student_weight", "student_bias", "student_factor")
linear_uld_rows, linear_uld_total, _ = family("linear_uld", "linear_uld_loss", TENSORS, OPTIONS, _compute, GRADIENTS)
