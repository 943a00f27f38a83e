"""A student with a part of the teacher's vocabulary, and a teacher that keeps its whole softmax (docs/losses.md, 1e).

The teacher's columns that no student column is mapped to become one more column of both sides: the teacher's logit
there is their logsumexp, the student's -inf. Every divergence that is finite where p = 0 is linear in q there, so that
it is that of the whole vocabularies; the forward KL leaves the column out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Beyond(NamedTuple):
    """Of the teacher's unmapped columns (n,): the largest logit, a logit that has the probability of all of them, and
    where the whole row's largest is: the student's column, or -1."""

    largest: Tensor
    logit: Tensor
    top: Tensor


class DraftVocabulary:
    """The map of one call; on what device its columns are."""

    def __init__(self, vocab_map: Tensor, teacher_columns: int) -> None:
        self.columns = teacher_columns
        self.partners = vocab_map.clamp(min=0)
        there = (vocab_map >= 0).nonzero()[:, 0]
        self.mapped = vocab_map[there]
        none = len(vocab_map)
        first = vocab_map.new_full((teacher_columns,), none).scatter_reduce_(0, self.mapped, there, "amin")
        self.student_column = torch.where(first == none, -1, first)

    def split(self, whole: Tensor, teacher: Tensor, temperature: float) -> Beyond:
        """Writes the columns (n, V_s) of whole (n, V_t) to `teacher`; `whole` is lost."""
        teacher.copy_(whole[:, self.partners])
        top = self.student_column[whole.argmax(1)]
        whole.index_fill_(1, self.mapped, -torch.inf)
        largest = whole.amax(1)
        unit = torch.where(largest == -torch.inf, 0.0, largest)
        logit = unit + temperature * whole.sub_(unit[:, None]).div_(temperature).exp_().sum(1).log()
        return Beyond(largest, logit, top)


def with_whole(levels: Tensor, beyond: Beyond, temperature: float) -> tuple[Tensor, Tensor]:
    """Levels (n, LEVELS) whose teacher is normalised over all columns, from those of the mapped ones, and ln of what
    these have of its probability, which is exact near 0."""
    others = (beyond.logit - levels[:, 2]) / temperature
    log_share = -torch.exp(others - levels[:, 3]).log1p()
    return torch.cat((levels[:, :3], torch.logaddexp(levels[:, 3], others)[:, None]), 1), log_share
