"""Options of `fastdistil evaluate`, and those of labelled data, which other commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdistil.configs.common import Configuration, option


@dataclass(frozen=True, kw_only=True)
class LabelledData(Configuration):
    """Options of how labelled data are read."""

    ignore_types: tuple[str, ...] = option((), "Types of entities to read as O, such as those that one file alone has.")
    column: tuple[str, ...] = option(
        (), "NAME=COLUMN where the data call words, tags, text, text_pair or label otherwise."
    )
    max_length: int | None = option(None, "Pieces per example; what is beyond is not read. (default: 512, or fewer)")

    def check(self) -> None:
        self.at_least(max_length=3)
        self.columns()

    def columns(self) -> dict[str, str]:
        """{our name: the data's}. Raises ValueError for another form or name."""
        known = ("words", "tags", "text", "text_pair", "label")
        pairs = [pair.partition("=") for pair in self.column]
        for (name, _, column), pair in zip(pairs, self.column, strict=True):
            if name not in known or not column:
                wanted = "NAME=COLUMN with one of " + ", ".join(known)
                raise ValueError(f"{type(self).__name__}: column is {pair!r}, expected {wanted}")
        return {name: column for name, _, column in pairs}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(LabelledData):
    """Score a classifier of words or texts on test files, by file and language."""

    model: str = option(help="The model: a folder, a run's folder, or a name on the hub.")
    test: tuple[str, ...] = option(
        help="Test data: a file of words and tags, JSON Lines, CSV, Parquet, a saved data set or a name on the hub; "
        "da=FILE names its language. Several times for several files."
    )
    task: Literal["auto", "tokens", "text"] = option("auto", "Tags of words or labels of texts; auto: the model's.")
    batch_size: int = option(32, "Examples per batch; those of a batch have about the same length.")
    out: Path | None = option(None, "A folder for the figures as JSON.")

    def check(self) -> None:
        super().check()
        self.at_least(batch_size=1)
        if not self.test:
            raise ValueError("EvaluateConfig: test is empty, expected at least one file")
