"""Custom ops of linear_logit_loss: the logits of two heads exist for one chunk of rows at a time.

A chunk is two products by the vendor's GEMM into float32, the row op of `logit_loss`, which overwrites the student's
logits with their gradient, and two products back. `linear_logit_total` computes the gradients with the value and keeps
them for the backward pass, which then needs no product again (ops/gradients.py); `linear_logit_rows` has a gradient a
row to honour, so its backward pass runs the chunks again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistil.backends import choose, get
from fastdistil.backends.memory import new_empty
from fastdistil.ops import linear_mse
from fastdistil.ops.gradients import hand_out, refuse_double_backward
from fastdistil.ops.logit_rule import DIVERGENCES, STATS, LogitRule
from fastdistil.ops.precision import without_autocast
from fastdistil.ops.products import add_product, product, product_back

# Columns that rows of logits are padded to, so that every row of an odd vocabulary begins at 64 bytes.
ALIGNED_COLUMNS = 16

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # in student hidden, weight and bias


def chunk_rows(rows: int, columns: int, itemsize: int, chunk_bytes: int) -> int:
    """Rows a chunk, whose two buffers of logits fit in `chunk_bytes`: a multiple of 16 where there are as many."""
    padded = -(-columns // ALIGNED_COLUMNS) * ALIGNED_COLUMNS
    fit = max(1, chunk_bytes // (2 * padded * itemsize))
    return max(1, min(rows, fit - fit % 16 if fit >= 16 else fit))


@without_autocast
def _compute(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    row_scale: Tensor,
    rule: LogitRule,
    chunk_bytes: int,
    backend: str,
    wanted: tuple[bool, bool, bool],
    dense: bool,
) -> tuple[Tensor, Gradients]:
    """Rows (N,) times row_scale, and those gradients of their sum that are `wanted`, in row_scale's dtype.

    Rows of scale 0 are dropped before the products, unless the caller knows that there are none (`dense`): finding
    them waits for a GPU once."""
    if backend == "triton" and row_scale.dtype == torch.float64:
        raise ValueError("linear_logit_loss: backend 'triton' has no float64 kernel, expected backend='reference'")
    heads = (student_weight, student_bias, teacher_weight, teacher_bias)
    kept = None if dense else row_scale.nonzero()[:, 0]
    if kept is not None and len(kept) < len(row_scale):
        student, teacher, scale = student_hidden[kept], teacher_hidden[kept], row_scale[kept]
    else:
        kept, student, teacher, scale = None, student_hidden, teacher_hidden, row_scale
    mse = rule["divergence"] == DIVERGENCES.index("mse") and backend != "reference"
    if mse and linear_mse.pays(student, student_weight, teacher, wanted):
        rows, found = linear_mse.compute(student, teacher, *heads, scale, rule, chunk_bytes, wanted)
    else:
        rows, found = _chunks(student, teacher, *heads, scale, rule, chunk_bytes, backend, wanted)
    if kept is not None:
        rows = torch.zeros_like(row_scale).index_copy_(0, kept, rows)
        if (dstudent := found[0]) is not None:
            spread = dstudent.new_zeros(student_hidden.shape).index_copy_(0, kept, dstudent)
            found = (spread, *found[1:])
    return rows, found


def _chunks(
    student: Tensor,
    teacher: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    scale: Tensor,
    rule: LogitRule,
    chunk_bytes: int,
    backend: str,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    (count, _), columns, dtype = student.shape, student_weight.shape[0], scale.dtype
    name = choose(backend, student.device)
    module = get("logit", "reference" if name == "triton" and dtype == torch.float64 else name, student.device)
    rows = torch.empty_like(scale)
    dstudent = scale.new_empty(student.shape) if wanted[0] else None
    dweight = new_empty(scale, student_weight.shape) if wanted[1] else None
    dbias = scale.new_zeros(columns) if wanted[2] else None
    if count == 0:
        return rows, (dstudent, None if dweight is None else dweight.zero_(), dbias)
    step = chunk_rows(count, columns, scale.element_size(), chunk_bytes)
    padded = -(-columns // ALIGNED_COLUMNS) * ALIGNED_COLUMNS
    buffers = new_empty(scale, (2, step, padded))[:, :, :columns]
    stats = scale.new_empty(step, STATS)
    for start in range(0, count, step):
        chunk = slice(start, min(start + step, count))
        n = chunk.stop - start
        z_s, z_t = buffers[:, :n]
        _logits(student[chunk], student_weight, student_bias, z_s)
        _logits(teacher[chunk], teacher_weight, teacher_bias, z_t)
        gradient = z_s if any(wanted) else None
        module.logit_fwd(z_s, z_t, scale[chunk], rows[chunk], stats[:n], gradient, **rule)
        if dstudent is not None:
            product_back(z_s, student_weight, dstudent[chunk])
        if dweight is not None:
            add_product(z_s, student[chunk], dweight, first=start == 0)
        if dbias is not None:
            dbias += z_s.sum(0)
    return rows, (dstudent, dweight, dbias)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    product(hidden, weight, out)
    if bias is not None:
        out += bias


def _rule(divergence: int, beta: float, t_s: float, t_t: float, value_factor: float) -> LogitRule:
    return {
        "divergence": divergence,
        "beta": beta,
        "student_temperature": t_s,
        "teacher_temperature": t_t,
        "value_factor": value_factor,
    }


@torch.library.custom_op("fastdistil::linear_logit_rows", mutates_args=())
def linear_logit_rows(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    row_scale: Tensor,
    rule: list[float],
    chunk_bytes: int,
    backend: str,
    dense: bool,
) -> Tensor:
    """student_hidden (N, D_s), student_weight (V, D_s), student_bias (V,), teacher_hidden (N, D_t), teacher_weight
    (V, D_t), teacher_bias (V,), row_scale (N,) float32 (float64 for float64 inputs) -> rows (N,) times row_scale.
    `rule`: index of the divergence, beta, the temperatures, the value's factor."""
    heads = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    constants = _rule(int(rule[0]), *rule[1:])
    return _compute(*heads, row_scale, constants, chunk_bytes, backend, (False, False, False), dense)[0]


