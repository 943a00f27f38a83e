"""What a teacher of K known columns is, and the formulas of its losses as one writes them."""

from __future__ import annotations

import math

import torch
from test_logit import textbook
from torch import Tensor

from fastdistil.ops.logit_rule import DIVERGENCES

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
