"""Options of `fastdistil finetune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastdistil.configs.common import Run, option
from fastdistil.configs.evaluate import LabelledData


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(LabelledData, Run):
    """Tune an encoder on labelled words or texts: a task's teacher, or a baseline."""

    model: str = option(help="The encoder: a folder, a run's folder, or a name on the hub.")
    train: tuple[str, ...] = option(
        help="Labelled data: a file of words and tags, JSON Lines, CSV, Parquet, a saved data set or a name on the "
        "hub; da=FILE names its language. Several times for several files."
    )
    dev: tuple[str, ...] = option((), "Data for validation. (default: a share of the training data)")
    dev_share: float = option(0.1, "Share of the training data for validation, where there is no --dev.")
    task: Literal["tokens", "text"] = option("tokens", "Tags of words, or labels of texts and pairs of texts.")
    epochs: float = option(3.0, "Passes over the training data.")
    steps: int | None = option(None, "Steps, in place of epochs.")
    lr: float = option(5e-5, "Learning rate, which falls linearly to 0.")
    head_steps: int = option(0, "Steps before these in which a new head alone is trained.")
    head_lr: float = option(1e-3, "Learning rate of those steps.")
    warmup_share: float = option(0.1, "Share of the steps in which the learning rate rises.")
    weight_decay: float = option(0.01, "AdamW's weight decay, of matrices alone.")
    evaluate_every: int | None = option(None, "Steps between validations. (default: an epoch)")
    patience: int | None = option(3, "Validations without a better score after which training stops.")
    freeze_embeddings: bool = option(False, "Keep the word embeddings as they are.")
    freeze: tuple[str, ...] = option((), "Parts of names of parameters to keep as they are, as encoder.layer.0.")

    def check(self) -> None:
        Run.check(self)
        LabelledData.check(self)
        self.at_least(steps=1, head_steps=0, evaluate_every=1, patience=1, weight_decay=0)
        self.within(0, 1, "dev_share", "warmup_share")
        for name in ("lr", "head_lr", "epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"FinetuneConfig: {name} is {getattr(self, name)}, expected more than 0")
        if not self.train:
            raise ValueError("FinetuneConfig: train is empty, expected at least one file")
        if not self.dev and not 0 < self.dev_share < 1:
            raise ValueError(
                f"FinetuneConfig: dev_share is {self.dev_share} without dev, expected 0 to 1, without both"
            )
