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
    function: str,
    values: Tensor,
    indices: Tensor,
    row_scale: Tensor,
    columns: int,
    tail: int,
    vocab_map: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """values (N, K) as float64 and indices (N, K) as int32, sorted by column; entries that are not there, and all of
    rows that do not count, are (-inf, `columns`) and come last.

    Wrong entries (docs/losses.md, section 1a) raise ValueError on a CPU; on a GPU, where nothing may wait for the
    device, they become NaN, which makes the row's value NaN. vocab_map (columns,): as in `through_map`.
    """
    u = values.double()
    u = torch.where((row_scale != 0)[:, None], u, -torch.inf)
    mass = u.exp().sum(-1)
    heavy = mass > LARGEST_MASS if tail != RENORMALIZE else torch.zeros_like(mass, dtype=torch.bool)
    if vocab_map is not None:
        u, indices = through_map(u, indices, vocab_map, tail)
    there = u != -torch.inf
    inside = (indices >= 0) & (indices < columns)
    outside = there & ~inside
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


def through_map(u: Tensor, indices: Tensor, vocab_map: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities u (N, K) float64 and the student's columns (N, K) of a teacher whose entries are at its own.

    vocab_map (V,) int64: the teacher's column of each of the student's, -1 for none, none of them twice. Entries
    without a partner are not there (-inf), and the others' probabilities are divided by what those leave of 1 (not for
    "renormalize", which does so itself). Negative indices stay, to be refused, and rows with a NaN stay NaN."""
    partner, column = vocab_map.sort()
    wanted = indices.long().contiguous()
    at = torch.searchsorted(partner, wanted).clamp_max(len(partner) - 1)
    found = (partner[at] == wanted) & (wanted >= 0)
    known = found | (wanted < 0)
    broken = u.isnan().any(-1, keepdim=True)
    if tail != RENORMALIZE:
        lost = torch.where(known, -torch.inf, u)
        top, where = lost.max(-1, keepdim=True)
        left = -torch.expm1(top) - lost.exp().scatter(-1, where, 0.0).sum(-1, keepdim=True)
        u = torch.where(left <= 0, -torch.inf, u - left.log())
    u = torch.where(known, u, -torch.inf)
    if tail == BUCKET:  # no column is left for a tail: a sum over 1 by next to nothing says so
        whole = (u != -torch.inf).sum(-1, keepdim=True) == (vocab_map >= 0).sum()
        u = torch.where(whole, u - u.logsumexp(-1, keepdim=True) + 1e-14, u)
    u = torch.where(broken, -torch.inf, u)
    u[:, :1].masked_fill_(broken, torch.nan)  # of one entry, wherever it was
    return u, torch.where(found, column[at], wanted.clamp_max(0)).masked_fill(broken, 0)


def _refuse_index(function: str, indices: Tensor, outside: Tensor, columns: int) -> NoReturn:
    row, entry = outside.nonzero()[0].tolist()
    raise ValueError(
        f"{function}: teacher_indices holds {int(indices[row, entry])} in row {row}, entry {entry}, "
        f"expected 0 to {columns - 1}"
    )
