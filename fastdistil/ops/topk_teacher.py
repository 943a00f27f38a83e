"""The teacher of a top-k loss as every backend receives it."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from fastdistil.contracts.topk import BUCKET, RENORMALIZE, TAILS, ZERO

# Probabilities that sum to more are no rounding error: 16-bit log-probabilities are within 3% each.
LARGEST_MASS = 1.1


def canonical(
    function: str,
    values: Tensor,
    indices: Tensor,
    teacher_tail: Tensor | None,
    row_scale: Tensor,
    columns: int,
    tail: int,
    vocab_map: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher as every backend gets it: values u (N, K) float64 and indices (N, K) int32, sorted by column; entries
    that are not there, and all of rows that do not count, are (-inf, `columns`) and come last. And what is known of the
    other columns (N,) float64: the logarithm of their mass for "bucket", which backends normalise together with the
    entries; their mass for "zero", which rounding may leave a little below 0; nothing for "renormalize".

    Wrong entries (docs/losses.md, section 1a) raise ValueError on a CPU; on a GPU, where nothing may wait for the
    device, they become NaN, which makes the row's value NaN. teacher_tail (N,) or None; vocab_map (columns,): as in
    `through_map`.
    """
    counts = row_scale != 0
    u = torch.where(counts[:, None], values.double(), -torch.inf)
    given = None if teacher_tail is None else torch.where(counts, teacher_tail.double(), 0.0)
    stored, q = u, u.exp()
    mass = q.sum(-1) if given is None else q.sum(-1) + given.exp()
    wrong = mass > LARGEST_MASS
    if tail == RENORMALIZE:
        wrong = torch.zeros_like(counts)
    elif given is not None:  # a row without entries says nothing, whatever its tail
        wrong = (wrong | (mass < 2 - LARGEST_MASS)) & (u != -torch.inf).any(-1)
    if vocab_map is not None:
        u, indices = through_map(u, indices, vocab_map)
    there = u != -torch.inf
    rest = mass
    if tail == BUCKET:
        rest = torch.maximum(*rest_of(stored, q, values.dtype)).log() if given is None else given
        count = there.sum(-1)
        whole = count == (columns if vocab_map is None else (vocab_map >= 0).sum())
        rest = torch.where(count == 0, 0.0, torch.where(whole, -torch.inf, rest))
    elif tail == ZERO:
        rest, least = (given.exp(), mass.new_zeros(())) if given is not None else rest_of(stored, q, values.dtype)
        outside = torch.maximum(rest, least)
        known = outside + u.exp().sum(-1)
        # As they are stored, unless they are of a part of the vocabulary, or of the whole with a known tail.
        part = (there != (stored != -torch.inf)).any(-1) if given is None else known > 0
        u = torch.where(part[:, None], u - known.log()[:, None], u)
        rest = torch.where(part, outside / known, rest)
    inside = (indices >= 0) & (indices < columns)
    strange = there & ~inside
    key, order = torch.where(there & inside, indices, columns).to(torch.int32).sort(-1)
    u = torch.where(strange | wrong[:, None], torch.nan, u).gather(-1, order)
    again = (key[:, 1:] == key[:, :-1]) & (key[:, 1:] < columns)
    u[:, 1:].masked_fill_(again, torch.nan)
    if values.device.type == "cpu":
        if bool(strange.any()):
            _refuse_index(function, indices, strange, columns)
        if bool(again.any()):
            row, entry = again.nonzero()[0].tolist()
            column = int(key[row, entry])
            raise ValueError(
                f"{function}: teacher_indices holds {column} twice in row {row}, expected each column once"
            )
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            _refuse_mass(function, row, float(mass[row]), tail, given is not None)
    return u.contiguous(), key.contiguous(), rest.contiguous()


def rest_of(u: Tensor, q: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """1 - sum(q) (N,) of log-probabilities u (N, K) float64 and their q = e^u, exact for a confident teacher, and the
    smallest that is no rounding (N,): values of `dtype` are off by its unit times |u| each, and what they were taken
    from by that unit, or float32's where 16 bits round the result of float32."""
    largest, at = u.max(-1, keepdim=True)
    rest = -torch.expm1(largest[:, 0]) - q.scatter(-1, at, 0.0).sum(-1)
    unit = torch.finfo(dtype).eps / 2
    rounding = unit * torch.where(q == 0, 0.0, q * u.abs()).sum(-1)
    return rest, rounding.clamp_min(min(unit, 2.0**-24))


def through_map(u: Tensor, indices: Tensor, vocab_map: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities u (N, K) float64 and the student's columns (N, K) of a teacher whose entries are at its own.

    vocab_map (V,) int64: the teacher's column of each of the student's, -1 for none, none of them twice. Entries
    without a partner are not there (-inf). Negative indices stay, to be refused, and rows with a NaN stay NaN."""
    partner, column = vocab_map.sort()
    wanted = indices.long().contiguous()
    at = torch.searchsorted(partner, wanted).clamp_max(len(partner) - 1)
    found = (partner[at] == wanted) & (wanted >= 0)
    broken = u.isnan().any(-1, keepdim=True)
    u = torch.where((found | (wanted < 0)) & ~broken, u, -torch.inf)
    u[:, :1].masked_fill_(broken, torch.nan)  # of one entry, wherever it was
    return u, torch.where(found, column[at], wanted.clamp_max(0)).masked_fill(broken, 0)


def _refuse_index(function: str, indices: Tensor, strange: Tensor, columns: int) -> NoReturn:
    row, entry = strange.nonzero()[0].tolist()
    raise ValueError(
        f"{function}: teacher_indices holds {int(indices[row, entry])} in row {row}, entry {entry}, "
        f"expected 0 to {columns - 1}"
    )


def _refuse_mass(function: str, row: int, mass: float, tail: int, given: bool) -> NoReturn:
    if given:
        raise ValueError(
            f"{function}: teacher_values and teacher_tail have probabilities that sum to {mass:.4g} in row {row}, "
            "expected 1: teacher_tail is the natural logarithm of what the other columns have together"
        )
    raise ValueError(
        f"{function}: teacher_values has probabilities that sum to {mass:.4g} in row {row}, "
        f"expected log-probabilities (at most 1 in all) with tail={TAILS[tail]!r}: of probabilities pass "
        "teacher_values.log(); tail='renormalize' takes any scores"
    )
