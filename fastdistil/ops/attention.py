"""Custom ops of the attention losses: `attention_rows`, one value a query row, and `attention_total`, their sum.

A backend's `attention` (`attention_mean.attention` for means over the heads) returns the rows and, where asked, the
gradients of their sum. `attention_total` asks for both at once and keeps the gradients (as large as Q and K) for its
backward pass, which only multiplies them with the incoming gradient: no tile of the map is computed twice
(ops/families.py). `attention_rows` has a gradient a row to honour, so its backward pass runs the kernel again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.backends import choose, module
from fastdistil.ops import attention_low_rank, attention_mean
from fastdistil.ops.families import Found, family
from fastdistil.ops.precision import with_exact_products
from fastdistil.ops.products import float64_is_fast


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What values, statistics and sums are computed in: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@with_exact_products
def _compute(
    student_q: Tensor,
    student_k: Tensor | None,
    teacher_q: Tensor,
    teacher_k: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    row_scale: Tensor,
    kind: str,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
    heads: str,
    backend: str,
    wanted: list[bool],
    rounded: bool,
) -> Found:
    """Rows in row_scale's shape, times row_scale, and the gradients of their sum in student_q and student_k; of a
    relation (no keys: the queries are both) the first is the gradient through both sides."""
    arguments = (student_q, student_k, teacher_q, teacher_k, key_mask, cu_seqlens, row_scale)
    options = (kind, causal, student_scale, teacher_scale, heads, backend)
    rows, dq, dk = _of_maps(*arguments, *options, any(wanted))
    if student_k is None and dq is not None and dk is not None:
        # In the accumulator's dtype: rounded once, where autograd would add up rounded ones.
        return Found(rows, (dq.add_(dk), None))
    return Found(rows, (dq, dk))


def _of_maps(
    student_q: Tensor,
    student_k: Tensor | None,
    teacher_q: Tensor,
    teacher_k: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    row_scale: Tensor,
    kind: str,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
    heads: str,
    backend: str,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    name = choose(backend, student_q.device)
    relation = student_k is None or teacher_k is None
    keys = (student_q, teacher_q) if student_k is None or teacher_k is None else (student_k, teacher_k)
    tensors = (student_q, keys[0], teacher_q, keys[1], key_mask, cu_seqlens, row_scale)
    if heads == "mean":
        return attention_mean.attention(
            *tensors, kind, causal, student_scale, teacher_scale, name == "reference", need_grad
        )
    linear = kind == "score_mse" and not causal and cu_seqlens is None
    if name == "triton" and linear and float64_is_fast(student_q.device):  # matrix products alone, the vendor's
        return attention_low_rank.score_mse(*tensors[:5], row_scale, student_scale, teacher_scale, need_grad)
    name = choose(backend, student_q.device, row_scale.dtype)
    given = (None, None) if relation and name == "triton" else keys  # Triton has a kernel for both sides at once
    found: tuple[Tensor, Tensor | None, Tensor | None] = module("attention", name).attention(
        student_q, given[0], teacher_q, given[1], key_mask, cu_seqlens, row_scale, kind, causal, student_scale,
        teacher_scale, need_grad,
    )  # fmt: skip
    return found


# student_q (B, H, S, d_s), teacher_q (B, H, S, d_t), the keys with as many heads or a divisor of H, or both None where
# the queries are the keys too (a relation), key_mask (B, S) bool, cu_seqlens (n + 1,) integer for packed sequences
# (then B = 1), row_scale (B, H, S), or (B, 1, S) for heads "mean", float32 (float64 for float64 inputs).
TENSORS = "Tensor student_q, Tensor? student_k, Tensor teacher_q, Tensor? teacher_k, Tensor? key_mask"
TENSORS += ", Tensor? cu_seqlens, Tensor row_scale"
OPTIONS = "str kind, bool causal, float student_scale, float teacher_scale, str heads, str backend"
attention_rows, attention_total, _ = family(
    "attention", "attention_loss", TENSORS, OPTIONS, _compute, gradients=("student_q", "student_k")
)
