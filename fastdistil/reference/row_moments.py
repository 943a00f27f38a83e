"""Moments of rows of logits in plain PyTorch, which entropies and cross entropy are made of (docs/losses.md, 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def row_moments(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    moments: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> None:
    """Writes moments (N, 9) of student and teacher (N, V), in row_scale's dtype; 0 in rows of scale 0.

    With a = student / T_s and b = teacher / T_t, in the order of RowMoment (csrc/rules/row_moments_args.h): max(a),
    sum e^(a - max a) - 1, sum e^(a - max a) (a - max a), the same of b, sum e^(b - max b) (a - max a), and the first
    column of each maximum. The 1 is that column's own: where it is far above the rest, the whole sum has no digits of
    the others.
    """
    keep = row_scale != 0

    def moment(weight: Tensor, x: Tensor) -> Tensor:
        return torch.where(weight == 0, 0.0, weight * x).sum(-1)

    def of(x: Tensor, temperature: float) -> tuple[Tensor, ...]:
        z = torch.where(keep[:, None], x, 0.0).to(moments.dtype) / temperature
        top, column = z.max(-1)
        centred = z - torch.where(top == -torch.inf, 0.0, top)[:, None]
        weight = centred.exp()
        others = weight.scatter_add(1, column[:, None], torch.full_like(top, -1.0)[:, None]).sum(-1)
        return top, others, moment(weight, centred), column, centred, weight

    *found_a, top_a, a, _ = of(student, student_temperature)
    *found_b, top_b, _, q = of(teacher, teacher_temperature)
    found = (*found_a, *found_b, moment(q, a), top_a, top_b)
    moments.copy_(torch.where(keep[:, None], torch.stack([x.to(moments.dtype) for x in found], -1), 0.0))