@torch.library.custom_op("fastdistil::linear_logit_total", mutates_args=())
def linear_logit_total(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    row_scale: Tensor,
    rule: list[float],
    chunk_bytes: int,
    backend: str,
    dense: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `linear_logit_rows` -> the rows' sum (), and its gradients in student hidden, weight and bias in row_scale's
    dtype, empty where not `wanted`."""
    heads = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    constants, flags = _rule(int(rule[0]), *rule[1:]), (wanted[0], wanted[1], wanted[2])
    rows, found = _compute(*heads, row_scale, constants, chunk_bytes, backend, flags, dense)
    dhidden, dweight, dbias = (row_scale.new_empty(0) if g is None else g for g in found)
    return rows.sum(), dhidden, dweight, dbias


@linear_logit_rows.register_fake
def _(student_hidden: Tensor, student_weight: Tensor, b: Any, h: Any, w: Any, c: Any, scale: Tensor, *_: Any) -> Tensor:
    return scale.new_empty(scale.shape)


@linear_logit_total.register_fake
def _(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    row_scale: Tensor,
    rule: list[float],
    chunk_bytes: int,
    backend: str,
    dense: bool,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    inputs = (student_hidden, student_weight, student_bias)
    return row_scale.new_empty(()), *(
        row_scale.new_empty(x.shape if want and x is not None else 0) for x, want in zip(inputs, wanted, strict=True)
    )


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.rule, ctx.chunk_bytes, ctx.backend, ctx.dense = inputs
    ctx.save_for_backward(*tensors)


def _backward_rows(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward("linear_logit_loss")
    *tensors, row_scale = ctx.saved_tensors
    scale = torch.where(row_scale == 0, 0.0, row_scale * drows)
    wanted = list(ctx.needs_input_grad[:3])
    _, *found = linear_logit_total(*tensors, scale, ctx.rule, ctx.chunk_bytes, ctx.backend, ctx.dense, wanted)
    gradients = (g.to(x.dtype) if want else None for g, x, want in zip(found, tensors[:3], wanted, strict=True))
    return *gradients, *[None] * 8


def _setup_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for them either
    *tensors, ctx.rule, ctx.chunk_bytes, ctx.backend, ctx.dense, ctx.wanted = inputs
    ctx.save_for_backward(*tensors)
    ctx.kept = output[1:]


def _backward_total(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_double_backward("linear_logit_loss")
    if dtotal is None:
        return (None,) * 12
    tensors = ctx.saved_tensors

    def again() -> tuple[Tensor, ...]:
        rest = (ctx.rule, ctx.chunk_bytes, ctx.backend, ctx.dense, ctx.wanted)
        found: tuple[Tensor, ...] = linear_logit_total(*tensors, *rest)
        return found[1:]

    gradients = hand_out(ctx, dtotal, again)
    each = zip(gradients, tensors[:3], ctx.wanted, strict=True)
    return *(g.to(x.dtype) if want else None for g, x, want in each), *[None] * 9


linear_logit_rows.register_autograd(_backward_rows, setup_context=_setup_rows)
linear_logit_total.register_autograd(_backward_total, setup_context=_setup_total)
