"""Distillation of a head's logits, which never exist as a whole, from a top-k teacher."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastdistil.contracts.topk import TAILS
from fastdistil.losses import _check, _heads, _terms
from fastdistil.losses.linear_logit import check_head, chunk_size
from fastdistil.losses.logit import rule_of
from fastdistil.losses.topk import check_defined, check_teacher, labels_of, partners_of, tail_of
from fastdistil.ops.linear_topk import TENSOR_NAMES, linear_topk_rows, linear_topk_total
from fastdistil.ops.shards import Call, run

_NAME = "linear_topk_logit_loss"


def linear_topk_logit_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_values: Tensor,
    teacher_indices: Tensor,
    *,
    teacher_tail: Tensor | None = None,
    student_bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    tail: str = "bucket",
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    weight: Tensor | None = None,
    shift: bool = False,
    labels: Tensor | Literal["teacher"] | None = None,
    label_weight: float | None = None,
    label_num_items: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_map: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`topk_logit_loss` of `student_hidden @ student_weight.T + student_bias`, chunk by chunk.

    Args:
        student_hidden: (..., D) float32, bfloat16, float16 or float64. student_weight: (V, D); student_bias: (V,).
            DTensors are gathered; under fully_shard every rank has to call (docs/trainers/many-devices.md).
        teacher_values, teacher_indices, teacher_tail: (..., K) twice and (...,), as in `topk_logit_loss`.
        chunk_bytes: upper bound of the memory for logits, as in `linear_logit_loss`.
        tail, divergence, beta, temperature, scale_by_t2, labels, label_weight, label_num_items, ignore_index,
            vocab_map, reduction, num_items: as in `topk_logit_loss`.
        student_logit_scale, student_softcap: as in `linear_logit_loss`; cached teacher outputs are taken as they are.
        weight: (...,) one number or bool per row; rows of weight 0 are dropped before the products (on a GPU, finding
            them synchronises once per call).
        shift: as in fastdistil.logit_loss: weight and labels are those of tokens, row i predicts token i + 1.
        backend: "auto", "reference", "cpu" or "triton", for the rows; the products are torch's.

    Returns:
        float32 (float64 where hidden, weight or bias is): a scalar, or (...,) for reduction="none", whose backward pass
        computes everything again.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted; wrong entries of the teacher as in
            `topk_logit_loss`.
        NotImplementedError: in forward-mode differentiation (torch.func.jvp).

    Example:
        >>> import torch, fastdistil
        >>> draw = torch.Generator().manual_seed(0)
        >>> hidden, head = torch.randn(4, 8, generator=draw), torch.randn(50, 8, generator=draw)
        >>> values, indices = torch.randn(4, 50, generator=draw).log_softmax(-1).topk(3)
        >>> _ = hidden.requires_grad_()
        >>> loss = fastdistil.linear_topk_logit_loss(hidden, head, values, indices)
        >>> loss.backward()
        >>> whole = fastdistil.topk_logit_loss(hidden @ head.T, values, indices)  # from logits that it never holds
        >>> print(torch.allclose(loss, whole, rtol=1e-4), hidden.grad.shape)
        True torch.Size([4, 8])
    """
    student_hidden = _heads.whole_rows(student_hidden)
    given = {"student_weight": student_weight, "student_bias": student_bias}
    parts = _heads.resolve(_NAME, given, student_hidden, None, whole=True)
    student_weight, student_bias = parts.tensors.values()  # type: ignore[assignment]
    _check.no_tangents(
        _NAME, student_hidden=student_hidden, student_weight=student_weight, student_bias=student_bias,
        teacher_values=teacher_values, weight=weight,
    )  # fmt: skip
    check_head(_NAME, "student", student_hidden, student_weight, student_bias)
    values = _check.float_tensor(_NAME, "teacher_values", teacher_values)
    check_teacher(_NAME, student_hidden, student_weight.shape[0], values, teacher_indices)
    _check.one_of(_NAME, "tail", tail, TAILS)
    known = tail_of(_NAME, teacher_tail, tail, values)
    index, mixture, t, _, factor = rule_of(_NAME, divergence, beta, temperature, None, scale_by_t2)
    _check.one_of(_NAME, "reduction", reduction, _check.REDUCTIONS)
    check_defined(_NAME, tail, divergence, mixture)
    device, rows = student_hidden.device, student_hidden.shape[:-1]
    chunk = chunk_size(_NAME, chunk_bytes, device)

    heads = tuple(None if x is None else _check.usable(x) for x in (student_hidden, student_weight, student_bias))
    hidden, matrix, bias = heads
    assert hidden is not None and matrix is not None
    teacher_indices = _check.usable(teacher_indices)
    wide = any(x is not None and x.dtype == torch.float64 for x in heads)
    dtype = torch.float64 if wide else torch.float32
    w = _terms.row_weights(_NAME, weight, shift, rows, device, dtype)
    columns = student_weight.shape[0]
    label, counted, alpha = _terms.labels(
        _NAME, labels, label_weight, ignore_index, w, rows, columns, device, label_num_items, shift
    )
    partners = None if vocab_map is None else partners_of(_NAME, vocab_map, columns, device)
    scale, label_scale = _terms.scales(
        _NAME, math.prod(rows), w, counted, alpha, reduction, num_items, label_num_items, device, dtype
    )
    if label is None and label_scale is not None:
        label, there = labels_of(values, teacher_indices, columns, partners)
        label_scale = torch.where(there, label_scale, 0.0)
    caps = _terms.caps(_NAME, student_logit_scale, student_softcap, 1.0, None)[:2]
    k, constants = values.shape[-1], [float(x) for x in (index, mixture, TAILS.index(tail), t, factor, *caps)]
    arguments = (
        hidden.reshape(-1, hidden.shape[-1]), matrix, bias, values.reshape(-1, k), teacher_indices.reshape(-1, k),
        known, scale, label, label_scale, partners, constants, chunk, backend, weight is None,
    )  # fmt: skip
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in heads]
    summed = reduction != "none" and any(wanted)
    loss: Tensor
    if parts.shards:
        shards = {TENSOR_NAMES.index(x.removeprefix("student_")): shard for x, shard in parts.shards.items()}
        call = Call(linear_topk_rows, linear_topk_total, TENSOR_NAMES, [*arguments], shards, wanted, summed)
        loss = run(call)
    else:
        loss = linear_topk_total(*arguments, wanted, False)[0] if summed else linear_topk_rows(*arguments)
    if summed:
        return loss
    return loss.reshape(rows) if reduction == "none" else loss.sum()
