"""Distillation of logits from two heads, whose logits never exist as a whole."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from fastdistil.contracts.logit import LOSSES
from fastdistil.losses import _check, _heads, _terms
from fastdistil.losses._terms import LogitStats
from fastdistil.losses.logit import rule_of
from fastdistil.ops.linear_logit import TENSOR_NAMES, linear_logit_rows, linear_logit_total
from fastdistil.ops.logit_terms import pack
from fastdistil.ops.shards import Call, run

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NAME = "linear_logit_loss"

# Bytes of logits at a time. CPU: 128 rows of V = 119,547, where the products of 512 rows of width 768 take 2.6 s; twice
# as much would take 2.3 s. GPU: about 1,500 rows of that V, not yet measured.
CHUNK_BYTES = {"cpu": 124_000_000, "gpu": 1_500_000_000}


@overload
def linear_logit_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    return_stats: Literal[True],
    **options: Any,
) -> tuple[Tensor, LogitStats]: ...
@overload
def linear_logit_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Any,
) -> Tensor: ...
def linear_logit_loss(  # type: ignore[misc] # the overloads need not repeat what is written here
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    chunk_bytes: int | None = None,
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
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    return_stats: bool = False,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, LogitStats]:
    """`logit_loss` of `student_hidden @ student_weight.T + student_bias` and the teacher's likewise, chunk by chunk.

    Logits stay float32 from the product's accumulator to p - q, so that the gradients are right where the student has
    almost become the teacher and 16-bit logits would have lost their difference. The gradients of student hidden,
    weight and bias come with the value; what needs no gradient costs none. For "mse" no logits are formed at all where
    that takes fewer operations (docs/losses.md, section 5); the Gram matrices of two frozen heads are then kept for
    the next call.

    Where the student has come near its teacher, the difference of the logits is not taken from two rounded products:
    it comes from the differences of states and weights, or on a CPU from float64 (docs/losses.md, section 2). A head
    that both sides share is known by its memory: pass the same tensor twice, not a copy.

    Args:
        student_hidden: (..., D_s) float32, bfloat16, float16 or float64, as all others, in any combination.
            student_weight: (V, D_s), as in
            torch.nn.Linear; it may be the tied embedding. student_bias: (V,) or None.
        teacher_hidden: (..., D_t), the same rows; D_t may differ. teacher_weight: (V, D_t); teacher_bias: (V,) or None.
            All constants.
        chunk_bytes: upper bound of the memory for logits; by default 124 MB on a CPU, 1.5 GB on a GPU. Beyond it come
            the gradients alone: (..., D_s), (V, D_s) and (V,) in float32.
        divergence, beta, eta, temperature, teacher_temperature, scale_by_t2, labels, label_weight, label_num_items,
            ignore_index, vocab_map, renormalize, reduction, num_items, return_stats: as in `logit_loss`.
        student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap: logits become scale * z and then,
            with a softcap, cap * tanh(z / cap) (Gemma 2, arXiv 2408.00118), before anything else is made of them.
        weight: (...,) one number or bool per row. Rows of weight 0 are dropped before the products: 15% of the rows
            cost 15%. On a GPU, finding them synchronises once per call; without a weight nothing synchronises.
        shift: as in fastdistil.logit_loss: weight and labels are those of tokens, row i predicts token i + 1.
        group: a process group over whose ranks the vocabulary is split, in the order of ranks: each passes its own
            rows of both heads and the whole hidden states, and gets the whole loss, the whole gradient of the hidden
            states and its rows' of the head. DTensor heads of tensor parallelism, sharded by rows over one mesh
            dimension, bring their group with them; those of fully_shard, whose ranks have rows of their own, are
            gathered instead, and every rank has to call (docs/trainers/many-devices.md). Statistics are merged, logits
            never gathered. labels, the same on every rank, count through the rows of all ranks; a vocab_map has this
            rank's rows and points to this rank's teacher rows. Not with backend="reference".
        backend: "auto", "reference", "cpu", "triton" or "cuda", for the rows; the products are torch's.

    Returns:
        float32 (float64 where an input is): a scalar, or (...,) for reduction="none", whose backward pass computes
        everything again; with return_stats a pair of that and LogitStats.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
        NotImplementedError: in forward-mode differentiation (torch.func.jvp).

    Example:
        >>> import torch, fastdistil
        >>> draw = torch.Generator().manual_seed(0)
        >>> student, student_head = torch.randn(4, 8, generator=draw), torch.randn(50, 8, generator=draw)
        >>> teacher, teacher_head = torch.randn(4, 16, generator=draw), torch.randn(50, 16, generator=draw)
        >>> _ = student_head.requires_grad_()
        >>> loss = fastdistil.linear_logit_loss(student, student_head, teacher, teacher_head)
        >>> loss.backward()
        >>> logits = student @ student_head.T, teacher @ teacher_head.T  # which it never holds as a whole
        >>> print(torch.allclose(loss, fastdistil.logit_loss(*logits), rtol=1e-4), student_head.grad.shape)
        True torch.Size([50, 8])
    """
    student_hidden = _heads.whole_rows(student_hidden)
    teacher_hidden = _heads.whole_rows(teacher_hidden)
    given = {
        "student_weight": student_weight, "student_bias": student_bias,
        "teacher_weight": teacher_weight, "teacher_bias": teacher_bias,
    }  # fmt: skip
    parts = _heads.resolve(_NAME, given, student_hidden, group)
    student_weight, student_bias, teacher_weight, teacher_bias = parts.tensors.values()  # type: ignore[assignment]
    group = parts.group
    heads = _check_heads(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        vocab_map is not None,
    )
    _check.no_tangents(
        _NAME, student_hidden=student_hidden, student_weight=student_weight, student_bias=student_bias,
        teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, teacher_bias=teacher_bias, weight=weight,
    )  # fmt: skip
    rule = rule_of(_NAME, divergence, beta, temperature, teacher_temperature, scale_by_t2, LOSSES, eta)
    _check.one_of(_NAME, "reduction", reduction, _check.REDUCTIONS)
    device = student_hidden.device
    chunk = chunk_size(_NAME, chunk_bytes, device)

    rows = student_hidden.shape[:-1]
    wide = any(x is not None and x.dtype == torch.float64 for x in heads)
    dtype = torch.float64 if wide else torch.float32
    w = _terms.row_weights(_NAME, weight, shift, rows, device, dtype)
    columns = student_weight.shape[0]
    name, partners = _terms.group_name(_NAME, group), None
    if vocab_map is not None:
        partners = _terms.vocab_map(_NAME, vocab_map, columns, teacher_weight.shape[0], device, bool(name))
    renormalize = _terms.renormalized(_NAME, renormalize, partners, divergence, name)
    columns_here = None if name else columns
    label, counted, alpha = _terms.labels(
        _NAME, labels, label_weight, ignore_index, w, rows, columns_here, device, label_num_items, shift
    )
    caps = _terms.caps(_NAME, student_logit_scale, student_softcap, teacher_logit_scale, teacher_softcap)
    scale, label_scale = _terms.scales(
        _NAME, math.prod(rows), w, counted, alpha, reduction, num_items, label_num_items, device, dtype
    )
    alone = None
    if return_stats and alpha == 1:  # the labels alone count, and no kernel looks at the teacher: a pass for them
        with torch.no_grad():
            _, alone = linear_logit_loss(
                student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias=student_bias,
                teacher_bias=teacher_bias, chunk_bytes=chunk_bytes, temperature=rule[2], teacher_temperature=rule[3],
                weight=weight, shift=shift, vocab_map=vocab_map, renormalize=renormalize, student_logit_scale=caps[0],
                student_softcap=caps[1] or None,
                teacher_logit_scale=caps[2], teacher_softcap=caps[3] or None, reduction="none", return_stats=True,
                group=group, backend=backend,
            )  # fmt: skip
    hidden, matrix, bias, *teacher = heads
    assert hidden is not None and matrix is not None and teacher[0] is not None
    arguments = (
        hidden.reshape(-1, hidden.shape[-1]), matrix, bias, teacher[0].reshape(-1, teacher[0].shape[-1]), *teacher[1:],
        scale, label, label_scale, partners, pack(rule, caps, renormalize), return_stats and alone is None, chunk,
        backend, weight is None, name,
    )  # fmt: skip
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, matrix, bias)]
    summed = reduction != "none" and any(wanted)
    if parts.shards:
        shards = {TENSOR_NAMES.index(x): shard for x, shard in parts.shards.items()}
        call = Call(linear_logit_rows, linear_logit_total, TENSOR_NAMES, [*arguments], shards, wanted, summed)
        loss, each = run(call)
    elif summed:
        loss, each, *_ = linear_logit_total(*arguments, wanted, False)
    else:
        loss, each = linear_logit_rows(*arguments)
    if not summed:
        loss = loss.reshape(rows) if reduction == "none" else loss.sum()
    if alone is not None:
        return loss, alone
    return (loss, _terms.row_stats(each, rows)) if return_stats else loss


def chunk_size(function: str, chunk_bytes: object, device: torch.device) -> int:
    """The checked chunk_bytes, or the device's default."""
    if chunk_bytes is None:
        return CHUNK_BYTES["cpu" if device.type == "cpu" else "gpu"]
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int) or chunk_bytes < 1:
        raise ValueError(f"{function}: chunk_bytes is {chunk_bytes!r}, expected a whole number of bytes, at least 1")
    return chunk_bytes


