"""What student_topk_logit_loss reads of the teacher: log-probabilities at chosen columns and of all others."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.ops.logit import CHUNK_BYTES

# float64 copies of a row: the scores, those without the chosen columns, and what logsumexp makes of each.
BUFFERS = 4


@torch.library.custom_op("fastdistil::log_probabilities_at", mutates_args=())
def log_probabilities_at(teacher: Tensor, columns: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """teacher (N, V), columns (N, K) int64 -> logarithms of softmax(teacher / temperature) at the columns (N, K) and of
    the probability of all other columns (N,), float64. log(1 - sum) would have few digits of a small rest."""
    values = columns.new_empty(columns.shape, dtype=torch.float64)
    rest = columns.new_empty(len(columns), dtype=torch.float64)
    size = CHUNK_BYTES["cpu" if teacher.device.type == "cpu" else "gpu"]
    step = max(1, size // (BUFFERS * 8 * teacher.shape[1]))
    for start in range(0, len(columns), step):
        rows = slice(start, start + step)
        scores = teacher[rows].double() / temperature
        total = scores.logsumexp(-1, keepdim=True)
        values[rows] = scores.gather(-1, columns[rows]) - total
        rest[rows] = scores.scatter_(-1, columns[rows], -torch.inf).logsumexp(-1) - total[:, 0]
    return values, rest


@log_probabilities_at.register_fake
def _(teacher: Tensor, columns: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    wide = torch.float64
    return columns.new_empty(columns.shape, dtype=wide), columns.new_empty(columns.shape[0], dtype=wide)
