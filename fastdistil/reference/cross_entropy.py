"""Cross entropy of rows of logits with their labels, in plain PyTorch (docs/losses.md, section 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_rows(
    logits: Tensor,
    labels: Tensor,
    row_scale: Tensor,
    loss: Tensor,
    gradient: Tensor | None,
    lse: Tensor | None = None,
) -> None:
    """Adds row_scale (N,) times the cross entropy of logits (N, V) with labels (N,) to loss (N,), and its gradient in
    the logits to gradient (N, V). Rows of scale 0 may hold anything, their label too. All but the labels (int64) have
    one dtype, float32 or float64.

    With lse (N,), the logsumexp of rows whose other columns are elsewhere, a label outside [0, V) is not here: such a
    row's loss gets nothing, the others' minus the label's logit; the gradient is that of these columns.
    """
    keep = row_scale != 0
    z = torch.where(keep[:, None], logits, 0.0)
    here = keep if lse is None else keep & (labels >= 0) & (labels < z.shape[1])
    column = torch.where(here, labels, 0)[:, None]
    total = z.logsumexp(-1) if lse is None else torch.where(keep, lse, 0.0)
    at_label = torch.where(here, z.gather(1, column)[:, 0], 0.0)
    loss += torch.where(keep, row_scale * ((total if lse is None else 0.0) - at_label), 0.0)
    if gradient is not None:
        gradient += row_scale[:, None] * (z - total[:, None]).exp()
        gradient.scatter_add_(1, column, -torch.where(here, row_scale, 0.0)[:, None])
