"""Distillation of logits across tokenizers through a sparse map of probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistil.losses import _check, _terms
from fastdistil.losses.logit import matrix, rule_of
from fastdistil.losses.uld import check_rows
from fastdistil.losses.vocab_projection import VocabProjection
from fastdistil.ops.logit_terms import pack
from fastdistil.ops.projected import projected_rows, projected_total

_NAME = "projected_logit_loss"


def projected_logit_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    projection: VocabProjection,
    *,
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
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Divergence from a teacher with another vocabulary, whose probabilities a sparse matrix brings into the student's.

    With q_t = softmax(teacher_logits / teacher_temperature) and the projection's M, the teacher is q = M q_t, divided
    by its sum, and the student p = softmax(student_logits / temperature) over the columns that M maps anything to: all
    of section 1's divergences but "mse" (docs/losses.md, section 1d). Student columns without an entry in M are left
    out on both sides and get no gradient, as with `logit_loss`'s vocab_map, which is the case of one entry of 1 in each
    row: taken for columns of probability 0, they would be pushed down wherever the tokenizers differ (X-Token, arXiv
    2605.21699, calls that the uncommon-token failure).

    A row is a position at which both models have read the same text; which ones those are is the caller's to say.

    Rows are computed in float64, a few at a time: value and gradient keep their relative precision when the student
    has almost become the teacher. No (N, V) is held beside the gradient.

    Args:
        student_logits: (..., V_s) float32, bfloat16, float16 or float64.
        teacher_logits: (..., V_t), the same rows, in any of these dtypes; a constant.
        projection: `VocabProjection.of` a sparse matrix (V_s, V_t), or `tokenizer_projection`'s, on the same device.
        renormalize: False takes q as it is, Q = sum(q) < 1 where M does not map all of the teacher: the value is
            sum_v q_v log(q_v / p_v), Q times the renormalised one plus Q log Q, which weighs each row by what arrives
            of it (the constant may make it negative). forward_kl alone.
        divergence, beta, temperature, teacher_temperature, scale_by_t2: as in `logit_loss`.
        weight: (...,) one number or bool per row; a row of weight 0 contributes exactly 0, whatever it holds.
        shift: as in fastdistil.logit_loss: weight and labels are those of tokens, row i predicts token i + 1.
        labels, label_weight, label_num_items, ignore_index: a second term, the cross entropy with (...,) int64 labels
            over all of the student's columns, as in `logit_loss`.
        reduction: "mean" is sum(w * loss) / sum(w), "sum" is sum(w * loss), "none" is w * loss, per row.
        num_items: replaces sum(w) in "mean": a number or a tensor of one entry.
        backend: "auto", "reference", "cpu" or "cuda", for the rows, in float64.

    Returns:
        float32 (float64 where either side is): a scalar, or (...,) for reduction="none".

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
        NotImplementedError: in forward-mode differentiation (torch.func.jvp).

    Example:
        >>> import torch, fastdistil
        >>> matrix = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]).to_sparse()  # two of the teacher's are one piece
        >>> projection = fastdistil.VocabProjection.of(matrix)
        >>> teacher = torch.tensor([[0.5, 0.2, 0.3]]).log()
        >>> student = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
        >>> loss = fastdistil.projected_logit_loss(student, teacher, projection)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", student.grad.abs().max().item() < 1e-6)
        0.0000 True
    """
    _check.no_tangents(_NAME, student_logits=student_logits, teacher_logits=teacher_logits, weight=weight)
    student = _check.float_tensor(_NAME, "student_logits", student_logits)
    teacher = _check.float_tensor(_NAME, "teacher_logits", teacher_logits)
    check_rows(_NAME, student, teacher, "logits", "V_t")
    tensors = check_projection(_NAME, projection, student.shape[-1], teacher.shape[-1], student.device, "logits")
    rule = rule_of(_NAME, divergence, beta, temperature, teacher_temperature, scale_by_t2)
    check_divergence(_NAME, divergence, renormalize)
    _check.one_of(_NAME, "reduction", reduction, _check.REDUCTIONS)

    rows, device = student.shape[:-1], student.device
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    w = _terms.row_weights(_NAME, weight, shift, rows, device, dtype)
    label, counted, alpha = _terms.labels(
        _NAME, labels, label_weight, ignore_index, w, rows, student.shape[-1], device, label_num_items, shift
    )
    scale, label_scale = _terms.scales(
        _NAME, math.prod(rows), w, counted, alpha, reduction, num_items, label_num_items, device, dtype
    )
    constants = pack(rule, (1.0, 0.0, 1.0, 0.0))
    arguments = (
        matrix(student), matrix(teacher), *tensors, scale, label, label_scale, constants, renormalize, backend,
    )  # fmt: skip
    # A float16 gradient rounded before a GradScaler's scale is known would underflow.
    ahead = reduction != "none" and student.dtype != torch.float16
    if ahead and student.requires_grad and torch.is_grad_enabled():
        total: Tensor = projected_total(*arguments, [True], True)[0]
        return total
    losses: Tensor = projected_rows(*arguments)
    return losses.reshape(rows) if reduction == "none" else losses.sum()


def check_projection(
    function: str, projection: object, columns: int, teacher_columns: int, device: torch.device, what: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of a projection of these sizes; what: the arguments' name that gave them."""
    if not isinstance(projection, VocabProjection):
        raise TypeError(
            f"{function}: projection is {type(projection).__name__}, expected a fastdistil.VocabProjection "
            "(VocabProjection.of makes one of a sparse matrix)"
        )
    if projection.shape != (columns, teacher_columns):
        raise ValueError(
            f"{function}: projection has shape {projection.shape}, expected ({columns}, {teacher_columns}) to match "
            f"student_{what} and teacher_{what}"
        )
    _check.same_device(function, "projection", projection.offsets, f"student_{what}", device)
    return projection.offsets, projection.columns, projection.weights


def check_divergence(function: str, divergence: str, renormalize: object) -> None:
    """Raises for those that a projected teacher gives no meaning to."""
    if divergence == "mse":
        raise ValueError(f"{function}: divergence is 'mse', expected one of probabilities: sums have no logits")
    if not isinstance(renormalize, bool):
        raise TypeError(f"{function}: renormalize is {type(renormalize).__name__}, expected a bool")
    if not renormalize and divergence != "forward_kl":
        raise ValueError(
            f"{function}: divergence is {divergence!r} with renormalize=False, expected 'forward_kl', which is the "
            "renormalised one weighted by what arrives of the teacher, but for a constant"
        )
