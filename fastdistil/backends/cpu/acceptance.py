"""The acceptance of rows of logits on the CPU: csrc/cpu/acceptance.cpp, on torch's own number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil import _C


def acceptance(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    levels: Tensor,
    log_acceptance: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> None:
    """As fastdistil.reference.acceptance.acceptance."""
    temperatures = (student_temperature, teacher_temperature)
    threads = torch.get_num_threads()
    _C.acceptance(student, teacher, row_scale, levels, log_acceptance, *temperatures, threads=threads)
