"""Hidden-state losses on the CPU, on chunks of rows that stay in the cache; kl by the kernel of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

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
    """As `fastdistil.reference.hidden.hidden_rows`, with temporaries of a chunk only."""
    count, size = student.shape
    rows = torch.empty_like(row_scale)
    dstudent = None if grad_dtype is None else torch.empty((count, size), dtype=grad_dtype)
    step = max(1, CHUNK_ELEMENTS // max(1, size))
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        scale = row_scale[chunk]
        if kind == "mse" and activation == "none":
            r = torch.sub(student[chunk].to(scale.dtype), teacher[chunk])
            if bias is not None:
                r += bias
            if not bool(scale.all()):
                r.masked_fill_((scale == 0)[:, None], 0.0)
            rows[chunk] = torch.linalg.vecdot(r, r).mul_(scale).div_(size)
            if dstudent is not None:
                torch.mul(r, scale[:, None] * (2 / size), out=dstudent[chunk])
        elif kind == "kl" and activation == "none":
            rows[chunk], found = _kl(student[chunk], teacher[chunk], bias, scale, dstudent is not None)
            if dstudent is not None and found is not None:
                dstudent[chunk] = found
        else:
            rows[chunk], found = reference.hidden_rows(
                student[chunk], teacher[chunk], bias, scale, kind, activation, grad_dtype
            )
            if dstudent is not None and found is not None:
                dstudent[chunk] = found
    return rows, dstudent


def _kl(
    student: Tensor, teacher: Tensor, bias: Tensor | None, scale: Tensor, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """kl without activation is the forward KL of logits: values and, with `need_grad`, gradient, both times `scale`."""
    h, t = (x.to(scale.dtype).contiguous() for x in (student, teacher))
    if bias is not None:
        h = h + bias
    values, stats = torch.empty_like(scale), scale.new_empty((len(scale), STATS))
    dh = torch.empty_like(h) if need_grad else None
    cpu_logit.logit_fwd(h, t, scale.contiguous(), values, stats, dh, **_FORWARD_KL)
    return values, dh
