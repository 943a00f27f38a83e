"""Distillation of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.backends import choose
from fastdistil.losses import _check
from fastdistil.ops import logit as ops
from fastdistil.ops.logit_rule import DIVERGENCES

_NAME = "logit_loss"


def logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    scale_by_t2: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Divergence of the student's next-token (or class) distribution from the teacher's.

    With p = softmax(student_logits / temperature) and q = softmax(teacher_logits / teacher_temperature):

    ==================  ==============================================================================
    forward_kl          KL(q || p), Hinton et al. 2015
    reverse_kl          KL(p || q), MiniLLM (Gu et al. 2024)
    jsd                 beta KL(q || m) + (1-beta) KL(p || m), m = beta q + (1-beta) p, GKD (Agarwal et al. 2024)
    skew_kl             KL(q || beta q + (1-beta) p), DistiLLM (Ko et al. 2024)
    skew_reverse_kl     KL(p || beta p + (1-beta) q), DistiLLM
    tvd                 1/2 sum |p - q|
    mse                 mean over V of the squared difference of the tempered logits
    ==================  ==============================================================================

    Value and gradient keep their relative precision when the student has almost become the teacher.

    Args:
        student_logits: (..., V) float32, bfloat16, float16 or float64.
        teacher_logits: the same shape, dtype and device; a constant.
        divergence: one of the names above.
        beta: the mixture's weight of the teacher (jsd, skew_kl) or of the student (skew_reverse_kl); inside (0, 1) for
            jsd, [0, 1) for the skewed ones, ignored by the others.
        temperature: T_s > 0; teacher_temperature: T_t > 0, by default the same.
        scale_by_t2: multiply by T_s * T_t, so that gradients keep their size as the temperature changes (Hinton 2015).
        weight: (...,) one number or bool a row; a row of weight 0 contributes exactly 0 and is not read.
        reduction: "mean" is sum(w * loss) / sum(w), "sum" is sum(w * loss), "none" is w * loss, one entry a row.
        num_items: replaces sum(w) in "mean": a number or a tensor of one entry (gradient accumulation, data parallel).
        inplace_backward: lets the gradient overwrite student_logits, which must not be read after this call and cannot
            be a leaf; a second backward is then an error, and an incoming gradient other than 1 costs 16-bit logits a
            second rounding. torch.compile, which plans memory itself, ignores it.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see fastdistil.backends().

    Returns:
        float32 (float64 for float64 logits): a scalar, or (...,) for reduction="none".

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    student = _check.float_tensor(_NAME, "student_logits", student_logits)
    teacher = _check.float_tensor(_NAME, "teacher_logits", teacher_logits)
    _check_pair(student, teacher)
    rule = rule_of(_NAME, divergence, beta, temperature, teacher_temperature, scale_by_t2)
    _check.one_of(_NAME, "reduction", reduction, _check.REDUCTIONS)
    if inplace_backward and student.is_leaf and student.requires_grad:
        raise ValueError(
            f"{_NAME}: inplace_backward came with student_logits that are a leaf, expected a model's output"
        )
    if not torch.compiler.is_compiling():
        choose(backend, student.device)

    rows = student.shape[:-1]
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    w = None if weight is None else _check.row_weight(_NAME, weight, rows, student.device, dtype)
    scale = _check.row_scale(_NAME, rows.numel(), w, reduction, num_items, student.device, dtype)
    matrices = (_matrix(student), _matrix(teacher))
    # The gradient ahead of its time, but not where torch.compile plans the memory.
    ahead = student.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if inplace_backward and ahead:
        loss = ops.Overwrite.apply(*matrices, scale, *rule, backend)  # type: ignore[no-untyped-call]
    else:  # "none" is rarely followed by a gradient of ones
        loss, _, _ = ops.logit(*matrices, scale, *rule, ahead and reduction != "none", backend)
    total: Tensor = loss.reshape(rows) if reduction == "none" else loss.sum()
    return total


def _matrix(x: Tensor) -> Tensor:
    """(..., V) as (N, V) with dense rows."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _check_pair(student: Tensor, teacher: Tensor) -> None:
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"{_NAME}: student_logits has shape {tuple(student.shape)}, expected (..., V) with V >= 1")
    _check.same_shape(_NAME, "teacher_logits", teacher, "student_logits", student.shape)
    _check.same_device(_NAME, "teacher_logits", teacher, "student_logits", student.device)
    if teacher.dtype != student.dtype:
        raise TypeError(
            f"{_NAME}: teacher_logits has dtype {teacher.dtype}, expected {student.dtype} to match student_logits"
        )
    _check.constant(_NAME, "teacher_logits", teacher)


def rule_of(
    function: str,
    divergence: str,
    beta: float,
    temperature: float,
    teacher_temperature: float | None,
    scale_by_t2: bool,
) -> tuple[int, float, float, float, float]:
    """The checked constants in the order of LogitRule."""
    _check.one_of(function, "divergence", divergence, DIVERGENCES)
    value = _check.number(function, "beta", beta)
    if divergence == "jsd" and not 0 < value < 1:
        raise ValueError(
            f"{function}: beta is {value} for jsd, expected 0 < beta < 1 (the limits are forward_kl and reverse_kl)"
        )
    if divergence.startswith("skew") and not 0 <= value < 1:
        raise ValueError(f"{function}: beta is {value} for {divergence}, expected 0 <= beta < 1")
    t_s = _check.positive(function, "temperature", temperature)
    t_t = t_s if teacher_temperature is None else _check.positive(function, "teacher_temperature", teacher_temperature)
    return DIVERGENCES.index(divergence), value, t_s, t_t, t_s * t_t if scale_by_t2 else 1.0
