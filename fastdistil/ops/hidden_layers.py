"""Custom op of a list of hidden states without projection: all layers in one launch, for the backend that has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistil.backends import get
from fastdistil.ops.gradients import refuse_double_backward


@torch.library.custom_op("fastdistil::hidden_layers", mutates_args=())
def hidden_layers(
    students: list[Tensor], teachers: list[Tensor], row_scale: Tensor, kind: str, activation: str, backend: str
) -> Tensor:
    """students, teachers: L of (N, D) in one dtype; row_scale (L, N) float32 -> rows (L, N), times row_scale."""
    kernels = get("hidden_layers", backend, row_scale.device)
    rows: Tensor = kernels.hidden_layers(students, teachers, row_scale, kind, activation, False)[0]
    return rows


@torch.library.custom_op("fastdistil::hidden_layers_bwd", mutates_args=())
def hidden_layers_bwd(
    students: list[Tensor], teachers: list[Tensor], row_scale: Tensor, kind: str, activation: str, backend: str
) -> Tensor:
    """As `hidden_layers` -> the gradients of the rows' sum (L, N, D), in the layers' dtype."""
    kernels = get("hidden_layers", backend, row_scale.device)
    gradients: Tensor = kernels.hidden_layers(students, teachers, row_scale, kind, activation, True)[1]
    return gradients


@hidden_layers.register_fake
def _(students: list[Tensor], teachers: list[Tensor], row_scale: Tensor, *args: Any) -> Tensor:
    return row_scale.new_empty(row_scale.shape)


@hidden_layers_bwd.register_fake
def _(students: list[Tensor], teachers: list[Tensor], row_scale: Tensor, *args: Any) -> Tensor:
    return students[0].new_empty((len(students), *students[0].shape))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    students, teachers, row_scale, ctx.kind, ctx.activation, ctx.backend = inputs
    ctx.layers = len(students)
    ctx.save_for_backward(*students, *teachers, row_scale)


def _backward(ctx: Any, drows: Tensor) -> tuple[Any, ...]:
    refuse_double_backward("hidden_loss")
    *states, row_scale = ctx.saved_tensors
    students, teachers = states[: ctx.layers], states[ctx.layers :]
    scale = torch.where(row_scale == 0, 0.0, row_scale * drows)
    gradients = hidden_layers_bwd(students, teachers, scale, ctx.kind, ctx.activation, ctx.backend)
    return list(gradients.unbind()), [None] * ctx.layers, None, None, None, None


hidden_layers.register_autograd(_backward, setup_context=_setup)
