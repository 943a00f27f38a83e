"""Custom ops of logit_loss.

Rows are read where they are, and the gradient for an incoming one of 1 is written in the same pass; labels are added
by the kernel of the divergence, which reads the student's row once more, from the cache, for its softmax at temperature
1. With a vocabulary map, a group or two dtypes, a chunk of rows at a time is brought into float32 (or float64) buffers,
the teacher's in the order of the student's columns, and the gradient is rounded once on its way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistil.backends import choose, module
from fastdistil.backends.memory import new_empty
from fastdistil.contracts.logit import STATS, LogitRule
from fastdistil.ops import acceptance, row_statistics
from fastdistil.ops.families import Found, State, family
from fastdistil.ops.logit_terms import ADDS_LABELS, Terms, composed, run, unpack
from fastdistil.ops.precision import with_exact_products
from fastdistil.ops.row_statistics import ROW_STATISTICS

# Bytes of the two buffers: on a CPU what a level 3 cache may hold, on a GPU enough rows to fill it (not yet tuned).
CHUNK_BYTES = {"cpu": 16 << 20, "gpu": 1 << 30}


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
) -> Found:
    gradient = None
    if wanted[0]:
        dtype = student.dtype if rounded else row_scale.dtype
        gradient = student if overwrite else new_empty(student, student.shape, dtype)
    name = choose(backend, student.device, row_scale.dtype)
    rule, caps, renormalize = unpack(constants)
    in_place = _reads_in_place(student, teacher, vocab_map, constants, group)
    in_place = in_place and (label_scale is None or name in ADDS_LABELS)
    if not in_place or (gradient is not None and gradient.dtype != student.dtype):
        terms = Terms(labels, label_scale, vocab_map, *caps, statistics, renormalize)
        source = _Source(student, teacher, vocab_map if renormalize else None, gradient)
        rows, each = _in_chunks(row_scale, source, terms, rule, backend, group)
        return Found(rows, [gradient], each, (row_scale.new_empty(0, STATS),))
    each = row_scale.new_empty(0, ROW_STATISTICS)
    if statistics:  # before the gradient overwrites the logits
        temperatures = (rule["student_temperature"], rule["teacher_temperature"])
        found = row_statistics.moments(student, teacher, row_scale, temperatures, backend)
        levels = acceptance.levels(student, teacher, found, found)
        log_alpha = acceptance.log_acceptance(student, teacher, row_scale, levels, temperatures, backend)
        each = row_statistics.statistics(found, row_scale, log_alpha)
    rows, stats = torch.empty_like(row_scale), row_scale.new_empty(len(row_scale), STATS)
    more: dict[str, Tensor] = {}
    if label_scale is not None:
        more = {"labels": teacher.argmax(1) if labels is None else labels, "label_scale": label_scale}
    module("logit", name).logit_fwd(student, teacher, row_scale, rows, stats, gradient, **more, **rule)
    return Found(rows, [gradient], each, (stats if label_scale is None else row_scale.new_empty(0, STATS),))


def _reads_in_place(
    student: Tensor, teacher: Tensor, vocab_map: Tensor | None, constants: list[float], group: str
) -> bool:
    return vocab_map is None and not group and student.dtype == teacher.dtype and not composed(unpack(constants)[0])


class _Source:
    """Rows of logits in memory; without a map the teacher's are as they come."""

    def __init__(self, student: Tensor, teacher: Tensor, vocab_map: Tensor | None, gradient: Tensor | None) -> None:
        self.student, self.teacher = student, teacher
        self.partners = None if vocab_map is None else vocab_map.clamp(min=0)
        self.columns, self.teacher_columns = student.shape[1], teacher.shape[1]
        self.gradient = gradient  # may be the student itself: a chunk has been read before it is written

    def fill(self, rows: slice, student: Tensor, teacher: Tensor) -> None:
        student.copy_(self.student[rows])
        there = self.teacher[rows]
        teacher.copy_(there if self.partners is None else there[:, self.partners])

    def back(self, rows: slice, gradient: Tensor) -> None:
        if self.gradient is not None:
            self.gradient[rows] = gradient


@with_exact_products
def _in_chunks(
    row_scale: Tensor, source: _Source, terms: Terms, rule: LogitRule, backend: str, group: str
) -> tuple[Tensor, Tensor]:
    size = CHUNK_BYTES["cpu" if row_scale.device.type == "cpu" else "gpu"]
    return run(source, row_scale, rule, terms, size, backend, source.gradient is not None, group)


def _fake_state(
    student: Tensor, teacher: Tensor, row_scale: Tensor, _: Any, label_scale: Tensor | None, vocab_map: Tensor | None,
    constants: list[float], statistics: Any, backend: Any, group: str,
) -> tuple[Tensor]:  # fmt: skip
    there = label_scale is None and _reads_in_place(student, teacher, vocab_map, constants, group)
    return (row_scale.new_empty(row_scale.shape[0] if there else 0, STATS),)


def _back(
    tensors: Sequence[Any],
    options: Sequence[Any],
    state: Sequence[Tensor],
    gradient: Tensor,
    dloss: Tensor,
    keep_unit: bool,
) -> None:
    student, teacher, row_scale, *_ = tensors
    constants, _, backend, _ = options
    kernels = module("logit", choose(backend, student.device, row_scale.dtype))
    kernels.logit_bwd(student, teacher, row_scale, *state, gradient, dloss, keep_unit, **unpack(constants)[0])


# student (N, V_s), teacher (N, V_t), row_scale (N,) float32 (float64 where either has it), labels (N,) int64,
# label_scale (N,) as row_scale, vocab_map (V_s,) int64, `constants` of logit_terms.pack -> rows (N,) times their
# scales, and statistics (N, ROW_STATISTICS), or none of them.
TENSORS = "Tensor student, Tensor teacher, Tensor row_scale, Tensor? labels, Tensor? label_scale, Tensor? vocab_map"
OPTIONS = "float[] constants, bool statistics, str backend, str group"
logit_rows, logit_total, logit_rows_overwrite_ = family(
    "logit", "logit_loss", TENSORS, OPTIONS, _compute, ("student",), State(1, _fake_state, _back), overwrites=True
)
