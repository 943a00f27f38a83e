"""The constants of one topk_logit_loss call, and the teacher as every backend receives it."""

from __future__ import annotations

from typing import NoReturn, TypedDict

import torch
from torch import Tensor

# The order is the enum Tail of csrc/rules/topk_args.h.
TAILS = ("bucket", "renormalize", "zero")
BUCKET, RENORMALIZE, ZERO = range(3)

# Columns of the row statistics before the K gradients: the largest student logit outside of the K columns, and what
# e^((z - largest) / T) is multiplied by to give the gradient there.
STATS = 2

# Probabilities that sum to more are no rounding error: 16-bit log-probabilities are within 3% each.
LARGEST_MASS = 1.1


class TopkRule(TypedDict):
    divergence: int  # index into fastdistil.ops.logit_rule.DIVERGENCES
    beta: float
    tail: int  # index into TAILS
    temperature: float
    value_factor: float  # T^2, or 1


def canonical(
    function: str, values: Tensor, indices: Tensor, row_scale: Tensor, columns: int, tail: int
) -> tuple[Tensor, Tensor]:
    """values (N, K) as float64 and indices (N, K) as int32, sorted by column; entries that are not there, and all of
    rows that do not count, are (-inf, `columns`) and come last.

    Wrong entries (docs/losses.md, section 1a) raise ValueError on a CPU; on a GPU, where nothing may wait for the
    device, they become NaN, which makes the row's value NaN.
    """
    u = values.double()
    there = (row_scale != 0)[:, None] & (u != -torch.inf)
    inside = (indices >= 0) & (indices < columns)
    outside = there & ~inside
    u = torch.where(there, u, -torch.inf)
    mass = u.exp().sum(-1)
    heavy = mass > LARGEST_MASS if tail != RENORMALIZE else torch.zeros_like(mass, dtype=torch.bool)
    key, order = torch.where(there & inside, indices, columns).to(torch.int32).sort(-1)
    u = torch.where(outside | heavy[:, None], torch.nan, u).gather(-1, order)
    again = (key[:, 1:] == key[:, :-1]) & (key[:, 1:] < columns)
    u[:, 1:].masked_fill_(again, torch.nan)
    if values.device.type == "cpu":
        if bool(outside.any()):
            _refuse_index(function, indices, outside, columns)
        if bool(again.any()):
            row, entry = again.nonzero()[0].tolist()
            column = int(key[row, entry])
            raise ValueError(
                f"{function}: teacher_indices holds {column} twice in row {row}, expected each column once"
            )
        if bool(heavy.any()):
            row = int(heavy.nonzero()[0])
            raise ValueError(
                f"{function}: teacher_values has probabilities that sum to {float(mass[row]):.4g} in row {row}, "
                f"expected log-probabilities (at most 1 in all) with tail={TAILS[tail]!r}; tail='renormalize' takes "
                "any scores"
            )
    return u.contiguous(), key.contiguous()


def _refuse_index(function: str, indices: Tensor, outside: Tensor, columns: int) -> NoReturn:
    row, entry = outside.nonzero()[0].tolist()
    raise ValueError(
        f"{function}: teacher_indices holds {int(indices[row, entry])} in row {row}, entry {entry}, "
        f"expected 0 to {columns - 1}"
    )
