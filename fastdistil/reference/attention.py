"""Losses between two attention maps, with the maps in memory (losses.md, section 4): the judge of all backends.

prob_mse: BiStil (arXiv 2306.01709); score_mse: TinyBERT (arXiv 1909.10351); prob_kl: MiniLM (arXiv 2002.10957).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.contracts.attention import sum_of_groups
from fastdistil.reference.exact import forward_kl_rows, softmax_difference, through_softmax

COMMON = 0.25  # of a mean's square, in units of the variance: what is less is left where it is


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
    """Rows of the loss times `row_scale`, and the gradients of their sum.

    student_q: (B, H, S, d_s); teacher_q: (B, H, S, d_t); student_k, teacher_k: likewise, or with a divisor of H heads,
    each for as many query heads in a row; key_mask: (B, S) bool, True = real; cu_seqlens: (n + 1,) where sequences of
    one row of B = 1 begin, then S: a query sees its own sequence alone; row_scale: (B, H, S), rows with 0 are skipped
    whatever they hold. kind: "prob_mse" sum over keys of (P_s - P_t)^2, "prob_kl" KL(P_t || P_s), "score_mse" sum over
    keys of (A_s - A_t)^2.
    Returns rows (B, H, S), dstudent_q, dstudent_k in their tensors' shapes; None without `need_grad`. All in
    row_scale's dtype.
    """
    dtype = row_scale.dtype
    keep = row_scale != 0  # (B, H, S)
    real = keep.new_ones(keep.shape[0], 1, keep.shape[2]) if key_mask is None else key_mask[:, None, :]  # (B, 1, S)
    q_s, q_t = (torch.where(keep[..., None], x.to(dtype), 0.0) for x in (student_q, teacher_q))
    k_s, k_t = (
        torch.where(real[..., None], x.to(dtype), 0.0).repeat_interleave(keep.shape[1] // x.shape[1], 1)
        for x in (student_k, teacher_k)
    )
    visible = (real[..., None, :] & keep[..., None]).expand(*keep.shape, keep.shape[-1])  # (B, H, S, S)
    visible = visible.tril() if causal else visible
    if cu_seqlens is not None:
        of_token = torch.searchsorted(cu_seqlens, torch.arange(keep.shape[-1], device=keep.device), right=True)
        visible = visible & (of_token[:, None] == of_token)

    wide = [x.to(torch.float64) for x in (q_s, k_s, q_t, k_t)]  # the scores may agree though their factors do not
    student_scores, teacher_scores = student_scale * wide[0] @ wide[1].mT, teacher_scale * wide[2] @ wide[3].mT
    score_difference = (student_scores - teacher_scores).masked_fill(~visible, 0.0)

    if kind == "score_mse":
        score_difference = score_difference.to(dtype)
        rows, dscores = score_difference.square().sum(-1), 2 * score_difference
    else:  # a softmax sees neither what all keys nor what all scores of a row have in common
        k_s = without_mean(k_s, real[..., None])
        if visible.shape[-1] > 0:
            largest = teacher_scores.masked_fill(~visible, float("-inf")).argmax(-1, keepdim=True)
            score_difference = score_difference - score_difference.gather(-1, largest)
            student_scores, teacher_scores = (_below_largest(x, visible) for x in (student_scores, teacher_scores))
        student_scores, teacher_scores = student_scores.to(dtype), teacher_scores.to(dtype)
        score_difference = score_difference.to(dtype)
        difference = softmax_difference(teacher_scores, score_difference, visible, student_scores)
        e = difference.p_minus_q
        if kind == "prob_kl":
            rows, dscores = forward_kl_rows(difference), e
        else:
            p = student_scores.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible, 0.0)
            rows, dscores = e.square().sum(-1), 2 * through_softmax(p, e, p)
    rows = torch.where(keep, row_scale * rows, 0.0)
    if not need_grad:
        return rows, None, None
    dscores = torch.where(visible, row_scale[..., None] * dscores, 0.0)
    dk = student_scale * dscores.mT @ q_s
    return rows, student_scale * dscores @ k_s, sum_of_groups(dk, student_k.shape[1])


def _below_largest(scores: Tensor, visible: Tensor) -> Tensor:
    """Less the largest visible one of each row."""
    return scores - scores.masked_fill(~visible, float("-inf")).amax(-1, keepdim=True).nan_to_num(neginf=0.0)


def without_mean(k: Tensor, real: Tensor | None) -> Tensor:
    """k (B, H, S, d), 0 where not `real` (B, 1, S, 1), less the mean of its real tokens where that is not small.

    It adds q . mean to every score of a row: to no softmax, but to the rounding of the scores and of dA K."""
    count = max(1, k.shape[2]) if real is None else real.sum(2, keepdim=True).clamp(min=1)
    mean = k.sum(2, keepdim=True) / count
    squares = mean.square().sum(-1, keepdim=True)
    variance = k.square().sum((2, 3), keepdim=True) / count - squares
    moved = k - torch.where((squares > COMMON * variance) & squares.isfinite(), mean, 0.0)
    return moved if real is None else moved.masked_fill_(~real, 0.0)
