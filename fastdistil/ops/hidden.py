"""Custom ops of the hidden-state losses: `hidden_rows`, one value a row, and `hidden_total`, their sum with gradients.

With a projection the loop below runs the matrix products of one chunk of rows at a time around the backend's row
kernel, so that the projected states exist for one chunk only. `hidden_total` keeps the gradients for its backward
pass, which then needs no product again; on a GPU without a projection `hidden_rows` is enough, its gradient costs one
more read.

They are registered here and not by ops/pairs.py: with its list of gradients six layers of 2,048 x 768 took 1.13 times
as long on a CPU.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastdistil.backends import choose, module
from fastdistil.ops.gradients import hand_out, refuse_double_backward
from fastdistil.ops.hidden_near import is_near
from fastdistil.ops.precision import with_exact_products

# Elements of one chunk of projected states: 2 MiB of float32 on a CPU, 128 MiB on a GPU.
CHUNK_ELEMENTS = {"cpu": 2**19, "gpu": 2**25}

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # in student, projection, bias


@with_exact_products
def _compute(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor,
    kind: str,
    activation: str,
    backend: str,
    dense: bool,
    wanted: tuple[bool, bool, bool],
    rounded: bool,
) -> tuple[Tensor, Gradients]:
    """Rows (N,), and the gradients that are `wanted`, in the inputs' dtypes where `rounded`, else in row_scale's.

    Rows of scale 0 are dropped before the products. Finding them waits for a GPU once, unless the caller knows that
    there are none (`dense`)."""
    name = choose(backend, student.device, row_scale.dtype)
    kernels = module("hidden", name)
    checked = student.device.type == "cpu" and name != "triton" and row_scale.dtype == torch.float32
    if projection is not None:
        states = (student, teacher, projection, bias, row_scale)
        rows, found = _projected(kernels, *states, kind, activation, dense, wanted, checked)
        if rounded:
            inputs = (student, projection, bias)
            found = tuple(g if g is None or x is None else g.to(x.dtype) for g, x in zip(found, inputs, strict=True))  # type: ignore[assignment]
        return rows, found
    dtype = (student.dtype if rounded else row_scale.dtype) if wanted[0] else None
    wide = (
        checked
        and activation != "none"
        and is_near(student.to(row_scale.dtype), teacher, None, row_scale, kind, activation)
    )
    scale = row_scale.double() if wide else row_scale
    rows, dstudent = kernels.hidden_rows(student, teacher, None, scale, kind, activation, dtype)
    return rows.to(row_scale.dtype), (dstudent, None, None)


def _projected(
    kernels: ModuleType,
    student: Tensor,
    teacher: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    kind: str,
    activation: str,
    dense: bool,
    wanted: tuple[bool, bool, bool],
    checked: bool,
) -> tuple[Tensor, Gradients]:
    dtype, (count, size_s), size_t = row_scale.dtype, student.shape, projection.shape[0]
    on_cpu = student.device.type == "cpu"
    kept = row_scale.nonzero()[:, 0] if on_cpu or not dense else None
    if kept is not None and len(kept) == count:
        kept = None
    zeros = torch.zeros if kept is not None else torch.empty
    rows = zeros(count, dtype=dtype, device=student.device)
    dstudent = zeros((count, size_s), dtype=dtype, device=student.device) if wanted[0] else None
    dprojection = torch.zeros_like(projection, dtype=dtype) if wanted[1] else None
    dbias = torch.zeros(size_t, dtype=dtype, device=student.device) if wanted[2] else None
    low = multiplied_in(student, projection, dtype)
    weight = projection.to(low)
    shift = None if bias is None else bias.to(dtype)
    near = False
    wide: Tensor | None = None
    step = chunk_rows(size_t, student.device)
    for start in range(0, count if kept is None else len(kept), step):
        chunk = slice(start, min(start + step, count)) if kept is None else kept[start : start + step]
        scale, h = row_scale[chunk], student[chunk].to(low)
        t, offset = teacher[chunk], shift
        if not near:
            z = _product(h, weight.T, dtype)
            near = checked and is_near(z, t, shift, scale, kind, activation)
        if near:  # and the rest of the rows without asking
            wide = weight.double() if wide is None else wide
            z, offset, scale = h.double() @ wide.T, None if shift is None else shift.double(), scale.double()
        need = dtype if any(wanted) else None
        values, dz = kernels.hidden_rows(z, t, offset, scale, kind, activation, need)
        rows[chunk] = values.to(dtype)
        if dstudent is not None:
            if kept is None and weight.dtype == dtype:
                torch.mm(dz, weight, out=dstudent[chunk])
            else:
                dstudent[chunk] = _product(dz, weight, dtype)
        if dprojection is not None:
            if h.dtype == dtype:
                dprojection.addmm_(dz.T, h)
            else:
                dprojection += _product(dz.T, h, dtype)
        if dbias is not None:
            dbias += dz.sum(0)
    return rows, (dstudent, dprojection, dbias)


def multiplied_in(student: Tensor, projection: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the products' factors: that of both where they share one and there are tensor cores."""
    return projection.dtype if student.device.type != "cpu" and student.dtype == projection.dtype else dtype


