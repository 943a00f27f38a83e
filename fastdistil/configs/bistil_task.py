"""Options of BiStil's second phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastdistil.configs.common import Run, option
from fastdistil.configs.evaluate import LabelledData


@dataclass(frozen=True, kw_only=True)
class BistilTaskConfig(LabelledData, Run):
    """BiStil, phase 2 (Ansell et al. 2023): a task from the source language alone, as a sparse change of it."""

    student: str = option(help="Folder of phase 1's run or of its student.")
    teacher: str = option(help="Folder or hub name of the teacher tuned for the task, with the whole vocabulary.")
    train: tuple[str, ...] = option(help="Labelled text of the source language: column files or what `datasets` loads.")
    dev: tuple[str, ...] = option((), "Labelled text that the training is watched on.")
    test: tuple[str, ...] = option((), "Labelled text, FILE or LANGUAGE=FILE, each scored by itself.")
    task: Literal["tokens", "text"] = option("tokens", "A tag for every word, or a label for every text.")
    full: bool = option(False, "Tune everything and stop there, for comparison.")
    labels_only: bool = option(False, "Learn from the labels alone, without the teacher, for comparison.")
    density: float = option(0.08, "Share of the encoder's entries that the sparse training may change.")
    head: Literal["new", "teacher"] = option("new", "Begin with a new head, or with the teacher's.")
    epochs: float = option(3.0, "Passes over the data in which everything trains.")
    sparse_epochs: float = option(10.0, "Passes over the data in which the chosen entries train.")
    steps: int | None = option(None, "Steps of each, in place of both epochs.")
    lr: float = option(5e-5, "Learning rate of AdamW; it falls linearly to 0.")
    warmup_share: float = option(0.0, "Share of the steps in which the learning rate rises.")
    head_steps: int = option(0, "Steps before these in which the head alone is trained.")
    head_lr: float = option(1e-3, "Learning rate of those steps.")
    freeze_embeddings: bool = option(False, "Keep the word embeddings as they are.")
    evaluate_every: int | None = option(None, "Steps between evaluations on --dev (default: at the end).")
    batch_size: int = option(8, "Examples per micro-batch and process.")

    def check(self) -> None:
        Run.check(self)
        LabelledData.check(self)
        self.at_least(steps=1, evaluate_every=1, head_steps=0)
        name = type(self).__name__
        for field in ("density", "epochs", "sparse_epochs", "lr", "head_lr"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{name}: {field} is {getattr(self, field)}, expected more than 0")
        self.within(0, 1, "density", "warmup_share")
        if not self.train:
            raise ValueError(f"{name}: train is empty, expected at least one file")
