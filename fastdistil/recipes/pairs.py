"""What a recipe is written in: pairs of a student and a teacher tensor with a loss, and stages that add them up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastdistil as fd
from fastdistil.fingerprint import function_name
from fastdistil.models.capture import Captured, transformers_models
from fastdistil.train import Batch, OptimizerFactory, Options, adamw, train

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(student (..., C), teacher (..., C) or (...), weight (...), items ()) -> 0-d sum of weight * loss, / items."""


@dataclass(frozen=True)
class Pair:
    """One term of a stage.

    `student` picks a tensor from the student's transformers output, or is the number of a layer, whose state is taken
    as `fd.capture` does: -1 is the last block's output before the norm behind it, which `hidden_states[-1]` of
    ModernBERT's or Llama's output is not; of a student that is no transformers model, `hidden_states` of its output
    are counted. `teacher` and `weight` name entries of the batch (the weight has one 0/1
    entry a token and its sum is the term's number of items); `loss` is told by how many items of the whole step to
    divide; `projection` maps the student's tensor to the teacher's width and trains with the student; `scale` is the
    term's share in the stage's loss.
    """

    name: str
    student: Callable[[Any], Tensor] | int
    teacher: str
    loss: PairLoss
    weight: str
    projection: nn.Module | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Stage:
    """Pairs whose sum is minimised, on which `examples` of the data, with which options, training which parameters.

    `frozen` and `trained` hold parts of parameters' names: those do not train in this stage, or do although they came
    frozen. All others train where their requires_grad said so before the first stage.
    """

    name: str
    pairs: Sequence[Pair]
    examples: Sequence[Any]
    options: Options
    frozen: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()


class PairObjective(nn.Module):
    """The `Objective` of a stage: one forward pass of the student, then the sum of every pair's loss."""

    def __init__(self, student: nn.Module, pairs: Sequence[Pair]) -> None:
        super().__init__()
        self.student = student
        self.projections = nn.ModuleDict({p.name: p.projection for p in pairs if p.projection is not None})
        self.pairs = tuple(pairs)
        self.captures = bool(transformers_models(student))

    def forward(self, batch: Batch, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = [pair.student for pair in self.pairs if isinstance(pair.student, int)]
        layers = {self._layer(number) for number in named} if self.captures else ()
        with fd.capture(self.student, hidden_states=layers) if layers else nullcontext(Captured()) as captured:
            out = self.student(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
            )
        terms: dict[str, Tensor] = {}
        for pair in self.pairs:
            if not isinstance(pair.student, int):
                student = pair.student(out)
            elif self.captures:
                student = captured.hidden_states[self._layer(pair.student)]
            else:
                student = out.hidden_states[pair.student]
            if pair.name in self.projections:
                student = self.projections[pair.name](student)
            # The scale goes into the divisor: what follows the loss would cost its gradient another pass.
            divisor = items[pair.name] / pair.scale
            terms[pair.name] = pair.loss(student, batch[pair.teacher], batch[pair.weight], divisor)
        return terms

    def _layer(self, number: int) -> int:
        config: Any = self.student.config
        return number if number >= 0 else int(config.num_hidden_layers) + 1 + number

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint's run must have in common with this one: the pairs. The teacher is in the data."""
        return {"terms": [_said(pair) for pair in self.pairs]}

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        return {pair.name: batch[pair.weight].sum() for pair in self.pairs}


def _said(pair: Pair) -> str:
    """A pair in one line, the same in every run."""
    student = f"layer {pair.student}" if isinstance(pair.student, int) else function_name(pair.student)
    loss = function_name(pair.loss)
    projection = None if pair.projection is None else type(pair.projection).__name__
    return f"{pair.name}: {loss}({student}, {pair.teacher}, {pair.weight}, {projection}), scale {pair.scale}"


def set_trainable(student: nn.Module, frozen: Iterable[str], trained: Iterable[str] = ()) -> None:
    """requires_grad False for parameters whose name holds one of `frozen`, True for one of `trained`; others keep it.

    Raises ValueError where an entry matches no parameter, as a misspelt name would train silently, and where a
    parameter matches both.
    """
    parameters = dict(student.named_parameters())
    wanted: dict[str, tuple[bool, str]] = {}
    for argument, parts, value in (("frozen", tuple(frozen), False), ("trained", tuple(trained), True)):
        for part in parts:
            names = [name for name in parameters if part in name]
            if not names:
                raise ValueError(f"set_trainable: {argument} holds {part!r}, which is part of no parameter's name")
            for name in names:
                before, other = wanted.setdefault(name, (value, part))
                if before is not value:
                    raise ValueError(
                        f"set_trainable: {name} is in frozen by {other!r} and in trained by {part!r}, expected one"
                    )
    for name, (value, _) in wanted.items():
        parameters[name].requires_grad_(value)


@contextmanager
def _kept_trainable(student: nn.Module) -> Iterator[Callable[[], None]]:
    """A function that gives every parameter the requires_grad that it has now; called at the end as well."""
    before = [(parameter, parameter.requires_grad) for parameter in student.parameters()]

    def restore() -> None:
        for parameter, value in before:
            parameter.requires_grad_(value)

    try:
        yield restore
    finally:
        restore()


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
    there, and a second call after an interruption continues where the first one was. What is frozen before stays frozen
    unless a stage names it in `trained`; behind the stages, and behind an error, requires_grad is what it was. Errors
    as `train.train` and `set_trainable`.
    """
    history = {}
    with _kept_trainable(student) as restore:
        for index, stage in enumerate(stages):
            restore()
            set_trainable(student, stage.frozen, stage.trained)
            history[stage.name] = train(
                PairObjective(student, stage.pairs),
                stage.examples,
                collate,
                stage.options,
                optimizer=optimizer,
                out=None if out is None else out / f"{index}-{stage.name}",
                name=f"{name}: {stage.name}",
            )
    return history
