"""The loss object of TRL's GOLDTrainer across tokenizers (looked at: trl 1.16.0), by uld_loss.

Which positions of both sides are compared is TRL's to say: its object finds the answers and aligns their pieces. What
replaces it is the comparison: no softmax, sorted copy or permutation of all rows is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastdistil.losses.uld import uld_loss

# TRL's: a probability that a row is multiplied by is no less, and has no gradient below.
SMALLEST = 1e-8


class UniversalLogitLoss:
    """Called as TRL's ULDLoss is. Whatever else is asked of it, that one answers.

    theirs: the trainer's `uld_loss_fn`, without the hybrid loss."""

    def __init__(self, theirs: Any) -> None:
        self.theirs = theirs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.theirs, name)

    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        student_labels: Tensor,
        teacher_labels: Tensor,
        student_input_ids: Tensor,
        teacher_input_ids: Tensor,
        student_byte_offsets: Tensor | None = None,
        teacher_byte_offsets: Tensor | None = None,
    ) -> Tensor:
        options = self.theirs
        student = _Side(student_logits, student_labels, student_input_ids, student_byte_offsets, options, "student")
        teacher = _Side(teacher_logits, teacher_labels, teacher_input_ids, teacher_byte_offsets, options, "teacher")
        weights = list[float]()
        for item in range(len(student_logits)):
            pairs = self._pairs(item, student, teacher)
            for own, other in pairs:
                student.add(item, own)
                teacher.add(item, other)
            weights += [1 / (len(pairs) * len(student_logits)) for _ in pairs]
        rows, factor = student.rows()
        other_rows, other_factor = teacher.rows()
        loss: Tensor = uld_loss(
            rows, other_rows, temperature=student.temperature, teacher_temperature=teacher.temperature,
            student_factor=factor, teacher_factor=other_factor, reduction="sum",
            weight=torch.tensor(weights, dtype=torch.float64, device=rows.device),
        )  # fmt: skip
        loss = options.distillation_weight * loss
        if options.crossentropy_weight > 0:
            labels = functional.pad(student_labels[:, 1:], (0, 1), value=options.ignore_index)  # not the logits
            entropy = functional.cross_entropy(
                student_logits.flatten(0, 1), labels.flatten(), ignore_index=options.ignore_index
            )
            loss = options.crossentropy_weight * entropy + loss
        return loss

    def _pairs(self, item: int, student: _Side, teacher: _Side) -> list[tuple[list[int], list[int]]]:
        """The positions of one example that are compared, as groups of each side's."""
        (start, size), (other_start, other_size) = student.answers[item], teacher.answers[item]
        if size <= 0 or other_size <= 0:
            return []
        extended = self.theirs.use_extended_uld
        if student.before and 0 in (start, other_start):  # nothing comes before the first token that would predict it
            drop = other_drop = 1
            if extended:
                groups = self._aligned(item, student, (start, size), teacher, (other_start, other_size))
                drop, other_drop = (len(x) for x in groups[0]) if groups else (size, other_size)
            start, size, other_start, other_size = (
                start + drop, size - drop, other_start + other_drop, other_size - other_drop,
            )  # fmt: skip
            if size <= 0 or other_size <= 0:
                return []
        if not extended:
            return [([start + i], [other_start + i]) for i in range(min(size, other_size))]
        groups = self._aligned(item, student, (start, size), teacher, (other_start, other_size))
        return [([start + i for i in own], [other_start + i for i in other]) for own, other in groups if own and other]

    def _aligned(
        self, item: int, student: _Side, answer: tuple[int, int], teacher: _Side, other: tuple[int, int]
    ) -> list[tuple[list[int], list[int]]]:
        ends = [side.spans(item, *where) for side, where in ((student, answer), (teacher, other))]
        return list(zip(*self.theirs._align_by_byte_offsets(*ends), strict=True))


class _Side:
    """One side's logits (B, S, V), and which rows of it are compared."""

    def __init__(
        self, logits: Tensor, labels: Tensor, tokens: Tensor, offsets: Tensor | None, options: Any, side: str
    ) -> None:
        self.logits, self.offsets = logits, offsets
        self.tokens = tokens.tolist()
        self.temperature: float = getattr(options, f"{side}_temperature")
        self.before = options.token_merge_strategy == "bayesian"  # a token is compared where it is predicted
        starts, sizes = options._get_start_and_size_answers(labels)
        skipped = int(getattr(options, f"skip_{side}_eos"))
        self.answers = [(start, size - skipped) for start, size in zip(starts, sizes, strict=True)]
        self.compared = list[int]()  # positions in (B * S,), one for each row of the loss
        self.others = list[tuple[int, int, int]]()  # the position and token of a probability, and its row

    def spans(self, item: int, start: int, size: int) -> list[Sequence[int]]:
        if self.offsets is None:
            raise ValueError("GOLDMixin: byte offsets are missing, which use_extended_uld=True aligns by")
        found: list[Sequence[int]] = self.offsets[item, start : start + size].tolist()
        return found

    def add(self, item: int, group: list[int]) -> None:
        """A row of the loss: the group's distribution at one position, times the probabilities of its other tokens."""
        at, *others = reversed(group) if self.before else group
        first = item * self.logits.shape[1] - int(self.before)
        self.others += [(first + i, self.tokens[item][i], len(self.compared)) for i in others]
        self.compared.append(first + at)

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """The compared rows (R, V) and their factors (R,), None where all are 1."""
        flat, device = self.logits.flatten(0, 1), self.logits.device
        places = torch.tensor([*self.compared, *(x[0] for x in self.others)], dtype=torch.long, device=device)
        rows, others = torch.split(flat[places], [len(self.compared), len(self.others)])  # one copy, and one gradient
        if not self.others:
            return rows, None
        tokens, of = (torch.tensor([x[i] for x in self.others], device=device) for i in (1, 2))
        wide = others if others.dtype == torch.float64 else others.float()
        logs = -functional.cross_entropy(wide / self.temperature, tokens, reduction="none")
        logs = logs.exp().clamp_min(SMALLEST).log()
        return rows, logs.new_zeros(len(rows)).index_add(0, of, logs).exp()
