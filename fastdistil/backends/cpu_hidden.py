"""Hidden-state losses on the CPU: C++ (csrc/cpu/hidden.cpp) for mse and cosine without activation.

The rest runs on chunks of rows that stay in the cache, kl by the rule of the attention maps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil import _C
from fastdistil.backends.cpu_attention import prob_kl
from fastdistil.backends.memory import new_empty
from fastdistil.reference import hidden as reference

FUSED = ("mse", "cosine")  # enum HiddenKind

# Elements of a chunk: 256 KiB of float32, so that a few temporaries of that size fit in a core's L2 cache.
CHUNK_ELEMENTS = 64 * 1024


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
    dstudent = None if grad_dtype is None else new_empty(student, (count, size), grad_dtype)
    if kind in FUSED and activation == "none":
        student, teacher = (x if x.stride(-1) == 1 or size == 1 else x.contiguous() for x in (student, teacher))
        threads = torch.get_num_threads()
        _C.hidden_rows(student, teacher, bias, row_scale, rows, dstudent, kind=FUSED.index(kind), threads=threads)
        return rows, dstudent
    step = max(1, CHUNK_ELEMENTS // max(1, size))
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        scale = row_scale[chunk]
        if kind == "kl" and activation == "none":
            rows[chunk], found = _kl(student[chunk], teacher[chunk], bias, scale, dstudent is not None)
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
    """One chunk of kl without activation: values and, with `need_grad`, gradient, both times `scale`."""
    skipped = None if bool(scale.all()) else (scale == 0)[:, None]
    h, t = (x.to(scale.dtype, copy=True) for x in (student, teacher))
    if bias is not None:
        h += bias
    if skipped is not None:
        h, t = h.masked_fill_(skipped, 0.0), t.masked_fill_(skipped, 0.0)
    h -= reference.kl_offset(h, t)
    values, dh = prob_kl(t, h - t, lambda: h, None, need_grad)
    return values.mul_(scale), dh.mul_(scale[:, None]) if need_grad else None
