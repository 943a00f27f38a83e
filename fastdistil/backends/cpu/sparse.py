"""Sparse updates on the CPU: the C++ kernels of csrc/cpu/sparse_*.cpp, on torch's own number of threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistil import _C
from fastdistil.contracts.sparse import UpdateRow, update_table


def sparse_histogram(params: Sequence[Tensor], bases: Sequence[Tensor], counts: Tensor, bucket: int) -> int:
    """Adds the bits of |params - bases| to counts int64: (2048,) of the upper bits for bucket -1, else (2^20,) of the
    lower bits of those in `bucket`. Returns the index of the first pair with a NaN change, or -1."""
    threads = torch.get_num_threads()
    for i, (param, base) in enumerate(zip(params, bases, strict=True)):
        if _C.sparse_histogram(param, base, counts, bucket, threads):
            return i
    return -1


def sparse_compact(
    params: Sequence[Tensor], bases: Sequence[Tensor], out: Tensor | None, threshold: int, ties: int
) -> tuple[list[int], int]:
    """Writes to `out` (int32 or int64), pair after pair, the ascending positions of the changes above the threshold
    and of the first `ties` at it; None: counts only. Returns each pair's count, and the number of ties used."""
    counts, used, threads = list[int](), 0, torch.get_num_threads()
    for param, base in zip(params, bases, strict=True):
        rest = None if out is None else out[sum(counts) :]
        count, more = _C.sparse_compact(param, base, rest, threshold, ties - used, threads)
        counts.append(count)
        used += more
    return counts, used


def sparse_take(tensor: Tensor, index: Tensor) -> Tensor:
    """The elements of `tensor` at flat positions `index` (n,), in its dtype, bit for bit."""
    values = torch.empty(len(index), dtype=tensor.dtype)
    _C.sparse_take(tensor, index, values, torch.get_num_threads())
    return values


def sparse_put_(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Writes `values` (n,) to flat positions `index` (n,) of `tensor`, bit for bit."""
    _C.sparse_put(tensor, index, values, torch.get_num_threads())
    torch.autograd.graph.increment_version(tensor)  # autograd would not know that it changed


def sparse_update_(rows: Sequence[UpdateRow]) -> None:
    """One AdamW step of every row, in place."""
    _C.sparse_update(*update_table(rows), torch.get_num_threads())
    torch.autograd.graph.increment_version([row.param for row in rows])  # autograd would not know that they changed
