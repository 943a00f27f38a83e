"""Options of XtremeDistil."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdistil.configs.common import Run, option
from fastdistil.configs.evaluate import LabelledData

SCHEDULES = ("unfreezing", "stage-wise", "joint", "logits", "labels")


@dataclass(frozen=True, kw_only=True)
class XtremeDistilConfig(LabelledData, Run):
    """XtremeDistil (Mukherjee & Awadallah 2020): a task teacher's states and logits on unlabelled text, then labels."""

    teacher: str = option(help="Folder or hub name of the teacher, a classifier of words or of texts.")
    train: tuple[str, ...] = option(
        help="Labelled data: a file of words and tags, JSON Lines, CSV, Parquet, a saved data set or a name on the "
        "hub; da=FILE names its language. Several times for several files."
    )
    unlabelled: tuple[str, ...] = option(
        (), "Data of any languages for the teacher to read; labels in it are not used. The labelled data come with it."
    )
    dev: tuple[str, ...] = option((), "Labelled data to stop by (default: a share of the training data).")
    test: tuple[str, ...] = option(
        (), "Labelled data to score teacher and student on at the end, and for nothing else."
    )
    task: Literal["auto", "tokens", "text"] = option("auto", "Tags of words or labels of texts; auto: the teacher's.")
    schedule: Literal["unfreezing", "stage-wise", "joint", "logits", "labels"] = option(
        "unfreezing",
        "unfreezing: states, logits, labels, the last two with one sub-stage per group of parameters from the head "
        "down; stage-wise: one each; joint: all at once; logits or labels: these alone, as baselines.",
    )
    divergence: Literal["mse", "forward_kl", "reverse_kl", "js"] = option(
        "mse", "Distance of the logits; mse is half of the squared distance."
    )
    teacher_layer: int | None = option(
        None, "Layer whose states the student learns: 0 the embeddings', -1 the last (default: the middle one)."
    )
    student: Literal["bilstm", "transformer"] = option("bilstm", "Kind of student.")
    embedding_size: int = option(300, "BiLSTM: width of the word embeddings, an SVD of the teacher's.")
    lstm_size: int = option(600, "BiLSTM: width in each direction.")
    hidden_size: int = option(128, "Transformer: width.")
    layers: int = option(2, "Transformer: blocks.")
    heads: int = option(4, "Transformer: attention heads.")
    ffn_size: int = option(512, "Transformer: width of the feed-forward layers.")
    dropout: float | None = option(None, "Dropout of the student (default: 0.2 of a BiLSTM, 0.1 of a transformer).")
    trim: bool = option(True, "Keep only the pieces that stand in the training, unlabelled and development data.")
    epochs: float = option(3.0, "Passes of each stage or sub-stage over its data, at most.")
    steps: int | None = option(None, "Steps of the whole schedule at most, in place of epochs.")
    shares: tuple[float, ...] = option(
        (0.3, 0.5, 0.2), "Shares of --steps for states, logits and labels; sub-stages share alike."
    )
    lr: float | None = option(None, "Learning rate (default: 1e-3 of a BiLSTM, 5e-4 of a transformer).")
    patience: int = option(5, "Evaluations without a lower loss after which a stage stops.")
    evaluate_every: int | None = option(None, "Steps between evaluations (default: a tenth of the stage's).")
    dev_share: float = option(0.1, "Share of the training data to stop by, where no --dev is given.")
    dev_rows: int = option(400, "Sentences or texts of the development data that evaluations in training read.")
    max_length: int | None = option(128, "Pieces per example, special ones included.")
    cache: Path | None = option(
        None, "Folder of the teacher's outputs, to share between runs (default: inside of --out).", identity=False
    )
    cache_dtype: Literal["float16", "bfloat16", "float32"] = option("float16", "Type of the teacher's states on disk.")

    def check(self) -> None:
        Run.check(self)
        LabelledData.check(self)
        self.at_least(
            embedding_size=1, lstm_size=1, hidden_size=1, layers=1, heads=1, ffn_size=1, steps=1, patience=1,
            evaluate_every=1, dev_rows=1,
        )  # fmt: skip
        self.within(0, 0.95, "dropout")
        name = type(self).__name__
        if not self.train:
            raise ValueError(f"{name}: train is empty, expected at least one file")
        if not 0 < self.dev_share < 1:
            raise ValueError(f"{name}: dev_share is {self.dev_share}, expected more than 0 and less than 1")
        if not self.epochs > 0 or not (self.lr is None or self.lr > 0):
            raise ValueError(f"{name}: epochs is {self.epochs} and lr {self.lr}, expected more than 0")
        if len(self.shares) != 3 or not all(x > 0 for x in self.shares) or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"{name}: shares is {self.shares}, expected three numbers above 0 that sum to 1")
        if self.hidden_size % self.heads:
            raise ValueError(f"{name}: hidden_size is {self.hidden_size}, expected a multiple of heads = {self.heads}")

    @property
    def rate(self) -> float:
        """The learning rate, the student's own where none is given: 2e-3 lets a small transformer say O to all."""
        return self.lr if self.lr is not None else 1e-3 if self.student == "bilstm" else 5e-4

    @property
    def drop(self) -> float:
        return self.dropout if self.dropout is not None else 0.2 if self.student == "bilstm" else 0.1

    @property
    def reads_states(self) -> bool:
        return self.schedule in ("unfreezing", "stage-wise", "joint")
