"""What the layer-to-layer recipes are written in: pairs of a student and a teacher layer, and the objective of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastdistil as fd
from fastdistil.fingerprint import of_teacher
from fastdistil.train import Batch


@dataclass(frozen=True)
class LayerPair:
    """One term: the student's layer against the teacher's, `scale` its share in the loss.

    kind: "hidden" for the mean squared difference of (B, S, D) states (0 is what the first block gets, l the output of
    block l); "prob_mse", "prob_kl" or "score_mse" for the attention maps of two blocks, from 1.
    """

    kind: str
    student: int
    teacher: int
    scale: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.student}_{self.teacher}"


class LayerObjective(nn.Module):
    """The `Objective` of a stage (train.py): both models run on the batch under `fd.capture`, no map is formed.

    The batch holds input_ids and attention_mask (B, S); a pair's items are its real tokens, or, for attention maps, the
    pairs of them and heads. The teacher is kept in evaluation mode and out of parameters and checkpoints.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, pairs: Sequence[LayerPair]) -> None:
        super().__init__()
        if not pairs:
            raise ValueError("LayerObjective: pairs is empty, expected at least one")
        self.student, self.pairs = student, tuple(pairs)
        self._teacher = (teacher.eval(),)  # a tuple hides it from the module's parameters
        config = getattr(student, "config", None)
        self.heads = int(getattr(config, "num_attention_heads", 1))

    def _layers(self, side: str) -> dict[str, list[int]]:
        def of(hidden: bool) -> list[int]:
            return sorted({int(getattr(pair, side)) for pair in self.pairs if (pair.kind == "hidden") is hidden})

        return {"hidden_states": of(True), "queries": of(False), "keys": of(False)}

    def forward(self, batch: Batch, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        teacher, mask = self._teacher[0].to(inputs["input_ids"].device), inputs["attention_mask"].bool()
        with torch.no_grad(), fd.capture(teacher, **self._layers("teacher")) as t:
            teacher(**inputs)
        with fd.capture(self.student, **self._layers("student")) as s:
            self.student(**inputs)
        terms: dict[str, Tensor] = {}
        for pair in self.pairs:
            i, j, divisor = pair.student, pair.teacher, items[pair.name] / pair.scale
            if pair.kind == "hidden":
                loss = fd.hidden_loss(s.hidden_states[i], t.hidden_states[j], weight=mask, num_items=divisor)
            else:
                maps = (s.queries[i], s.keys[i], t.queries[j], t.keys[j])
                loss = fd.attention_loss(*maps, kind=pair.kind, mask=mask, reduction="sum") / divisor
            terms[pair.name] = loss
        return terms

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint's run must have in common with this one: the teacher and the pairs."""
        terms = [f"{pair.name}, scale {pair.scale}" for pair in self.pairs]
        return {"teacher": of_teacher(self._teacher[0]), "terms": terms}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        tokens = batch["attention_mask"].sum(1)
        items = {"hidden": tokens.sum(), "prob_kl": self.heads * tokens.sum()}
        maps = self.heads * tokens.square().sum()
        return {pair.name: items.get(pair.kind, maps) for pair in self.pairs}
