"""Cross entropy on the CPU: csrc/cpu/cross_entropy.cpp, on torch's own number of threads."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil import _C


def cross_entropy_rows(
    logits: Tensor,
    labels: Tensor,
    row_scale: Tensor,
    loss: Tensor,
    gradient: Tensor | None,
    whole: Tensor | None = None,
) -> None:
    """As fastdistil.reference.cross_entropy.cross_entropy_rows."""
    threads = torch.get_num_threads()
    _C.cross_entropy_rows(logits, labels.contiguous(), row_scale, loss, gradient, whole, threads=threads)
