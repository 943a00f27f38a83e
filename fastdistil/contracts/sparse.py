"""What the sparse kernels of all backends share: the split of a float's bits, and one tensor's part of an update.

The columns are those of csrc/rules/sparse_args.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LOW_BITS = 20
HIGH_BUCKETS = 1 << (31 - LOW_BITS)  # |change| has 31 bits
LOW_BUCKETS = 1 << LOW_BITS
ALL_BUCKETS = -1  # the first histogram, over the upper bits of everything

COLUMNS = 11  # of a row of the table: seven addresses, entries, dtype, whether the index is int64, the size
CONSTANTS = 8
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class UpdateConstants(NamedTuple):
    """The numbers of one tensor's AdamW step."""

    decay: float  # 1 - lr * weight_decay
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    step_size: float  # lr / (1 - beta1^step)
    inv_bias2_sqrt: float  # 1 / sqrt(1 - beta2^step)
    l1: float  # the pull towards the base, an entry


class UpdateRow(NamedTuple):
    """One tensor of an update: dense tensors, of which the kernels get the addresses.

    `param` and `gradient` (any shape), of one dtype; `positions` (n,) int32 or int64, ascending and flat, or None for
    every element; `exp_avg`, `exp_avg_sq` (n,) float32 (float64 for float64); `master` (n,) float32 of a 16-bit
    parameter's entries; `base` (n,), what the L1 pull goes towards.
    """

    param: Tensor
    gradient: Tensor
    positions: Tensor | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None
    base: Tensor | None
    constants: UpdateConstants


def update_table(rows: Sequence[UpdateRow]) -> tuple[Tensor, Tensor]:
    """(rows, COLUMNS) int64 and (rows, CONSTANTS) float64, both on the CPU."""
    table, numbers = list[int](), list[float]()
    for param, gradient, positions, exp_avg, exp_avg_sq, master, base, constants in rows:
        table += (
            param.data_ptr(),
            gradient.data_ptr(),
            0 if positions is None else positions.data_ptr(),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            0 if master is None else master.data_ptr(),
            0 if base is None else base.data_ptr(),
            exp_avg.numel(),
            DTYPES[param.dtype],
            positions is not None and positions.dtype == torch.int64,
            param.numel(),
        )
        numbers += constants
    addresses = torch.tensor(table, dtype=torch.int64).view(-1, COLUMNS)
    return addresses, torch.tensor(numbers, dtype=torch.float64).view(-1, CONSTANTS)
