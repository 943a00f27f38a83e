"""Hidden-state losses on the CPU: mse and cosine by csrc/cpu/hidden.cpp, kl by the kernel of the logits.

An activation goes by the reference, on chunks of rows that stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil import _C
from fastdistil.backends import cpu_logit
from fastdistil.backends.memory import new_empty
from fastdistil.ops.logit_rule import STATS, LogitRule
from fastdistil.reference import hidden as reference

FUSED = ("mse", "cosine")  # enum HiddenKind

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
    count, size = student.shape
    if activation == "none":
        student, teacher = (x if x.stride(-1) == 1 or size == 1 else x.contiguous() for x in (student, teacher))
        bias = None if bias is None else bias.to(row_scale.dtype).contiguous()
        row_scale = row_scale.contiguous()
        if kind == "kl":
            return _kl(student, teacher, bias, row_scale, grad_dtype)
    rows = torch.empty_like(row_scale)
    dstudent = None if grad_dtype is None else new_empty(student, (count, size), grad_dtype)
    if kind in FUSED and activation == "none":
        threads = torch.get_num_threads()
        _C.hidden_rows(student, teacher, bias, row_scale, rows, dstudent, kind=FUSED.index(kind), threads=threads)
        return rows, dstudent
    step = max(1, CHUNK_ELEMENTS // max(1, size))
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        rows[chunk], found = reference.hidden_rows(
            student[chunk], teacher[chunk], bias, row_scale[chunk], kind, activation, grad_dtype
        )
        if dstudent is not None and found is not None:
            dstudent[chunk] = found
    return rows, dstudent


def _kl(
    student: Tensor, teacher: Tensor, bias: Tensor | None, row_scale: Tensor, grad_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """The forward KL of two rows of logits."""
    wide = row_scale.dtype
    if student.dtype != teacher.dtype or bias is not None or grad_dtype != student.dtype:
        student, teacher = student.to(wide), teacher.to(wide)
    if bias is not None:
        student = student + bias
    rows, stats = torch.empty_like(row_scale), row_scale.new_empty((len(row_scale), STATS))
    gradient = None if grad_dtype is None else new_empty(student, student.shape)
    cpu_logit.logit_fwd(student, teacher, row_scale, rows, stats, gradient, **_FORWARD_KL)
    return rows, gradient if gradient is None or grad_dtype is None else gradient.to(grad_dtype)
