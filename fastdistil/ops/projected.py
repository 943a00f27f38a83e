"""Custom ops of projected_logit_loss: a teacher's probabilities, brought into the student's vocabulary by a sparse
matrix, are the teacher of logit_loss's row op.

Chunk by chunk, in float64: the logarithm of a sum of probabilities, rounded to float32, would have lost its difference
from the student's near convergence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastdistil.backends import choose
from fastdistil.backends.memory import new_empty
from fastdistil.contracts.logit import LogitRule
from fastdistil.ops.families import Found, family
from fastdistil.ops.logit import CHUNK_BYTES
from fastdistil.ops.logit_terms import Terms, run, unpack


class Projection:
    """M (V_s, V_t) in compressed rows; teacher's logits -> the logarithms of M softmax."""

    def __init__(
        self, offsets: Tensor, columns: Tensor, weights: Tensor, teacher_columns: int, temperature: float
    ) -> None:
        self.offsets, self.columns, self.weights, self.temperature = offsets, columns, weights, temperature
        self.teacher_columns = teacher_columns

    @property
    def vocab_map(self) -> Tensor:
        """(V_s,): -1 for student columns that nothing is mapped to, as `Terms` leaves them out."""
        return torch.where(self.offsets[1:] > self.offsets[:-1], 0, -1)

    def bytes_per_row(self, itemsize: int) -> int:
        """Beside what is handed in: the entries' logits and probabilities, and the sums with where they begin."""
        return len(self.columns) * (itemsize + 2 * 8) + len(self.offsets) * 2 * 8

    def logarithms(self, logits: Tensor, out: Tensor) -> None:
        """out (n, V_s) float64 = log M e^(logits / T), but for a constant of each row, from logits (n, V_t)."""
        scores = logits.index_select(1, self.columns).double().div_(self.temperature)
        scores -= scores.amax(-1, keepdim=True)  # over the columns that M reads: others may be far larger
        shares = scores.exp_().mul_(self.weights)
        offsets = self.offsets.expand(len(logits), -1).contiguous()
        torch.log(torch.segment_reduce(shares, "sum", offsets=offsets, axis=1, unsafe=True, initial=0), out=out)


class Source(Protocol):
    columns: int  # V_s
    teacher_columns: int  # V_t
    projection: Projection

    def teacher_logits(self, rows: slice) -> Tensor:
        """Of `rows` (n, V_t), in any dtype."""

    def fill(self, rows: slice, student: Tensor, teacher: Tensor) -> None:
        """Writes the student's logits of `rows` and the logarithms of the projected teacher (n, V_s)."""

    def back(self, rows: slice, gradient: Tensor) -> None:
        """Takes the gradient of the student's logits (n, V_s)."""


class _Rows:
    """Rows of logits in memory."""

    def __init__(self, student: Tensor, teacher: Tensor, projection: Projection, gradient: Tensor | None) -> None:
        self.student, self.teacher, self.projection, self.gradient = student, teacher, projection, gradient
        self.columns, self.teacher_columns = student.shape[1], teacher.shape[1]

    def teacher_logits(self, rows: slice) -> Tensor:
        return self.teacher[rows]

    def fill(self, rows: slice, student: Tensor, teacher: Tensor) -> None:
        student.copy_(self.student[rows])
        self.projection.logarithms(self.teacher[rows], teacher)

    def back(self, rows: slice, gradient: Tensor) -> None:
        if self.gradient is not None:
            self.gradient[rows] = gradient


def run_projected(
    source: Source,
    row_scale: Tensor,
    rule: LogitRule,
    terms: Terms,
    renormalize: bool,
    bytes_per_row: int,
    chunk_bytes: int,
    backend: str,
    need_gradient: bool,
) -> Tensor:
    """Rows (N,) times their scales, which are row_scale's (N,) and those of `terms`; bytes_per_row: what a row takes
    beside the two float64 buffers. The rule's temperatures are those of both models."""
    scale, mass = row_scale.double(), None
    if not renormalize:
        # With Q = sum(M q), sum_v q_v log(q_v / p_v) is Q KL(q / Q || p) + Q log Q, its gradient Q times the former's.
        mass = mass_of(source.teacher_logits, len(scale), source.projection, chunk_bytes)
        scale = torch.where(scale == 0, 0.0, scale * mass)
    pair = 2 * 8 * source.columns  # all that `run` knows of
    within = max(1, chunk_bytes * pair // (pair + bytes_per_row))
    rows, _ = run(source, scale, {**rule, "teacher_temperature": 1.0}, terms, within, backend, need_gradient, "")
    if mass is not None:
        rows += torch.where(scale == 0, 0.0, scale * mass.log()) * rule["value_factor"]
    return rows.to(row_scale.dtype)


def mass_of(logits: Callable[[slice], Tensor], count: int, projection: Projection, chunk_bytes: int) -> Tensor:
    """sum(M q) (N,) float64 of q = softmax(logits / T), whose rows `logits` hands out."""
    sums = projection.weights.new_zeros(projection.teacher_columns)
    sums.scatter_add_(0, projection.columns, projection.weights)
    found = sums.new_empty(count)
    step = max(1, chunk_bytes // (4 * 8 * len(sums)))
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        found[rows] = torch.softmax(logits(rows).double() / projection.temperature, -1) @ sums
    return found


def terms_of(
    labels: Tensor | None, label_scale: Tensor | None, projection: Projection, scale: float, cap: float
) -> Terms:
    """Of float64 rows: student columns that nothing is mapped to are left out on both sides."""
    wide = None if label_scale is None else label_scale.double()
    return Terms(labels, wide, projection.vocab_map, scale, cap)


def default_chunk_bytes(device: torch.device) -> int:
    return CHUNK_BYTES["cpu" if device.type == "cpu" else "gpu"]


def _compute(
    student: Tensor,
    teacher: Tensor,
    offsets: Tensor,
    columns: Tensor,
    weights: Tensor,
    row_scale: Tensor,
    labels: Tensor | None,
    label_scale: Tensor | None,
    constants: list[float],
    renormalize: bool,
    backend: str,
    wanted: list[bool],
    rounded: bool,
) -> Found:
    choose(backend, student.device, torch.float64)  # raises where it cannot
    gradient = new_empty(student, student.shape, student.dtype if rounded else row_scale.dtype) if wanted[0] else None
    rule, *_ = unpack(constants)
    projection = Projection(offsets, columns, weights, teacher.shape[1], rule["teacher_temperature"])
    rows = run_projected(
        _Rows(student, teacher, projection, gradient), row_scale, rule,
        terms_of(labels, label_scale, projection, 1.0, 0.0), renormalize,
        projection.bytes_per_row(teacher.dtype.itemsize), default_chunk_bytes(student.device), backend, wanted[0],
    )  # fmt: skip
    return Found(rows, [gradient])


# student (N, V_s), teacher (N, V_t), offsets (V_s + 1,), columns and weights (entries,) of M, row_scale (N,) float32
# (float64 where either side is), labels (N,) int64, label_scale (N,) as row_scale, `constants` of logit_terms.pack ->
# rows (N,) times their scales.
TENSORS = "Tensor student, Tensor teacher, Tensor offsets, Tensor columns, Tensor weights, Tensor row_scale"
TENSORS += ", Tensor? labels, Tensor? label_scale"
OPTIONS = "float[] constants, bool renormalize, str backend"
projected_rows, projected_total, _ = family(
    "projected", "projected_logit_loss", TENSORS, OPTIONS, _compute, ("student",)
)
