"""logit_loss on NVIDIA GPUs: the CUDA C++ kernels of kernels/cuda/logit.cu, on torch's current stream."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastdistil import _C
from fastdistil.contracts.logit import PHASE_ALL, LogitRule


def logit_fwd(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    loss: Tensor,
    stats: Tensor,
    gradient: Tensor | None,
    phase: int = PHASE_ALL,
    difference: bool = False,
    **rule: Unpack[LogitRule],
) -> None:
    """As fastdistil.backends.cpu.logit.logit_fwd."""
    with torch.cuda.device(student.device):
        _C.logit_fwd_cuda(
            student,
            teacher,
            row_scale,
            loss,
            stats,
            gradient,
            **rule,
            stream=torch.cuda.current_stream(student.device).cuda_stream,
            phase=phase,
            difference=difference,
        )


def logit_bwd(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    gradient: Tensor,
    dloss: Tensor,
    keep_unit: bool,
    difference: bool = False,
    **rule: Unpack[LogitRule],
) -> None:
    """Writes gradient (N, V), times dloss (N,), from what logit_fwd left in stats; it may be the student's memory.

    With keep_unit, gradient holds what a dloss of 1 gives: only the other rows are touched.
    """
    with torch.cuda.device(student.device):
        _C.logit_bwd_cuda(
            student,
            teacher,
            row_scale,
            stats,
            gradient,
            dloss,
            keep_unit,
            **rule,
            stream=torch.cuda.current_stream(student.device).cuda_stream,
            difference=difference,
        )
