"""What a recipe is written in: pairs of a student and a teacher tensor with a loss, and stages that add them up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.train import Batch, OptimizerFactory, Options, adamw, train

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(student (..., C), teacher (..., C) or (...), weight (...), items ()) -> 0-d sum of weight * loss, / items."""


@dataclass(frozen=True)
class Pair:
    """One term of a stage.

    `student` picks a tensor from the student's transformers output; `teacher` and `weight` name entries of the batch
    (the weight has one 0/1 entry a token and its sum is the term's number of items); `loss` is told by how many items
    of the whole step to divide;
    `projection` maps the student's tensor to the teacher's width and trains with the student; `scale` is the term's
    share in the stage's loss.
    """

    name: str
    student: Callable[[Any], Tensor]
    teacher: str
    loss: PairLoss
    weight: str
    projection: nn.Module | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Stage:
    """Pairs whose sum is minimised, on which `examples` of the data, with which options, training which parameters."""

    name: str
    pairs: Sequence[Pair]
    examples: Sequence[Any]
    options: Options
    frozen: tuple[str, ...] = ()


class PairObjective(nn.Module):
    """The `Objective` of a stage: one forward pass of the student, then the sum of every pair's loss."""

    def __init__(self, student: nn.Module, pairs: Sequence[Pair]) -> None:
        super().__init__()
        self.student = student
        self.projections = nn.ModuleDict({p.name: p.projection for p in pairs if p.projection is not None})
        self.pairs = tuple(pairs)

    def forward(self, batch: Batch, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        out = self.student(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        )
        terms: dict[str, Tensor] = {}
        for pair in self.pairs:
            student = pair.student(out)
            if pair.name in self.projections:
                student = self.projections[pair.name](student)
            # The scale goes into the divisor: what follows the loss would cost its gradient another pass.
            divisor = items[pair.name] / pair.scale
            terms[pair.name] = pair.loss(student, batch[pair.teacher], batch[pair.weight], divisor)
        return terms

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        return {pair.name: batch[pair.weight].sum() for pair in self.pairs}


def set_trainable(student: nn.Module, frozen: Iterable[str]) -> None:
    """requires_grad False for parameters whose name holds one of `frozen`, True for all others.

    Raises ValueError where an entry of `frozen` matches no parameter: a misspelt name would train silently.
    """
    names = [name for name, _ in student.named_parameters()]
    parts = tuple(frozen)
    for part in parts:
        if not any(part in name for name in names):
            raise ValueError(f"set_trainable: frozen holds {part!r}, which is part of no parameter's name")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not any(part in name for part in parts))


def cross_entropy(student: Tensor, labels: Tensor, weight: Tensor, items: Tensor) -> Tensor:
    """Sum of weight * cross entropy / items: `student` (..., C) logits, `labels` (...) int64, `weight` (...) 0/1."""
    keep = weight.bool()
    return torch.nn.functional.cross_entropy(student[keep].float(), labels[keep], reduction="sum") / items


def run_stages(
    student: nn.Module,
    stages: Sequence[Stage],
    collate: Callable[[list[Any]], Batch],
    *,
    optimizer: OptimizerFactory = adamw,
    out: Path | None = None,
    name: str = "student",
) -> dict[str, list[dict[str, float]]]:
    """Train `student` in place through `stages`, one after the other; returns the losses of every step by stage.

    `collate` makes a batch from a list of a stage's examples. With `out`, each stage keeps its checkpoint in a folder
    there, and a second call after an interruption continues where the first one was. Errors as `train.train`.
    """
    history = {}
    for index, stage in enumerate(stages):
        set_trainable(student, stage.frozen)
        history[stage.name] = train(
            PairObjective(student, stage.pairs),
            stage.examples,
            collate,
            stage.options,
            optimizer=optimizer,
            out=None if out is None else out / f"{index}-{stage.name}",
            name=f"{name}: {stage.name}",
        )
    set_trainable(student, ())
    return history
