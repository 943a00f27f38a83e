"""Section 6 of docs/losses.md in plain PyTorch, on any device. Signatures as in fastdistil/backends/cpu/sparse.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistil.contracts.sparse import ALL_BUCKETS, LOW_BITS, LOW_BUCKETS, UpdateRow

_INFINITY_BITS = 0x7F800000  # above it: NaN


def change_bits(param: Tensor, base: Tensor) -> Tensor:
    """|param - base| in float32 as int32 (n,), which order alike; differences of float64 are taken in float64."""
    compute = torch.float64 if torch.float64 in (param.dtype, base.dtype) else torch.float32
    change = (param.reshape(-1).to(compute) - base.reshape(-1).to(compute)).float()
    return change.view(torch.int32) & 0x7FFFFFFF


def sparse_histogram(params: Sequence[Tensor], bases: Sequence[Tensor], counts: Tensor, bucket: int) -> int:
    for i, (param, base) in enumerate(zip(params, bases, strict=True)):
        bits = change_bits(param, base)
        if bool((bits > _INFINITY_BITS).any()):
            return i
        if bucket == ALL_BUCKETS:
            found = bits >> LOW_BITS
        else:
            found = bits[(bits >> LOW_BITS) == bucket] & (LOW_BUCKETS - 1)
        counts += torch.bincount(found, minlength=len(counts))
    return -1


def sparse_compact(
    params: Sequence[Tensor], bases: Sequence[Tensor], out: Tensor | None, threshold: int, ties: int
) -> tuple[list[int], int]:
    counts, used = list[int](), 0
    for param, base in zip(params, bases, strict=True):
        bits = change_bits(param, base)
        at = (bits == threshold).nonzero().reshape(-1)[: ties - used]
        used += len(at)
        kept = torch.cat([(bits > threshold).nonzero().reshape(-1), at]).sort().values
        if out is not None:
            start = sum(counts)
            out[start : start + len(kept)] = kept.to(out.dtype)
        counts.append(len(kept))
    return counts, used


def sparse_take(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.reshape(-1)[index.long()]


def sparse_put_(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    tensor.view(-1)[index.long()] = values


def sparse_update_(rows: Sequence[UpdateRow]) -> None:
    for row in rows:
        _update(row)


def _update(row: UpdateRow) -> None:
    """torch.optim.AdamW's order of operations on the entries, and the gradient of l1 * |w - base|."""
    c, index = row.constants, None if row.positions is None else row.positions.long()
    param = row.param.view(-1)
    stored = param if index is None else param[index]
    w, g = stored.to(row.exp_avg.dtype), row.gradient.reshape(-1)
    g = (g if index is None else g[index]).to(row.exp_avg.dtype)
    if row.master is not None:  # unless someone else has written the parameter since, its master knows it better
        w = torch.where(row.master.to(stored.dtype) == stored, row.master, w)
    if row.base is not None:
        g = g + c.l1 * torch.sign(w - row.base)
    w = w * c.decay
    row.exp_avg.add_((g - row.exp_avg) * c.one_minus_beta1)
    row.exp_avg_sq.mul_(c.beta2).add_(g * g * c.one_minus_beta2)
    w = w - c.step_size * row.exp_avg / (row.exp_avg_sq.sqrt() * c.inv_bias2_sqrt + c.eps)
    if row.master is not None:
        row.master.copy_(w)
    if index is None:
        param.copy_(w)
    else:
        param[index] = w.to(param.dtype)
