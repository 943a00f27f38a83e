"""Custom ops of linear_topk_logit_loss: a top-k teacher against the logits of a head, one chunk of rows at a time.

The loop of linear_logit.py with the row op of topk_logit_loss: a product into float32, the row op, two products back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistil.backends import choose, get
from fastdistil.backends.memory import new_empty
from fastdistil.ops.gradients import hand_out, refuse_double_backward
from fastdistil.ops.linear_logit import Flags, Gradients, StudentHead
from fastdistil.ops.logit_terms import ALIGNED_COLUMNS, chunk_rows
from fastdistil.ops.precision import without_autocast
from fastdistil.ops.topk_rule import STATS, TopkRule, canonical


@without_autocast
def _compute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    row_scale: Tensor,
    constants: list[float],
    chunk_bytes: int,
    backend: str,
    dense: bool,
    wanted: Flags,
) -> tuple[Tensor, Gradients]:
    """Rows (N,) times their scales and the gradients of their sum that are `wanted`, in row_scale's dtype."""
    name = choose(backend, hidden.device)
    if name == "triton" and row_scale.dtype == torch.float64:
        if backend == "triton":
            raise ValueError("linear_topk_logit_loss: backend 'triton' has no float64 kernel, expected 'reference'")
        name = "reference"
    divergence, beta, tail, temperature, factor = constants
    rule: TopkRule = {
        "divergence": int(divergence),
        "beta": beta,
        "tail": int(tail),
        "temperature": temperature,
        "value_factor": factor,
    }
    kept = None if dense else row_scale.nonzero()[:, 0]
    if kept is not None and len(kept) < len(row_scale):
        hidden, values, indices, scale = hidden[kept], values[kept], indices[kept], row_scale[kept]
    else:
        kept, scale = None, row_scale
    head = StudentHead(hidden, weight, bias, scale, wanted)
    teacher = canonical("linear_topk_logit_loss", values, indices, scale, head.columns, rule["tail"])
    rows = _chunks(head, teacher, scale, rule, chunk_bytes, name)
    found = head.gradients
    if kept is None:
        return rows, found

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(len(row_scale), *x.shape[1:]).index_copy_(0, kept, x)

    return spread(rows), (None if found[0] is None else spread(found[0]), *found[1:])


def _chunks(
    head: StudentHead, teacher: tuple[Tensor, Tensor], scale: Tensor, rule: TopkRule, chunk_bytes: int, name: str
) -> Tensor:
    rows, count, need = torch.empty_like(scale), len(scale), any(x is not None for x in head.gradients)
    if count == 0:
        return rows
    u, columns = teacher
    module = get("topk", name, scale.device)
    step = chunk_rows(count, head.columns, scale.element_size(), chunk_bytes)
    padded = -(-head.columns // ALIGNED_COLUMNS) * ALIGNED_COLUMNS
    buffers = new_empty(scale, (1 + need, step, padded))[:, :, : head.columns]
    stats = scale.new_empty((step, STATS + u.shape[1]), dtype=torch.float64)
    for start in range(0, count, step):
        chunk = slice(start, min(start + step, count))
        n = chunk.stop - start
        logits, gradient = buffers[0, :n], buffers[1, :n] if need else None
        head.logits(chunk, logits)
        part = (u[chunk], columns[chunk], scale[chunk], rows[chunk], stats[:n])
        module.topk_fwd(logits, *part, gradient, **rule)
        if gradient is not None:
            head.back(chunk, gradient)
    return rows


@torch.library.custom_op("fastdistil::linear_topk_rows", mutates_args=())
def linear_topk_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    row_scale: Tensor,
    constants: list[float],
    chunk_bytes: int,
    backend: str,
    dense: bool,
) -> Tensor:
    """hidden (N, D), weight (V, D), bias (V,), values (N, K), indices (N, K) int32 or int64, row_scale (N,) float32
    (float64 for float64 inputs), `constants` of TopkRule in its order -> rows (N,) times their scales."""
    options = (row_scale, constants, chunk_bytes, backend, dense)
    return _compute(hidden, weight, bias, values, indices, *options, (False, False, False))[0]


@torch.library.custom_op("fastdistil::linear_topk_total", mutates_args=())
def linear_topk_total(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    row_scale: Tensor,
    constants: list[float],
    chunk_bytes: int,
    backend: str,
    dense: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `linear_topk_rows` -> the rows' sum () and its gradients in hidden, weight and bias in row_scale's dtype,
    empty where not `wanted`."""
    options, flags = (row_scale, constants, chunk_bytes, backend, dense), (wanted[0], wanted[1], wanted[2])
    rows, found = _compute(hidden, weight, bias, values, indices, *options, flags)
    dhidden, dweight, dbias = (row_scale.new_empty(0) if g is None else g for g in found)
    return rows.sum(), dhidden, dweight, dbias


@linear_topk_rows.register_fake
def _(*args: Any) -> Tensor:
    found: Tensor = args[5].new_empty(args[5].shape)
    return found


@linear_topk_total.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    scale, wanted = args[5], args[10]
    shapes = (x.shape if want and x is not None else 0 for x, want in zip(args[:3], wanted, strict=True))
    return scale.new_empty(()), *(scale.new_empty(shape) for shape in shapes)


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _backward_rows(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward("linear_topk_logit_loss")
    *tensors, row_scale = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    scale = torch.where(row_scale == 0, 0.0, row_scale * drows)
    _, *found = linear_topk_total(*tensors, scale, *ctx.options, wanted)
    each = zip(found, tensors[:3], wanted, strict=True)
    return *(g.to(x.dtype) if want else None for g, x, want in each), *[None] * 7


def _setup_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]
    ctx.kept = output[1:]


def _backward_total(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_double_backward("linear_topk_logit_loss")
    if dtotal is None:
        return (None,) * 11
    tensors = ctx.saved_tensors

    def again() -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = linear_topk_total(*tensors, *ctx.options)
        return found[1:]

    each = zip(hand_out(ctx, dtotal, again), tensors[:3], ctx.options[-1], strict=True)
    return *(g.to(x.dtype) if want else None for g, x, want in each), *[None] * 8


linear_topk_rows.register_autograd(_backward_rows, setup_context=_setup_rows)
linear_topk_total.register_autograd(_backward_total, setup_context=_setup_total)
