"""Custom ops of logit_loss with labels, a vocabulary map, a group or two dtypes.

Labels alone are added where the rows are, by the kernel of the divergence: the student's row is read once more, from
the cache, for its softmax at temperature 1. With one of the others, a chunk of rows at a time is brought into float32
(or float64) buffers, the teacher's in the order of the student's columns, and the gradient is rounded once on its way
out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.backends import choose, module
from fastdistil.backends.memory import new_empty
from fastdistil.contracts.logit import STATS, LogitRule
from fastdistil.ops import row_statistics
from fastdistil.ops.logit_terms import ADDS_LABELS, Terms, run, unpack
from fastdistil.ops.pairs import pair
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
    wanted: list[bool],
    rounded: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Rows and statistics, and the gradient of the rows' sum where it is wanted; to `overwrite`, it is written over the
    student."""
    gradient = None
    if wanted[0]:
        dtype = student.dtype if rounded else row_scale.dtype
        gradient = student if overwrite else new_empty(student, student.shape, dtype)
    name = choose(backend, student.device, row_scale.dtype)
    rule, caps = unpack(constants)
    as_they_are = vocab_map is None and not group and (gradient is None or gradient.dtype == student.dtype)
    as_they_are = as_they_are and student.dtype == teacher.dtype
    if name in ADDS_LABELS and labels is not None and label_scale is not None and as_they_are:
        rows, each = _in_place(student, teacher, row_scale, labels, label_scale, rule, statistics, name, gradient)
        return rows, each, [gradient]
    terms = Terms(labels, label_scale, vocab_map, *caps, statistics)
    source = _Source(student, teacher, vocab_map, gradient)
    chunk_bytes = CHUNK_BYTES["cpu" if student.device.type == "cpu" else "gpu"]
    rows, each = run(source, row_scale, rule, terms, chunk_bytes, backend, gradient is not None, group)
    return rows, each, [gradient]


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


# student (N, V_s), teacher (N, V_t), row_scale (N,) float32 (float64 where either has it), labels (N,) int64,
# label_scale (N,) as row_scale, vocab_map (V_s,) int64, `constants` of logit_terms.pack -> rows (N,) times their
# scales, and statistics (N, ROW_STATISTICS), or none of them.
TENSORS = "Tensor student, Tensor teacher, Tensor row_scale, Tensor? labels, Tensor? label_scale, Tensor? vocab_map"
OPTIONS = "float[] constants, bool statistics, str backend, str group"
logit_rows, logit_total, logit_rows_overwrite_ = pair(
    "logit", "logit_loss", TENSORS, OPTIONS, _compute, gradients=("student",), overwrites=True
)