def chunk_rows(columns: int, device: torch.device) -> int:
    """How many rows of `columns` projected states, of one layer or of several together, exist at a time."""
    return max(1, CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "gpu"] // max(1, columns))


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right accumulated and returned in `dtype`. 16-bit `right`: the tensor cores' product, for which a float32
    `left` is scaled to at most 1, since float16 has not the range of a gradient, and rounded once."""
    if right.dtype == dtype:
        return left @ right
    if left.dtype == right.dtype:
        return low_product(left, right, dtype)
    largest = left.abs().amax().clamp(min=torch.finfo(dtype).tiny)
    return low_product((left / largest).to(right.dtype), right, dtype) * largest


def low_product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """left @ right of 16-bit factors, accumulated in `dtype` and returned in it, or written to `out`."""
    if hasattr(torch.ops.aten.mm, "dtype"):  # torch 2.8
        op, into = (torch.ops.aten.mm.dtype, {}) if out is None else (torch.ops.aten.mm.dtype_out, {"out": out})
        found: Tensor = op(left, right, dtype, **into)
        return found
    return (left @ right).to(dtype) if out is None else out.copy_(left @ right)


@torch.library.custom_op("fastdistil::hidden_rows", mutates_args=())
def hidden_rows(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor,
    kind: str,
    activation: str,
    backend: str,
    dense: bool,
) -> Tensor:
    """student (N, D_s), teacher (N, D_t), projection (D_t, D_s), bias (D_t,), row_scale (N,) float32 (float64 for
    float64 students), without a 0 where `dense` -> rows (N,), already times row_scale."""
    no = (False, False, False)
    return _compute(student, teacher, projection, bias, row_scale, kind, activation, backend, dense, no, True)[0]


@torch.library.custom_op("fastdistil::hidden_total", mutates_args=())
def hidden_total(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor,
    kind: str,
    activation: str,
    backend: str,
    dense: bool,
    wanted: list[bool],
    rounded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `hidden_rows` -> the rows' sum (), and its gradients in student, projection and bias, empty where not wanted;
    in the inputs' dtypes where `rounded`, else in row_scale's."""
    flags = (wanted[0], wanted[1], wanted[2])
    arguments = (student, teacher, projection, bias, row_scale, kind, activation, backend)
    rows, found = _compute(*arguments, dense, flags, rounded)
    dstudent, dprojection, dbias = (row_scale.new_empty(0) if g is None else g for g in found)
    return rows.sum(), dstudent, dprojection, dbias


@hidden_rows.register_fake
def _(student: Tensor, teacher: Tensor, projection: Any, bias: Any, row_scale: Tensor, *args: Any) -> Tensor:
    return row_scale.new_empty(row_scale.shape)


@hidden_total.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor,
    kind: str,
    activation: str,
    backend: str,
    dense: bool,
    wanted: list[bool],
    rounded: bool,
) -> tuple[Tensor, ...]:
    inputs = (student, projection, bias)
    return row_scale.new_empty(()), *(
        row_scale.new_empty(x.shape, dtype=x.dtype if rounded else row_scale.dtype)
        if want and x is not None
        else row_scale.new_empty(0)
        for x, want in zip(inputs, wanted, strict=True)
    )


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kind, ctx.activation, ctx.backend, ctx.dense = inputs
    ctx.save_for_backward(*tensors)


def _backward_rows(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward("hidden_loss")
    *tensors, row_scale = ctx.saved_tensors
    scale = torch.where(row_scale == 0, 0.0, row_scale * drows)
    needed = ctx.needs_input_grad
    wanted = [needed[0], needed[2], needed[3]]
    _, *found = hidden_total(*tensors, scale, ctx.kind, ctx.activation, ctx.backend, ctx.dense, wanted, True)
    dstudent, dprojection, dbias = (g if want else None for g, want in zip(found, wanted, strict=True))
    return dstudent, None, dprojection, dbias, *[None] * 5


def _setup_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for them either
    *tensors, ctx.kind, ctx.activation, ctx.backend, ctx.dense, ctx.wanted, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.kept = output[1:]


def _backward_total(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_double_backward("hidden_loss")
    if dtotal is None:
        return (None,) * 11
    tensors = ctx.saved_tensors

    def again() -> tuple[Tensor, ...]:
        options = (ctx.kind, ctx.activation, ctx.backend, ctx.dense, ctx.wanted, False)
        found: tuple[Tensor, ...] = hidden_total(*tensors, *options)
        return found[1:]

    gradients = hand_out(ctx, dtotal, again)
    inputs = (tensors[0], tensors[2], tensors[3])
    dstudent, dprojection, dbias = (
        g.to(x.dtype) if want else None for g, x, want in zip(gradients, inputs, ctx.wanted, strict=True)
    )
    return dstudent, None, dprojection, dbias, *[None] * 7


hidden_rows.register_autograd(_backward_rows, setup_context=_setup_rows)
hidden_total.register_autograd(_backward_total, setup_context=_setup_total)
