"""Custom ops of topk_logit_loss with labels, or over logits that may be overwritten: rows in memory, chunk by chunk.

The loop of linear_topk.py; without these options `fastdistil::topk` reads the rows where they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistil.backends import choose
from fastdistil.backends.memory import new_empty
from fastdistil.ops.gradients import hand_out, refuse_double_backward
from fastdistil.ops.linear_topk import run, unpack
from fastdistil.ops.logit_rows import CHUNK_BYTES
from fastdistil.ops.logit_terms import Terms
from fastdistil.ops.topk_teacher import canonical


class _Source:
    """Rows of logits in memory; the gradient may be the same memory: a chunk has been read before it is written."""

    def __init__(self, student: Tensor, gradient: Tensor | None) -> None:
        self.student, self.columns, self.gradient = student, student.shape[1], gradient

    def logits(self, rows: slice, out: Tensor) -> None:
        out.copy_(self.student[rows])

    def back(self, rows: slice, gradient: Tensor) -> None:
        if self.gradient is not None:
            self.gradient[rows] = gradient


def _compute(
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    teacher_tail: Tensor | None,
    row_scale: Tensor,
    labels: Tensor | None,
    label_scale: Tensor | None,
    vocab_map: Tensor | None,
    constants: list[float],
    backend: str,
    gradient: Tensor | None,
) -> Tensor:
    """Rows; the gradient of their sum is written where one is wanted."""
    name = choose(backend, row_scale.device, row_scale.dtype)
    rule, caps = unpack(constants)
    known = (values, indices, teacher_tail)
    teacher = canonical("topk_logit_loss", *known, row_scale, student.shape[1], rule["tail"], vocab_map)
    chunk_bytes = CHUNK_BYTES["cpu" if student.device.type == "cpu" else "gpu"]
    terms = Terms(labels, label_scale, vocab_map, *caps)
    return run(_Source(student, gradient), teacher, row_scale, rule, terms, chunk_bytes, name, gradient is not None)


@torch.library.custom_op("fastdistil::topk_rows", mutates_args=())
def topk_rows(
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    teacher_tail: Tensor | None,
    row_scale: Tensor,
    labels: Tensor | None,
    label_scale: Tensor | None,
    vocab_map: Tensor | None,
    constants: list[float],
    backend: str,
) -> Tensor:
    """student (N, V), values (N, K), indices (N, K) int32 or int64, teacher_tail (N,) float32 or float64, row_scale
    (N,) float32 (float64 for float64 logits), labels (N,) int64, label_scale (N,) as row_scale, vocab_map (V,) int64,
    `constants` of linear_topk.unpack -> rows (N,) times their scales."""
    options = (row_scale, labels, label_scale, vocab_map, constants, backend)
    return _compute(student, values, indices, teacher_tail, *options, None)


@torch.library.custom_op("fastdistil::topk_total", mutates_args=())
def topk_total(
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    teacher_tail: Tensor | None,
    row_scale: Tensor,
    labels: Tensor | None,
    label_scale: Tensor | None,
    vocab_map: Tensor | None,
    constants: list[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """As `topk_rows` -> the rows' sum () and its gradient (N, V) in the student's dtype."""
    gradient = new_empty(student, student.shape)
    options = (row_scale, labels, label_scale, vocab_map, constants, backend)
    rows = _compute(student, values, indices, teacher_tail, *options, gradient)
    return rows.sum(), gradient


@torch.library.custom_op("fastdistil::topk_rows_overwrite_", mutates_args={"student"})
def topk_rows_overwrite_(
    student: Tensor,  # (N, V): becomes the gradient of the rows' sum
    values: Tensor,
    indices: Tensor,
    teacher_tail: Tensor | None,
    row_scale: Tensor,
    labels: Tensor | None,
    label_scale: Tensor | None,
    vocab_map: Tensor | None,
    constants: list[float],
    backend: str,
) -> Tensor:
    """As `topk_rows`; the gradient is written over the student's logits."""
    options = (row_scale, labels, label_scale, vocab_map, constants, backend)
    return _compute(student, values, indices, teacher_tail, *options, student)


@topk_rows.register_fake
@topk_rows_overwrite_.register_fake
def _(
    student: Tensor, values: Tensor, indices: Tensor, teacher_tail: Tensor | None, row_scale: Tensor, *rest: Any
) -> Tensor:
    return row_scale.new_empty(row_scale.shape)


@topk_total.register_fake
def _(
    student: Tensor, values: Tensor, indices: Tensor, teacher_tail: Tensor | None, row_scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return row_scale.new_empty(()), student.new_empty(student.shape)


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _backward_rows(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward("topk_logit_loss")
    student, values, indices, teacher_tail, row_scale, labels, label_scale, vocab_map = ctx.saved_tensors
    scale, label_scale = (None if x is None else torch.where(x == 0, 0.0, x * drows) for x in (row_scale, label_scale))
    teacher = (values, indices, teacher_tail)
    found = topk_total(student, *teacher, scale, labels, label_scale, vocab_map, *ctx.options)[1]
    return found, *[None] * 9


def _setup_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8])
    ctx.options, ctx.kept = inputs[8:], output[1:]


def _backward_total(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_double_backward("topk_logit_loss")
    if dtotal is None:
        return (None,) * 10
    tensors, options = ctx.saved_tensors, ctx.options
    return *hand_out(ctx, dtotal, lambda: (topk_total(*tensors, *options)[1],)), *[None] * 9


topk_rows.register_autograd(_backward_rows, setup_context=_setup_rows)
topk_total.register_autograd(_backward_total, setup_context=_setup_total)
