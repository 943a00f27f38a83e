"""Distillation of logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from fastdistil.contracts.logit import DIVERGENCES, LOSSES
from fastdistil.losses import _check, _heads, _terms
from fastdistil.losses._terms import LogitStats
from fastdistil.ops.families import Overwrite
from fastdistil.ops.logit import logit_rows, logit_rows_overwrite_, logit_total
from fastdistil.ops.logit_terms import pack

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NAME = "logit_loss"


@overload
def logit_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, return_stats: Literal[True], **options: Any
) -> tuple[Tensor, LogitStats]: ...
@overload
def logit_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, return_stats: Literal[False] = False, **options: Any
) -> Tensor: ...
def logit_loss(  # type: ignore[misc] # the overloads need not repeat what is written here
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    eta: float = 3.0,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    scale_by_t2: bool = True,
    weight: Tensor | None = None,
    shift: bool = False,
    labels: Tensor | Literal["teacher"] | None = None,
    label_weight: float | None = None,
    label_num_items: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_map: Tensor | None = None,
    renormalize: bool = True,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    inplace_backward: bool = False,
    return_stats: bool = False,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LogitStats]:
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
    nla                 -log(alpha), alpha = sum min(p, q), LK losses (Samarin et al. 2026, arXiv 2602.23881)
    lk_hybrid           k KL(q || p) + (1-k) tvd, k = exp(-eta alpha) without a gradient, LK losses
    ==================  ==============================================================================

    Value and gradient keep their relative precision when the student has almost become the teacher.

    Args:
        student_logits: (..., V) float32, bfloat16, float16 or float64. Inputs whose leading dimensions cannot be
            viewed as one (logits[:, :-1]) are copied: `shift` takes them unsliced.
        teacher_logits: the same shape and device, or (..., V_t) with a vocab_map, in any of these dtypes; a constant.
            Two dtypes are computed in the wider one (float32 for bfloat16 with float16), a chunk of rows at a time.
        divergence: one of the names above.
        beta: the mixture's weight of the teacher (jsd, skew_kl) or of the student (skew_reverse_kl); inside (0, 1) for
            jsd, which is 0 at both ends, [0, 1) for the skewed ones, ignored by the others. What GKD calls beta 0 and
            1, the limits of jsd / beta and jsd / (1-beta), are forward_kl and reverse_kl.
        eta: of lk_hybrid, at least 0: how soon it leaves the KL as a row's alpha grows; ignored by the others.
        temperature: T_s > 0; teacher_temperature: T_t > 0, by default the same.
        scale_by_t2: multiply by T_s * T_t, so that gradients keep their size as the temperature changes (Hinton 2015).
        weight: (...,) one number or bool per row; a row of weight 0 contributes exactly 0 and is not read.
        shift: the rows are those of a causal language model, unsliced: (..., S, V). Row i predicts token i + 1, so that
            weight and labels, which are the tokens', are taken from there, and the last row of each sequence counts
            nothing. Nothing is copied, as logits[:, :-1] would be.
        labels: (...,) int64, with label_weight, which they need: a second term, the cross entropy of the student's own
            logits at temperature 1. The loss is (1 - label_weight) * divergence + label_weight * cross entropy, in
            "mean" each over its own rows; rows whose label is ignore_index have no cross entropy. "teacher": each row's
            label is the teacher's most likely column (among the mapped ones; without renormalize among all, and a row
            whose column is not mapped has a cross entropy of 0), the first of several, as torch.argmax.
        label_num_items: replaces the labelled rows' sum(w) in "mean", as num_items does for the divergence (and, where
            this is None, for both).
        vocab_map: (V_s,) int64: student column v is teacher column vocab_map[v], -1 for none. Both distributions are
            renormalised over the mapped columns; the others get no gradient (but from the labels). The mse is the mean
            over the mapped columns. On a GPU the entries of labels and vocab_map are not
            checked: that would synchronise.
        renormalize: False, with a vocab_map: q is the teacher's softmax over all its columns, of which the student's
            probability is 0 where they are not mapped (a drafter with a vocabulary of its own). forward_kl is then the
            sum of q log(q / p) over the mapped columns alone, which may be negative. Not for mse, and not with a group.
        reduction: "mean" is sum(w * loss) / sum(w), "sum" is sum(w * loss), "none" is w * loss, per row.
        num_items: replaces sum(w) in "mean": a number or a tensor of one entry (gradient accumulation, data parallel).
            0 is for a step in which no row counts: the value is then 0, and NaN where one does.
        inplace_backward: lets the gradient overwrite student_logits, which must not be read after this call and cannot
            be a leaf; a second backward is then an error, and an incoming gradient other than 1 costs bfloat16 logits
            a second rounding. torch.compile, which plans memory itself, ignores it, and so do float16 logits, whose
            gradient would underflow if it were rounded before the incoming gradient (a GradScaler's scale) is known.
        return_stats: return (loss, LogitStats) with the entropies of student and teacher, their cross entropy,
            whether their most likely columns agree and the acceptance rate, per row, detached.
        group: a process group over whose ranks the vocabulary is split, in the order of ranks: each passes its own
            columns of both sides and gets the whole loss and its columns' gradient. DTensors that are split over the
            vocabulary bring their group with them. Statistics are merged, logits never gathered. labels, the same on
            every rank, count through the columns of all ranks; a vocab_map has this rank's columns and points to this
            rank's teacher columns. Not with backend="reference".
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see fastdistil.backends().

    Returns:
        float32 (float64 where either side is): a scalar, or (...,) for reduction="none"; with return_stats a pair of
        that and LogitStats.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
        NotImplementedError: in forward-mode differentiation (torch.func.jvp).

    Example:
        >>> import torch, fastdistil
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])
        >>> loss = fastdistil.logit_loss(student, teacher, temperature=2.0)
        >>> loss.backward()
        >>> print(f"{loss.item():.4f}", student.grad.shape)
        0.1993 torch.Size([2, 3])
        >>> options = {"labels": torch.tensor([1, 2]), "label_weight": 0.5, "return_stats": True}
        >>> loss, stats = fastdistil.logit_loss(student, teacher, divergence="jsd", **options)
        >>> print(f"{loss.item():.4f}", stats.agreement.tolist())
        0.4196 [0.0, 1.0]
    """
    _check.no_tangents(_NAME, student_logits=student_logits, teacher_logits=teacher_logits, weight=weight)
    student_logits, teacher_logits, group = _heads.columns_here(_NAME, student_logits, teacher_logits, group)
    student = _check.float_tensor(_NAME, "student_logits", student_logits)
    teacher = _check.float_tensor(_NAME, "teacher_logits", teacher_logits)
    device, columns = student.device, _check_pair(student, teacher, vocab_map is not None)
    rule = rule_of(_NAME, divergence, beta, temperature, teacher_temperature, scale_by_t2, LOSSES, eta)
    _check.one_of(_NAME, "reduction", reduction, _check.REDUCTIONS)
    check_inplace(_NAME, student, inplace_backward)

    rows = student.shape[:-1]
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    w = _terms.row_weights(_NAME, weight, shift, rows, device, dtype)
    name = _terms.group_name(_NAME, group)
    partners = None if vocab_map is None else _terms.vocab_map(_NAME, vocab_map, *columns, device, bool(name))
    renormalize = _terms.renormalized(_NAME, renormalize, partners, divergence, name)
    columns_here = None if name else columns[0]
    label, counted, alpha = _terms.labels(
        _NAME, labels, label_weight, ignore_index, w, rows, columns_here, device, label_num_items, shift
    )
    scale, label_scale = _terms.scales(
        _NAME, math.prod(rows), w, counted, alpha, reduction, num_items, label_num_items, device, dtype
    )
    matrices = (matrix(student), matrix(teacher))
    plain = label_scale is None and partners is None and not name and student.dtype == teacher.dtype
    plain = plain and divergence in DIVERGENCES
    wanted, compiling = student.requires_grad and torch.is_grad_enabled(), torch.compiler.is_compiling()
    # A float16 gradient rounded before a GradScaler's scale would underflow: a plain one is computed again
    # where that is not 1, another one in the backward alone.
    overwrite = inplace_backward and wanted and not compiling and student.dtype != torch.float16
    # "none" is rarely followed by a gradient of ones. torch.compile plans the memory, and a plain backward need not
    # begin anew.
    ahead = wanted and reduction != "none" and (not compiling if plain else student.dtype != torch.float16)
    each, alone = None, None
    if return_stats and alpha == 1:  # the labels alone count, and no kernel looks at the teacher: a pass for them
        _, alone = logit_loss(
            student.detach(), teacher, temperature=rule[2], teacher_temperature=rule[3], weight=weight, shift=shift,
            vocab_map=vocab_map, renormalize=renormalize, reduction="none", return_stats=True, group=group,
            backend=backend,
        )  # fmt: skip
    tensors = (*matrices, scale, label, label_scale, partners)
    constants = pack(rule, (1.0, 0.0, 1.0, 0.0), renormalize)
    arguments = (*tensors, constants, return_stats and alone is None, backend, name)
    if overwrite:
        loss, each = Overwrite.apply(_NAME, logit_rows_overwrite_, *arguments)  # type: ignore[no-untyped-call]
    elif ahead:
        loss, each, *_ = logit_total(*arguments, [True], True)
    else:
        loss, each, _ = logit_rows(*arguments)
    total: Tensor = loss.reshape(rows) if reduction == "none" else loss.sum() if loss.ndim else loss
    if alone is not None:
        return total, alone
    return (total, _terms.row_stats(each, rows)) if return_stats and each is not None else total


