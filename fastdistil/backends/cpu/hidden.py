"""Hidden-state losses on the CPU: mse and cosine by csrc/cpu/hidden.cpp, kl by the kernel of the logits.

An activation is torch's own, around these kernels, on chunks of rows that stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil import _C
from fastdistil.backends.cpu import logit
from fastdistil.backends.memory import new_empty
from fastdistil.contracts.hidden import KERNEL_KINDS
from fastdistil.contracts.logit import STATS, LogitRule

# Elements of a chunk with an activation: its few temporaries of 1 MiB of float32 stay in an L3 cache. Chunks for an L2
# cache are slower: each call starts the threads anew.
CHUNK_ELEMENTS = 2**18
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
    if activation == "none":
        return _plain(student, teacher, bias, row_scale, kind, grad_dtype)
    count, size = student.shape
    wide, skipped = row_scale.dtype, row_scale == 0
    rows = torch.empty_like(row_scale)
    dstudent = None if grad_dtype is None else new_empty(student, (count, size), grad_dtype)
    step = max(1, CHUNK_ELEMENTS // max(1, size))
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        z = student[chunk].to(wide).masked_fill(skipped[chunk, None], 0.0)  # such rows may hold anything
        z = z if bias is None else z.add_(bias.to(wide))
        h, t, scale = torch.nn.functional.gelu(z), teacher[chunk], row_scale[chunk]
        rows[chunk], dh = _plain(h, t, None, scale, kind, None if dstudent is None else wide)
        if dstudent is not None and dh is not None:
            dstudent[chunk] = torch.ops.aten.gelu_backward(dh, z)
    return rows, dstudent


def _plain(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    kind: str,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Without an activation."""
    student, teacher = (x if x.stride(-1) == 1 or x.shape[1] == 1 else x.contiguous() for x in (student, teacher))
    bias = None if bias is None else bias.to(row_scale.dtype).contiguous()
    row_scale = row_scale.contiguous()
    if kind == "kl":
        return _kl(student, teacher, bias, row_scale, grad_dtype)
    rows = torch.empty_like(row_scale)
    dstudent = None if grad_dtype is None else new_empty(student, student.shape, grad_dtype)
    threads = torch.get_num_threads()
    _C.hidden_rows(student, teacher, bias, row_scale, rows, dstudent, kind=KERNEL_KINDS.index(kind), threads=threads)
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
    logit.logit_fwd(student, teacher, row_scale, rows, stats, gradient, **_FORWARD_KL)
    return rows, gradient if gradient is None or grad_dtype is None else gradient.to(grad_dtype)
