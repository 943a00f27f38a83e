"""What adding takes: values to parameters, the entries of two differences to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.sparse._check import position_dtype


def added(old: Tensor, value: Tensor) -> Tensor:
    """old + value, formed in the wider of both dtypes and rounded once to the old one."""
    return (old.to(torch.promote_types(value.dtype, old.dtype)) + value.to(old.device)).to(old.dtype)


def common_base(one: str | None, other: str | None) -> str | None:
    if one is not None and other is not None and one != other:
        raise ValueError(f"SparseDelta +: one is to {one!r}, the other to {other!r}, expected the same base_model")
    return one if one is not None else other


def merged(a: Tensor, a_values: Tensor, b: Tensor, b_values: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted union of two sorted runs of positions; values of the same position add up."""
    dtype = torch.promote_types(a_values.dtype, b_values.dtype)
    index, order = torch.cat([a.long(), b.long()]).sort(stable=True)
    values = torch.cat([a_values.to(dtype), b_values.to(dtype)])[order]
    union, place = torch.unique_consecutive(index, return_inverse=True)
    total = torch.zeros(len(union), dtype=dtype).index_add_(0, place, values)
    wide = len(union) > 0 and int(union[-1]) >= 2**31
    return union.to(torch.int64 if wide else position_dtype(1)), total
