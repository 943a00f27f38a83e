"""The losses between means over the heads, a block of query rows at a time, on any device.

There is no kernel for these: the mean needs the maps of all heads of a row before the first gradient, so that a tile
would be computed as often as there are heads. A block's maps are `fastdistil.reference.attention_mean`'s.

On a CPU they are float64, as in the reference: a mean is made of rounded probabilities, of which some row's gradient is
always a small part, also where the means lie far apart. This saves memory, not time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.contracts.attention import sum_of_groups
from fastdistil.reference import attention_mean as reference

# Elements of one map's block, all heads of it; about ten such tensors are alive at a time.
BLOCK_ELEMENTS = {"cpu": 2**18, "gpu": 2**24}


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
    whole: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `fastdistil.reference.attention.attention`, with row_scale and rows (B, 1, S); `whole`: as one block."""
    dtype, (batch, heads, length, _), device = row_scale.dtype, student_q.shape, student_q.device
    compute = torch.float64 if whole or device.type == "cpu" else dtype
    real = None if key_mask is None else key_mask[:, None, :, None]
    student_keys, teacher_keys = (
        _filled(k, compute, real).repeat_interleave(q.shape[1] // k.shape[1], 1)
        for q, k in ((student_q, student_k), (teacher_q, teacher_k))
    )
    keys = reference.keys(student_keys, teacher_keys, real, student_q.shape == teacher_q.shape)
    del student_keys, teacher_keys
    rows = torch.empty_like(row_scale)
    dq, dk = None, None
    if need_grad:
        dq = torch.empty(student_q.shape, dtype=dtype, device=device)
        dk = torch.zeros(keys.student.shape, dtype=dtype, device=device)
    block = BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "gpu"] // max(1, batch * heads * length)
    block = max(1, length if whole else block)
    tokens = torch.arange(length, device=device)
    sequence = None if cu_seqlens is None else torch.searchsorted(cu_seqlens, tokens, right=True)
    for start in range(0, length, block):
        r = slice(start, min(start + block, length))
        visible = (row_scale[:, 0, r] != 0)[..., None]
        visible = visible.expand(-1, -1, length) if key_mask is None else visible & key_mask[:, None]
        if causal:
            visible = visible & (tokens <= tokens[r, None])
        if sequence is not None:
            visible = visible & (sequence == sequence[r, None])
        counted = (row_scale[:, :, r] != 0)[..., None]
        q_s, q_t = (_filled(x[:, :, r], compute, counted) for x in (student_q, teacher_q))
        means = reference.means(q_s, q_t, keys, visible, student_scale, teacher_scale)
        scale = row_scale[:, 0, r].to(compute)
        rows[:, 0, r], dq_block, dk_block = reference.attention(
            q_s, keys, means, visible, scale, kind, student_scale, need_grad
        )
        if dq is not None and dk is not None and dq_block is not None and dk_block is not None:
            dq[:, :, r] = dq_block
            dk += dk_block
    return rows, dq, None if dk is None else sum_of_groups(dk, student_k.shape[1])


def _filled(x: Tensor, dtype: torch.dtype, real: Tensor | None) -> Tensor:
    """In dtype, with zeros where nothing is visible."""
    x = x.to(dtype)
    return x if real is None else x.masked_fill(~real, 0.0)
