"""The custom ops behind logit_loss.

``fastdistil::logit`` computes the scaled value of each row and, where the caller says that a gradient will be wanted,
the gradient for a dloss of 1 in the same pass over the logits. The backward hands that buffer out if dloss is 1
(the usual case: the loss is what `backward()` was called on); if not, a 16-bit one is computed again from the logits,
so that it is rounded once. A second backward through a retained graph computes into fresh memory. Under torch.compile
the gradient is always computed in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastdistil.backends import get
from fastdistil.backends.memory import new_empty
from fastdistil.contracts.logit import STATS, LogitRule
from fastdistil.ops.gradients import multiply_, refuse_double_backward


def _rule(divergence: int, beta: float, t_s: float, t_t: float, value_factor: float) -> LogitRule:
    return {
        "divergence": divergence,
        "beta": beta,
        "student_temperature": t_s,
        "teacher_temperature": t_t,
        "value_factor": value_factor,
    }


def _kernels(backend: str, student: Tensor) -> ModuleType:
    return get("logit", backend, student.device, student.dtype)


@torch.library.custom_op("fastdistil::logit", mutates_args=())
def logit(
    student: Tensor,  # (N, V)
    teacher: Tensor,  # (N, V)
    row_scale: Tensor,  # (N,) float32, float64 for float64 logits
    divergence: int,
    beta: float,
    student_temperature: float,
    teacher_temperature: float,
    value_factor: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses (N,), row statistics (N, STATS) and the gradient for dloss = 1 ((N, V), or (0, V) if not wanted)."""
    loss, stats, gradient = _outputs(student, row_scale, with_gradient, new_empty)
    rule = _rule(divergence, beta, student_temperature, teacher_temperature, value_factor)
    kernels = _kernels(backend, student)
    kernels.logit_fwd(student, teacher, row_scale, loss, stats, gradient if with_gradient else None, **rule)
    return loss, stats, gradient


def _outputs(
    student: Tensor, row_scale: Tensor, with_gradient: bool, empty: Callable[..., Tensor] = Tensor.new_empty
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = student.shape
    stats = row_scale.new_empty(rows, STATS)
    return torch.empty_like(row_scale), stats, empty(student, (rows if with_gradient else 0, columns))


@logit.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    divergence: int,
    beta: float,
    student_temperature: float,
    teacher_temperature: float,
    value_factor: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(student, row_scale, with_gradient)


@torch.library.custom_op("fastdistil::logit_bwd", mutates_args=())
def logit_bwd(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    dloss: Tensor,  # (N,)
    divergence: int,
    beta: float,
    student_temperature: float,
    teacher_temperature: float,
    value_factor: float,
    backend: str,
) -> Tensor:
    """The student's gradient (N, V), times dloss, in fresh memory."""
    gradient = new_empty(student, student.shape)
    rule = _rule(divergence, beta, student_temperature, teacher_temperature, value_factor)
    kernels = _kernels(backend, student)
    kernels.logit_bwd(student, teacher, row_scale, stats, gradient, dloss.contiguous(), False, **rule)
    return gradient


@logit_bwd.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    dloss: Tensor,
    divergence: int,
    beta: float,
    student_temperature: float,
    teacher_temperature: float,
    value_factor: float,
    backend: str,
) -> Tensor:
    return student.new_empty(student.shape)


@torch.library.custom_op("fastdistil::logit_overwrite_", mutates_args={"student"})
def logit_overwrite_(
    student: Tensor,  # (N, V): becomes its own gradient for dloss = 1
    teacher: Tensor,
    row_scale: Tensor,
    divergence: int,
    beta: float,
    student_temperature: float,
    teacher_temperature: float,
    value_factor: float,
    backend: str,
) -> Tensor:
    """Row losses (N,); the gradient is written over the student's logits."""
    loss, stats, _ = _outputs(student, row_scale, False)
    rule = _rule(divergence, beta, student_temperature, teacher_temperature, value_factor)
    _kernels(backend, student).logit_fwd(student, teacher, row_scale, loss, stats, student, **rule)
    return loss


@logit_overwrite_.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    divergence: int,
    beta: float,
    student_temperature: float,
    teacher_temperature: float,
    value_factor: float,
    backend: str,
) -> Tensor:
    return torch.empty_like(row_scale)


class Overwrite(torch.autograd.Function):
    """An op that leaves the gradient of its rows' sum in `student` and returns the rows (N,) first, as a function.
    Custom ops that write to an input cannot carry autograd themselves."""

    @staticmethod
    def forward(ctx: Any, function: str, op: Callable[..., Any], student: Tensor, *rest: Any) -> Any:
        ctx.function, ctx.gradient, ctx.inputs = function, student.detach(), 3 + len(rest)
        found = op(ctx.gradient, *rest)
        if not isinstance(found, Tensor):
            ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    def backward(ctx: Any, *dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward(ctx.function)
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError(
                f"{ctx.function}: a second backward came through inplace_backward=True, expected one: the gradient has "
                "been given away and the logits are gone"
            )
        multiply_(gradient, dloss[0])
        return (None, None, gradient, *(None,) * (ctx.inputs - 3))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, row_scale, *rule, with_gradient, backend = inputs
    _, stats, gradient = output
    ctx.mark_non_differentiable(stats, gradient)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, row_scale, stats)
    ctx.rule, ctx.backend = rule, backend
    # Not saved but held: the first backward gives the buffer away, so that nobody has to copy it. A tensor that is
    # being traced cannot be held that way; its backward computes the gradient instead.
    ctx.gradient = gradient if with_gradient and type(gradient) is Tensor else None


def _backward(ctx: Any, dloss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("logit_loss")
    gradient = None
    if dloss is not None and ctx.needs_input_grad[0]:
        student, teacher, row_scale, stats = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is not None:  # never while tracing: no need for the dispatcher, which costs more than small rows
            kernels = _kernels(ctx.backend, student)
            rest = (stats, gradient, dloss.contiguous())
            kernels.logit_bwd(student, teacher, row_scale, *rest, True, **_rule(*ctx.rule))
        else:
            gradient = logit_bwd(student, teacher, row_scale, stats, dloss, *ctx.rule, ctx.backend)
    return (gradient, *(None,) * 9)


logit.register_autograd(_backward, setup_context=_setup)
