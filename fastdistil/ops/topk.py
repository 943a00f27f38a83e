"""The custom ops behind topk_logit_loss.

``fastdistil::topk`` computes the scaled value of each row, what its gradient is made of (`stats`: one factor for the
columns that the teacher does not name and one entry for each that it does) and, where the caller says that a gradient
will be wanted, the gradient for a dloss of 1. The backward hands that buffer out if dloss is 1; if not, a 16-bit one is
computed again, so that it is rounded once. A second backward computes into fresh memory: one exponential a column.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastdistil.backends import get
from fastdistil.backends.memory import new_empty
from fastdistil.contracts.topk import STATS, TopkRule
from fastdistil.ops.gradients import refuse_double_backward
from fastdistil.ops.topk_teacher import canonical


def _kernels(backend: str, student: Tensor) -> ModuleType:
    return get("topk", backend, student.device, student.dtype)


@torch.library.custom_op("fastdistil::topk", mutates_args=())
def topk(
    student: Tensor,  # (N, V)
    values: Tensor,  # (N, K), any floating dtype
    indices: Tensor,  # (N, K) int32 or int64
    teacher_tail: Tensor | None,  # (N,) float32 or float64
    row_scale: Tensor,  # (N,) float32, float64 for float64 logits
    divergence: int,
    beta: float,
    tail: int,
    temperature: float,
    value_factor: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row losses (N,), columns (N, K) int32 ascending, stats (N, STATS + K) float64, and the gradient for dloss = 1
    ((N, V), or (0, V) if not wanted)."""
    rule: TopkRule = {
        "divergence": divergence,
        "beta": beta,
        "tail": tail,
        "temperature": temperature,
        "value_factor": value_factor,
    }
    kernels = _kernels(backend, student)
    teacher = (values, indices, teacher_tail)
    u, columns, rest = canonical("topk_logit_loss", *teacher, row_scale, student.shape[1], tail)
    loss, _, stats, gradient = _outputs(student, values, row_scale, with_gradient, new_empty)
    kernels.topk_fwd(student, u, columns, rest, row_scale, loss, stats, gradient if with_gradient else None, **rule)
    return loss, columns, stats, gradient


def _outputs(
    student: Tensor,
    values: Tensor,
    row_scale: Tensor,
    with_gradient: bool,
    empty: Callable[..., Tensor] = Tensor.new_empty,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (rows, columns), k = student.shape, values.shape[1]
    chosen = values.new_empty((rows, k), dtype=torch.int32)
    stats = values.new_empty((rows, STATS + k), dtype=torch.float64)
    return torch.empty_like(row_scale), chosen, stats, empty(student, (rows if with_gradient else 0, columns))


@topk.register_fake
def _(
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    teacher_tail: Tensor | None,
    row_scale: Tensor,
    divergence: int,
    beta: float,
    tail: int,
    temperature: float,
    value_factor: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(student, values, row_scale, with_gradient)


@torch.library.custom_op("fastdistil::topk_bwd", mutates_args=())
def topk_bwd(
    student: Tensor,
    columns: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    dloss: Tensor,  # (N,)
    temperature: float,
    backend: str,
) -> Tensor:
    """The student's gradient (N, V), times dloss, in fresh memory."""
    gradient = new_empty(student, student.shape)
    rest = (gradient, dloss.contiguous(), False, temperature)
    _kernels(backend, student).topk_bwd(student, columns, row_scale, stats, *rest)
    return gradient


@topk_bwd.register_fake
def _(
    student: Tensor,
    columns: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    dloss: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    return student.new_empty(student.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    student, _, _, _, row_scale, *_, ctx.temperature, _, with_gradient, ctx.backend = inputs
    _, columns, stats, gradient = output
    ctx.mark_non_differentiable(columns, stats, gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, columns, row_scale, stats)
    # Held, not saved: the first backward gives the buffer away (fastdistil/ops/logit.py does the same).
    ctx.gradient = gradient if with_gradient and type(gradient) is Tensor else None


def _backward(ctx: Any, dloss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("topk_logit_loss")
    gradient = None
    if dloss is not None and ctx.needs_input_grad[0]:
        tensors = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is not None:  # never while tracing
            kernels = _kernels(ctx.backend, tensors[0])
            kernels.topk_bwd(*tensors, gradient, dloss.contiguous(), True, ctx.temperature)
        else:
            gradient = topk_bwd(*tensors, dloss, ctx.temperature, ctx.backend)
    return (gradient, *(None,) * 11)


topk.register_autograd(_backward, setup_context=_setup)
