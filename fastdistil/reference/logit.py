"""The divergences of two rows of logits in plain PyTorch: what every other backend of logit_loss is compared with.

Source: docs/losses.md, section 1. Nothing is formed as a difference of two rounded numbers: delta = log p - log q comes
from the ratio of the softmaxes' masses, values are sums of non-negative terms, gradients products. Everything is
float64, whatever the dtype of the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastdistil.contracts.logit import DIVERGENCES, PHASE_ALL, LogitRule
from fastdistil.reference.exact import LARGEST_EXACT, expm1_minus_x, log_mass_ratio, usable_reference

LARGEST_SLOPE = 1e4  # log(p/q) in a gradient
FARTHEST_ORIGIN = 60.0  # a delta up to which slopes are taken from the student's largest column, rules/divergence.h


def _excess(w: Tensor, gap: Tensor, l: Tensor) -> Tensor:
    """w (e^l - 1 - l) >= 0, where gap = w (e^l - 1) is known exactly; 0 * inf counts as 0."""
    return torch.where(l.abs() < 0.5, w * expm1_minus_x(l.clamp(-0.5, 0.5)), gap - torch.where(w == 0, 0.0, w * l))


def _log(y: Tensor, u: Tensor) -> Tensor:
    """ln(u) where y = u - 1 and u are both known exactly."""
    return torch.where(y.abs() < 0.5, torch.log1p(y), u.log())


def _log_excess(y: Tensor, u: Tensor) -> Tensor:
    """ln(u) - y / u likewise: with s = y / (2 + y), ln(u) = 2 (s + s^3/3 + s^5/5 ...) and y / u = 2 s / (1 + s)."""
    v = y / u.clamp_min(1e-300)
    s = y / (2.0 + y)
    series = sum(2.0 * s.pow(n) / n for n in range(23, 1, -2))
    return torch.where(y.abs() <= 0.25, s * v + series, _log(y, u) - v)


def _bounded(x: Tensor) -> Tensor:
    """Keeps e^x finite."""
    return x.clamp(-700.0, 700.0)


class _Origin(NamedTuple):
    """Where slopes are 0, given by a delta; u = m/p and x = q/p there, for a mixture m = own p + other q."""

    own: Tensor  # own p / m
    other: Tensor  # other q / m
    log_ratio: Tensor  # ln u
    scale: Tensor  # x / u^2

    @classmethod
    def at(cls, own: float, other: float, delta: Tensor) -> _Origin:
        x = torch.exp(-delta)
        u = own + other * x
        return cls(own / u, other * x / u, _log(other * torch.expm1(-delta), u), x / u.square())

    def mixture(self, turn: Tensor) -> tuple[Tensor, Tensor]:
        """u - 1 and u of columns whose delta is larger by `turn`, relative to the u here."""
        turn = _bounded(-turn)
        return self.other * torch.expm1(turn), self.own + self.other * torch.exp(turn)


def _shares(
    name: str, beta: float, p: Tensor, q: Tensor, delta: Tensor, gap: Tensor, turn: Tensor, zero: Tensor
) -> tuple[Tensor, Tensor]:
    """A column's shares of value and slope; gap = p - q, turn = delta - zero, where slopes are 0 (not the total
    variation's). A centred rule's gradient is p (slope - sum(p slope))."""
    rest = 1.0 - beta
    forth = _bounded(delta)
    if name == "forward_kl":
        return _excess(q, gap, delta), gap
    if name == "reverse_kl":
        return _excess(p, -gap, -delta), turn
    if name == "tvd":
        return 0.5 * gap.abs(), 0.5 * gap.sign()
    m_over_q = _log(rest * torch.expm1(forth), beta + rest * torch.exp(forth))
    if name == "jsd":
        origin = _Origin.at(rest, beta, zero)
        turned = _log(*origin.mixture(turn))
        m_over_p = origin.log_ratio + turned
        value = beta * _excess(q, rest * gap, m_over_q) + rest * _excess(p, -beta * gap, m_over_p)
        return value, -rest * turned
    if name == "skew_kl":
        origin = _Origin.at(rest, beta, zero)
        _, u = origin.mixture(turn)
        return _excess(q, rest * gap, m_over_q), -rest * rest * (origin.scale * (torch.expm1(_bounded(-turn)) / u))
    origin = _Origin.at(beta, rest, zero)
    y, u = origin.mixture(turn)
    v, log = y / u.clamp_min(1e-300), _log(y, u)
    near = -_log_excess(y, u) - origin.other * v
    slope = torch.where(y.abs() <= 0.25, near, origin.own * v - log.clamp(-1e4, 1e4))
    return _excess(p, -rest * gap, origin.log_ratio + log), slope


def _scores(student: Tensor, teacher: Tensor, rule: LogitRule, shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tempered scores a and b, and d = a - b less a constant that no softmax sees: exact where the rest is small."""
    t_s, t_t = rule["student_temperature"], rule["teacher_temperature"]
    absent = (student == teacher) & student.isinf()
    if t_s != t_t:
        a, b = student / t_s, teacher / t_t
        top = teacher.argmax(-1, keepdim=True)
        on_both = shifted & ((a - b).gather(-1, top).abs() < 1e6)
        s, t = (x - torch.where(on_both, x.gather(-1, top), 0.0) for x in (student, teacher))
        return a, b, torch.where(absent, 0.0, s / t_s - t / t_t)
    x = student - teacher
    back = x - student
    error = ((student - (x - back)) - (teacher + back)).nan_to_num(0.0, 0.0, 0.0)
    shift = usable_reference(teacher, x) if shifted else torch.zeros_like(x[:, :1])
    return student / t_s, teacher / t_t, torch.where(absent, 0.0, (x - shift) + error) / t_s


