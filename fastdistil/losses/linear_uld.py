"""Distillation across tokenizers by sorted probabilities of two heads, whose logits never exist as a whole."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistil.losses import _check, _terms
from fastdistil.losses.linear_logit import check_head, chunk_size
from fastdistil.losses.uld import check_rows, factors_of, temperatures_of
from fastdistil.ops.linear_uld import linear_uld_rows, linear_uld_total

_NAME = "linear_uld_loss"


def linear_uld_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    student_factor: Tensor | None = None,
    teacher_factor: Tensor | None = None,
    weight: Tensor | None = None,
    shift: bool = False,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`uld_loss` of `student_hidden @ student_weight.T + student_bias` and the teacher's likewise, chunk by chunk.

    Rows are positions at which both models have read the same text. The states of these are cheap to pick:
    states[positions] on each side, where the logits would be copied whole.

    Args:
        student_hidden: (..., D_s) float32, bfloat16, float16 or float64, as all others, in any combination.
            student_weight: (V_s, D_s), as in torch.nn.Linear. student_bias: (V_s,) or None.
        teacher_hidden: (..., D_t), the same rows. teacher_weight: (V_t, D_t); teacher_bias: (V_t,) or None. All
            constants.
        chunk_bytes: upper bound of the memory for logits, as in `linear_logit_loss`. Sorting takes 16 MiB more on a
            CPU and 256 MiB on a GPU, or one row's.
        temperature, teacher_temperature, student_factor, teacher_factor, reduction, num_items: as in `uld_loss`.
        weight: (...,) one number or bool per row; rows of weight 0 are dropped before the products (on a GPU, finding
            them synchronises once per call).
        shift: as in fastdistil.logit_loss: the weights are those of tokens, row i predicts token i + 1.
        student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap: as in `linear_logit_loss`.
        backend: "auto" or "reference", for the rows; the products are torch's.

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
        >>> _ = student_head.requires_grad_()
        >>> loss = fastdistil.linear_uld_loss(student, student_head, teacher, teacher_head)
        >>> loss.backward()
        >>> whole = fastdistil.uld_loss(student @ student_head.T, teacher @ teacher_head.T)
        >>> print(torch.allclose(loss, whole, rtol=1e-4), student_head.grad.shape)
        True torch.Size([50, 8])
    """
    _check.no_tangents(
        _NAME, student_hidden=student_hidden, student_weight=student_weight, student_bias=student_bias,
        teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, teacher_bias=teacher_bias,
        student_factor=student_factor, teacher_factor=teacher_factor, weight=weight,
    )  # fmt: skip
    heads = two_heads(_NAME, student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    temperatures = temperatures_of(_NAME, temperature, teacher_temperature)
    _check.one_of(_NAME, "reduction", reduction, _check.REDUCTIONS)
    device, rows = student_hidden.device, student_hidden.shape[:-1]
    chunk = chunk_size(_NAME, chunk_bytes, device)
    factors = factors_of(_NAME, student_factor, teacher_factor, rows, device)
    wide = any(x is not None and x.dtype == torch.float64 for x in (*heads, *factors))
    dtype = torch.float64 if wide else torch.float32
    w = _terms.row_weights(_NAME, weight, shift, rows, device, dtype)
    caps = _terms.caps(_NAME, student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap)
    scale = _check.row_scale(_NAME, math.prod(rows), w, reduction, num_items, device, dtype)
    arguments = (*heads, *factors, scale, [*temperatures, *caps], chunk, backend, weight is None)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (*heads[:3], factors[0])]
    if reduction != "none" and any(wanted):
        total: Tensor = linear_uld_total(*arguments, wanted, False)[0]
        return total
    losses: Tensor = linear_uld_rows(*arguments)
    return losses.reshape(rows) if reduction == "none" else losses.sum()


def two_heads(
    function: str,
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """The checked tensors of two heads of any widths, hidden states as (N, D)."""
    check_head(function, "student", student_hidden, student_weight, student_bias)
    check_head(function, "teacher", teacher_hidden, teacher_weight, teacher_bias)
    check_rows(function, student_hidden, teacher_hidden, "hidden", "D_t")
    for name, x in (("weight", teacher_weight), ("bias", teacher_bias)):
        if x is not None:
            _check.constant(function, f"teacher_{name}", x)
    usable = _check.usable
    return (
        usable(student_hidden).reshape(-1, student_hidden.shape[-1]),
        usable(student_weight),
        None if student_bias is None else usable(student_bias),
        usable(teacher_hidden).reshape(-1, teacher_hidden.shape[-1]),
        usable(teacher_weight),
        None if teacher_bias is None else usable(teacher_bias),
    )
