"""attention_loss on the CPU: the C++ kernels of csrc/cpu/attention*.cpp, on torch's own number of threads.

The maps exist one cache-sized block a thread at a time; score_mse without a causal mask never forms one where the
sequences are so long that the low-rank form is less work.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil import _C
from fastdistil.backends.memory import new_empty
from fastdistil.contracts.attention import KINDS


def attention(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    row_scale: Tensor,
    kind: str,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `fastdistil.reference.attention.attention`, in memory that does not grow with S * S."""
    q_s, k_s, q_t, k_t = (
        x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)  # contiguous() leaves empty ones
        for x in (student_q, student_k, teacher_q, teacher_k)
    )
    dtype, sizes = row_scale.dtype, (student_q.shape[-1], teacher_q.shape[-1])
    offsets = [] if cu_seqlens is None else cu_seqlens.tolist()
    length = row_scale.shape[-1] / max(1, len(offsets) - 1)  # the sequences' mean
    # From this many tokens on the low-rank form is the faster one; of head sizes that differ it is in double.
    many = sum(sizes) if sizes[0] == sizes[1] else 2 * sum(sizes)
    rows = torch.empty_like(row_scale, memory_format=torch.contiguous_format)
    dq, dk = (new_empty(x, x.shape, dtype) if need_grad else None for x in (student_q, student_k))
    _C.attention(
        q_s,
        k_s,
        q_t,
        k_t,
        real=None if key_mask is None else key_mask.to(dtype).contiguous(),
        row_scale=row_scale.contiguous(),
        rows=rows,
        dq=dq,
        dk=dk,
        offsets=offsets,
        kind=KINDS.index(kind),
        causal=causal,
        student_scale=student_scale,
        teacher_scale=teacher_scale,
        low_rank=kind == "score_mse" and not causal and length > many,
        threads=torch.get_num_threads(),
    )
    return rows, dq, dk
