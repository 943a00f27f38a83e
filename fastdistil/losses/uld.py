"""Distillation across tokenizers by sorted probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistil.losses import _check, _terms
from fastdistil.losses.logit import matrix
from fastdistil.ops.uld import uld_rows, uld_total

_NAME = "uld_loss"


def uld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    student_factor: Tensor | None = None,
    teacher_factor: Tensor | None = None,
    weight: Tensor | None = None,
    shift: bool = False,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Universal logit distillation: the distance of two sorted distributions, whose columns need not correspond.

    With p = softmax(student_logits / temperature) and q = softmax(teacher_logits / teacher_temperature), each sorted
    from the largest to the smallest and the shorter one followed by zeros, a row's value is sum_i |p_i - q_i|, from 0
    to 2 (Boizard et al., TMLR 2025, arXiv 2402.12030; docs/losses.md, section 1b). The paper derives it as an optimal
    transport at a uniform cost: what a column means is not looked at. Where the tokenizers' pieces can be compared,
    `projected_logit_loss` sees more.

    A row is a position at which both models have read the same text and predict what follows: which positions those
    are is the caller's to say, by handing in these rows alone.

    Value and gradient are computed in float64 behind the sorts. Memory beyond the gradient is that of a few rows.

    Args:
        student_logits: (..., V_s) float32, bfloat16, float16 or float64.
        teacher_logits: (..., V_t), the same rows, in any of these dtypes; a constant.
        temperature: T_s > 0; teacher_temperature: T_t > 0, by default the same. There is no factor T^2.
        student_factor: (...,) floating, a factor of each row's p, by default 1; it may have a gradient. A row that
            stands for several tokens has the probability of the others as its factor (TRL's GOLD).
        teacher_factor: (...,) likewise of q, a constant.
        weight: (...,) one number or bool per row; a row of weight 0 contributes exactly 0, whatever it holds.
        shift: as in fastdistil.logit_loss: the weights are those of tokens, row i predicts token i + 1.
        reduction: "mean" is sum(w * loss) / sum(w), "sum" is sum(w * loss), "none" is w * loss, per row.
        num_items: replaces sum(w) in "mean": a number or a tensor of one entry.
        backend: "auto" or "reference": the sorts are torch's on every device.

    Returns:
        float32 (float64 where an input is): a scalar, or (...,) for reduction="none". The gradient at ranks where
        p_i = q_i is that of 0, one of the subgradients. Columns of equal student logits are taken in their order: the
        value does not depend on it, and the gradient is again one of the subgradients.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
        NotImplementedError: in forward-mode differentiation (torch.func.jvp).

    Example:
        >>> import torch, fastdistil
        >>> student = torch.tensor([[0.0, 2.0, 1.0]], requires_grad=True)
        >>> print(f"{fastdistil.uld_loss(student, torch.tensor([[1.0, 0.0, 2.0]])).item():.4f}")  # another order
        0.0000
        >>> loss = fastdistil.uld_loss(student, torch.tensor([[1.0, 3.0]]))
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", student.grad.shape)
        0.4311 torch.Size([1, 3])
    """
    _check.no_tangents(
        _NAME, student_logits=student_logits, teacher_logits=teacher_logits, student_factor=student_factor,
        teacher_factor=teacher_factor, weight=weight,
    )  # fmt: skip
    student = _check.float_tensor(_NAME, "student_logits", student_logits)
    teacher = _check.float_tensor(_NAME, "teacher_logits", teacher_logits)
    check_rows(_NAME, student, teacher, "logits", "V_t")
    temperatures = temperatures_of(_NAME, temperature, teacher_temperature)
    _check.one_of(_NAME, "reduction", reduction, _check.REDUCTIONS)
    rows, device = student.shape[:-1], student.device
    factors = factors_of(_NAME, student_factor, teacher_factor, rows, device)
    wide = any(x is not None and x.dtype == torch.float64 for x in (student, teacher, *factors))
    dtype = torch.float64 if wide else torch.float32
    w = _terms.row_weights(_NAME, weight, shift, rows, device, dtype)
    scale = _check.row_scale(_NAME, math.prod(rows), w, reduction, num_items, device, dtype)
    arguments = (matrix(student), matrix(teacher), *factors, scale, temperatures, backend)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (student, factors[0])]
    # A float16 gradient rounded before a GradScaler's scale is known would underflow.
    if reduction != "none" and any(wanted) and student.dtype != torch.float16:
        total: Tensor = uld_total(*arguments, wanted, True)[0]
        return total
    losses: Tensor = uld_rows(*arguments)
    return losses.reshape(rows) if reduction == "none" else losses.sum()


def check_rows(function: str, student: Tensor, teacher: Tensor, what: str, columns: str) -> None:
    """Raises where teacher (..., columns) is no constant on the rows and the device of student (..., anything)."""
    for side, x in (("student", student), ("teacher", teacher)):
        if x.dim() == 0 or x.shape[-1] == 0:
            raise ValueError(f"{function}: {side}_{what} has shape {tuple(x.shape)}, expected (..., V) with V >= 1")
    if teacher.shape[:-1] != student.shape[:-1]:
        wanted = ", ".join(map(str, (*student.shape[:-1], columns)))
        raise ValueError(
            f"{function}: teacher_{what} has shape {tuple(teacher.shape)}, expected ({wanted}) to match student_{what}"
        )
    _check.same_device(function, f"teacher_{what}", teacher, f"student_{what}", student.device)
    _check.constant(function, f"teacher_{what}", teacher)


def temperatures_of(function: str, temperature: object, teacher_temperature: object) -> list[float]:
    """The checked temperatures of student and teacher."""
    found = _check.positive(function, "temperature", temperature)
    if teacher_temperature is None:
        return [found, found]
    return [found, _check.positive(function, "teacher_temperature", teacher_temperature)]


def factors_of(
    function: str, student_factor: object, teacher_factor: object, rows: torch.Size, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The checked factors, flat."""
    found: list[Tensor | None] = []
    for side, value in (("student", student_factor), ("teacher", teacher_factor)):
        if value is None:
            found.append(None)
            continue
        factor = _check.float_tensor(function, f"{side}_factor", value)
        _check.same_shape(function, f"{side}_factor", factor, "the rows", rows)
        _check.same_device(function, f"{side}_factor", factor, "the rows", device)
        if side == "teacher":
            _check.constant(function, "teacher_factor", factor)
        found.append(factor.reshape(-1))
    return found[0], found[1]
