"""The constants of one logit_loss call, as every backend receives them."""

from __future__ import annotations

from typing import TypedDict

# The order is the enum Divergence of csrc/rules/logit_args.h.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "mse")
# Made of rows of those with a factor of the acceptance rate on each (fastdistil/ops/acceptance.py): no kernel sees one.
ACCEPTANCE_LOSSES = ("nla", "lk_hybrid")
LOSSES = DIVERGENCES + ACCEPTANCE_LOSSES

# Columns of the row statistics, enum LogitStat of csrc/rules/logit_args.h: the largest teacher logit m, 1 / sum of
# e^((t - m) / T_t), the shift taken off the rows' differences (of logits; with two temperatures the student's logit of
# the shift's column), D = lse(a) - lse(b) - reference (infinite where the rows lie far apart), sum of p * slope, the
# reference (a - b less the shift where the teacher is largest), M and L of log p = (s - M) / T_s - L, for rules whose
# slopes have a mean the student's largest logit and the teacher's there, and with two temperatures the teacher's logit
# of the shift's column (else 0).
STATS = 11


# What a forward does; the order is the enum Phase of csrc/rules/logit_args.h.
PHASES = ("all", "statistics", "value")
PHASE_ALL, PHASE_STATISTICS, PHASE_VALUE = range(3)


class LogitRule(TypedDict):
    divergence: int  # index into DIVERGENCES; of an op's constants, into LOSSES
    beta: float  # of lk_hybrid, eta
    student_temperature: float
    teacher_temperature: float
    value_factor: float  # T_s T_t, or 1
