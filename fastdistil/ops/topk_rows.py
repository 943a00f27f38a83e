"""Custom ops of topk_logit_loss with labels, or over logits that may be overwritten: rows in memory, chunk by chunk.

The loop of linear_topk.py; without these options `fastdistil::topk` reads the rows where they are.
"""

from __future__ import annotations

from torch import Tensor

from fastdistil.backends import choose
from fastdistil.backends.memory import new_empty
from fastdistil.ops.linear_topk import run, unpack
from fastdistil.ops.logit_rows import CHUNK_BYTES
from fastdistil.ops.logit_terms import Terms
from fastdistil.ops.pairs import pair
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
    wanted: list[bool],
    rounded: bool,
    overwrite: bool = False,
) -> tuple[Tensor, None, list[Tensor | None]]:
    """Rows, and the gradient of their sum where it is wanted; to `overwrite`, it is written over the student."""
    gradient = None
    if wanted[0]:
        dtype = student.dtype if rounded else row_scale.dtype
        gradient = student if overwrite else new_empty(student, student.shape, dtype)
    name = choose(backend, row_scale.device, row_scale.dtype)
    rule, caps = unpack(constants)
    known = (values, indices, teacher_tail)
    teacher = canonical("topk_logit_loss", *known, row_scale, student.shape[1], rule["tail"], vocab_map)
    chunk_bytes = CHUNK_BYTES["cpu" if student.device.type == "cpu" else "gpu"]
    terms = Terms(labels, label_scale, vocab_map, *caps)
    source = _Source(student, gradient)
    rows = run(source, teacher, row_scale, rule, terms, chunk_bytes, name, gradient is not None)
    return rows, None, [gradient]


# student (N, V), values (N, K), indices (N, K) int32 or int64, teacher_tail (N,) float32 or float64, row_scale (N,)
# float32 (float64 for float64 logits), labels (N,) int64, label_scale (N,) as row_scale, vocab_map (V,) int64,
# `constants` of linear_topk.unpack -> rows (N,) times their scales.
TENSORS = "Tensor student, Tensor values, Tensor indices, Tensor? teacher_tail, Tensor row_scale, Tensor? labels"
TENSORS += ", Tensor? label_scale, Tensor? vocab_map"
topk_rows, topk_total, topk_rows_overwrite_ = pair(
    "topk", "topk_logit_loss", TENSORS, "float[] constants, str backend", _compute, ("student",), overwrites=True
)
