"""Hidden-state losses on the CPU: mse by csrc/cpu/hidden.cpp, kl by the kernel of the logits, the rest by the reference
on chunks of rows that stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil import _C
from fastdistil.backends import cpu_logit
from fastdistil.ops.logit_rule import STATS, LogitRule
from fastdistil.reference import hidden as reference

# Elements of a chunk: 256 KiB of float32, so that a few temporaries of that size fit in a core's L2 cache.
CHUNK_ELEMENTS = 64 * 1024
_FORWARD_KL: LogitRule = {
    "divergence": 0, "beta": 0.0, "student_temperature": 1.0, "teacher_temperature": 1.0, "value_factor": 1.0
}  # fmt: skip


def hidden_rows(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    kind: str,
    activation: str,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """As `fastdistil.reference.hidden.hidden_rows`, with temporaries of a chunk at most."""
    if activation == "none" and kind in ("mse", "kl"):
        return _compiled(student, teacher, bias, row_scale, kind, grad_dtype)
    count, size = student.shape
    rows = torch.empty_like(row_scale)
    dstudent = None if grad_dtype is None else torch.empty((count, size), dtype=grad_dtype)
    step = max(1, CHUNK_ELEMENTS // max(1, size))
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        rows[chunk], found = reference.hidden_rows(
            student[chunk], teacher[chunk], bias, row_scale[chunk], kind, activation, grad_dtype
        )
        if dstudent is not None and found is not None:
            dstudent[chunk] = found
    return rows, dstudent


def _compiled(
    student: Tensor, teacher: Tensor, bias: Tensor | None, row_scale: Tensor, kind: str, grad_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    wide = row_scale.dtype
    if student.dtype != teacher.dtype or (kind == "kl" and (bias is not None or grad_dtype != student.dtype)):
        student, teacher = student.to(wide), teacher.to(wide)
    student, teacher = (x if x.stride(1) == 1 else x.contiguous() for x in (student, teacher))
    row_scale, rows = row_scale.contiguous(), torch.empty(len(row_scale), dtype=wide)
    shift = None if bias is None else bias.to(wide).contiguous()
    if kind == "kl" and shift is not None:
        student = student + shift
    # The kernels write the states' dtype, or what they sum in.
    dtype = grad_dtype if grad_dtype in (None, wide) or kind == "kl" else student.dtype
    gradient = None if dtype is None else torch.empty(student.shape, dtype=student.dtype if kind == "kl" else dtype)
    if kind == "kl":
        stats = torch.empty((len(row_scale), STATS), dtype=wide)
        cpu_logit.logit_fwd(student, teacher, row_scale, rows, stats, gradient, **_FORWARD_KL)
    else:
        _C.hidden_mse(student, teacher, shift, row_scale, rows, gradient, threads=torch.get_num_threads())
    return rows, gradient if gradient is None or grad_dtype is None else gradient.to(grad_dtype)
