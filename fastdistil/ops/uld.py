"""Custom ops of uld_loss. Rows are read where they are, sorted a few at a time; the gradient comes with the value."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastdistil.backends import choose, module
from fastdistil.backends.memory import new_empty
from fastdistil.ops.families import Found, family


def kernels(backend: str, device: torch.device) -> ModuleType:
    """Of ULD: torch's sorts are all there is, on every device."""
    return module("uld", "reference" if backend == "auto" else choose(backend, device))


def _compute(
    student: Tensor,
    teacher: Tensor,
    student_factor: Tensor | None,
    teacher_factor: Tensor | None,
    row_scale: Tensor,
    constants: list[float],
    backend: str,
    wanted: list[bool],
    rounded: bool,
) -> Found:
    rows = torch.empty_like(row_scale)
    gradient = new_empty(student, student.shape, student.dtype if rounded else row_scale.dtype) if wanted[0] else None
    factor_gradient = torch.empty_like(row_scale) if wanted[1] else None
    kernels(backend, student.device).uld_fwd(
        student, teacher, student_factor, teacher_factor, row_scale, rows, gradient, factor_gradient,
        student_temperature=constants[0], teacher_temperature=constants[1],
    )  # fmt: skip
    return Found(rows, [gradient, factor_gradient])


# student (N, V_s), teacher (N, V_t), student_factor and teacher_factor (N,) floating, row_scale (N,) float32 (float64
# where either side is), constants: both temperatures -> rows (N,) times their scales.
TENSORS = "Tensor student, Tensor teacher, Tensor? student_factor, Tensor? teacher_factor, Tensor row_scale"
uld_rows, uld_total, _ = family(
    "uld", "uld_loss", TENSORS, "float[] constants, str backend", _compute, ("student", "student_factor")
)
