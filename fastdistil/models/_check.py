"""What the functions that make students check at their doors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistil.losses._check import no_tensor


def vocabulary_rows(function: str, rows: object, size: int) -> Tensor:
    """`rows` (V_s,) as ids of a vocabulary of `size`."""
    if not isinstance(rows, Tensor):
        raise no_tensor(function, "rows", rows)
    if rows.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{function}: rows has dtype {rows.dtype}, expected int64")
    if rows.ndim != 1:
        raise ValueError(f"{function}: rows has shape {tuple(rows.shape)}, expected (V_s,)")
    if rows.numel() == 0 or int(rows.min()) < 0 or int(rows.max()) >= size:
        came = f"{int(rows.min())} to {int(rows.max())}" if rows.numel() else "none"
        raise ValueError(f"{function}: rows are {came}, expected ids from 0 to {size - 1}, which the model has")
    return rows.long()


def labels_and_padding(function: str, labels: object, pad_token_id: object, size: int) -> list[str]:
    """`labels` as a list of names; a padding id of a vocabulary of `size`."""
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise TypeError(f"{function}: labels is {type(labels).__name__}, expected a list of names, one for each class")
    if not labels:
        raise ValueError(f"{function}: labels is empty, expected at least one name")
    if isinstance(pad_token_id, bool) or not isinstance(pad_token_id, int) or not 0 <= pad_token_id < size:
        raise ValueError(
            f"{function}: pad_token_id is {pad_token_id!r}, expected 0 to {size - 1}: it counts in the student's ids"
        )
    return list(labels)
