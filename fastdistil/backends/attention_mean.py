"""The losses between means over the heads, a block of query rows at a time, on any device.

There is no kernel for these: the mean needs the maps of all heads of a row before the first gradient, so that a tile
would be computed as often as there are heads. A block's maps are `fastdistil.reference.attention_mean`'s, or for
different heads and without a mask, where nothing is exact and nothing hidden, those of a few products in place.

This saves memory, not time: on one CPU thread, 6 heads against 12 of size 64, it ran at 1.0 to 1.2 times the eager
formula's speed at S 512, at 0.6 to 0.8 times at 128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.reference import attention_mean as reference
from fastdistil.reference.attention import sum_of_groups

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
    hidden = None if key_mask is None else ~key_mask[:, None, :, None]
    open_maps = device.type == "cpu" and key_mask is None and cu_seqlens is None and not causal and not whole
    open_maps = open_maps and student_q.shape != teacher_q.shape and bool((row_scale != 0).all())
    skipped = (row_scale == 0)[..., None]
    q_s, q_t = (x.to(dtype) if open_maps else x.to(dtype).masked_fill(skipped, 0.0) for x in (student_q, teacher_q))
    k_s, k_t = (x.to(dtype) if hidden is None else x.to(dtype).masked_fill(hidden, 0.0) for x in (student_k, teacher_k))
    k_s, k_t = (k.repeat_interleave(q.shape[1] // k.shape[1], 1) for k, q in ((k_s, q_s), (k_t, q_t)))
    rows = torch.empty_like(row_scale)
    dq, dk = (torch.empty_like(q_s), torch.zeros_like(k_s)) if need_grad else (None, None)
    block = BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "gpu"] // max(1, batch * heads * length)
    block = max(1, length if whole else block)
    tokens = torch.arange(length, device=device)
    sequence = None if cu_seqlens is None else torch.searchsorted(cu_seqlens, tokens, right=True)
    for start in range(0, length, block):
        r = slice(start, min(start + block, length))
        if open_maps:
            scales = (student_scale, teacher_scale)
            rows[:, 0, r] = _open_block(
                q_s[:, :, r],
                k_s,
                q_t[:, :, r],
                k_t,
                row_scale[:, 0, r],
                kind,
                scales,
                None if dq is None else dq[:, :, r],
                dk,
            )
            continue
        visible = (row_scale[:, 0, r] != 0)[..., None]
        visible = visible.expand(-1, -1, length) if key_mask is None else visible & key_mask[:, None]
        if causal:
            visible = visible & (tokens <= tokens[r, None])
        if sequence is not None:
            visible = visible & (sequence == sequence[r, None])
        rows[:, 0, r], dq_block, dk_block = reference.attention(
            q_s[:, :, r], k_s, q_t[:, :, r], k_t, visible, row_scale[:, 0, r], kind, student_scale, teacher_scale,
            need_grad,
        )  # fmt: skip
        if dq is not None and dk is not None and dq_block is not None and dk_block is not None:
            dq[:, :, r] = dq_block
            dk += dk_block
    return rows, dq, None if dk is None else sum_of_groups(dk, student_k.shape[1])


def _open_block(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    row_scale: Tensor,
    kind: str,
    scales: tuple[float, float],
    dq: Tensor | None,
    dk: Tensor | None,
) -> Tensor:
    """The rows (B, R) of a block in which every query sees every key; dq (B, H, R, d) is written, dk (B, H, S, d) added
    to. As the reference without the masks, and with one temporary beside the student's maps."""
    p, q = (torch.softmax((x * scale) @ k.mT, -1) for x, k, scale in ((q_s, k_s, scales[0]), (q_t, k_t, scales[1])))
    mean, q = p.mean(1), q.mean(1)
    rows, dmean = reference.compare(kind, q, mean - q, mean, row_scale)
    if dq is None or dk is None:
        return rows
    dmean.mul_(scales[0] / p.shape[1])
    d = p * dmean[:, None]
    d.addcmul_(p, d.sum(-1, keepdim=True), value=-1)
    dq.copy_(d @ k_s)
    dk.flatten(0, 1).baddbmm_(d.mT.flatten(0, 1), q_s.flatten(0, 1))
    return rows
