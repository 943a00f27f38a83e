"""What a teacher of K known columns is, and the formulas of its losses as one writes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import torch
from judge import Outcome
from mpmath import mpf
from test_logit import textbook
from torch import Tensor

from fastdistil.contracts.logit import DIVERGENCES

# What each tail gives a meaning to.
CASES = [
    *(("bucket", d) for d in DIVERGENCES if d != "mse"),
    *(("renormalize", d) for d in DIVERGENCES if d not in ("mse", "reverse_kl")),
    ("zero", "forward_kl"),
]


def known(teacher: Tensor, k: int, temperature: float = 1.0, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The teacher's K most probable columns, as one stores them."""
    values, indices = (teacher.double() / temperature).log_softmax(-1).topk(k)
    return values.to(teacher.dtype if dtype is None else dtype), indices


def formula(s: Tensor, values: Tensor, indices: Tensor, tail: str, divergence: str, beta: float = 0.5, t: float = 1.0) -> Tensor:  # fmt: skip
    """The rows' values as one writes them: log-probabilities of K + 1 outcomes, or of all V columns."""
    log_p = (s / t).log_softmax(-1)
    u = values.to(s.dtype)
    if tail == "zero":
        return (u.exp() * (u - log_p.gather(-1, indices))).sum(-1)
    if tail == "renormalize":
        log_q = torch.full_like(s, -math.inf).scatter(-1, indices, u.log_softmax(-1))
        return textbook(log_p, log_q, divergence, beta)
    rest = torch.ones_like(s, dtype=torch.bool).scatter(-1, indices, False)
    p_rest = log_p.masked_fill(~rest, -math.inf).logsumexp(-1, keepdim=True)
    q_rest = torch.log1p(-u.exp().sum(-1, keepdim=True))
    return textbook(torch.cat((log_p.gather(-1, indices), p_rest), -1), torch.cat((u, q_rest), -1), divergence, beta)


def digits(
    student: Tensor,
    values: Tensor,
    indices: Tensor,
    tail: str,
    divergence: str,
    teacher_tail: Tensor | None = None,
    beta: float = 0.3,
) -> Outcome:
    """Value (1,) and gradient (1, V) of one row by docs/losses.md, section 1a, in 60 digits, the gradient by central
    differences. teacher_tail (1,), or what the section puts in its place for float32 values."""
    with mpmath.workdps(60):
        a, q = [mpf(x) for x in student[0].tolist()], [mpmath.exp(mpf(u)) for u in values[0].tolist()]
        named, step = indices[0].tolist(), mpf("1e-25")
        rounding = mpf(2) ** -24 * max(1, mpmath.fsum(x * abs(mpmath.log(x)) for x in q))
        outside = max(1 - mpmath.fsum(q), rounding) if teacher_tail is None else mpmath.exp(mpf(teacher_tail.item()))
        outside = mpf(0) if tail == "renormalize" else outside
        mass = mpf(1) if tail == "zero" and teacher_tail is None else mpmath.fsum(q) + outside
        q = [x / mass for x in q]

        def value(scores: list[mpf]) -> mpf:
            total = mpmath.fsum(map(mpmath.exp, scores))
            p = [mpmath.exp(scores[i]) / total for i in named]
            if tail == "zero":
                return mpmath.fsum(y * mpmath.log(y / x) for x, y in zip(p, q, strict=True))
            others = mpmath.fsum(mpmath.exp(x) for i, x in enumerate(scores) if i not in named) / total
            pairs = zip([*p, others], [*q, outside / mass], strict=True)
            return mpmath.fsum(SHARES[divergence](x, y, mpf(beta)) for x, y in pairs)

        def moved(column: int, by: mpf) -> list[mpf]:
            return [x + by if i == column else x for i, x in enumerate(a)]

        slopes = [(value(moved(i, step)) - value(moved(i, -step))) / (2 * step) for i in range(len(a))]
        rows = [torch.tensor([float(x) for x in xs], dtype=torch.float64) for xs in ([value(a)], slopes)]
    return Outcome(rows[0].to(student.device), (rows[1][None].to(student.device),))


def _kl(x: mpf, y: mpf) -> mpf:
    return mpf(0) if x == 0 else mpmath.inf if y == 0 else x * mpmath.log(x / y)


# Of one outcome of probability p (student) and q (teacher), by the divergence's definition.
SHARES: dict[str, Callable[[mpf, mpf, mpf], mpf]] = {
    "forward_kl": lambda p, q, beta: _kl(q, p),
    "reverse_kl": lambda p, q, beta: _kl(p, q),
    "jsd": lambda p, q, beta: beta * _kl(q, beta * q + (1 - beta) * p) + (1 - beta) * _kl(p, beta * q + (1 - beta) * p),
    "skew_kl": lambda p, q, beta: _kl(q, beta * q + (1 - beta) * p),
    "skew_reverse_kl": lambda p, q, beta: _kl(p, beta * p + (1 - beta) * q),
    "tvd": lambda p, q, beta: abs(p - q) / 2,
}
