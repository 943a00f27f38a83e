"""Custom ops of topk_logit_loss.

Rows are read where they are: a pass leaves what the gradient is made of (one factor for the columns that the teacher
does not name and one number for each that it does), so that a second backward takes one exponential per column. With
labels, a vocabulary map, or over logits that may be overwritten: chunk by chunk, by the loop of linear_topk.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistil.backends import choose, module
from fastdistil.backends.memory import new_empty
from fastdistil.contracts.topk import STATS
from fastdistil.ops.families import Found, State, family
from fastdistil.ops.linear_topk import run, unpack
from fastdistil.ops.logit import CHUNK_BYTES
from fastdistil.ops.logit_terms import Terms
from fastdistil.ops.topk_teacher import canonical


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
    wanted: list[bool],
    rounded: bool,
    overwrite: bool = False,
) -> Found:
    gradient = None
    if wanted[0]:
        dtype = student.dtype if rounded else row_scale.dtype
        gradient = student if overwrite else new_empty(student, student.shape, dtype)
    name = choose(backend, student.device, row_scale.dtype)
    rule, caps = unpack(constants)
    known = (values, indices, teacher_tail)
    teacher = canonical("topk_logit_loss", *known, row_scale, student.shape[1], rule["tail"], vocab_map)
    in_place = labels is None and vocab_map is None and not overwrite
    if not in_place or (gradient is not None and gradient.dtype != student.dtype):
        terms = Terms(labels, label_scale, vocab_map, *caps)
        size = CHUNK_BYTES["cpu" if student.device.type == "cpu" else "gpu"]
        rows = run(_Source(student, gradient), teacher, row_scale, rule, terms, size, name, gradient is not None)
        return Found(rows, [gradient], state=_new_state(values, 0))
    rows, state, (u, columns, rest) = torch.empty_like(row_scale), _new_state(values, len(values)), teacher
    module("topk", name).topk_fwd(student, u, columns, rest, row_scale, rows, state[1], gradient, **rule)
    return Found(rows, [gradient], state=(columns, state[1]))


class _Source:
    """Rows of logits in memory; the gradient may be the same memory: a chunk has been read before it is written."""

    def __init__(self, student: Tensor, gradient: Tensor | None) -> None:
        self.student, self.columns, self.gradient = student, student.shape[1], gradient

    def logits(self, rows: slice, out: Tensor) -> None:
        out.copy_(self.student[rows])

    def back(self, rows: slice, gradient: Tensor) -> None:
        if self.gradient is not None:
            self.gradient[rows] = gradient


def _new_state(values: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """columns (rows, K) int32, ascending, and stats (rows, STATS + K) float64."""
    k = values.shape[1]
    return values.new_empty((rows, k), dtype=torch.int32), values.new_empty((rows, STATS + k), dtype=torch.float64)


def _fake_state(
    student: Tensor,
    values: Tensor,
    indices: Any,
    tail: Any,
    scale: Any,
    labels: Any,
    _: Any,
    vocab_map: Any,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    return _new_state(values, values.shape[0] if labels is None and vocab_map is None else 0)


def _back(
    tensors: Sequence[Any],
    options: Sequence[Any],
    state: Sequence[Tensor],
    gradient: Tensor,
    dloss: Tensor,
    keep_unit: bool,
) -> None:
    student, row_scale, (constants, backend) = tensors[0], tensors[4], options
    columns, stats = state
    temperature = unpack(constants)[0]["temperature"]
    kernels = module("topk", choose(backend, student.device, row_scale.dtype))
    kernels.topk_bwd(student, columns, row_scale, stats, gradient, dloss, keep_unit, temperature)


# student (N, V), values (N, K), indices (N, K) int32 or int64, teacher_tail (N,) float32 or float64, row_scale (N,)
# float32 (float64 for float64 logits), labels (N,) int64, label_scale (N,) as row_scale, vocab_map (V,) int64,
# `constants` of linear_topk.unpack -> rows (N,) times their scales.
TENSORS = "Tensor student, Tensor values, Tensor indices, Tensor? teacher_tail, Tensor row_scale, Tensor? labels"
TENSORS += ", Tensor? label_scale, Tensor? vocab_map"
topk_rows, topk_total, topk_rows_overwrite_ = family(
    "topk", "topk_logit_loss", TENSORS, "float[] constants, str backend", _compute, ("student",),
    State(2, _fake_state, _back), overwrites=True,
)  # fmt: skip
