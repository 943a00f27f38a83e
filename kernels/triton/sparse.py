"""Sparse updates in Triton: AdamW on the entries of many tensors in one launch. A selection has no atomics or scans
worth a kernel here: it runs in plain PyTorch on the GPU, where CUDA was not built."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from fastdistil.kernels.triton.numerics import FUSION
from torch import Tensor

from fastdistil.contracts.sparse import COLUMNS, CONSTANTS, UpdateRow, update_table
from fastdistil.reference.sparse import sparse_compact, sparse_histogram, sparse_put_, sparse_take

__all__ = ["aot_cases", "sparse_compact", "sparse_histogram", "sparse_put_", "sparse_take", "sparse_update_"]

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def sparse_update_kernel(
    table_ptr,  # (tensors, COLUMNS) int64: addresses, entries, dtype, width of the index
    constants_ptr,  # (tensors, CONSTANTS) float32
    chunks_ptr,  # (programs, 2) int64: tensor, first entry
    DTYPE: tl.constexpr,  # of parameters and gradients
    INDEX: tl.constexpr,  # of positions
    MASTER: tl.constexpr,  # 16-bit parameters have a float32 copy of their entries
    COLUMNS: tl.constexpr,
    CONSTANTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = chunks_ptr + 2 * tl.program_id(0)
    tensor = tl.load(chunk)
    row, c = table_ptr + tensor * COLUMNS, constants_ptr + tensor * CONSTANTS
    entry = tl.load(chunk + 1) + tl.arange(0, BLOCK)
    keep = entry < tl.load(row + 7)

    positions, base_address = tl.load(row + 2), tl.load(row + 6)
    index = tl.load(positions.to(tl.pointer_type(INDEX)) + entry, mask=keep & (positions != 0), other=0)
    at = tl.where(positions != 0, index.to(tl.int64), entry)  # no positions: every element in order
    param = tl.load(row).to(tl.pointer_type(DTYPE)) + at
    exp_avg = tl.load(row + 3).to(tl.pointer_type(tl.float32)) + entry
    exp_avg_sq = tl.load(row + 4).to(tl.pointer_type(tl.float32)) + entry

    w = tl.load(param, mask=keep, other=0.0).to(tl.float32)
    g = tl.load(tl.load(row + 1).to(tl.pointer_type(DTYPE)) + at, mask=keep, other=0.0).to(tl.float32)
    m = tl.load(exp_avg, mask=keep, other=0.0)
    v = tl.load(exp_avg_sq, mask=keep, other=0.0)
    if MASTER:  # unless someone else has written the parameter since, its master knows it better
        master = tl.load(row + 5).to(tl.pointer_type(tl.float32)) + entry
        known = tl.load(master, mask=keep, other=0.0)
        w = tl.where(known.to(DTYPE).to(tl.float32) == w, known, w)
    base = tl.load(base_address.to(tl.pointer_type(tl.float32)) + entry, mask=keep & (base_address != 0), other=0.0)
    l1 = tl.where(base_address != 0, tl.load(c + 7), 0.0)
    g += tl.where(w > base, l1, tl.where(w < base, -l1, 0.0))

    w = w * tl.load(c)
    m += (g - m) * tl.load(c + 1)
    v = v * tl.load(c + 2) + g * g * tl.load(c + 3)
    w -= tl.load(c + 5) * m / (tl.sqrt(v) * tl.load(c + 6) + tl.load(c + 4))

    tl.store(exp_avg, m, mask=keep)
    tl.store(exp_avg_sq, v, mask=keep)
    if MASTER:
        tl.store(master, w, mask=keep)
    tl.store(param, w.to(DTYPE), mask=keep)


def sparse_config() -> tuple[int, dict[str, int]]:
    """Entries a program, and warps: 8 entries a thread, gathered together. Not yet tuned on a GPU."""
    return 1024, {"num_warps": 4} | FUSION


@lru_cache(maxsize=16)
def _chunks(entries: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """(programs, 2): which entries of which tensor; the same in every step, so made once."""
    found = [(tensor, start) for tensor, count in enumerate(entries) for start in range(0, count, block)]
    return torch.tensor(found, dtype=torch.int64, device=device)


def _alike(row: UpdateRow) -> tuple[Any, Any, bool]:
    """What a launch's tensors must share."""
    wide = row.positions is not None and row.positions.dtype == torch.int64
    return _DTYPES[row.param.dtype], tl.int64 if wide else tl.int32, row.master is not None


def sparse_update_(rows: Sequence[UpdateRow]) -> None:
    """As fastdistil.backends.cpu.sparse.sparse_update_, for float32, bfloat16 and float16: a launch a dtype."""
    block, options = sparse_config()
    for row in rows:
        if row.param.dtype not in _DTYPES:
            raise ValueError(
                f"sparse_update_: param has dtype {row.param.dtype}, Triton's kernel takes {list(_DTYPES)}"
            )
    for kind in dict.fromkeys(_alike(row) for row in rows):
        same = [row for row in rows if _alike(row) == kind]
        device = same[0].param.device
        table, constants = update_table(same)
        chunks = _chunks(tuple(row.exp_avg.numel() for row in same), block, device)
        dtype, index, master = kind
        sparse_update_kernel[(len(chunks),)](
            table.to(device), constants.float().to(device), chunks,
            DTYPE=dtype, INDEX=index, MASTER=master, COLUMNS=COLUMNS, CONSTANTS=CONSTANTS, BLOCK=block, **options,
        )  # fmt: skip
    torch.autograd.graph.increment_version([row.param for row in rows])  # autograd would not know that they changed


def aot_cases() -> list[dict[str, Any]]:
    """Every configuration as ahead-of-time compilation sees it."""
    block, options = sparse_config()
    return [
        {
            "name": f"sparse_update_kernel-{dtype}-{index}",
            "kernel": sparse_update_kernel,
            "signature": {"table_ptr": "*i64", "constants_ptr": "*fp32", "chunks_ptr": "*i64"},
            "constants": {
                "DTYPE": dtype,
                "INDEX": index,
                "MASTER": dtype != tl.float32,
                "COLUMNS": COLUMNS,
                "CONSTANTS": CONSTANTS,
                "BLOCK": block,
            },
            "options": options,
            "divisible": ["table_ptr", "constants_ptr", "chunks_ptr"],
        }
        for dtype in _DTYPES.values()
        for index in (tl.int32, tl.int64)
    ]
