"""The loop behind ops/hidden_projected.py: chunks of rows of all layers, their products, and one launch of the rule.

One buffer of float32, of at most CHUNK_ELEMENTS (ops/hidden.py), holds the projected states of a chunk (L, n, D_t), and
then their gradients. A chunk costs L products there and, for the gradients, up to 2 L back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdistil.backends import get
from fastdistil.ops.hidden import chunk_rows, low_product, multiplied_in
from fastdistil.ops.precision import with_exact_products

Chunk = slice | Tensor  # of the rows (N,): from where to where, or their indices


@dataclass
class Layer:
    """One layer's inputs, and its gradients where they are wanted: several layers may add to one of a parameter."""

    student: Tensor  # (N, D_s)
    teacher: Tensor  # (N, D_t)
    projection: Tensor  # (D_t, D_s), in the products' dtype
    bias: Tensor | None  # (D_t,)
    factor: float
    dstudent: Tensor | None
    dprojection: Tensor | None  # float32, as is dbias
    dbias: Tensor | None


@with_exact_products
def compute(
    row_scale: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    projections: list[Tensor],
    biases: list[Tensor],
    projection_of: list[int],
    bias_of: list[int],
    factors: list[float],
    kind: str,
    activation: str,
    backend: str,
    dense: bool,
    wanted: list[bool],
    rounded: bool,
) -> tuple[Tensor, list[Tensor]]:
    """As ops/hidden_projected.py's `hidden_projected_total`, but with the rows (N,).

    Rows of scale 0 are dropped before the products, and so are layers of factor 0. Finding these rows waits for a GPU
    once, unless the caller knows that there are none (`dense`)."""
    dtype = row_scale.dtype
    kept = None if dense else row_scale.nonzero()[:, 0]
    if kept is not None and len(kept) == len(row_scale):
        kept = None
    inputs = (*students, *projections, *biases)
    # A student's gradient is written once, row by row; a parameter's is a sum, which is rounded at its end.
    rounding = [rounded] * len(students) + [False] * (len(inputs) - len(students))
    found = [
        torch.zeros(x.shape, dtype=x.dtype if at_once else dtype, device=x.device) if want else None
        for x, want, at_once in zip(inputs, wanted, rounding, strict=True)
    ]
    dprojections, dbiases = found[len(students) :], found[len(students) + len(projections) :]
    low = multiplied_in(students[0], projections[0], dtype)
    factors_of_products = [x.to(low) for x in projections]
    layers = [
        Layer(
            students[i],
            teachers[i],
            factors_of_products[projection_of[i]],
            None if bias_of[i] < 0 else biases[bias_of[i]],
            factor,
            found[i],
            dprojections[projection_of[i]],
            None if bias_of[i] < 0 else dbiases[bias_of[i]],
        )
        for i, factor in enumerate(factors)
        if factor != 0
    ]
    rows = _rows(layers, row_scale, kept, kind, activation, backend, any(wanted))
    gradients = [
        row_scale.new_empty(0) if g is None else g.to(x.dtype) if rounded else g
        for g, x in zip(found, inputs, strict=True)
    ]
    return rows, gradients


def _rows(
    layers: list[Layer],
    row_scale: Tensor,
    kept: Tensor | None,
    kind: str,
    activation: str,
    backend: str,
    need_grad: bool,
) -> Tensor:
    """Rows (N,), sums over the layers; adds to the layers' gradients. kept: the rows to compute, None for all."""
    rows = torch.zeros_like(row_scale)
    total = len(row_scale) if kept is None else len(kept)
    if not layers or total == 0:
        return rows
    dtype, device, count, size = row_scale.dtype, row_scale.device, len(layers), layers[0].teacher.shape[1]
    kernels = get("hidden_layers", backend, device)
    table = kernels.layer_table([layer.teacher for layer in layers])
    biases = [layer.bias.to(dtype) for layer in layers if layer.bias is not None]  # of all layers or of none
    bias = torch.stack(biases) if biases else None
    factors = torch.tensor([layer.factor for layer in layers], dtype=dtype).to(device, non_blocking=True)
    scales = factors[:, None] * (row_scale if kept is None else row_scale[kept])
    bias_sums = torch.zeros(count, size, dtype=dtype, device=device)
    step = min(total, chunk_rows(count * size, device))
    states = torch.empty(step * count * size, dtype=dtype, device=device)
    for start in range(0, total, step):
        stop = min(start + step, total)
        chunk = slice(start, stop) if kept is None else kept[start:stop]
        z = states[: (stop - start) * count * size].view(count, stop - start, size)
        hidden = [layer.student[chunk].to(layer.projection.dtype) for layer in layers]
        for layer, h, out in zip(layers, hidden, z, strict=True):
            _product(h, layer.projection.T, dtype, out)
        scale = scales[:, start:stop].contiguous()
        rows[chunk] = kernels.hidden_projected(z, table, bias, scale, chunk, kind, activation, need_grad).sum(0)
        if any(layer.dbias is not None for layer in layers):
            bias_sums += z.sum(1)
        if need_grad:
            _add_gradients(layers, z, hidden, chunk)
    for layer, part in zip(layers, bias_sums, strict=True):
        if layer.dbias is not None:
            layer.dbias += part
    return rows


def _add_gradients(layers: list[Layer], dz: Tensor, hidden: list[Tensor], chunk: Chunk) -> None:
    """dz (L, n, D_t) float32, which is overwritten; hidden: the students' rows, in the products' dtype.

    Where the other factor has 16 bits, dz is rounded to them once for both products, scaled to at most 1, since float16
    has not the range of a gradient (as `_product` in ops/hidden.py)."""
    dtype, low = dz.dtype, hidden[0].dtype
    largest = None
    if low != dtype:
        largest = torch.linalg.vector_norm(dz, float("inf"), dim=(1, 2)).clamp(min=torch.finfo(dtype).tiny)
        dz = dz.div_(largest[:, None, None]).to(low)
    for i, (layer, d, h) in enumerate(zip(layers, dz, hidden, strict=True)):
        if layer.dstudent is not None:
            in_place = isinstance(chunk, slice) and layer.dstudent.dtype == dtype
            found = _product(d, layer.projection, dtype, layer.dstudent[chunk] if in_place else None)
            if largest is not None:
                found *= largest[i]
            if not in_place:
                layer.dstudent[chunk] = found.to(layer.dstudent.dtype)
        if layer.dprojection is not None:
            if largest is None:
                layer.dprojection.addmm_(d.T, h)
            else:
                layer.dprojection.addcmul_(low_product(d.T, h, dtype), largest[i])


def _product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """left @ right of factors in one dtype, accumulated in `dtype` and returned in it, or written to `out`."""
    return torch.mm(left, right, out=out) if left.dtype == dtype else low_product(left, right, dtype, out)
