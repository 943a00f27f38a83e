"""The divergences of two rows of logits in plain PyTorch: what every other backend of logit_loss is compared with.

Source: docs/losses.md, section 1. Nothing is formed as a difference of two rounded numbers: delta = log p - log q comes
from the ratio of the softmaxes' masses, values are sums of non-negative terms, gradients products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastdistil.ops.logit_rule import DIVERGENCES, PHASE_ALL, LogitRule
from fastdistil.reference.exact import LARGEST_EXACT, expm1_minus_x, log_mass_ratio, usable_reference


def _excess(w: Tensor, gap: Tensor, l: Tensor) -> Tensor:
    """w (e^l - 1 - l) >= 0, where gap = w (e^l - 1) is known exactly; 0 * inf counts as 0."""
    return torch.where(l.abs() < 0.5, w * expm1_minus_x(l.clamp(-0.5, 0.5)), gap - torch.where(w == 0, 0.0, w * l))


def _shares(name: str, beta: float, p: Tensor, q: Tensor, delta: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """A column's shares of value and slope; gap = p - q. A centred rule's gradient is p (slope - sum(p slope))."""
    rest = 1.0 - beta
    bounded = delta.clamp(-80.0, 80.0)  # keeps e^delta finite in float32
    forth, back = torch.expm1(bounded), torch.expm1(-bounded)  # p/q - 1, q/p - 1
    if name == "forward_kl":
        return _excess(q, gap, delta), gap
    if name == "reverse_kl":
        return _excess(p, -gap, -delta), delta.clamp(-1e4, 1e4)
    if name == "tvd":
        return 0.5 * gap.abs(), 0.5 * gap.sign()
    if name == "jsd":
        m_over_q, m_over_p = torch.log1p(rest * forth), torch.log1p(beta * back)
        value = beta * _excess(q, rest * gap, m_over_q) + rest * _excess(p, -beta * gap, m_over_p)
        return value, -rest * m_over_p
    if name == "skew_kl":
        return _excess(q, rest * gap, torch.log1p(rest * forth)), -rest * rest * back / (1.0 + beta * back)
    skewed = rest * torch.where(delta.isinf(), back.clamp_min(-1.0), back)
    m_over_p = torch.log1p(skewed)
    slope = beta * skewed / (1.0 + skewed).clamp_min(1e-30) - m_over_p.clamp(-1e4, 1e4)
    return _excess(p, -rest * gap, m_over_p), slope


def _scores(student: Tensor, teacher: Tensor, rule: LogitRule, shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tempered scores a and b after the shift, and d = a - b, exact where student and teacher are close."""
    t_s, t_t = rule["student_temperature"], rule["teacher_temperature"]
    equal = t_s == t_t
    s, t = (student, teacher) if equal else (student / t_s, teacher / t_t)
    if shifted:
        offset = s[:, :1] - t[:, :1]
        s = s - torch.where(offset.abs() < 1e6, (offset * 1024).round() / 1024, 0.0)
    d = torch.where(s == t, 0.0, s - t)
    return (s / t_s, t / t_t, d / t_s) if equal else (s, t, d)


def _rows(student: Tensor, teacher: Tensor, rule: LogitRule) -> tuple[Tensor, Tensor]:
    """The value of each row (N,) and its gradient in the tempered student logits (N, V), without any scale."""
    name = DIVERGENCES[rule["divergence"]]
    a, b, d = _scores(student, teacher, rule, shifted=name != "mse")
    if name == "mse":
        return (d * d).mean(-1), 2.0 * d / d.shape[-1]
    return pair_rows(name, rule["beta"], a, b, d)


def _log_softmax(x: Tensor) -> Tensor:
    """torch's own adds 100,000 exponentials one by one (1e-5 off in float32); this sum goes in pairs."""
    above = x - x.amax(-1, keepdim=True)
    return above - above.exp().sum(-1, keepdim=True).log()


def pair_rows(name: str, beta: float, a: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of the softmaxes of student scores a and teacher scores b (N, V), d = a - b known exactly: the
    value of each row (N,) and its gradient in a (N, V)."""
    reference = usable_reference(b, d)
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    c = d - reference
    exact = c - log_mass_ratio(b, c, a - reference)
    near = (exact.abs() <= 1) & (c.abs() <= LARGEST_EXACT)
    absent = (b == -torch.inf) & (d == 0)
    delta = torch.where(near, exact, torch.where(absent, 0.0, log_p - log_q))
    p, q = log_p.exp(), log_q.exp()
    gap = torch.where(near, q * torch.expm1(delta.clamp(-1, 1)), p - q)
    p = torch.where(near, q + gap, p + (q - q))  # a teacher that is NaN stays visible
    value, slope = _shares(name, beta, p, q, delta, gap)
    if name == "forward_kl":
        return value.sum(-1), slope
    # The same for all slopes taken from that column's, whose own would be 1/2 - (1/2 - 1e-8) in the total variation.
    top = b.argmax(-1, keepdim=True)
    slope = slope - torch.where(near, slope, 0.0).gather(-1, top)
    return value.sum(-1), p * (slope - (p * slope).sum(-1, keepdim=True))


def _compute(student: Tensor, teacher: Tensor, row_scale: Tensor, rule: LogitRule) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled values, their gradients (times row_scale), and which rows count."""
    counts = row_scale != 0
    s, t = (torch.where(counts[:, None], x, 0).to(row_scale.dtype) for x in (student, teacher))
    value, gradient = _rows(s, t, rule)
    factor = row_scale * rule["value_factor"]
    return torch.where(counts, value * factor, 0.0), gradient * (factor / rule["student_temperature"])[:, None], counts


def logit_fwd(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    loss: Tensor,
    stats: Tensor,
    gradient: Tensor | None,
    phase: int = PHASE_ALL,
    **rule: Unpack[LogitRule],
) -> None:
    """Writes loss (N,) and, where given, gradient (N, V). Nothing is kept in stats: the backward starts afresh."""
    if phase != PHASE_ALL:
        raise ValueError("backend 'reference' has no part of a vocabulary, expected 'cpu', 'triton' or 'cuda'")
    value, slope, counts = _compute(student, teacher, row_scale, rule)
    loss.copy_(value)
    stats.zero_()
    if gradient is not None:
        gradient.copy_(torch.where(counts[:, None], slope, 0.0))


def logit_bwd(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    gradient: Tensor,
    dloss: Tensor,
    keep_unit: bool,
    **rule: Unpack[LogitRule],
) -> None:
    """Writes gradient (N, V), times dloss (N,); with keep_unit, rows whose dloss is 1 are left alone."""
    _, slope, counts = _compute(student, teacher, row_scale, rule)
    result = torch.where(counts[:, None], slope * dloss[:, None], 0.0).to(gradient.dtype)
    gradient.copy_(torch.where((dloss == 1)[:, None], gradient, result) if keep_unit else result)
