"""The losses between means over the heads, a block of query rows at a time, on any device.

There is no kernel for these: the mean needs the maps of all heads of a row before the first gradient, so that a tile
would be computed as often as there are heads. A block's maps are `fastdistil.reference.attention_mean`'s, or for
different heads and without a mask, where nothing is exact and nothing hidden, those of a few products in place.

This saves memory, not time: on one CPU thread, 6 heads against 12 of size 64, it ran at 1.0 to 1.2 times the eager
formula's speed at S 512, at 0.6 to 0.8 times at 128.

On a CPU a block in which the difference of the means has lost its digits is done again in float64, and so are the ones
behind it: that of different heads, as a difference of rounded probabilities, that of factors in another basis, and that
at a key where some head is sharp. A GPU would have to be waited for. The reference computes in float64 from the
beginning.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdistil.reference import attention_mean as reference
from fastdistil.reference.attention import sum_of_groups

# Elements of one map's block, all heads of it; about ten such tensors are alive at a time.
BLOCK_ELEMENTS = {"cpu": 2**18, "gpu": 2**24}


class _Operands(NamedTuple):
    student_q: Tensor
    teacher_q: Tensor
    keys: reference.Keys


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
    open_maps = device.type == "cpu" and key_mask is None and cu_seqlens is None and not causal and not whole
    open_maps = open_maps and student_q.shape != teacher_q.shape and bool((row_scale != 0).all())
    tensors, scales = (student_q, student_k, teacher_q, teacher_k), (student_scale, teacher_scale)
    operands = _operands(tensors, key_mask, row_scale, torch.float64 if whole else dtype, open_maps)
    rows = torch.empty_like(row_scale)
    dq, dk = None, None
    if need_grad:
        dq = torch.empty(student_q.shape, dtype=dtype, device=device)
        dk = torch.zeros(operands.keys.student.shape, dtype=dtype, device=device)
    block = BLOCK_ELEMENTS["cpu" if device.type == "cpu" else "gpu"] // max(1, batch * heads * length)
    block = max(1, length if whole else block)
    tokens = torch.arange(length, device=device)
    sequence = None if cu_seqlens is None else torch.searchsorted(cu_seqlens, tokens, right=True)
    for start in range(0, length, block):
        r = slice(start, min(start + block, length))
        if open_maps:
            out = (None, None) if dq is None or dk is None else (dq[:, :, r], dk)
            found = _open_block(operands, r, row_scale[:, 0, r], kind, scales, *out)
            if found is not None:
                rows[:, 0, r] = found
                continue
            open_maps = False
            operands = _operands(tensors, key_mask, row_scale, torch.float64)
        visible = (row_scale[:, 0, r] != 0)[..., None]
        visible = visible.expand(-1, -1, length) if key_mask is None else visible & key_mask[:, None]
        if causal:
            visible = visible & (tokens <= tokens[r, None])
        if sequence is not None:
            visible = visible & (sequence == sequence[r, None])
        means = _means(operands, r, visible, scales)
        if device.type == "cpu" and means.q.dtype != torch.float64 and not bool(means.kept):
            operands = _operands(tensors, key_mask, row_scale, torch.float64)
            means = _means(operands, r, visible, scales)
        q_s, scale = operands.student_q[:, :, r], row_scale[:, 0, r].to(means.q.dtype)
        rows[:, 0, r], dq_block, dk_block = reference.attention(
            q_s, operands.keys, means, visible, scale, kind, student_scale, need_grad
        )
        if dq is not None and dk is not None and dq_block is not None and dk_block is not None:
            dq[:, :, r] = dq_block
            dk += dk_block
    return rows, dq, None if dk is None else sum_of_groups(dk, student_k.shape[1])


def _operands(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    key_mask: Tensor | None,
    row_scale: Tensor,
    dtype: torch.dtype,
    every_row: bool = False,
) -> _Operands:
    """In dtype, with zeros where nothing is visible, and as many key heads as query heads; every_row: none skipped."""
    student_q, student_k, teacher_q, teacher_k = tensors
    skipped = None if every_row else (row_scale == 0)[..., None]
    real = None if key_mask is None else key_mask[:, None, :, None]
    q_s, q_t = (_filled(x.to(dtype), skipped) for x in (student_q, teacher_q))
    k_s, k_t = (_filled(x.to(dtype), None if real is None else ~real) for x in (student_k, teacher_k))
    k_s, k_t = (k.repeat_interleave(q.shape[1] // k.shape[1], 1) for k, q in ((k_s, q_s), (k_t, q_t)))
    return _Operands(q_s, q_t, reference.keys(k_s, k_t, real, student_q.shape == teacher_q.shape))


def _filled(x: Tensor, where: Tensor | None) -> Tensor:
    return x if where is None else x.masked_fill(where, 0.0)


def _means(operands: _Operands, r: slice, visible: Tensor, scales: tuple[float, float]) -> reference.Means:
    q_s, q_t, keys = operands
    return reference.means(q_s[:, :, r], q_t[:, :, r], keys, visible, *scales)


def _open_block(
    operands: _Operands,
    r: slice,
    row_scale: Tensor,
    kind: str,
    scales: tuple[float, float],
    dq: Tensor | None,
    dk: Tensor | None,
) -> Tensor | None:
    """The rows (B, R) of a block in which every query sees every key; dq (B, H, R, d) is written, dk (B, H, S, d) added
    to. As the reference without the masks, and with one temporary beside the student's maps. None, and nothing written,
    where float32 is not enough."""
    q_s, q_t, keys = operands
    sides = ((q_s, keys.student, scales[0]), (q_t, keys.teacher, scales[1]))
    p, q = (torch.softmax((x[:, :, r] * scale) @ k.mT, -1) for x, k, scale in sides)
    mean, q = p.mean(1), q.mean(1)
    e = mean - q
    if e.dtype != torch.float64 and not bool(reference.kept_digits(e, q) & reference.kept_at_tops(p, e, q)):
        return None
    rows, dmean = reference.compare(kind, q, e, mean, row_scale)
    if dq is None or dk is None:
        return rows
    dmean.mul_(scales[0] / p.shape[1])
    top = p.argmax(-1, keepdim=True)  # the slopes are taken relative to that there, as in `through_softmax`
    d = dmean[:, None] - dmean[:, None].expand_as(p).gather(-1, top)
    d.mul_(p)
    d.addcmul_(p, d.sum(-1, keepdim=True), value=-1)
    dq.copy_(d @ keys.student)
    dk.flatten(0, 1).baddbmm_(d.mT.flatten(0, 1), q_s[:, :, r].flatten(0, 1))
    return rows
