"""Distillation of logits from two heads, whose logits never exist as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.backends import choose
from fastdistil.losses import _check
from fastdistil.losses.logit import rule_of
from fastdistil.ops.linear_logit import linear_logit_rows, linear_logit_total

_NAME = "linear_logit_loss"

# Bytes of logits at a time. CPU: 128 rows of V = 119,547, where the products of 512 rows of width 768 take 2.6 s; twice
# as much would take 2.3 s. GPU: about 1,500 rows of that V, not yet measured.
CHUNK_BYTES = {"cpu": 124_000_000, "gpu": 1_500_000_000}


def linear_logit_loss(
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
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    scale_by_t2: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`logit_loss` of `student_hidden @ student_weight.T + student_bias` and the teacher's likewise, chunk by chunk.

    Logits stay float32 from the product's accumulator to p - q, so that the gradients are right where the student has
    almost become the teacher and 16-bit logits would have lost their difference. The gradients of student hidden,
    weight and bias come with the value; what needs no gradient costs none. For "mse" no logits are formed at all where
    that takes fewer operations (docs/losses.md, section 5); the Gram matrices of two frozen heads are then kept for
    the next call.

    Args:
        student_hidden: (..., D_s) float32, bfloat16, float16 or float64. student_weight: (V, D_s), as in
            torch.nn.Linear; it may be the tied embedding. student_bias: (V,) or None.
        teacher_hidden: (..., D_t), the same rows; D_t may differ. teacher_weight: (V, D_t); teacher_bias: (V,) or None.
            All constants.
        chunk_bytes: upper bound of the memory for logits; by default 124 MB on a CPU, 1.5 GB on a GPU. Beyond it come
            the gradients alone: (..., D_s), (V, D_s) and (V,) in float32.
        divergence, beta, temperature, teacher_temperature, scale_by_t2, reduction, num_items: as in `logit_loss`.
        weight: (...,) one number or bool a row. Rows of weight 0 are dropped before the products: 15% of the rows cost
            15%. On a GPU, finding them waits for it once a call; without a weight nothing waits.
        backend: "auto", "reference", "cpu", "triton" or "cuda", for the rows; the products are torch's.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or (...,) for reduction="none", whose backward pass computes
        everything again.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted.
    """
    heads = _check_heads(student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias)
    rule = rule_of(_NAME, divergence, beta, temperature, teacher_temperature, scale_by_t2)
    _check.one_of(_NAME, "reduction", reduction, _check.REDUCTIONS)
    device = student_hidden.device
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES["cpu" if device.type == "cpu" else "gpu"]
    elif isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int) or chunk_bytes < 1:
        raise ValueError(f"{_NAME}: chunk_bytes is {chunk_bytes!r}, expected a whole number of bytes, at least 1")
    if not torch.compiler.is_compiling():
        choose(backend, device)

    rows = student_hidden.shape[:-1]
    wide = any(x is not None and x.dtype == torch.float64 for x in heads)
    dtype = torch.float64 if wide else torch.float32
    w = None if weight is None else _check.row_weight(_NAME, weight, rows, device, dtype)
    scale = _check.row_scale(_NAME, rows.numel(), w, reduction, num_items, device, dtype)
    hidden, matrix, bias, *teacher = heads
    assert hidden is not None and matrix is not None and teacher[0] is not None
    arguments = (
        hidden.reshape(-1, hidden.shape[-1]), matrix, bias, teacher[0].reshape(-1, teacher[0].shape[-1]), *teacher[1:],
        scale, [float(x) for x in rule], chunk_bytes, backend, weight is None,
    )  # fmt: skip
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, matrix, bias)]
    if reduction != "none" and any(wanted):
        total: Tensor = linear_logit_total(*arguments, wanted)[0]
        return total
    losses: Tensor = linear_logit_rows(*arguments)
    return losses.reshape(rows) if reduction == "none" else losses.sum()


def _check_heads(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The six tensors, checked; the student's first."""
    named = {
        "student_hidden": student_hidden, "student_weight": student_weight, "student_bias": student_bias,
        "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "teacher_bias": teacher_bias,
    }  # fmt: skip
    for name, x in named.items():
        if x is None and name.endswith("bias"):
            continue
        found = _check.float_tensor(_NAME, name, x)
        _check.same_device(_NAME, name, found, "student_hidden", student_hidden.device)
        if name.startswith("teacher"):
            _check.constant(_NAME, name, found)
    for side, hidden, matrix, bias in (
        ("student", student_hidden, student_weight, student_bias),
        ("teacher", teacher_hidden, teacher_weight, teacher_bias),
    ):
        if hidden.ndim < 1 or hidden.shape[-1] == 0:
            raise ValueError(f"{_NAME}: {side}_hidden has shape {tuple(hidden.shape)}, expected (..., D) with D >= 1")
        if matrix.ndim != 2 or matrix.shape[0] == 0 or matrix.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"{_NAME}: {side}_weight has shape {tuple(matrix.shape)}, expected (V, {hidden.shape[-1]}) to match "
                f"{side}_hidden"
            )
        if bias is not None:
            _check.same_shape(_NAME, f"{side}_bias", bias, f"{side}_weight", matrix.shape[:1])
    if teacher_weight.shape[0] != student_weight.shape[0]:
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
    return tuple(named.values())
