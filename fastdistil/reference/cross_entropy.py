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
    whole: Tensor | None = None,
) -> None:
    """Adds row_scale (N,) times the cross entropy of logits (N, V) with labels (N,) to loss (N,), and its gradient in
    the logits to gradient (N, V). Rows of scale 0 may hold anything, their label too. All but the labels (int64) have
    one dtype, float32 or float64.

    With whole (N, 2), of rows whose other columns are elsewhere the largest logit m and the sum of exp(z - m) over all
    columns but that one, a label outside [0, V) is not here: such a row's loss gets nothing, the others' m minus the
    label's logit, to which log1p of the sum is still to be added; the gradient is that of these columns.
    """
    keep = row_scale != 0
    z = torch.where(keep[:, None], logits, 0.0)
    here = keep if whole is None else keep & (labels >= 0) & (labels < z.shape[1])
    column = torch.where(here, labels, 0)[:, None]
    if whole is None:
        largest, top = z.max(-1, keepdim=True)
        others = (z - largest).exp().scatter(1, top, 0.0).sum(-1, keepdim=True)
        others += largest - largest  # NaN of a row without any number
    else:
        largest, others = (x[:, None] for x in torch.where(keep[:, None], whole, 0.0).unbind(1))
    below = torch.where(here, (largest - z.gather(1, column))[:, 0], 0.0)
    log_sum = others.log1p()[:, 0] if whole is None else 0.0
    loss += torch.where(keep, row_scale * (below + log_sum), 0.0)
    if gradient is not None:
        p = (z - largest).exp() / (1.0 + others)
        own = p.gather(1, column)
        # Of a student that is sure of its label, p - 1 is what the other columns have.
        less_one = torch.where(z.gather(1, column) == largest, -others / (1.0 + others), own - 1.0)
        p.scatter_(1, column, torch.where(here[:, None], less_one, own))
        gradient += torch.where(keep, row_scale, 0.0)[:, None] * p
