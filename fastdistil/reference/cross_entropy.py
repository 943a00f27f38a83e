"""Cross entropy of rows of logits with their labels, in plain PyTorch (docs/losses.md, section 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_rows(
    logits: Tensor, labels: Tensor, row_scale: Tensor, loss: Tensor, gradient: Tensor | None
) -> None:
    """Adds row_scale (N,) times the cross entropy of logits (N, V) with labels (N,) to loss (N,), and its gradient in
    the logits to gradient (N, V). Rows of scale 0 may hold anything, their label too. All but the labels (int64) have
    one dtype, float32 or float64.
    """
    keep = row_scale != 0
    z = torch.where(keep[:, None], logits, 0.0)
    column = torch.where(keep, labels, 0)[:, None]
    log_p = z.log_softmax(-1)
    loss -= torch.where(keep, row_scale * log_p.gather(1, column)[:, 0], 0.0)
    if gradient is not None:
        gradient += row_scale[:, None] * log_p.exp()
        gradient.scatter_add_(1, column, -row_scale[:, None])
