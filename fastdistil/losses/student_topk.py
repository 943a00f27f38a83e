"""Distillation of logits on the columns that the student itself finds most probable."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistil.contracts.topk import TAILS as TOPK_TAILS
from fastdistil.losses import _check, _terms
from fastdistil.losses.logit import logit_loss, matrix, rule_of
from fastdistil.ops.student_topk import log_probabilities_at
from fastdistil.ops.topk import topk_rows, topk_total

_NAME = "student_topk_logit_loss"
TAILS = ("bucket", "renormalize")


def student_topk_logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    k: int,
    tail: str = "bucket",
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    scale_by_t2: bool = True,
    weight: Tensor | None = None,
    shift: bool = False,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Divergence on the student's own k most probable columns (docs/losses.md, section 1c).

    On-policy distillation compares the two models where the student goes: with p = softmax(student_logits /
    temperature), q = softmax(teacher_logits / teacher_temperature) and S the columns of the student's k largest logits,

    ===========  =================================================================================================
    bucket       over k + 1 classes, S and all other columns together: 1 - p(S) against 1 - q(S)
    renormalize  p / p(S) against q / q(S), both on S alone; how much either has outside is not seen
    ===========  =================================================================================================

    "bucket" is at most the divergence over all columns (classes are merged), and is it at k = V. Which columns are in
    S is a constant: the gradient does not see that it depends on the student.

    Args:
        student_logits: (..., V) float32, bfloat16, float16 or float64.
        teacher_logits: the same shape, in any of these dtypes; a constant. It is read a few rows at a time.
        k: 1 to V. Of equal logits at the k-th place torch.topk chooses.
        tail: "bucket" or "renormalize".
        divergence: as in `logit_loss`, but for "mse"; by default KL(p || q).
        beta: the mixture's weight, as in `logit_loss`.
        temperature: T_s > 0; teacher_temperature: T_t > 0, by default the same.
        scale_by_t2: multiply by T_s * T_t.
        weight: (...,) one number or bool per row; a row of weight 0 contributes exactly 0, whatever it holds.
        shift: as in fastdistil.logit_loss: the weights are those of tokens, row i predicts token i + 1.
        reduction: "mean" is sum(w * loss) / sum(w), "sum" is sum(w * loss), "none" is w * loss, per row.
        num_items: replaces sum(w) in "mean": a number or a tensor of one entry.
        backend: "auto", "reference", "cpu" or "triton"; see fastdistil.backends().

    Returns:
        float32 (float64 where either side is): a scalar, or (...,) for reduction="none".

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
        NotImplementedError: in forward-mode differentiation (torch.func.jvp).

    Example:
        >>> import torch, fastdistil
        >>> student = torch.tensor([[3.0, 2.0, 0.0, -1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[2.0, 3.0, -1.0, 1.0]])
        >>> whole = fastdistil.logit_loss(student, teacher, divergence="reverse_kl")
        >>> for k in (1, 2, 4):
        ...     loss = fastdistil.student_topk_logit_loss(student, teacher, k=k)
        ...     print(f"{loss.item():.4f} of {whole.item():.4f}")
        0.4588 of 0.5072
        0.4595 of 0.5072
        0.5072 of 0.5072
    """
    _check.no_tangents(_NAME, student_logits=student_logits, teacher_logits=teacher_logits, weight=weight)
    student = _check.float_tensor(_NAME, "student_logits", student_logits)
    teacher = _check.float_tensor(_NAME, "teacher_logits", teacher_logits)
    if student.dim() == 0 or not 0 < student.shape[-1] < 2**31:
        raise ValueError(
            f"{_NAME}: student_logits has shape {tuple(student.shape)}, expected (..., V) with 1 <= V < 2^31"
        )
    _check.same_shape(
        _NAME, "teacher_logits", teacher, "student_logits", student.shape, "for two vocabularies see uld_loss"
    )
    _check.same_device(_NAME, "teacher_logits", teacher, "student_logits", student.device)
    _check.constant(_NAME, "teacher_logits", teacher)
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{_NAME}: k is {type(k).__name__}, expected an int")
    if not 1 <= k <= student.shape[-1]:
        raise ValueError(f"{_NAME}: k is {k}, expected 1 to {student.shape[-1]}, the number of columns")
    _check.one_of(_NAME, "tail", tail, TAILS)
    index, mixture, t_s, t_t, factor = rule_of(_NAME, divergence, beta, temperature, teacher_temperature, scale_by_t2)
    if divergence == "mse":
        raise ValueError(
            f"{_NAME}: divergence is 'mse', expected one of probabilities: a bucket of columns has no logit"
        )
    _check.one_of(_NAME, "reduction", reduction, _check.REDUCTIONS)
    rows, device = student.shape[:-1], student.device

    columns = student.detach().topk(k, dim=-1).indices
    if tail == "renormalize":
        _terms.row_weights(_NAME, weight, shift, rows, device, torch.float32)
        _check.given_items(_NAME, reduction, num_items, device, torch.float32)
        return logit_loss(
            student.gather(-1, columns), teacher.gather(-1, columns), divergence=divergence, beta=beta,
            temperature=t_s, teacher_temperature=t_t, scale_by_t2=scale_by_t2, weight=weight, shift=shift,
            reduction=reduction, num_items=num_items, backend=backend,
        )  # fmt: skip
    if teacher.dtype == torch.float64:  # the kernels know the student's dtype alone
        student = student.double()
    values, rest = log_probabilities_at(matrix(teacher), columns.reshape(-1, k), t_t)
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    w = _terms.row_weights(_NAME, weight, shift, rows, device, dtype)
    scale = _check.row_scale(_NAME, math.prod(rows), w, reduction, num_items, device, dtype)
    constants = [float(x) for x in (index, mixture, TOPK_TAILS.index(tail), t_s, factor, 1.0, 0.0)]
    arguments = (
        matrix(student), values, columns.reshape(-1, k), rest, scale, None, None, None, constants, backend,
    )  # fmt: skip
    # As in topk_logit_loss.
    if reduction != "none" and student.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        total: Tensor = topk_total(*arguments, [True], True)[0]
        return total
    losses: Tensor = topk_rows(*arguments)[0]
    return losses.reshape(rows) if reduction == "none" else losses.sum()
