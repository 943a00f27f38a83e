"""Custom ops of linear_topk_logit_loss: a top-k teacher against the logits of a head, one chunk of rows at a time.

The loop of linear_logit.py with the row op of topk_logit_loss: a product into float32, the row op, the cross entropy
with labels where there are any, two products back. ops/topk_rows.py runs it over rows in memory.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fastdistil.backends import choose, module
from fastdistil.backends.memory import new_empty
from fastdistil.contracts.topk import STATS, TopkRule
from fastdistil.ops.gradients import hand_out, refuse_double_backward
from fastdistil.ops.linear_logit import Flags, Gradients, StudentHead
from fastdistil.ops.logit_terms import ALIGNED_COLUMNS, Terms, cap, cap_back, chunk_rows
from fastdistil.ops.precision import with_exact_products
from fastdistil.ops.row_statistics import kernels
from fastdistil.ops.topk_teacher import canonical


class Source(Protocol):
    columns: int  # V

    def logits(self, rows: slice, out: Tensor) -> None:
        """Writes the logits of `rows` (n, V)."""

    def back(self, rows: slice, gradient: Tensor) -> None:
        """Takes the gradient of those logits (n, V)."""


def unpack(constants: list[float]) -> tuple[TopkRule, tuple[float, float]]:
    """The rule, and the student's logit scale and softcap (0 for none)."""
    divergence, beta, tail, temperature, factor, scale, softcap = constants
    rule: TopkRule = {
        "divergence": int(divergence),
        "beta": beta,
        "tail": int(tail),
        "temperature": temperature,
        "value_factor": factor,
    }
    return rule, (scale, softcap)


@with_exact_products
def _compute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    teacher_tail: Tensor | None,
    row_scale: Tensor,
    labels: Tensor | None,
    label_scale: Tensor | None,
    vocab_map: Tensor | None,
    constants: list[float],
    chunk_bytes: int,
    backend: str,
    dense: bool,
    wanted: Flags,
) -> tuple[Tensor, Gradients]:
    """Rows (N,) times their scales and the gradients of their sum that are `wanted`, in row_scale's dtype."""
    name = choose(backend, row_scale.device, row_scale.dtype)
    rule, caps = unpack(constants)
    terms = Terms(labels, label_scale, vocab_map, *caps)
    kept = None if dense else terms.counts(row_scale).nonzero()[:, 0]
    if kept is not None and len(kept) < len(row_scale):
        hidden, values, indices, scale = hidden[kept], values[kept], indices[kept], row_scale[kept]
        teacher_tail = None if teacher_tail is None else teacher_tail[kept]
        terms = terms.rows(kept)
    else:
        kept, scale = None, row_scale
    head = StudentHead(hidden, weight, bias, scale, wanted, vocab_map if labels is None else None)
    known = (values, indices, teacher_tail)
    teacher = canonical("linear_topk_logit_loss", *known, scale, head.columns, rule["tail"], vocab_map)
    rows = run(head, teacher, scale, rule, terms, chunk_bytes, name, any(wanted))
    found = head.gradients
    if kept is None:
        return rows, found

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(len(row_scale), *x.shape[1:]).index_copy_(0, kept, x)

    return spread(rows), (None if found[0] is None else spread(found[0]), *found[1:])


