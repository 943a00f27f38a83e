"""The constants of one logit_loss call, as every backend receives them."""

from __future__ import annotations

from typing import TypedDict

# The order is the enum Divergence of csrc/rules/divergence.h.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "mse")

# Columns of the row statistics (LogitStat of csrc/rules/logit_args.h): largest tempered teacher logit, 1 / its sum of
# exponentials, the shift taken off the student, D = lse(a) - lse(b), and sum of p * slope.
STATS = 8


# enum Phase of csrc/rules/logit_args.h: what a forward does.
PHASE_ALL, PHASE_STATISTICS, PHASE_VALUE = range(3)


class LogitRule(TypedDict):
    divergence: int  # index into DIVERGENCES
    beta: float
    student_temperature: float
    teacher_temperature: float
    value_factor: float  # T_s T_t, or 1