def _rows(student: Tensor, teacher: Tensor, rule: LogitRule) -> tuple[Tensor, Tensor]:
    """The value of each row (N,) and its gradient in the tempered student logits (N, V), without any scale."""
    name = DIVERGENCES[rule["divergence"]]
    a, b, d = _scores(student, teacher, rule, shifted=name != "mse")
    if name == "mse":
        return (d * d).mean(-1), 2.0 * d / d.shape[-1]
    return pair_rows(name, rule["beta"], a, b, d)


def _log_softmax(x: Tensor) -> Tensor:
    """In pairs: torch's own adds 100,000 exponentials one by one."""
    above = x - x.amax(-1, keepdim=True)
    return above - above.exp().sum(-1, keepdim=True).log()


def pair_rows(name: str, beta: float, a: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of the softmaxes of student scores a and teacher scores b (N, V), d = a - b known exactly but for
    a constant: the value of each row (N,) and its gradient in a (N, V)."""
    reference = usable_reference(b, d)
    at_top = b.argmax(-1, keepdim=True)
    c = d - reference
    # The student's scores relative to that at the teacher's largest column, measured from there.
    level = a.gather(-1, at_top)
    found = d.gather(-1, at_top)
    usable = found.abs() < 1e6
    unit = b.gather(-1, at_top).nan_to_num(neginf=0.0)
    student = torch.where(usable, a - torch.where(usable, level, 0.0) + unit, a - reference)
    log_p, log_q = _log_softmax(a), _log_softmax(b)
    exact = c - log_mass_ratio(b, c, student)
    near = (exact.abs() <= 1) & (c.abs() <= LARGEST_EXACT)
    delta = torch.where(near, exact, torch.where(log_p == log_q, 0.0, log_p - log_q))
    p, q = log_p.exp(), log_q.exp()
    gap = torch.where(near, q * torch.expm1(delta.clamp(-1, 1)), p - q)
    p = torch.where(near, q + gap, p + (q - q))  # a teacher that is NaN stays visible
    # Slopes relative to that at the student's largest column: where it has nearly all mass, its own slope and the mean
    # of all are nearly the same number.
    top = a.argmax(-1, keepdim=True)
    delta_top, d_top = delta.gather(-1, top), d.gather(-1, top)
    zero = torch.zeros_like(delta_top) if name == "reverse_kl" else delta_top.clamp(0.0, FARTHEST_ORIGIN)
    by_scores = (d_top.abs() < 1e6) & ((zero == delta_top) | (name == "reverse_kl"))
    turn = torch.where(by_scores, d - d_top, delta - zero)
    if name == "reverse_kl":  # log(p/q) is infinite where one side is 0
        level = torch.where(by_scores, delta_top, 0.0)
        turn = turn.clamp(-LARGEST_SLOPE - level, LARGEST_SLOPE - level)
    value, slope = _shares(name, beta, p, q, delta, gap, turn, zero)
    if name == "forward_kl":
        return value.sum(-1), slope
    slope = slope - slope.gather(-1, top)
    return value.sum(-1), p * (slope - (p * slope).sum(-1, keepdim=True))


def _compute(
    student: Tensor, teacher: Tensor, row_scale: Tensor, rule: LogitRule, difference: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled values, their gradients (times row_scale), both float64, and which rows count."""
    counts = row_scale != 0
    s, t = (torch.where(counts[:, None], x, 0).double() for x in (student, teacher))
    value, gradient = _rows(s + t if difference else s, t, rule)
    factor = row_scale.double() * rule["value_factor"]
    return torch.where(counts, value * factor, 0.0), gradient * (factor / rule["student_temperature"])[:, None], counts


def logit_fwd(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    loss: Tensor,
    stats: Tensor,
    gradient: Tensor | None,
    phase: int = PHASE_ALL,
    difference: bool = False,
    **rule: Unpack[LogitRule],
) -> None:
    """Writes loss (N,) and, where given, gradient (N, V). Nothing is kept in stats: the backward starts afresh."""
    if phase != PHASE_ALL:
        raise ValueError("backend 'reference' has no part of a vocabulary, expected 'cpu', 'triton' or 'cuda'")
    value, slope, counts = _compute(student, teacher, row_scale, rule, difference)
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
    difference: bool = False,
    **rule: Unpack[LogitRule],
) -> None:
    """Writes gradient (N, V), times dloss (N,); with keep_unit, rows whose dloss is 1 are left alone."""
    _, slope, counts = _compute(student, teacher, row_scale, rule, difference)
    result = torch.where(counts[:, None], slope * dloss[:, None], 0.0).to(gradient.dtype)
    gradient.copy_(torch.where((dloss == 1)[:, None], gradient, result) if keep_unit else result)
