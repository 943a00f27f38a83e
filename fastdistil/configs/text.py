"""Options of the systems that read raw text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdistil.configs.common import Run, option


@dataclass(frozen=True, kw_only=True)
class TextRun(Run):
    """A run over packed, corrupted blocks of raw text."""

    teacher: str = option(help="Folder or hub name of the teacher, an encoder of transformers.")
    text: tuple[str, ...] = option(
        help="Raw text: FILE or LANGUAGE=FILE (text, JSON Lines, CSV, Parquet), a saved dataset or a hub name."
    )
    documents: Literal["line", "paragraph"] = option("line", "What is a document in a file of plain text.")
    column: str | None = option(None, "Column of the text, where a file has several of strings.")
    cache: Path | None = option(
        None, "Folder of the text cut into pieces, to share between runs (default: inside of --out).", identity=False
    )
    max_length: int = option(256, "Pieces per block, special tokens included.")
    corruption: float = option(0.15, "Share of pieces that are masked or replaced, as for masked language modelling.")
    whole_words: bool = option(False, "Choose whole words for it; a word of more than 8 pieces is no word.")
    held_out: float = option(0.01, "Share of the documents that are held out, to evaluate on.")
    held_out_blocks: int = option(32, "Blocks of each language that an evaluation reads.")
    evaluate_every: int | None = option(None, "Steps between evaluations (default: a tenth of all).")
    epochs: float = option(1.0, "Passes over the text.")
    steps: int | None = option(None, "Steps, in place of epochs.")
    lr: float = option(1e-4, "Learning rate of AdamW; it falls linearly to 0.")
    warmup_share: float = option(0.1, "Share of the steps in which it rises first.")
    batch_size: int = option(8, "Blocks per micro-batch and process.")

    def check(self) -> None:
        super().check()
        self.at_least(max_length=3, steps=1, evaluate_every=1, held_out_blocks=1)
        self.within(0, 1, "warmup_share")
        self.within(0, 0.9, "corruption", "held_out")
        name = type(self).__name__
        if not self.text:
            raise ValueError(f"{name}: text is empty, expected LANGUAGE=FILE or FILE at least once")
        if not self.epochs > 0 or not self.lr > 0:
            raise ValueError(f"{name}: epochs is {self.epochs} and lr {self.lr}, expected more than 0")
