"""Custom ops of the attention losses: `attention_rows`, one value a query row, and `attention_total`, their sum.

A backend's `attention` (`attention_mean.attention` for means over the heads) returns the rows and, where asked, the
gradients of their sum. `attention_total` asks for both at once and keeps the gradients (as large as Q and K) for its
backward pass, which only multiplies them with the incoming gradient: no tile of the map is computed twice
(ops/gradients.py). `attention_rows` has a gradient a row to honour, so its backward pass runs the kernel again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistil.backends import choose, module
from fastdistil.ops import attention_low_rank, attention_mean, float64
from fastdistil.ops.gradients import hand_out, refuse_double_backward
from fastdistil.ops.precision import with_exact_products


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What values, statistics and sums are computed in: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@with_exact_products
def _compute(
    student_q: Tensor,
    student_k: Tensor | None,
    teacher_q: Tensor,
    teacher_k: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    row_scale: Tensor,
    kind: str,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
    heads: str,
    backend: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    name = choose(backend, student_q.device)
    relation = student_k is None or teacher_k is None
    keys = (student_q, teacher_q) if student_k is None or teacher_k is None else (student_k, teacher_k)
    tensors = (student_q, keys[0], teacher_q, keys[1], key_mask, cu_seqlens, row_scale)
    if heads == "mean":
        return attention_mean.attention(
            *tensors, kind, causal, student_scale, teacher_scale, name == "reference", need_grad
        )
    linear = kind == "score_mse" and not causal and cu_seqlens is None
    if name == "triton" and linear and float64.is_fast(student_q.device):  # matrix products alone, the vendor's
        found = attention_low_rank.score_mse(*tensors[:5], row_scale, student_scale, teacher_scale, need_grad)
        return _as_one(*found) if relation else found
    name = choose(backend, student_q.device, row_scale.dtype)
    given = (None, None) if relation and name == "triton" else keys  # Triton has a kernel for both sides at once
    found = module("attention", name).attention(
        student_q, given[0], teacher_q, given[1], key_mask, cu_seqlens, row_scale, kind, causal, student_scale,
        teacher_scale, need_grad,
    )  # fmt: skip
    return _as_one(*found) if relation else found


def _as_one(rows: Tensor, dq: Tensor | None, dk: Tensor | None) -> tuple[Tensor, Tensor | None, None]:
    """The gradient of what stands on both sides, in the accumulator's dtype: rounded once, where autograd would add up
    rounded ones."""
    return rows, dq if dq is None or dk is None else dq.add_(dk), None


@torch.library.custom_op("fastdistil::attention_rows", mutates_args=())
def attention_rows(
    student_q: Tensor,
    student_k: Tensor | None,
    teacher_q: Tensor,
    teacher_k: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    row_scale: Tensor,
    kind: str,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
    heads: str,
    backend: str,
) -> Tensor:
    """student_q (B, H, S, d_s), teacher_q (B, H, S, d_t), the keys with as many heads or a divisor of H, or both None
    where the queries are the keys too (a relation), key_mask (B, S) bool, cu_seqlens (n + 1,) integer for packed
    sequences (then B = 1), row_scale (B, H, S), or (B, 1, S) for heads "mean", float32 (float64 for float64 inputs) ->
    rows in row_scale's shape, already times row_scale."""
    return _compute(
        student_q, student_k, teacher_q, teacher_k, key_mask, cu_seqlens, row_scale, kind, causal, student_scale,
        teacher_scale, heads, backend, False,
    )[0]  # fmt: skip


@torch.library.custom_op("fastdistil::attention_total", mutates_args=())
def attention_total(
    student_q: Tensor,
    student_k: Tensor | None,
    teacher_q: Tensor,
    teacher_k: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    row_scale: Tensor,
    kind: str,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
    heads: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attention_rows` -> the rows' sum (), and its gradients in student_q and student_k in row_scale's dtype; for a
    relation the first is the gradient through both sides and the second is empty."""
    rows, dq, dk = _compute(
        student_q, student_k, teacher_q, teacher_k, key_mask, cu_seqlens, row_scale, kind, causal, student_scale,
        teacher_scale, heads, backend, True,
    )  # fmt: skip
    assert dq is not None  # need_grad
    return rows.sum(), dq, rows.new_empty(0) if dk is None else dk


@attention_rows.register_fake
def _(student_q: Tensor, student_k: Tensor | None, teacher_q: Tensor, *args: Any) -> Tensor:
    return student_q.new_empty(args[3].shape, dtype=accumulator(student_q.dtype))


@attention_total.register_fake
def _(student_q: Tensor, student_k: Tensor | None, teacher_q: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(student_q.dtype)
    return (
        student_q.new_empty((), dtype=dtype),
        student_q.new_empty(student_q.shape, dtype=dtype),
        student_q.new_empty(0 if student_k is None else student_k.shape, dtype=dtype),
    )


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kind, ctx.causal, ctx.student_scale, ctx.teacher_scale, ctx.heads, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward_rows(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward("attention_loss")
    *tensors, row_scale = ctx.saved_tensors
    scale = torch.where(row_scale == 0, 0.0, row_scale * drows)
    _, dq, dk = attention_total(
        *tensors, scale, ctx.kind, ctx.causal, ctx.student_scale, ctx.teacher_scale, ctx.heads, ctx.backend
    )
    return dq.to(tensors[0].dtype), None if tensors[1] is None else dk.to(tensors[1].dtype), *[None] * 11


def _setup_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for them either
    *tensors, ctx.kind, ctx.causal, ctx.student_scale, ctx.teacher_scale, ctx.heads, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.kept = output[1:]


def _backward_total(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_double_backward("attention_loss")
    if dtotal is None:
        return (None,) * 13
    tensors = ctx.saved_tensors

    def again() -> tuple[Tensor, ...]:
        options = (ctx.kind, ctx.causal, ctx.student_scale, ctx.teacher_scale, ctx.heads, ctx.backend)
        found: tuple[Tensor, ...] = attention_total(*tensors, *options)
        return found[1:]

    dq, dk = hand_out(ctx, dtotal, again)
    return dq.to(tensors[0].dtype), None if tensors[1] is None else dk.to(tensors[1].dtype), *[None] * 11


attention_rows.register_autograd(_backward_rows, setup_context=_setup_rows)
attention_total.register_autograd(_backward_total, setup_context=_setup_total)
