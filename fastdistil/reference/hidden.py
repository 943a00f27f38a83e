"""Losses between two hidden states, row by row (losses.md, section 3): the judge of all backends."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.reference.exact import forward_kl_rows, softmax_difference


def hidden_rows(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    kind: str,
    activation: str,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Rows of the loss times `row_scale`, and the gradient of their sum in `student`.

    student: (N, D), already projected where there is a projection; teacher: (N, D); bias: (D,) added to the student
    before the activation ("none" or "gelu", the exact one); row_scale: (N,), rows with 0 are skipped whatever they
    hold. kind: "mse" squared distance / D, "cosine" 1 - cos, "kl" KL(softmax(teacher) || softmax(student)).
    Returns rows (N,) in row_scale's dtype, dstudent (N, D) in `grad_dtype`, or None where that is None.
    """
    dtype = row_scale.dtype
    keep = (row_scale != 0)[:, None]
    z = torch.where(keep, student.to(dtype), 0.0)
    t = torch.where(keep, teacher.to(dtype), 0.0)
    if bias is not None:
        z = z + bias.to(dtype)
    h = torch.nn.functional.gelu(z) if activation == "gelu" else z
    rows, dh = {"mse": _mse, "cosine": _cosine, "kl": _kl}[kind](h, t)
    rows = torch.where(keep[:, 0], row_scale * rows, 0.0).to(dtype)
    if grad_dtype is None:
        return rows, None
    dz = dh * gelu_derivative(z) if activation == "gelu" else dh
    return rows, torch.where(keep, row_scale[:, None] * dz, 0.0).to(grad_dtype)


def gelu_derivative(z: Tensor) -> Tensor:
    """d gelu(z) / dz = Phi(z) + z * phi(z), Phi and phi of the normal distribution."""
    density: Tensor = torch.exp(-0.5 * z * z) * (2 * torch.pi) ** -0.5
    return 0.5 * torch.erfc(-z * 0.5**0.5) + z * density


def _mse(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    r = h - t
    return r.square().mean(-1), 2 * r / h.shape[-1]


def _cosine(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cos = |w|^2 / (|t|^2 (1 + cos)), w the part of h - t that is perpendicular to h; the gradient is
    w / (|h| |t|). No term cancels as h approaches t. Zero vectors: cos = 0, gradient 0."""
    r = h - t
    h2, t2 = h.square().sum(-1, keepdim=True), t.square().sum(-1, keepdim=True)
    nonzero = (h2 > 0) & (t2 > 0)
    h2, t2 = torch.where(nonzero, h2, 1.0), torch.where(nonzero, t2, 1.0)
    inverse_norms = h2.rsqrt() * t2.rsqrt()
    cos = torch.where(nonzero, (h * t).sum(-1, keepdim=True) * inverse_norms, 0.0)
    w = r - h * ((r * h).sum(-1, keepdim=True) / h2)
    near = w.square().sum(-1, keepdim=True) / (t2 * (1 + cos.clamp(min=0)))
    rows = torch.where(cos > 0, near, 1 - cos)
    return rows[:, 0], torch.where(nonzero, w * inverse_norms, 0.0)


def _kl(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    h, t = h.double(), t.double()
    difference = softmax_difference(t, (h - kl_offset(h, t)) - t)
    return forward_kl_rows(difference), difference.p_minus_q


def kl_offset(h: Tensor, t: Tensor) -> Tensor:
    """A constant between student and teacher (N, 1), which KL does not see: the multiple of 1/1024 nearest to their
    first difference, which floating point subtracts exactly from almost all entries."""
    return (1024 * (h[:, :1] - t[:, :1])).round().nan_to_num(0.0, 0.0, 0.0) / 1024