def check_inplace(function: str, student: Tensor, inplace_backward: bool) -> None:
    if inplace_backward and student.is_leaf and student.requires_grad:
        raise ValueError(
            f"{function}: inplace_backward came with student_logits that are a leaf, expected a model's output"
        )
    if inplace_backward and any(n > 1 and step == 0 for n, step in zip(student.shape, student.stride(), strict=True)):
        raise ValueError(
            f"{function}: inplace_backward came with expanded student_logits, of strides {student.stride()}, expected "
            "memory of its own for each entry"
        )


def matrix(x: Tensor) -> Tensor:
    """(..., V) as (N, V) with dense rows."""
    if x.dim() != 2:  # a view of the same shape would be another step of the backward
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _check_pair(student: Tensor, teacher: Tensor, mapped: bool) -> tuple[int, int]:
    """Columns of student and teacher."""
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"{_NAME}: student_logits has shape {tuple(student.shape)}, expected (..., V) with V >= 1")
    if not mapped:
        _check.same_shape(_NAME, "teacher_logits", teacher, "student_logits", student.shape, _check.OTHER_VOCABULARY)
    elif teacher.shape[:-1] != student.shape[:-1] or teacher.dim() == 0 or teacher.shape[-1] == 0:
        wanted = ", ".join(map(str, (*student.shape[:-1], "V_t")))
        raise ValueError(
            f"{_NAME}: teacher_logits has shape {tuple(teacher.shape)}, expected ({wanted}) to match student_logits"
        )
    _check.same_device(_NAME, "teacher_logits", teacher, "student_logits", student.device)
    _check.constant(_NAME, "teacher_logits", teacher)
    return student.shape[-1], teacher.shape[-1]


