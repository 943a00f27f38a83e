"""Custom ops of lists of hidden states, for the backend that takes all layers' rows in one launch.

`hidden_layers`: states as they are. `hidden_projected_rows` and `hidden_projected_total`: with projections, a launch
per chunk of rows. One buffer of float32, of at most CHUNK_ELEMENTS (ops/hidden.py), holds the projected states of a
chunk (L, n, D_t), and then their gradients; a chunk costs L products there and, for the gradients, up to 2 L back. A
projection or bias of several layers comes once, and so does its gradient: the layers' parts are added in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdistil.backends import get
from fastdistil.ops.families import Found, family, refuse_double_backward
from fastdistil.ops.hidden import chunk_rows, multiplied_in
from fastdistil.ops.precision import with_exact_products
from fastdistil.ops.products import low_product

Chunk = slice | Tensor  # of the rows (N,): from where to where, or their indices


@torch.library.custom_op("fastdistil::hidden_layers", mutates_args=())
def hidden_layers(
    students: list[Tensor], teachers: list[Tensor], row_scale: Tensor, kind: str, activation: str, backend: str
) -> Tensor:
    """students, teachers: L of (N, D) in one dtype; row_scale (L, N) float32 -> rows (L, N), times row_scale."""
    kernels = get("hidden_layers", backend, row_scale.device)
    rows: Tensor = kernels.hidden_layers(students, teachers, row_scale, kind, activation, False)[0]
    return rows


@torch.library.custom_op("fastdistil::hidden_layers_bwd", mutates_args=())
def hidden_layers_bwd(
    students: list[Tensor], teachers: list[Tensor], row_scale: Tensor, kind: str, activation: str, backend: str
) -> Tensor:
    """As `hidden_layers` -> the gradients of the rows' sum (L, N, D), in the layers' dtype."""
    kernels = get("hidden_layers", backend, row_scale.device)
    gradients: Tensor = kernels.hidden_layers(students, teachers, row_scale, kind, activation, True)[1]
    return gradients


@hidden_layers.register_fake
def _(students: list[Tensor], teachers: list[Tensor], row_scale: Tensor, *args: Any) -> Tensor:
    return row_scale.new_empty(row_scale.shape)


@hidden_layers_bwd.register_fake
def _(students: list[Tensor], teachers: list[Tensor], row_scale: Tensor, *args: Any) -> Tensor:
    return students[0].new_empty((len(students), *students[0].shape))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    students, teachers, row_scale, ctx.kind, ctx.activation, ctx.backend = inputs
    ctx.layers = len(students)
    ctx.save_for_backward(*students, *teachers, row_scale)


def _backward(ctx: Any, drows: Tensor) -> tuple[Any, ...]:
    refuse_double_backward("hidden_loss")
    *states, row_scale = ctx.saved_tensors
    students, teachers = states[: ctx.layers], states[ctx.layers :]
    scale = torch.where(row_scale == 0, 0.0, row_scale * drows)
    gradients = hidden_layers_bwd(students, teachers, scale, ctx.kind, ctx.activation, ctx.backend)
    return list(gradients.unbind()), [None] * ctx.layers, None, None, None, None


hidden_layers.register_autograd(_backward, setup_context=_setup)


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


def _compute(
    students: list[Tensor],
    teachers: list[Tensor],
    projections: list[Tensor],
    biases: list[Tensor],
    row_scale: Tensor,
    projection_of: list[int],
    bias_of: list[int],
    factors: list[float],
    kind: str,
    activation: str,
    backend: str,
    dense: bool,
    wanted: list[bool],
    rounded: bool,
) -> Found:
    """Rows of scale 0 are dropped before the products, and so are layers of factor 0. Finding these rows waits for a
    GPU once, unless the caller knows that there are none (`dense`)."""
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
    return Found(_rows(row_scale, layers, kept, kind, activation, backend, any(wanted)), found)


@with_exact_products
def _rows(
    row_scale: Tensor,
    layers: list[Layer],
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
    has not the range of a gradient (as `multiplied` in ops/products.py)."""
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


# students: L of (N, D_s) in one dtype, D_s may differ; teachers: L of (N, D_t) in one dtype; projections: (D_t, D_s) in
# one dtype; biases: (D_t,); row_scale (N,) float32, without a 0 where `dense`; projection_of, bias_of: which of them a
# layer has, -1 where there is no bias; factors: one a layer -> rows (N,), sums over the layers, times row_scale.
TENSORS = "Tensor[] students, Tensor[] teachers, Tensor[] projections, Tensor[] biases, Tensor row_scale"
OPTIONS = "int[] projection_of, int[] bias_of, float[] factors, str kind, str activation, str backend, bool dense"
_FAMILY = family(
    "hidden_projected", "hidden_loss", TENSORS, OPTIONS, _compute, gradients=("students", "projections", "biases")
)
hidden_projected_rows, hidden_projected_total = _FAMILY.rows, _FAMILY.total
