"""logit_loss on the CPU: the C++ kernels of csrc/cpu/logit.cpp, on torch's own number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil import _C


def logit_fwd(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    loss: Tensor,
    stats: Tensor,
    gradient: Tensor | None,
    *,
    divergence: int,
    beta: float,
    student_temperature: float,
    teacher_temperature: float,
    value_factor: float,
) -> None:
    """Writes loss (N,), stats (N, 5) and, where given, gradient (N, V) = d sum(loss) / d student."""
    _C.logit(
        student, teacher, row_scale, loss, stats, gradient, divergence, beta,
        student_temperature, teacher_temperature, value_factor, torch.get_num_threads(),
    )  # fmt: skip


def logit_bwd(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    gradient: Tensor,
    *,
    divergence: int,
    beta: float,
    student_temperature: float,
    teacher_temperature: float,
    value_factor: float,
) -> None:
    """Writes gradient (N, V) from the statistics that logit_fwd left; gradient may be the student's own memory."""
    _C.logit(
        student, teacher, row_scale, None, stats, gradient, divergence, beta,
        student_temperature, teacher_temperature, value_factor, torch.get_num_threads(),
    )  # fmt: skip
