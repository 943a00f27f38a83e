"""A schedule: stages of terms, each on its data, training a part of the student, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fastdistil.batches import InOrder, kept_generators
from fastdistil.recipes.terms import Distillation, Term
from fastdistil.suggest import meant_part
from fastdistil.train import Batch, Batches, Evaluate, OptimizerFactory, Options, adamw, train
from fastdistil.validation import mean_losses


@dataclass(frozen=True)
class Stage:
    """Terms whose sum is minimised, on which data, with which options, training which parameters.

    `data` is what `train` takes: examples, or `Batches`. `frozen` and `trained` hold parts of parameters' names: those
    do not train in this stage, or do although they came frozen. All others train where their requires_grad said so
    before the first stage. `fresh` holds parts of names whose modules are drawn anew before the stage, as a new head,
    from the options' seed. `held_out` is data whose mean losses are figures of the stage's evaluation, "loss" their sum
    (for `Options.metric`): examples for the collate, or batches where the data makes its own.
    """

    name: str
    terms: Sequence[Term]
    data: Sequence[Any] | Batches
    options: Options
    frozen: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    held_out: Sequence[Any] | Iterable[Batch] | None = None

    def __post_init__(self) -> None:
        for name in ("frozen", "trained", "fresh"):
            if isinstance(value := getattr(self, name), str):
                raise TypeError(f"Stage: {name} is a str, {value!r}, expected a tuple of parts of names: ({value!r},)")


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
                raise ValueError(
                    f"set_trainable: {argument} holds {part!r}, which is part of no parameter's name"
                    + meant_part(part, parameters)
                )
            for name in names:
                before, other = wanted.setdefault(name, (value, part))
                if before is not value:
                    raise ValueError(
                        f"set_trainable: {name} is in frozen by {other!r} and in trained by {part!r}, expected one"
                    )
    for name, (value, _) in wanted.items():
        parameters[name].requires_grad_(value)


def draw_anew(student: nn.Module, parts: Iterable[str], seed: int) -> None:
    """Draw the modules whose parameters' names hold one of `parts` anew from `seed`, as the student's class draws them;
    torch's generators stay as they are.

    Raises ValueError where an entry matches no parameter, or a module that cannot be drawn.
    """
    student_class: Any = student
    with kept_generators():
        torch.manual_seed(seed)
        for part in parts:
            names = [name for name, _ in student.named_parameters()]
            owners = [name.rpartition(".")[0] for name in names if part in name]
            if not owners:
                raise ValueError(
                    f"draw_anew: fresh holds {part!r}, which is part of no parameter's name{meant_part(part, names)}"
                )
            for owner in dict.fromkeys(owners):
                module: Any = student.get_submodule(owner)
                for held in (module, *module.parameters(recurse=False)):
                    vars(held).pop("_is_hf_initialized", None)  # transformers' mark of what was loaded and stays
                if hasattr(student, "_init_weights"):
                    student_class._init_weights(module)
                elif hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                else:
                    raise ValueError(f"draw_anew: {owner} is {type(module).__name__}, which has no reset_parameters")


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


def _evaluation(stage: Stage, collate: Callable[..., Batch] | None, evaluate: Evaluate | None) -> Evaluate | None:
    """The figures of the held-out data and of `evaluate`, which is asked of the student."""
    if stage.held_out is None and evaluate is None:
        return None

    def figures(objective: nn.Module) -> Mapping[str, float]:
        found: dict[str, float] = {}
        if stage.held_out is not None:
            found |= mean_losses(objective, _held_out(stage, collate))
        if evaluate is not None:
            distillation: Any = objective
            found |= evaluate(distillation.student)
        return found

    return figures


def _held_out(stage: Stage, collate: Callable[..., Batch] | None) -> Iterable[Batch]:
    if collate is None or isinstance(stage.data, Batches):
        return cast("Iterable[Batch]", stage.held_out)
    return InOrder(cast("Sequence[Any]", stage.held_out), collate, stage.options.batch_size, stage.options.seed)


def run_stages(
    student: nn.Module,
    stages: Sequence[Stage],
    collate: Callable[..., Batch] | None = None,
    *,
    teacher: nn.Module | None = None,
    optimizer: OptimizerFactory = adamw,
    out: str | Path | None = None,
    name: str = "student",
    evaluate: Evaluate | None = None,
    callbacks: Sequence[Any] = (),
) -> dict[str, list[dict[str, float]]]:
    """Train `student` in place through `stages`, one after the other; returns the losses of every step by stage.

    `collate` makes a batch of a list of a stage's examples; stages whose data makes its own batches need none.
    `teacher` runs along for the terms whose side of it is not in the batch. `evaluate` gets the student, in every stage
    (see `Options` for when). With `out`, each stage keeps its checkpoint in a folder there, and a second call after an
    interruption continues where the first one was. What is frozen before stays frozen unless a stage names it in
    `trained`; behind the stages, and behind an error, requires_grad is what it was.

    Raises ValueError where two stages have one name; other errors as `train.train`, `set_trainable` and `draw_anew`.
    """
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"run_stages: stages have the names {names}, expected each once")
    history, folder = {}, None if out is None else Path(out)
    with _kept_trainable(student) as restore:
        for index, stage in enumerate(stages):
            restore()
            draw_anew(student, stage.fresh, stage.options.seed)
            set_trainable(student, stage.frozen, stage.trained)
            batched = isinstance(stage.data, Batches)
            history[stage.name] = train(
                Distillation(student, stage.terms, teacher),
                stage.data,
                None if batched else collate,
                stage.options,
                optimizer=optimizer,
                out=None if folder is None else folder / f"{index}-{stage.name}",
                name=f"{name}: {stage.name}",
                evaluate=_evaluation(stage, collate, evaluate),
                callbacks=callbacks,
            )
    return history
