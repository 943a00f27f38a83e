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
    sum e^(a - max a), sum e^(a - max a) (a - max a), the same of b, sum e^(b - max b) (a - max a), and the first column
    of each maximum.
    """
    keep = row_scale != 0

    def of(x: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = torch.where(keep[:, None], x, 0.0).to(moments.dtype) / temperature
        top, column = z.max(-1)
        centred = z - torch.where(top == -torch.inf, 0.0, top)[:, None]
        return top, column, centred, centred.exp()

    def moment(weight: Tensor, x: Tensor) -> Tensor:
        return torch.where(weight == 0, 0.0, weight * x).sum(-1)

    (max_a, top_a, a, p), (max_b, top_b, b, q) = of(student, student_temperature), of(teacher, teacher_temperature)
    found = (max_a, p.sum(-1), moment(p, a), max_b, q.sum(-1), moment(q, b), moment(q, a), top_a, top_b)
    moments.copy_(torch.where(keep[:, None], torch.stack([x.to(moments.dtype) for x in found], -1), 0.0))
