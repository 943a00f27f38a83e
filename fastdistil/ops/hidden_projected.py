"""Custom ops of a list of hidden states with projections, for the backend that takes all layers' rows in one launch a
chunk: `hidden_projected_rows`, one value a row, and `hidden_projected_total`, their sum with gradients.

As in ops/hidden.py the projected states exist for one chunk only, here of all layers together, and the total keeps its
gradients for the backward pass. A projection or bias of several layers comes once, and so does its gradient: the
layers' parts are added in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistil.ops.gradients import hand_out, refuse_double_backward
from fastdistil.ops.hidden_chunks import compute


@torch.library.custom_op("fastdistil::hidden_projected_rows", mutates_args=())
def hidden_projected_rows(
    students: list[Tensor],
    teachers: list[Tensor],
    projections: list[Tensor],
    biases: list[Tensor],
    row_scale: Tensor,
    projection_of: list[int],
    bias_of: list[int],
    factors: list[float],
    kind: str,
    activation: str,
    backend: str,
    dense: bool,
) -> Tensor:
    """students: L of (N, D_s) in one dtype, D_s may differ; teachers: L of (N, D_t) in one dtype; projections: (D_t,
    D_s) in one dtype; biases: (D_t,); row_scale (N,) float32, without a 0 where `dense`; projection_of, bias_of: which
    of them a layer has, -1 where there is no bias; factors: one a layer -> rows (N,), sums over the layers, times
    row_scale."""
    wanted = [False] * (len(students) + len(projections) + len(biases))
    tensors = (row_scale, students, teachers, projections, biases)
    maps = (projection_of, bias_of)
    return compute(*tensors, *maps, factors, kind, activation, backend, dense, wanted, True)[0]


@torch.library.custom_op("fastdistil::hidden_projected_total", mutates_args=())
def hidden_projected_total(
    students: list[Tensor],
    teachers: list[Tensor],
    projections: list[Tensor],
    biases: list[Tensor],
    row_scale: Tensor,
    projection_of: list[int],
    bias_of: list[int],
    factors: list[float],
    kind: str,
    activation: str,
    backend: str,
    dense: bool,
    wanted: list[bool],
    rounded: bool,
) -> tuple[Tensor, list[Tensor]]:
    """As `hidden_projected_rows` -> the rows' sum (), and its gradients in students, projections and biases, empty
    where not wanted; in the inputs' dtypes where `rounded`, else in float32."""
    tensors = (row_scale, students, teachers, projections, biases)
    maps = (projection_of, bias_of)
    rows, gradients = compute(*tensors, *maps, factors, kind, activation, backend, dense, wanted, rounded)
    return rows.sum(), gradients


@hidden_projected_rows.register_fake
def _(students: Any, teachers: Any, projections: Any, biases: Any, row_scale: Tensor, *args: Any) -> Tensor:
    return row_scale.new_empty(row_scale.shape)


@hidden_projected_total.register_fake
def _(
    students: list[Tensor],
    teachers: list[Tensor],
    projections: list[Tensor],
    biases: list[Tensor],
    row_scale: Tensor,
    *args: Any,
) -> tuple[Tensor, list[Tensor]]:
    *_, wanted, rounded = args
    return row_scale.new_empty(()), [
        row_scale.new_empty(x.shape, dtype=x.dtype if rounded else row_scale.dtype) if want else row_scale.new_empty(0)
        for x, want in zip((*students, *projections, *biases), wanted, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...]) -> None:
    *lists, row_scale = inputs[:5]
    ctx.counts, ctx.options = [len(x) for x in lists], inputs[5:12]
    ctx.save_for_backward(*(x for tensors in lists for x in tensors), row_scale)


def _split(flat: Any, counts: list[int]) -> list[list[Any]]:
    """The items of `flat` in lists of these lengths."""
    items = iter(flat)
    return [[next(items) for _ in range(count)] for count in counts]


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs)


def _backward_rows(ctx: Any, drows: Tensor) -> tuple[Any, ...]:
    refuse_double_backward("hidden_loss")
    *tensors, row_scale = ctx.saved_tensors
    scale = torch.where(row_scale == 0, 0.0, row_scale * drows)
    needed = ctx.needs_input_grad
    wanted = [*needed[0], *needed[2], *needed[3]]
    gradients = hidden_projected_total(*_split(tensors, ctx.counts), scale, *ctx.options, wanted, True)[1]
    return _inputs_gradients(ctx, gradients, wanted, 8)


def _setup_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)  # no zeros for them either
    _save(ctx, inputs)
    ctx.wanted, ctx.kept = inputs[12], tuple(output[1])


def _backward_total(ctx: Any, dtotal: Tensor | None, _: Any) -> tuple[Any, ...]:
    refuse_double_backward("hidden_loss")
    tensors = ctx.saved_tensors
    lists = _split(tensors[:-1], ctx.counts)
    if dtotal is None:
        return *([None] * len(x) for x in lists), *[None] * 10

    def again() -> tuple[Tensor, ...]:
        return tuple(hidden_projected_total(*lists, tensors[-1], *ctx.options, ctx.wanted, False)[1])

    inputs = (*lists[0], *lists[2], *lists[3])
    gradients = [g.to(x.dtype) for g, x in zip(hand_out(ctx, dtotal, again), inputs, strict=True)]
    return _inputs_gradients(ctx, gradients, ctx.wanted, 10)


def _inputs_gradients(ctx: Any, gradients: list[Tensor], wanted: list[bool], rest: int) -> tuple[Any, ...]:
    """In the order of the op's inputs, of which `rest` come after the lists."""
    students, teachers, projections, biases = ctx.counts
    given = [g if want else None for g, want in zip(gradients, wanted, strict=True)]
    dstudents, dprojections, dbiases = _split(given, [students, projections, biases])
    return dstudents, [None] * teachers, dprojections, dbiases, *[None] * rest


hidden_projected_rows.register_autograd(_backward_rows, setup_context=_setup_rows)
hidden_projected_total.register_autograd(_backward_total, setup_context=_setup_total)
