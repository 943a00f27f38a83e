"""The constants of one topk_logit_loss call, as every backend receives them."""

from __future__ import annotations

from typing import TypedDict

# The order is the enum Tail of csrc/rules/topk_args.h.
TAILS = ("bucket", "renormalize", "zero")
BUCKET, RENORMALIZE, ZERO = range(3)

# Columns of the row statistics before the K gradients: the largest student logit outside of the K columns, and what
# e^((z - largest) / T) is multiplied by to give the gradient there.
STATS = 2


class TopkRule(TypedDict):
    divergence: int  # index into fastdistil.contracts.logit.DIVERGENCES
    beta: float
    tail: int  # index into TAILS
    temperature: float
    value_factor: float  # T^2, or 1