def rule_of(
    function: str,
    divergence: str,
    beta: float,
    temperature: float,
    teacher_temperature: float | None,
    scale_by_t2: bool,
    losses: tuple[str, ...] = DIVERGENCES,
    eta: float = 3.0,
) -> tuple[int, float, float, float, float]:
    """The checked constants in the order of LogitRule; `losses` are the names that the function takes."""
    _check.one_of(function, "divergence", divergence, losses)
    value = _check.number(function, "beta", beta)
    decay = _check.number(function, "eta", eta)
    if decay < 0:
        raise ValueError(f"{function}: eta is {decay}, expected at least 0")
    if divergence == "jsd" and not 0 < value < 1:
        raise ValueError(
            f"{function}: beta is {value} for jsd, expected 0 < beta < 1: at 0 and 1 the divergence itself is 0. Where "
            "others mean the limits of jsd / beta and jsd / (1 - beta) by them, pass divergence='forward_kl' for 0 and "
            "'reverse_kl' for 1"
        )
    if divergence.startswith("skew") and not 0 <= value < 1:
        raise ValueError(f"{function}: beta is {value} for {divergence}, expected 0 <= beta < 1")
    t_s = _check.positive(function, "temperature", temperature)
    t_t = t_s if teacher_temperature is None else _check.positive(function, "teacher_temperature", teacher_temperature)
    if value == 0:  # a mixture of one
        divergence = {"skew_kl": "forward_kl", "skew_reverse_kl": "reverse_kl"}.get(divergence, divergence)
    if divergence == "lk_hybrid":
        value = decay
    return LOSSES.index(divergence), value, t_s, t_t, t_s * t_t if scale_by_t2 else 1.0
