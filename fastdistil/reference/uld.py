"""Universal logit distillation in plain PyTorch, a few rows at a time. No other backend has it: its time is that of two
sorts, which are torch's.

Source: docs/losses.md, section 1b. Everything behind the sorts is float64, whatever the dtype of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Memory of the rows at hand; on a CPU what a level 3 cache may hold.
WORK_BYTES = {"cpu": 16 << 20, "gpu": 256 << 20}
# Per column of the wider side: both sorted rows in their own dtype with int64 positions, and five rows of float64.
COLUMN_BYTES = 2 * (8 + 8) + 5 * 8


def uld_fwd(
    student: Tensor,
    teacher: Tensor,
    student_factor: Tensor | None,
    teacher_factor: Tensor | None,
    row_scale: Tensor,
    loss: Tensor,
    gradient: Tensor | None,
    factor_gradient: Tensor | None,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> None:
    """Writes loss (N,), times row_scale (N,), and where given the gradient of its sum in student (N, V_s), which may be
    student itself, and in student_factor (N,). teacher (N, V_t); factors (N,) or None for 1."""
    width = max(student.shape[1], teacher.shape[1])
    step = max(1, WORK_BYTES["cpu" if student.device.type == "cpu" else "gpu"] // (width * COLUMN_BYTES))
    for start in range(0, len(row_scale), step):
        rows = slice(start, start + step)
        scale = row_scale[rows, None].double()
        counts = scale != 0
        scores, order = student[rows].sort(stable=True, dim=-1, descending=True)
        p = _probabilities(scores, student_temperature)
        q = _probabilities(teacher[rows].sort(-1, descending=True).values, teacher_temperature)
        if teacher_factor is not None:
            q *= teacher_factor[rows, None]
        value, slope = _distance(p if student_factor is None else p * student_factor[rows, None], q)
        loss[rows] = torch.where(counts, scale * value, 0.0)[:, 0]
        scale = scale + 0 * value  # the sign of a NaN is 0, and would hide it
        if factor_gradient is not None:
            found = scale * (p * slope).sum(-1, keepdim=True)
            factor_gradient[rows] = torch.where(counts, found, 0.0)[:, 0]
        if gradient is None:
            continue
        slope -= slope[:, :1].clone()  # relative to the largest column's: a confident row keeps its gradient there
        slope -= (p * slope).sum(-1, keepdim=True)
        factor = scale / student_temperature
        slope *= p * (factor if student_factor is None else factor * student_factor[rows, None])
        gradient[rows] = torch.where(counts, p.scatter_(-1, order, slope), 0.0).to(gradient.dtype)


def _probabilities(scores: Tensor, temperature: float) -> Tensor:
    """softmax(scores / temperature) of rows in descending order, float64."""
    p = scores.double()
    p = p.sub(p[:, :1]).div_(temperature).exp_()
    return p.div_(p.sum(-1, keepdim=True))


def _distance(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of |p - q| (n, 1) with zeros behind the shorter rows, and its slopes in p, 0 where both are equal."""
    columns, others = p.shape[1], q.shape[1]
    if columns < others:
        difference = p - q[:, :columns]
        return difference.abs().sum(-1, keepdim=True) + q[:, columns:].abs().sum(-1, keepdim=True), difference.sign()
    difference = torch.cat((p[:, :others] - q, p[:, others:]), -1)
    return difference.abs().sum(-1, keepdim=True), difference.sign()
