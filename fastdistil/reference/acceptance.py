"""The acceptance rate of rows of logits in plain PyTorch (docs/losses.md, section 1e), in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def acceptance(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    levels: Tensor,
    log_acceptance: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> None:
    """Writes ln of the sum of min(p, q) over the columns of student and teacher (N, V), (N,); 0 in rows of scale 0.

    levels (N, 4) in the order of AcceptanceLevel (csrc/rules/acceptance_args.h): log p = (student - level) / T_s - log.
    They come from outside, since q may be normalised over more columns than these, and the columns may be a part."""
    keep = row_scale != 0
    level_s, log_s, level_t, log_t = levels.double().unsqueeze(-1).unbind(1)
    s, t = (torch.where(keep[:, None], x, 0).double() for x in (student, teacher))
    lower = torch.minimum((s - level_s) / student_temperature - log_s, (t - level_t) / teacher_temperature - log_t)
    log_acceptance.copy_(torch.where(keep, lower.logsumexp(-1), 0.0))
