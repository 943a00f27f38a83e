"""Losses between attention maps, from the queries and keys alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.backends import choose
from fastdistil.losses import _check
from fastdistil.ops.attention import accumulator, attention_rows, attention_total

KINDS = ("prob_mse", "score_mse", "prob_kl")
_NAME = "attention_loss"


def attention_loss(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    kind: str = "prob_mse",
    mask: Tensor | None = None,
    causal: bool = False,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    mask_queries: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """The distance between two attention maps `A = scale * Q K^T`, `P = softmax(A)`, which never exist in memory.

    Args:
        student_q, student_k: (B, H, S, d_s) float32, bfloat16, float16 or float64, any strides; after rotary embedding.
        teacher_q, teacher_k: (B, H, S, d_t), constants. d_s and d_t may differ, B, H and S may not.
        kind: "prob_mse" (P_s - P_t)^2 (BiStil, arXiv 2306.01709); "score_mse" (A_s - A_t)^2 (TinyBERT, arXiv
            1909.10351); "prob_kl" KL(P_t || P_s) (MiniLM, arXiv 2002.10957).
        mask: (B, S) bool, True = real token; the rest is no key, whatever it holds.
        causal: a query sees no key behind it.
        student_scale, teacher_scale: 1 / sqrt(d) by default.
        mask_queries: False keeps the padded tokens as query rows, as BiStil does (they must then be finite).
        reduction: "mean" over visible (query, key) pairs and heads for prob_mse and score_mse, over query rows and
            heads for prob_kl; "sum"; "none" one value a query row, summed over its keys, 0 where it is masked.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        A scalar, or (B, H, S) for "none": float32 (float64 for float64 inputs). Without any real token it is 0.

    Raises:
        TypeError, ValueError: what came and what was wanted, by argument; a teacher that requires grad.
    """
    tensors = _check_tensors(student_q, student_k, teacher_q, teacher_k)
    _check.one_of(_NAME, "kind", kind, KINDS)
    _check.one_of(_NAME, "reduction", reduction, _check.REDUCTIONS)
    for name, flag in (("causal", causal), ("mask_queries", mask_queries)):
        if not isinstance(flag, bool):
            raise TypeError(f"{_NAME}: {name} is {type(flag).__name__}, expected a bool")
    if mask is not None:
        _check_mask(mask, student_q)
    scales = [
        x.shape[-1] ** -0.5 if scale is None else _check.number(_NAME, name, scale)
        for name, scale, x in (
            ("student_scale", student_scale, student_q),
            ("teacher_scale", teacher_scale, teacher_q),
        )
    ]
    choose(backend, student_q.device)

    row_scale = _row_scale(tensors[0], mask, kind, causal, mask_queries, reduction)
    arguments = (*tensors, mask, row_scale, kind, causal, scales[0], scales[1], backend)
    if reduction == "none":
        rows: Tensor = attention_rows(*arguments)
        return rows
    if torch.is_grad_enabled() and (student_q.requires_grad or student_k.requires_grad):
        total: Tensor = attention_total(*arguments)[0]
        return total
    value: Tensor = attention_rows(*arguments).sum()
    return value


def _check_tensors(student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor) -> tuple[Tensor, ...]:
    """The four tensors, in one dtype."""
    named = {"student_q": student_q, "student_k": student_k, "teacher_q": teacher_q, "teacher_k": teacher_k}
    for name, x in named.items():
        _check.float_tensor(_NAME, name, x)
        if x.ndim != 4 or x.shape[-1] == 0:
            raise ValueError(f"{_NAME}: {name} has shape {tuple(x.shape)}, expected (B, H, S, d) with d > 0")
        _check.same_device(_NAME, name, x, "student_q", student_q.device)
    _check.same_shape(_NAME, "student_k", student_k, "student_q", student_q.shape)
    _check.same_shape(_NAME, "teacher_k", teacher_k, "teacher_q", teacher_q.shape)
    if teacher_q.shape[:3] != student_q.shape[:3]:
        wanted = ", ".join(map(str, student_q.shape[:3]))
        raise ValueError(
            f"{_NAME}: teacher_q has shape {tuple(teacher_q.shape)}, expected ({wanted}, d) to match student_q"
        )
    _check.constant(_NAME, "teacher_q", teacher_q)
    _check.constant(_NAME, "teacher_k", teacher_k)
    if len({x.dtype for x in named.values()}) == 1:
        return tuple(named.values())
    wide = torch.float64 if any(x.dtype == torch.float64 for x in named.values()) else torch.float32
    return tuple(x.to(wide) for x in named.values())


def _check_mask(mask: Tensor, student_q: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{_NAME}: mask is {type(mask).__name__}, expected a torch.Tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"{_NAME}: mask has dtype {mask.dtype}, expected bool, True = real token (mask.bool())")
    wanted = (student_q.shape[0], student_q.shape[2])
    if tuple(mask.shape) != wanted:
        raise ValueError(f"{_NAME}: mask has shape {tuple(mask.shape)}, expected {wanted}, (B, S) of student_q")
    _check.same_device(_NAME, "mask", mask, "student_q", student_q.device)


def _row_scale(
    student_q: Tensor, mask: Tensor | None, kind: str, causal: bool, mask_queries: bool, reduction: str
) -> Tensor:
    """The factor of each query row (B, H, S): 1, or 1 / number of terms for "mean"; 0 for what does not count."""
    batch, heads, length, _ = student_q.shape
    dtype = accumulator(student_q.dtype)
    real = torch.ones(batch, length, dtype=torch.bool, device=student_q.device) if mask is None else mask
    keep = (real if mask_queries else torch.ones_like(real)).to(dtype)
    if reduction == "mean":
        if kind == "prob_kl":
            terms = keep
        else:  # the keys that each kept row sees
            keys = real.to(torch.int64)
            seen = keys.cumsum(1) if causal else keys.sum(1, keepdim=True)
            terms = keep * seen
        keep = keep / (heads * terms.sum(dtype=torch.float64)).clamp(min=1).to(dtype)
    return keep[:, None].expand(batch, heads, length).contiguous()
