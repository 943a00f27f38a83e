"""Distillation of logits from a teacher of which only the most probable columns are known."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastdistil.contracts.topk import TAILS
from fastdistil.losses import _check, _terms
from fastdistil.losses.logit import check_inplace, matrix, rule_of
from fastdistil.ops.families import Overwrite
from fastdistil.ops.topk import topk_rows, topk_rows_overwrite_, topk_total

_NAME = "topk_logit_loss"


def topk_logit_loss(
    student_logits: Tensor,
    teacher_values: Tensor,
    teacher_indices: Tensor,
    *,
    teacher_tail: Tensor | None = None,
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
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Divergence of the student's distribution from a teacher's known in K columns (docs/losses.md, section 1a).

    With p = softmax(student_logits / temperature) and q_k = exp(teacher_values):

    ===========  ==================================================================================================
    bucket       over K + 1 classes, the K columns and all others together (the tail's q against their sum of p)
    renormalize  q scaled to sum 1, 0 elsewhere, against p over all V; teacher_values may then be any scores
    zero         sum over the K of q_k log(q_k / p_k), q as it is; the other columns' terms count as 0
    ===========  ==================================================================================================

    Value and gradient keep their relative precision when the student has almost become the teacher. Memory beyond the
    gradient: (K + 2) float64 a row.

    Args:
        student_logits: (..., V) float32, bfloat16, float16 or float64.
        teacher_values: (..., K) log-probabilities in any of these dtypes, of the distribution to be matched, so with
            the teacher's temperature in them: (teacher_logits / T).log_softmax(-1).topk(K). A constant. An entry of
            -inf is not there, whatever its index. Hand them in as they were made or stored: their dtype tells how far
            they are rounded.
        teacher_indices: (..., K) int32 or int64, their columns, each at most once per row, in any order.
        teacher_tail: (...,) float32 or float64, the natural logarithm of the probability of all columns but
            teacher_indices: logsumexp over those of teacher_logits / T minus logsumexp over all. -inf: they have none.
            Stores have it (docs/teacher.md). A constant. The values alone do not tell a tail that is smaller than
            their own rounding: without teacher_tail, "bucket" takes 1 - sum q_k, but at least
            max(r * sum q_k |log q_k|, min(r, 2^-24)) with r = 2^-24 for float32 values (bfloat16: 2^-8, float16: 2^-11,
            float64: 2^-53). With it, "bucket" and "zero" divide all of the teacher by its sum, which is 1 but for
            rounding. "renormalize" has no tail and refuses it.
        tail: "bucket", "renormalize" or "zero".
        divergence: as in fastdistil.logit_loss, but for "mse"; "renormalize" has no reverse_kl (it is infinite),
            "zero" forward_kl alone.
        beta: the mixture's weight, as in logit_loss.
        temperature: T > 0, of the student's logits alone.
        scale_by_t2: multiply by T^2 (Hinton et al. 2015).
        weight: (...,) one number or bool per row; a row of weight 0 contributes exactly 0 and is not read.
        shift: as in fastdistil.logit_loss: weight and labels are those of tokens, row i predicts token i + 1.
        labels, label_weight, label_num_items, ignore_index: a second term, the cross entropy with (...,) int64 labels,
            as in logit_loss. "teacher": the column of the largest value among the mapped ones, the first of several; a
            row without one has a cross entropy of 0.
        vocab_map: (V,) int64: student column v is teacher column vocab_map[v], -1 for none, each teacher column at
            most once; teacher_indices are then the teacher's columns. Entries that no student column is mapped to are
            left out, and the others' probabilities divided by what those leave of 1; the tail keeps the probability of
            such columns in it (teacher_tail is that of all but the stored entries, mapped or not). The student's
            distribution is that of its mapped columns; the others get no gradient (but from the labels).
        reduction: "mean" is sum(w * loss) / sum(w), "sum" is sum(w * loss), "none" is w * loss, per row.
        num_items: replaces sum(w) in "mean": a number or a tensor of one entry.
        inplace_backward: lets the gradient overwrite student_logits, as in logit_loss.
        backend: "auto", "reference", "cpu" or "triton"; see fastdistil.backends().

    Returns:
        float32 (float64 for float64 logits): a scalar, or (...,) for reduction="none".

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted. In rows that count, an index out of
            range or given twice, or probabilities that sum to more than 1.1 ("bucket", "zero"; with teacher_tail: to
            less than 0.9 or more than 1.1), raise on a CPU; on a GPU the row's value and gradient are NaN, since
            looking would synchronise.
        NotImplementedError: in forward-mode differentiation (torch.func.jvp).

    Example:
        >>> import torch, fastdistil
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0, -1.0, 2.0]]).log_softmax(-1)
        >>> values, indices = teacher.topk(3)
        >>> tail = teacher.scatter(-1, indices, -torch.inf).logsumexp(-1)  # of the other two columns
        >>> student = torch.zeros(1, 5, requires_grad=True)
        >>> loss = fastdistil.topk_logit_loss(student, values, indices, teacher_tail=tail)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", student.grad.shape)
        0.6047 torch.Size([1, 5])
    """
    _check.no_tangents(_NAME, student_logits=student_logits, teacher_values=teacher_values, weight=weight)
    student = _check.float_tensor(_NAME, "student_logits", student_logits)
    values = _check.float_tensor(_NAME, "teacher_values", teacher_values)
    if student.dim() == 0 or not 0 < student.shape[-1] < 2**31:
        raise ValueError(
            f"{_NAME}: student_logits has shape {tuple(student.shape)}, expected (..., V) with 1 <= V < 2^31"
        )
    check_teacher(_NAME, student, student.shape[-1], values, teacher_indices)
    _check.one_of(_NAME, "tail", tail, TAILS)
    known = tail_of(_NAME, teacher_tail, tail, values)
    index, mixture, t, _, factor = rule_of(_NAME, divergence, beta, temperature, None, scale_by_t2)
    _check.one_of(_NAME, "reduction", reduction, _check.REDUCTIONS)
    check_defined(_NAME, tail, divergence, mixture)
    check_inplace(_NAME, student, inplace_backward)

    rows = student.shape[:-1]
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    w = _terms.row_weights(_NAME, weight, shift, rows, student.device, dtype)
    label, counted, alpha = _terms.labels(
        _NAME, labels, label_weight, ignore_index, w, rows, student.shape[-1], student.device, label_num_items, shift
    )
    partners = None if vocab_map is None else partners_of(_NAME, vocab_map, student.shape[-1], student.device)
    scale, label_scale = _terms.scales(
        _NAME, math.prod(rows), w, counted, alpha, reduction, num_items, label_num_items, student.device, dtype
    )
    if label is None and label_scale is not None:
        label, there = labels_of(values, teacher_indices, student.shape[-1], partners)
        label_scale = torch.where(there, label_scale, 0.0)
    rule = (index, mixture, TAILS.index(tail), t, factor)
    k = values.shape[-1]
    teacher = (values.reshape(-1, k), _check.usable(teacher_indices).reshape(-1, k), known)
    plain = label is None and partners is None
    wanted, compiling = student.requires_grad and torch.is_grad_enabled(), torch.compiler.is_compiling()
    # As in logit_loss.
    overwrite = inplace_backward and wanted and not compiling and student.dtype != torch.float16
    ahead = wanted and reduction != "none" and (not compiling if plain else student.dtype != torch.float16)
    constants = [float(x) for x in (*rule, 1.0, 0.0)]
    arguments = (matrix(student), *teacher, scale, label, label_scale, partners, constants, backend)
    if overwrite:
        loss = Overwrite.apply(_NAME, topk_rows_overwrite_, *arguments)  # type: ignore[no-untyped-call]
    else:
        loss, *_ = topk_total(*arguments, [True], True) if ahead else topk_rows(*arguments)
    total: Tensor = loss.reshape(rows) if reduction == "none" else loss.sum() if loss.ndim else loss
    return total


