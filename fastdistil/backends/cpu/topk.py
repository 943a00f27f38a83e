"""topk_logit_loss on the CPU: the C++ kernels of csrc/cpu/topk.cpp, on torch's own number of threads."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastdistil import _C
from fastdistil.contracts.topk import TopkRule


def topk_fwd(
    student: Tensor,
    values: Tensor,
    columns: Tensor,
    rest: Tensor,
    row_scale: Tensor,
    loss: Tensor,
    stats: Tensor,
    gradient: Tensor | None,
    **rule: Unpack[TopkRule],
) -> None:
    """As fastdistil.reference.topk.topk_fwd."""
    threads = torch.get_num_threads()
    _C.topk_fwd(student, values, columns, rest, row_scale, loss, stats, gradient, **rule, threads=threads)


def topk_bwd(
    student: Tensor,
    columns: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    gradient: Tensor,
    dloss: Tensor,
    keep_unit: bool,
    temperature: float,
) -> None:
    """As fastdistil.reference.topk.topk_bwd."""
    threads = torch.get_num_threads()
    _C.topk_bwd(student, columns, row_scale, stats, gradient, dloss, keep_unit, temperature, threads=threads)
