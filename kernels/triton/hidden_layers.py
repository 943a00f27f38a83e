"""Lists of hidden states in one launch of hidden.py's kernel: a program per layer and row, the layers by address.

Without a projection the states are read where they lie. With one, the students' projected states of a chunk of rows
come as one tensor, in which the gradients replace them; the teachers are still read where they lie.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from fastdistil.kernels.triton.hidden import AOT_CHOICES, aot_case, hidden_config, hidden_fwd_kernel
from torch import Tensor

_ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class LayerTable(NamedTuple):
    """Layers of one shape (N, D), dtype and stride between rows, by address."""

    addresses: Tensor  # (L,) int64 on the layers' device
    alignment: int  # bytes, divides all addresses
    stride: int  # elements from one row to the next
    layers: list[Tensor]  # what lies there: a copy would otherwise be freed before the kernel runs


def layer_table(layers: list[Tensor]) -> LayerTable:
    """layers: (N, D) each; where their strides differ or columns are not dense, the table is of copies."""
    first = layers[0]
    if {x.stride() for x in layers} != {first.stride()} or first.stride(1) != 1:
        layers = [x.contiguous() for x in layers]
    addresses = [x.data_ptr() for x in layers]
    aligned = all(address % 16 == 0 for address in addresses)
    table = torch.tensor(addresses, dtype=torch.int64).to(first.device, non_blocking=True)
    return LayerTable(table, 16 if aligned else first.element_size(), layers[0].stride(0), layers)


def hidden_layers(
    students: list[Tensor], teachers: list[Tensor], row_scale: Tensor, kind: str, activation: str, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """All layers, (N, D) each in one dtype, in one launch: rows (L, N) times row_scale (L, N), and the gradients
    (L, N, D) in the layers' dtype."""
    first, (layers, count) = students[0], row_scale.shape
    rows = torch.empty_like(row_scale)
    dz = torch.empty((layers, *first.shape), dtype=first.dtype, device=first.device) if need_grad else None
    if count == 0:
        return rows, dz
    table, size = layer_table([*students, *teachers]), first.shape[1]
    block, options = hidden_config(size, kind)
    hidden_fwd_kernel[(count, layers)](
        table.addresses, table.addresses[layers:], row_scale, row_scale.contiguous(), rows, rows if dz is None else dz,
        None, 0, table.stride, table.stride, size, KIND=kind, GELU=activation == "gelu", HAS_BIAS=False,
        NEED_GRAD=need_grad, BLOCK=block, LAYERS=_ELEMENTS[first.dtype], ALIGNMENT=table.alignment, PROJECTED=False,
        **options,
    )  # fmt: skip
    return rows, dz


def hidden_projected(
    z: Tensor,
    teachers: LayerTable,
    bias: Tensor | None,
    row_scale: Tensor,
    chunk: slice | Tensor,
    kind: str,
    activation: str,
    need_grad: bool,
) -> Tensor:
    """One chunk of n rows of all layers in one launch: rows (L, n) times row_scale (L, n). With `need_grad` the
    gradients take the place of z.

    z: (L, n, D) float32, the projected states without the bias; bias: (L, D) float32; chunk: the teachers' rows, a
    slice or their indices (n,) int64."""
    layers, count, size = z.shape
    rows = torch.empty_like(row_scale)
    index, first = (None, chunk.start) if isinstance(chunk, slice) else (chunk, 0)
    block, options = hidden_config(size, kind)
    hidden_fwd_kernel[(count, layers)](
        z, teachers.addresses, row_scale if bias is None else bias, row_scale, rows, z, index, first, size,
        teachers.stride, size, KIND=kind, GELU=activation == "gelu", HAS_BIAS=bias is not None, NEED_GRAD=need_grad,
        BLOCK=block, LAYERS=_ELEMENTS[teachers.layers[0].dtype], ALIGNMENT=teachers.alignment, PROJECTED=True,
        **options,
    )  # fmt: skip
    return rows


def aot_cases() -> list[dict[str, object]]:
    """Lists of layers as they are, and projected: each kind, with rows left out and without, one step wide and more."""
    plain = [aot_case(768, *choice, layers="layers") for choice in AOT_CHOICES if not choice[2]]
    sizes = ((768, True), (768, False), (7168, True))
    return plain + [
        aot_case(size, *choice, layers="projected", indexed=indexed)
        for size, indexed in sizes
        for choice in AOT_CHOICES
    ]
