"""Moments of rows of logits on the CPU: csrc/cpu/row_moments.cpp, on torch's own number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil import _C


def row_moments(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    moments: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> None:
    """As fastdistil.reference.row_moments.row_moments."""
    temperatures = (student_temperature, teacher_temperature)
    _C.row_moments(student, teacher, row_scale, moments, *temperatures, threads=torch.get_num_threads())
