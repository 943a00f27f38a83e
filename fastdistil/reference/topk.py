"""The divergences from a teacher of K known columns in plain PyTorch: what every other backend is compared with.

Source: docs/losses.md, section 1a. Everything is float64, whatever the dtype of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastdistil.contracts.logit import DIVERGENCES
from fastdistil.contracts.topk import BUCKET, STATS, ZERO, TopkRule
from fastdistil.reference.logit import pair_rows


def _chosen(columns: Tensor, width: int) -> Tensor:
    """(N, V) bool: the teacher names the column. `columns` (N, K) holds V where an entry is not there."""
    rows = columns.shape[0]
    marks = torch.zeros((rows, width + 1), dtype=torch.bool, device=columns.device)
    return marks.scatter(-1, columns.long(), True)[:, :width]


def _pick(x: Tensor, columns: Tensor, missing: float) -> Tensor:
    """x (N, V) at columns (N, K)."""
    return torch.cat((x, x.new_full((x.shape[0], 1), missing)), -1).gather(-1, columns.long())


def _outcomes(a: Tensor, u: Tensor, columns: Tensor, rest: Tensor, rule: TopkRule) -> tuple[Tensor, Tensor, Tensor]:
    """Values (N,), gradients in the K + 1 outcomes' scores (N, K + 1), and rho (N, 1), without any scale."""
    chosen = _chosen(columns, a.shape[-1])
    rho = torch.logsumexp(a.masked_fill(chosen, -torch.inf), -1, keepdim=True)
    student = torch.cat((_pick(a, columns, -torch.inf), rho), -1)
    outside = rest if rule["tail"] == BUCKET else torch.full_like(rest, -torch.inf)
    teacher = torch.cat((u, outside[:, None]), -1)
    d = torch.where(student == teacher, 0.0, student - teacher)
    value, gradient = pair_rows(DIVERGENCES[rule["divergence"]], rule["beta"], student, teacher, d)
    if rule["tail"] == ZERO:
        # The value is about as large as -log(mass): a confident teacher's difference needs all digits of both.
        mass = u.exp().sum(-1)
        value = torch.where(mass == 0, 0.0, mass * (value + torch.where(rest < 0.5, torch.log1p(-rest), mass.log())))
        gradient = torch.where(mass[:, None] == 0, 0.0, mass[:, None] * gradient)
    return value, gradient, rho


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
    """Writes loss (N,), stats (N, STATS + K) and, where given, gradient (N, V).

    values (N, K) float64, columns (N, K) int32 and rest (N,) float64 are what fastdistil.ops.topk_teacher.canonical
    returns. stats: the largest logit outside of the K columns, the factor of e^((z - largest) / T) there, and the K
    gradients.
    """
    counts = (row_scale != 0)[:, None]
    z = torch.where(counts, student, 0.0).double()
    top = z.amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)  # scores are relative to it: an offset of all costs no digits
    value, slope, rho = _outcomes((z - top) / rule["temperature"], values, columns, rest, rule)
    scale = row_scale.double() * rule["value_factor"]
    loss.copy_(torch.where(counts[:, 0], value * scale, 0.0))
    slope = torch.where(counts, slope * (scale / rule["temperature"])[:, None], 0.0)
    largest = z.masked_fill(_chosen(columns, z.shape[-1]), -torch.inf).amax(-1, keepdim=True)
    empty = largest == -torch.inf
    factor = torch.where(empty, 0.0, slope[:, -1:] * torch.exp((largest - top) / rule["temperature"] - rho))
    stats.copy_(torch.cat((torch.where(empty, 0.0, largest), factor, slope[:, :-1]), -1))
    if gradient is not None:
        topk_bwd(student, columns, row_scale, stats, gradient, torch.ones_like(row_scale), False, rule["temperature"])


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
    """Writes gradient (N, V), times dloss (N,); with keep_unit, rows whose dloss is 1 are left alone."""
    counts = (row_scale != 0)[:, None]
    z = torch.where(counts, student, 0.0).double().masked_fill(_chosen(columns, student.shape[-1]), -torch.inf)
    largest, factor, slope = stats[:, :1], stats[:, 1:STATS], stats[:, STATS:]
    found = torch.cat((factor * torch.exp((z - largest) / temperature), z[:, :1]), -1)
    found = found.scatter(-1, columns.long(), slope)[:, :-1]
    result = torch.where(counts, found * dloss[:, None], 0.0).to(gradient.dtype)
    gradient.copy_(torch.where((dloss == 1)[:, None], gradient, result) if keep_unit else result)
