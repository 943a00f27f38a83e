"""Options of BiStil's first phase."""

from __future__ import annotations

from dataclasses import dataclass

from fastdistil.configs.common import option
from fastdistil.configs.text import TextRun


@dataclass(frozen=True, kw_only=True)
class BistilConfig(TextRun):
    """BiStil, phase 1 (Ansell et al. 2023): every r-th block and a vocabulary of two languages learn all layers."""

    reduction: int = option(2, "Keep every r-th block of the teacher, 2 or 3 in the paper.")
    threshold: float = option(1e-6, "Share in one language from which on a piece of the vocabulary is kept.")
    trim: bool = option(True, "Cut the vocabulary to those pieces.")
    language_delta: tuple[str, ...] = option(
        (), "LANGUAGE=FILE: a sparse difference that the teacher has while it reads this language."
    )
    warmup_share: float = option(0.0, "Share of the steps in which the learning rate rises first.")
    save_every: int = option(1000, "Steps between checkpoints.", identity=False)

    def check(self) -> None:
        super().check()
        self.at_least(reduction=1)
        if not 0 < self.threshold < 1:
            raise ValueError(f"BistilConfig: threshold is {self.threshold}, expected more than 0 and less than 1")
        for entry in self.language_delta:
            if not all(entry.partition("=")):
                raise ValueError(f"BistilConfig: language_delta holds {entry!r}, expected LANGUAGE=FILE")