def run(
    source: Source,
    teacher: tuple[Tensor, Tensor, Tensor],
    scale: Tensor,
    rule: TopkRule,
    terms: Terms,
    chunk_bytes: int,
    name: str,
    need: bool,
) -> Tensor:
    """Rows (N,) times their scales, in scale's dtype, as the buffers are; of the terms, labels, the
    map and the student's caps.

    teacher: what `canonical` returns. need: whether the source is to get gradients."""
    rows, count = torch.empty_like(scale), len(scale)
    if count == 0:
        return rows
    u, columns, rest = teacher
    topk = module("topk", name)
    with_raw = need and terms.student_softcap != 0
    step = chunk_rows(count, source.columns, scale.element_size(), chunk_bytes, 2 + with_raw)
    padded = -(-source.columns // ALIGNED_COLUMNS) * ALIGNED_COLUMNS
    buffers = new_empty(scale, (1 + need + with_raw, step, padded))[:, :, : source.columns]
    stats = scale.new_empty((step, STATS + u.shape[1]), dtype=torch.float64)
    alone = None if terms.vocab_map is None else (terms.vocab_map < 0).nonzero()[:, 0]
    for start in range(0, count, step):
        chunk = slice(start, min(start + step, count))
        n = chunk.stop - start
        logits, gradient = buffers[0, :n], buffers[1, :n] if need else None
        source.logits(chunk, logits)
        raw = buffers[2, :n] if with_raw else None  # the logits before their softcap, in its units
        cap(logits, *terms.caps[:2], raw)
        kept = None
        if alone is not None:
            kept = logits[:, alone] if terms.labels is not None else None
            logits.index_fill_(1, alone, float("-inf"))
        part = (u[chunk], columns[chunk], rest[chunk], scale[chunk], rows[chunk], stats[:n])
        topk.topk_fwd(logits, *part, gradient, **rule)
        if terms.labels is not None and terms.label_scale is not None:
            if kept is not None and alone is not None:
                logits.index_copy_(1, alone, kept)
            entropy = kernels("cross_entropy", name, scale)
            entropy.cross_entropy_rows(logits, terms.labels[chunk], terms.label_scale[chunk], rows[chunk], gradient)
        if gradient is not None:
            cap_back(gradient, raw, *terms.caps[:2])
            if alone is not None and terms.labels is None:
                gradient.index_fill_(1, alone, 0.0)  # capping back made NaN of what was -inf
            source.back(chunk, gradient)
    return rows


@torch.library.custom_op("fastdistil::linear_topk_rows", mutates_args=())
def linear_topk_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    teacher_tail: Tensor | None,
    row_scale: Tensor,
    labels: Tensor | None,
    label_scale: Tensor | None,
    vocab_map: Tensor | None,
    constants: list[float],
    chunk_bytes: int,
    backend: str,
    dense: bool,
) -> Tensor:
    """hidden (N, D), weight (V, D), bias (V,), values (N, K), indices (N, K) int32 or int64, teacher_tail (N,) float32
    or float64, row_scale (N,) float32 (float64 for float64 inputs), labels (N,) int64, label_scale (N,) as row_scale,
    vocab_map (V,) int64, `constants` of TopkRule in its order, then logit scale and softcap -> rows (N,) times their
    scales."""
    options = (row_scale, labels, label_scale, vocab_map, constants, chunk_bytes, backend, dense)
    return _compute(hidden, weight, bias, values, indices, teacher_tail, *options, (False, False, False))[0]


@torch.library.custom_op("fastdistil::linear_topk_total", mutates_args=())
def linear_topk_total(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    indices: Tensor,
    teacher_tail: Tensor | None,
    row_scale: Tensor,
    labels: Tensor | None,
    label_scale: Tensor | None,
    vocab_map: Tensor | None,
    constants: list[float],
    chunk_bytes: int,
    backend: str,
    dense: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `linear_topk_rows` -> the rows' sum () and its gradients in hidden, weight and bias in row_scale's dtype,
    empty where not `wanted`."""
    options = (row_scale, labels, label_scale, vocab_map, constants, chunk_bytes, backend, dense)
    flags = (wanted[0], wanted[1], wanted[2])
    rows, found = _compute(hidden, weight, bias, values, indices, teacher_tail, *options, flags)
    dhidden, dweight, dbias = (row_scale.new_empty(0) if g is None else g for g in found)
    return rows.sum(), dhidden, dweight, dbias


@linear_topk_rows.register_fake
def _(*args: Any) -> Tensor:
    found: Tensor = args[6].new_empty(args[6].shape)
    return found


@linear_topk_total.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    scale, wanted = args[6], args[14]
    shapes = (x.shape if want and x is not None else 0 for x, want in zip(args[:3], wanted, strict=True))
    return scale.new_empty(()), *(scale.new_empty(shape) for shape in shapes)


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:]


def _backward_rows(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
    refuse_double_backward("linear_topk_logit_loss")
    *tensors, row_scale, labels, label_scale, vocab_map = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    scale, label_scale = (None if x is None else torch.where(x == 0, 0.0, x * drows) for x in (row_scale, label_scale))
    _, *found = linear_topk_total(*tensors, scale, labels, label_scale, vocab_map, *ctx.options, wanted)
    each = zip(found, tensors[:3], wanted, strict=True)
    return *(g.to(x.dtype) if want else None for g, x, want in each), *[None] * 11


def _setup_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10])
    ctx.options = inputs[10:]
    ctx.kept = output[1:]


def _backward_total(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    refuse_double_backward("linear_topk_logit_loss")
    if dtotal is None:
        return (None,) * 15
    tensors = ctx.saved_tensors

    def again() -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = linear_topk_total(*tensors, *ctx.options)
        return found[1:]

    each = zip(hand_out(ctx, dtotal, again), tensors[:3], ctx.options[-1], strict=True)
    return *(g.to(x.dtype) if want else None for g, x, want in each), *[None] * 12


linear_topk_rows.register_autograd(_backward_rows, setup_context=_setup_rows)
linear_topk_total.register_autograd(_backward_total, setup_context=_setup_total)
