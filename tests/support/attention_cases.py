"""What the attention tests compare with, and what they compare on."""

from __future__ import annotations

from typing import Any

import torch
from conftest import DEVICE, available
from judge import Outcome
from torch import Tensor

BACKENDS = available("reference", "cpu", "triton")
KINDS = ("prob_mse", "score_mse", "prob_kl")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# B, H, S, d_s, d_t, padded, causal: more than a tile and not a multiple of one; two tokens; unequal and odd head sizes.
SHAPES = {
    "padded": (2, 2, 37, 16, 16, True, False),
    "causal": (1, 2, 40, 8, 20, False, True),
    "two tokens": (2, 1, 2, 16, 16, False, False),
    "wide, padded, causal": (2, 1, 70, 80, 80, True, True),
    "no sequences": (0, 2, 5, 16, 16, False, False),
}


def textbook(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    kind: str,
    mask: Tensor | None,
    causal: bool,
    queries: bool = True,
) -> Tensor:
    """The mean as losses.md defines it, from whole maps, by autograd."""
    length = q_s.shape[2]
    real = torch.ones(q_s.shape[0], length, dtype=torch.bool, device=q_s.device) if mask is None else mask
    rows = real if queries else torch.ones_like(real)
    visible = (real[:, None, None, :] & rows[:, None, :, None]).expand(-1, q_s.shape[1], -1, -1)
    visible = visible.tril() if causal else visible
    a = q_s @ k_s.mT / q_s.shape[-1] ** 0.5
    b = q_t @ k_t.mT / q_t.shape[-1] ** 0.5
    if kind == "score_mse":
        return torch.where(visible, a - b, 0.0).square().sum() / max(1, int(visible.sum()))
    a, b = (x.masked_fill(~visible, torch.finfo(x.dtype).min) for x in (a, b))
    if kind == "prob_mse":
        return torch.where(visible, a.softmax(-1) - b.softmax(-1), 0.0).square().sum() / max(1, int(visible.sum()))
    terms = torch.where(visible, b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1)), 0.0)
    return terms.sum() / max(1, int(rows.sum()) * q_s.shape[1])


def draw(
    shape: tuple[int, int, int, int, int, bool, bool], dtype: torch.dtype, noise: float = 1.0
) -> tuple[list[Tensor], Tensor | None]:
    """student_q, student_k, teacher_q, teacher_k, and the mask, of uneven lengths and with a hole."""
    batch, heads, length, size_s, size_t, padded, _ = shape
    teacher = [2 * torch.randn(batch, heads, length, size_t, device=DEVICE) for _ in range(2)]
    student = [x[..., :size_s] + noise * torch.randn(batch, heads, length, size_s, device=DEVICE) for x in teacher]
    mask = None
    if padded:
        mask = torch.ones(batch, length, dtype=torch.bool, device=DEVICE)
        mask[0, 3] = False
        mask[-1, length // 2 :] = False
    return [x.to(dtype) for x in (*student, *teacher)], mask


def outcome(function: Any, tensors: list[Tensor], factor: float = 1.0) -> Outcome:
    """`factor` keeps float16's gradients in its range; it is the incoming gradient that the op must honour."""
    q, k = (x.detach().clone().requires_grad_() for x in tensors[:2])
    value = function(q, k, *tensors[2:])
    return Outcome(value, torch.autograd.grad(value, (q, k), torch.full_like(value, factor)))


def near_scores(sizes: tuple[int, int], length: int, groups: int, noise: float) -> list[Tensor]:
    """student_q, student_k, teacher_q, teacher_k in float32, of 2 key heads and `groups` query heads each: factors of
    `sizes` in bases of their own, whose scores differ by `noise`."""
    rank = min(sizes)
    at_random = {"dtype": torch.float64, "device": DEVICE}
    bases = [torch.linalg.qr(torch.randn(size, rank, **at_random)).Q.mT for size in sizes]
    stretch = (sizes[0] / sizes[1]) ** 0.25  # of both factors: the default scale is 1 / sqrt(d)
    tensors = []
    for heads in (2 * groups, 2):
        shared = 2 * torch.randn(2, heads, length, rank, **at_random)
        student = stretch * shared @ bases[0]
        tensors.append((student + noise * torch.randn_like(student), shared @ bases[1]))
    (q_s, q_t), (k_s, k_t) = tensors
    return [x.float() for x in (q_s, k_s, q_t, k_t)]
