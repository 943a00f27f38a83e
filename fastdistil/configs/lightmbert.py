"""Options of LightMBERT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastdistil.configs.common import option
from fastdistil.configs.text import TextRun


@dataclass(frozen=True, kw_only=True)
class LightmbertConfig(TextRun):
    """LightMBERT (Jiao et al. 2021): the teacher's bottom blocks learn its last layer on multilingual text."""

    learn_from: Literal["teacher", "mlm"] = option(
        "teacher", "What trains the student: the teacher's last layer, or, as a baseline, the masked pieces alone."
    )
    blocks: int | None = option(None, "Blocks of the student, the teacher's bottom ones (default: half of them).")
    maps: Literal["prob_mse", "score_mse"] = option(
        "prob_mse", "Compare attention maps as probabilities or as scores; the paper does not say which."
    )
    freeze_embeddings: bool = option(True, "Keep the teacher's word embeddings as they are.")
    smoothing: float = option(1.0, "Exponent of the languages' sizes in sampling: 1 as they are, 0.7 mBERT's, 0 alike.")
    max_length: int = option(512, "Pieces per block, special tokens included.")

    def check(self) -> None:
        super().check()
        self.at_least(blocks=1)
        self.within(0, 1, "smoothing")
        if self.learn_from == "mlm" and self.corruption == 0:
            raise ValueError("LightmbertConfig: learn_from is 'mlm' and corruption 0, expected more than 0")