def _check_heads(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    mapped: bool,
) -> tuple[Tensor | None, ...]:
    """The six tensors, checked; the student's first."""
    check_head(_NAME, "student", student_hidden, student_weight, student_bias)
    check_head(_NAME, "teacher", teacher_hidden, teacher_weight, teacher_bias)
    _check.same_device(_NAME, "teacher_hidden", teacher_hidden, "student_hidden", student_hidden.device)
    for name, x in (("hidden", teacher_hidden), ("weight", teacher_weight), ("bias", teacher_bias)):
        if x is not None:
            _check.constant(_NAME, f"teacher_{name}", x)
    if teacher_weight.shape[0] != student_weight.shape[0] and not mapped:
        raise ValueError(
            f"{_NAME}: teacher_weight has shape {tuple(teacher_weight.shape)}, expected "
            f"({student_weight.shape[0]}, D_t) to match student_weight"
        )
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        wanted = ", ".join(map(str, (*student_hidden.shape[:-1], "D_t")))
        raise ValueError(
            f"{_NAME}: teacher_hidden has shape {tuple(teacher_hidden.shape)}, expected ({wanted}) to match "
            "student_hidden"
        )
    heads = (student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    return tuple(None if x is None else _check.usable(x) for x in heads)


def check_head(function: str, side: str, hidden: object, weight: object, bias: object) -> None:
    """Raises where hidden (..., D), weight (V, D) and bias (V,) are not tensors that go together."""
    h, w = (_check.float_tensor(function, f"{side}_{name}", x) for name, x in (("hidden", hidden), ("weight", weight)))
    if h.ndim < 1 or h.shape[-1] == 0:
        raise ValueError(f"{function}: {side}_hidden has shape {tuple(h.shape)}, expected (..., D) with D >= 1")
    if w.ndim != 2 or w.shape[0] == 0 or w.shape[1] != h.shape[-1]:
        raise ValueError(
            f"{function}: {side}_weight has shape {tuple(w.shape)}, expected (V, {h.shape[-1]}) to match {side}_hidden"
        )
    _check.same_device(function, f"{side}_weight", w, f"{side}_hidden", h.device)
    if bias is not None:
        b = _check.float_tensor(function, f"{side}_bias", bias)
        _check.same_shape(function, f"{side}_bias", b, f"{side}_weight", w.shape[:1])
        _check.same_device(function, f"{side}_bias", b, f"{side}_hidden", h.device)
