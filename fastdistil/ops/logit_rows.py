"""Custom ops of logit_loss with labels, a vocabulary map, a group or two dtypes.

Labels alone are added where the rows are, by the kernel of the divergence: the student's row is read once more, from
the cache, for its softmax at temperature 1. With one of the others, a chunk of rows at a time is brought into float32
(or float64) buffers, the teacher's in the order of the student's columns, and the gradient is rounded once on its way
out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistil.backends import choose, module
from fastdistil.backends.memory import new_empty
from fastdistil.contracts.logit import STATS, LogitRule
from fastdistil.ops import row_statistics
from fastdistil.ops.gradients import hand_out, refuse_double_backward
from fastdistil.ops.logit_terms import ADDS_LABELS, Terms, run, unpack
from fastdistil.ops.precision import with_exact_products
from fastdistil.ops.row_statistics import ROW_STATISTICS

# Bytes of the two buffers: on a CPU what a level 3 cache may hold, on a GPU enough rows to fill it (not yet tuned).
CHUNK_BYTES = {"cpu": 16 << 20, "gpu": 1 << 30}


class _Source:
    """Rows of logits in memory."""

    def __init__(self, student: Tensor, teacher: Tensor, vocab_map: Tensor | None, gradient: Tensor | None) -> None:
        self.student, self.teacher = student, teacher
        self.partners = None if vocab_map is None else vocab_map.clamp(min=0)
        self.columns = student.shape[1]
        self.gradient = gradient  # may be the student itself: a chunk has been read before it is written

    def fill(self, rows: slice, student: Tensor, teacher: Tensor) -> None:
        student.copy_(self.student[rows])
        there = self.teacher[rows]
        teacher.copy_(there if self.partners is None else there[:, self.partners])

    def back(self, rows: slice, gradient: Tensor) -> None:
        if self.gradient is not None:
            self.gradient[rows] = gradient


@with_exact_products
def _compute(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    labels: Tensor | None,
    label_scale: Tensor | None,
    vocab_map: Tensor | None,
    constants: list[float],
    statistics: bool,
    backend: str,
    group: str,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Rows and statistics; the gradient of the rows' sum is written where one is wanted."""
    name = choose(backend, student.device, row_scale.dtype)
    rule, caps = unpack(constants)
    as_they_are = student.dtype == teacher.dtype and vocab_map is None and not group
    if name in ADDS_LABELS and labels is not None and label_scale is not None and as_they_are:
        return _in_place(student, teacher, row_scale, labels, label_scale, rule, statistics, name, gradient)
    terms = Terms(labels, label_scale, vocab_map, *caps, statistics)
    source = _Source(student, teacher, vocab_map, gradient)
    chunk_bytes = CHUNK_BYTES["cpu" if student.device.type == "cpu" else "gpu"]
    return run(source, row_scale, rule, terms, chunk_bytes, backend, gradient is not None, group)


def _in_place(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    labels: Tensor,
    label_scale: Tensor,
    rule: LogitRule,
    with_statistics: bool,
    backend: str,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `_compute`, with labels alone: the rows are read where they are."""
    rows, stats = torch.empty_like(row_scale), row_scale.new_empty(len(row_scale), STATS)
    each = row_scale.new_zeros(0, ROW_STATISTICS)
    if with_statistics:  # before the gradient overwrites the logits
        temperatures = (rule["student_temperature"], rule["teacher_temperature"])
        found = row_statistics.moments(student, teacher, row_scale, temperatures, backend)
        each = row_statistics.statistics(found, row_scale)
    module("logit", backend).logit_fwd(
        student, teacher, row_scale, rows, stats, gradient, labels=labels, label_scale=label_scale, **rule
    )
    return rows, each


@torch.library.custom_op("fastdistil::logit_rows", mutates_args=())
def logit_rows(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    labels: Tensor | None,
    label_scale: Tensor | None,
    vocab_map: Tensor | None,
    constants: list[float],
    statistics: bool,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor]:
    """student (N, V_s), teacher (N, V_t), row_scale (N,) float32 (float64 where either has it), labels (N,) int64,
    label_scale (N,) as row_scale, vocab_map (V_s,) int64, `constants` of logit_terms.pack -> rows (N,) times their
    scales, and statistics (N, ROW_STATISTICS), or none of them."""
    options = (row_scale, labels, label_scale, vocab_map, constants, statistics, backend, group)
    return _compute(student, teacher, *options, gradient=None)


@torch.library.custom_op("fastdistil::logit_total", mutates_args=())
def logit_total(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    labels: Tensor | None,
    label_scale: Tensor | None,
    vocab_map: Tensor | None,
    constants: list[float],
    statistics: bool,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `logit_rows` -> the rows' sum (), statistics, and the sum's gradient in the student's dtype."""
    options = (row_scale, labels, label_scale, vocab_map, constants, statistics, backend, group)
    gradient = new_empty(student, student.shape)
    rows, each = _compute(student, teacher, *options, gradient=gradient)
    return rows.sum(), each, gradient


@torch.library.custom_op("fastdistil::logit_rows_overwrite_", mutates_args={"student"})
def logit_rows_overwrite_(
    student: Tensor,  # (N, V_s): becomes the gradient of the rows' sum
    teacher: Tensor,
    row_scale: Tensor,
    labels: Tensor | None,
    label_scale: Tensor | None,
    vocab_map: Tensor | None,
    constants: list[float],
    statistics: bool,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor]:
    """As `logit_rows`; the gradient is written over the student's logits."""
    options = (row_scale, labels, label_scale, vocab_map, constants, statistics, backend, group)
    return _compute(student, teacher, *options, gradient=student)


@logit_rows.register_fake
@logit_rows_overwrite_.register_fake
def _(student: Tensor, teacher: Tensor, row_scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return row_scale.new_empty(row_scale.shape), row_scale.new_empty(len(row_scale) if rest[4] else 0, ROW_STATISTICS)


@logit_total.register_fake
def _(student: Tensor, teacher: Tensor, row_scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    each = row_scale.new_empty(len(row_scale) if rest[4] else 0, ROW_STATISTICS)
    return row_scale.new_empty(()), each, student.new_empty(student.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]
    ctx.kept = output[2:]


def _backward_rows(ctx: Any, drows: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_double_backward("logit_loss")
    if drows is None:
        return (None,) * 10
    student, teacher, row_scale, labels, label_scale, vocab_map = ctx.saved_tensors
    scale, label_scale = (None if x is None else torch.where(x == 0, 0.0, x * drows) for x in (row_scale, label_scale))
    constants, _statistics, *rest = ctx.options
    found = logit_total(student, teacher, scale, labels, label_scale, vocab_map, constants, False, *rest)
    return found[2], *[None] * 9


def _backward_total(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_double_backward("logit_loss")
    if dtotal is None:
        return (None,) * 10

    def again() -> tuple[Tensor, ...]:
        constants, _statistics, *rest = ctx.options
        found: tuple[Tensor, ...] = logit_total(*ctx.saved_tensors, constants, False, *rest)
        return found[2:]

    return *hand_out(ctx, dtotal, again), *[None] * 9


logit_rows.register_autograd(_backward_rows, setup_context=_setup)
logit_total.register_autograd(_backward_total, setup_context=_setup)
