"""Sparse updates on NVIDIA GPUs: the CUDA C++ kernels of kernels/cuda/sparse_*.cu, on torch's current stream.

Signatures as in fastdistil/backends/cpu/sparse.py. Each call is one launch for all of its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fastdistil import _C
from fastdistil.contracts.sparse import DTYPES, UpdateRow, update_table
from fastdistil.reference.sparse import sparse_put_, sparse_take

__all__ = ["sparse_compact", "sparse_histogram", "sparse_put_", "sparse_take", "sparse_update_"]


@lru_cache(maxsize=16)
def chunks_of(sizes: tuple[int, ...], chunk: int, device: torch.device) -> Tensor:
    """(chunks, 2) int64: tensor, first element; the same in every step, so made once."""
    found = [(tensor, start) for tensor, size in enumerate(sizes) for start in range(0, size, chunk)]
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 2).to(device)


def _changes(params: Sequence[Tensor], bases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The table of a selection and its chunks."""
    device = params[0].device
    table = [
        [after.data_ptr(), before.data_ptr(), after.numel(), DTYPES[after.dtype], DTYPES[before.dtype]]
        for after, before in zip(params, bases, strict=True)
    ]
    chunks = chunks_of(tuple(x.numel() for x in params), _C.sparse_select_chunk, device)
    return torch.tensor(table, dtype=torch.int64).to(device), chunks


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def sparse_histogram(params: Sequence[Tensor], bases: Sequence[Tensor], counts: Tensor, bucket: int) -> int:
    device = params[0].device
    table, chunks = _changes(params, bases)
    nan = torch.zeros(len(params), dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        _C.sparse_histogram_cuda(table, chunks, counts, nan, bucket, _stream(device))
    found = nan.nonzero().reshape(-1).tolist()
    return found[0] if found else -1


def sparse_compact(
    params: Sequence[Tensor], bases: Sequence[Tensor], out: Tensor | None, threshold: int, ties: int
) -> tuple[list[int], int]:
    device = params[0].device
    table, chunks = _changes(params, bases)
    counts = torch.zeros(len(chunks), 2, dtype=torch.int64, device=device)
    with torch.cuda.device(device):
        _C.sparse_count_cuda(table, chunks, counts, threshold, _stream(device))
        above, equal = counts[:, 0], counts[:, 1]
        keep = (ties - (equal.cumsum(0) - equal)).clamp(min=0).minimum(equal)  # the first ones, in order
        kept = above + keep
        per_tensor = torch.zeros(len(params), dtype=torch.int64, device=device).index_add_(0, chunks[:, 0], kept)
        if out is not None:
            if int(kept.sum()) > len(out):
                raise RuntimeError("a tensor changed between the passes of the selection")
            offsets = kept.cumsum(0) - kept
            _C.sparse_write_cuda(table, chunks, offsets, keep, out, threshold, _stream(device))
    found: list[int] = per_tensor.tolist()
    return found, int(keep.sum())


def sparse_update_(rows: Sequence[UpdateRow]) -> None:
    device = rows[0].param.device
    table, constants = update_table(rows)
    chunks = chunks_of(tuple(row.exp_avg.numel() for row in rows), _C.sparse_update_chunk, device)
    with torch.cuda.device(device):
        _C.sparse_update_cuda(table.to(device), constants.to(device), chunks, _stream(device))
    torch.autograd.graph.increment_version([row.param for row in rows])  # autograd would not know that they changed
