"""Distillation of two heads' logits across tokenizers through a sparse map of probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistil.losses import _check, _terms
from fastdistil.losses.linear_logit import chunk_size
from fastdistil.losses.linear_uld import two_heads
from fastdistil.losses.logit import rule_of
from fastdistil.losses.projected import check_divergence, check_projection
from fastdistil.losses.vocab_projection import VocabProjection
from fastdistil.ops.linear_projected import linear_projected_rows, linear_projected_total
from fastdistil.ops.logit_terms import pack

_NAME = "linear_projected_logit_loss"


def linear_projected_logit_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    projection: VocabProjection,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    renormalize: bool = True,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    scale_by_t2: bool = True,
    weight: Tensor | None = None,
    shift: bool = False,
    labels: Tensor | None = None,
    label_weight: float | None = None,
    label_num_items: float | Tensor | None = None,
    ignore_index: int = -100,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`projected_logit_loss` of `student_hidden @ student_weight.T + student_bias` and the teacher's likewise, chunk by
    chunk.

    The products are float32 (float64 for float64 inputs), all behind them is float64. Rows are positions at which both
    models have read the same text; their states are picked before: states[positions] on each side.

    Args:
        student_hidden: (..., D_s) float32, bfloat16, float16 or float64, as all others, in any combination.
            student_weight: (V_s, D_s), as in torch.nn.Linear. student_bias: (V_s,) or None.
        teacher_hidden: (..., D_t), the same rows. teacher_weight: (V_t, D_t); teacher_bias: (V_t,) or None. All
            constants.
        projection: as in `projected_logit_loss`.
        chunk_bytes: upper bound of the memory for logits and what is made of them, as in `linear_logit_loss`. The
            teacher's of a chunk take 20 bytes for each entry of the projection and row.
        renormalize, divergence, beta, temperature, teacher_temperature, scale_by_t2, labels, label_weight,
            label_num_items, ignore_index, reduction, num_items: as in `projected_logit_loss`. Without renormalize the
            teacher's products are formed twice.
        weight: (...,) one number or bool per row; rows of weight 0 are dropped before the products (on a GPU, finding
            them synchronises once per call).
        shift: as in fastdistil.logit_loss: weight and labels are those of tokens, row i predicts token i + 1.
        student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap: as in `linear_logit_loss`.
        backend: "auto", "reference", "cpu" or "cuda", for the rows; the products are torch's.

    Returns:
        float32 (float64 where an input is): a scalar, or (...,) for reduction="none", whose backward pass computes
        everything again.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
        NotImplementedError: in forward-mode differentiation (torch.func.jvp).

    Example:
        >>> import torch, fastdistil
        >>> draw = torch.Generator().manual_seed(0)
        >>> student, student_head = torch.randn(4, 8, generator=draw), torch.randn(50, 8, generator=draw)
        >>> teacher, teacher_head = torch.randn(4, 16, generator=draw), torch.randn(70, 16, generator=draw)
        >>> projection = fastdistil.VocabProjection.of(torch.eye(50, 70).to_sparse())
        >>> _ = student_head.requires_grad_()
        >>> heads = student, student_head, teacher, teacher_head
        >>> loss = fastdistil.linear_projected_logit_loss(*heads, projection)
        >>> loss.backward()
        >>> logits = student @ student_head.T, teacher @ teacher_head.T  # which it never holds as a whole
        >>> whole = fastdistil.projected_logit_loss(*logits, projection)
        >>> print(torch.allclose(loss, whole, rtol=1e-4), student_head.grad.shape)
        True torch.Size([50, 8])
    """
    _check.no_tangents(
        _NAME, student_hidden=student_hidden, student_weight=student_weight, student_bias=student_bias,
        teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, teacher_bias=teacher_bias, weight=weight,
    )  # fmt: skip
    heads = two_heads(_NAME, student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    device, rows, columns = student_hidden.device, student_hidden.shape[:-1], student_weight.shape[0]
    tensors = check_projection(_NAME, projection, columns, teacher_weight.shape[0], device, "weight")
    rule = rule_of(_NAME, divergence, beta, temperature, teacher_temperature, scale_by_t2)
    check_divergence(_NAME, divergence, renormalize)
    _check.one_of(_NAME, "reduction", reduction, _check.REDUCTIONS)
    chunk = chunk_size(_NAME, chunk_bytes, device)
    dtype = torch.float64 if any(x is not None and x.dtype == torch.float64 for x in heads) else torch.float32
    w = _terms.row_weights(_NAME, weight, shift, rows, device, dtype)
    label, counted, alpha = _terms.labels(
        _NAME, labels, label_weight, ignore_index, w, rows, columns, device, label_num_items, shift
    )
    caps = _terms.caps(_NAME, student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap)
    scale, label_scale = _terms.scales(
        _NAME, math.prod(rows), w, counted, alpha, reduction, num_items, label_num_items, device, dtype
    )
    arguments = (
        *heads, *tensors, scale, label, label_scale, pack(rule, caps), renormalize, chunk, backend, weight is None,
    )  # fmt: skip
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in heads[:3]]
    if reduction != "none" and any(wanted):
        total: Tensor = linear_projected_total(*arguments, wanted, False)[0]
        return total
    losses: Tensor = linear_projected_rows(*arguments)
    return losses.reshape(rows) if reduction == "none" else losses.sum()