def check_teacher(function: str, student: Tensor, width: int, values: Tensor, indices: object) -> None:
    """Raises where the teacher's (..., K) do not match a student (..., anything) of `width` columns."""
    if values.dim() == 0 or values.shape[:-1] != student.shape[:-1] or not 1 <= values.shape[-1] <= width:
        rows = ", ".join(map(str, student.shape[:-1])) + ", " if student.dim() > 1 else ""
        raise ValueError(
            f"{function}: teacher_values has shape {tuple(values.shape)}, expected ({rows}K) with 1 <= K <= {width}"
        )
    if not isinstance(indices, Tensor):
        raise _check.no_tensor(function, "teacher_indices", indices)
    _check.no_dtensor(function, "teacher_indices", indices)
    if indices.dtype not in (torch.int32, torch.int64):
        way = _check.way_to_integers("teacher_indices", indices)
        raise TypeError(f"{function}: teacher_indices has dtype {indices.dtype}, expected int32 or int64{way}")
    _check.same_shape(function, "teacher_indices", indices, "teacher_values", values.shape)
    _check.same_device(function, "teacher_values", values, "the student", student.device)
    _check.same_device(function, "teacher_indices", indices, "the student", student.device)
    _check.constant(function, "teacher_values", values)


def tail_of(function: str, value: object, tail: str, values: Tensor) -> Tensor | None:
    """The checked logarithms of the tails' mass, flat."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise _check.no_tensor(function, "teacher_tail", value)
    _check.no_dtensor(function, "teacher_tail", value)
    if tail == "renormalize":
        raise ValueError(
            f"{function}: teacher_tail came with tail='renormalize', which has none, expected None or another tail"
        )
    if value.dtype not in (torch.float32, torch.float64):  # 16 bits would lose what it is there for
        raise TypeError(f"{function}: teacher_tail has dtype {value.dtype}, expected float32 or float64")
    _check.same_shape(function, "teacher_tail", value, "the rows of teacher_values", values.shape[:-1])
    _check.same_device(function, "teacher_tail", value, "the student", values.device)
    _check.constant(function, "teacher_tail", value)
    return value.reshape(-1)


def labels_of(values: Tensor, indices: Tensor, columns: int, partners: Tensor | None) -> tuple[Tensor, Tensor]:
    """The student's columns (N,) of the teacher's largest values, and which rows have one."""
    k = values.shape[-1]
    values, at = values.detach().reshape(-1, k), _check.usable(indices).reshape(-1, k).to(torch.int64)
    there = values > -torch.inf
    if partners is not None:
        ordered, order = partners.sort()
        place = torch.searchsorted(ordered, at).clamp(max=columns - 1)
        there, at = there & (ordered[place] == at), order[place]
    there = there & (at >= 0) & (at < columns)  # of a wrong index the loss itself tells
    values = torch.where(there, values, -torch.inf)
    found = torch.where(there & (values == values.amax(-1, keepdim=True)), at, columns).amin(-1)
    return torch.where(found < columns, found, 0), found < columns


def partners_of(function: str, vocab_map: object, columns: int, device: torch.device) -> Tensor:
    """The checked map; how many columns the teacher has is not known here."""
    found = _terms.vocab_map(function, vocab_map, columns, 2**31, device, part=False)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        partners = found[found >= 0].sort()[0]
        again = partners[1:][partners[1:] == partners[:-1]]
        if len(again):
            raise ValueError(
                f"{function}: vocab_map holds {int(again[0])} for more than one column, expected each of the teacher's "
                "columns once: one stored probability cannot be divided among several"
            )
    return found


def check_defined(function: str, tail: str, divergence: str, beta: float) -> None:
    """The divergences that a tail gives a meaning to."""
    if divergence == "mse":
        raise ValueError(
            f"{function}: divergence is 'mse', expected one of probabilities: a top-k teacher has no logits"
        )
    if tail == "zero" and divergence != "forward_kl":
        raise ValueError(
            f"{function}: divergence is {divergence!r} with tail='zero', expected 'forward_kl': without the other "
            "columns' terms it is smallest where the student leaves the teacher's columns; use tail='bucket'"
        )
    if tail == "renormalize" and (divergence == "reverse_kl" or (divergence == "skew_reverse_kl" and beta == 0)):
        raise ValueError(
            f"{function}: divergence is {divergence!r} (beta {beta:g}) with tail='renormalize', expected one that is "
            "finite where the teacher is 0; use tail='bucket'"
        )
