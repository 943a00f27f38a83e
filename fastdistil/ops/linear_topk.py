"""Custom ops of linear_topk_logit_loss: a top-k teacher against the logits of a head, one chunk of rows at a time.

The loop of linear_logit.py with the row op of topk_logit_loss: a product into float32, the row op, the cross entropy
with labels where there are any, two products back. ops/topk.py runs it over rows in memory.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastdistil.backends import choose, module
from fastdistil.backends.memory import new_empty
from fastdistil.contracts.topk import STATS, TopkRule
from fastdistil.ops.families import Found, family
from fastdistil.ops.linear_logit import StudentHead
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
    wanted: list[bool],
    rounded: bool,
) -> Found:
    """Rows (N,) times their scales and the gradients of their sum that are `wanted`, in row_scale's dtype."""
    flags = (wanted[0], wanted[1], wanted[2])
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
    head = StudentHead(hidden, weight, bias, scale, flags, vocab_map if labels is None else None)
    known = (values, indices, teacher_tail)
    teacher = canonical("linear_topk_logit_loss", *known, scale, head.columns, rule["tail"], vocab_map)
    rows = run(head, teacher, scale, rule, terms, chunk_bytes, name, any(wanted))
    found = head.gradients
    if kept is None:
        return Found(rows, found)

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(len(row_scale), *x.shape[1:]).index_copy_(0, kept, x)

    return Found(spread(rows), (None if found[0] is None else spread(found[0]), *found[1:]))


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


# hidden (N, D), weight (V, D), bias (V,), values (N, K), indices (N, K) int32 or int64, teacher_tail (N,) float32 or
# float64, row_scale (N,) float32 (float64 for float64 inputs), labels (N,) int64, label_scale (N,) as row_scale,
# vocab_map (V,) int64, `constants` of TopkRule in its order, then logit scale and softcap -> rows (N,) times their
# scales.
TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor values, Tensor indices, Tensor? teacher_tail"
TENSORS += ", Tensor row_scale, Tensor? labels, Tensor? label_scale, Tensor? vocab_map"
TENSOR_NAMES = [x.split()[-1] for x in TENSORS.split(",")]
OPTIONS = "float[] constants, int chunk_bytes, str backend, bool dense"
linear_topk_rows, linear_topk_total, _ = family(
    "linear_topk", "linear_topk_logit_loss", TENSORS, OPTIONS, _compute, gradients=("hidden", "weight", "bias")
)
