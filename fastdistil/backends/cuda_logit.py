"""logit_loss on NVIDIA GPUs: the CUDA C++ kernels of kernels/cuda/logit.cu, on torch's current stream."""

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
    """As fastdistil.backends.cpu_logit.logit_fwd, for CUDA tensors."""
    with torch.cuda.device(student.device):
        _C.logit_cuda(
            student, teacher, row_scale, loss, stats, gradient, divergence, beta,
            student_temperature, teacher_temperature, value_factor, torch.cuda.current_stream().cuda_stream,
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
    """As fastdistil.backends.cpu_logit.logit_bwd, for CUDA tensors."""
    with torch.cuda.device(student.device):
        _C.logit_cuda(
            student, teacher, row_scale, None, stats, gradient, divergence, beta,
            student_temperature, teacher_temperature, value_factor, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
