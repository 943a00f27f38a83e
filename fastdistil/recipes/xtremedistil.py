"""XtremeDistil (Mukherjee & Awadallah 2020, arXiv 2004.05686): representation, then logits, then labels.

    student = bilstm_student(teacher, ...)       # models.bilstm, or models.student.compact_student
    states = xtremedistil.representation(7, student.bilstm.projection)
    stages = xtremedistil.stages(states, student.groups(), unlabelled, labelled, steps=1000, ...)
    run_stages(student, stages, collate)

The teacher's states and logits come in the batch (`recipes.terms` names its entries), so that it runs once, whatever
the number of stages and students. Against the paper, padding does not count. Its first loss, a KL divergence of the
states as they are, does not have its minimum at the teacher; the authors' second version has the MSE, as here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from fastdistil.recipes.stages import Stage
from fastdistil.recipes.terms import Term, hidden, labels, logits
from fastdistil.train import Batch, Batches, Options

Data = Sequence[Any] | Batches
HeldOut = Sequence[Any] | Iterable[Batch] | None
Example = TypeVar("Example")


def representation(
    teacher_layer: int | str, projection: nn.Module | None = None, *, kind: str = "mse", scale: float = 1.0
) -> Term:
    """The student's last states through `projection` (D_s -> D) against a teacher layer's, on every piece.

    `projection` is nn.Sequential(nn.Linear(D_s, D), nn.GELU()) in the paper, and a part of the student.
    """
    return hidden(-1, teacher_layer, kind=kind, projection=projection, scale=scale)


def split(data: Sequence[Example], share: float = 0.1, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """(what is trained on, what early stopping looks at): `share` of the training data, drawn; at least one of each.

    Raises ValueError where `data` has fewer than two examples, or `share` is not between 0 and 1.
    """
    if len(data) < 2:
        raise ValueError(f"xtremedistil.split: data has {len(data)} examples, expected at least 2")
    if not 0 < share < 1:
        raise ValueError(f"xtremedistil.split: share is {share}, expected more than 0 and less than 1")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = min(len(data) - 1, max(1, round(share * len(data))))
    return [data[i] for i in sorted(order[cut:])], [data[i] for i in sorted(order[:cut])]


def stages(
    states: Term,
    groups: Mapping[str, Sequence[str]],
    unlabelled: Data,
    labelled: Data,
    *,
    steps: int,
    label_steps: int | None = None,
    lr: float = 1e-3,
    batch_size: int = 32,
    seed: int = 0,
    divergence: str = "mse",
    unfreeze: bool = True,
    held_out_unlabelled: HeldOut = None,
    held_out_labelled: HeldOut = None,
    evaluate_every: int | None = None,
    patience: int = 5,
) -> list[Stage]:
    """The paper's schedule: the states; ½‖logits difference‖² (or another divergence); the labels, with a new head.

    Args:
        states: of stage 1, `representation(...)`.
        groups: {name: parts of parameters' names} of the student from its head down. Stages 2 and 3 train the first of
            them alone, then the first two, and so on: one sub-stage each, of a BiLSTM's four groups nine stages in all.
        unlabelled: what stages 1 and 2 read; `labelled`: what stage 3 reads. Examples, or `Batches`.
        steps: at most, of each sub-stage; `label_steps` of those of stage 3, the same by default.
        lr: falls to 1e-8 by half a cosine, from a fresh Adam in each sub-stage.
        unfreeze: False for one sub-stage that trains everything, in stages 2 and 3.
        held_out_unlabelled, held_out_labelled: a split of the training data, never of the test data (`split`). Each
            sub-stage then evaluates its own losses there every `evaluate_every` steps, stops after `patience`
            evaluations without a better one, and keeps the best weights.
    """
    if not groups:
        raise ValueError("xtremedistil.stages: groups is empty, expected the head's at least")
    parts = [tuple(part) for part in groups.values()]
    options = Options(steps, lr=lr, final_lr=min(1e-8, lr), batch_size=batch_size, warmup=0, weight_decay=0.0)
    late = replace(options, steps=steps if label_steps is None else label_steps)
    made = [Stage("states", [states], unlabelled, options, frozen=parts[0], held_out=held_out_unlabelled)]
    soft = (logits(divergence=divergence), unlabelled, options, held_out_unlabelled)
    for term, data, chosen, held_out in (soft, (labels(), labelled, late, held_out_labelled)):
        first = 0 if unfreeze else len(parts) - 1
        for last, name in list(enumerate(groups))[first:]:
            frozen = tuple(part for group in parts[last + 1 :] for part in group)
            fresh = parts[0] if term.name == "labels" and last == first else ()
            title = f"{term.name}-{name}" if unfreeze else term.name
            made.append(Stage(title, [term], data, chosen, frozen=frozen, fresh=fresh, held_out=held_out))
    seeded = [replace(stage, options=replace(stage.options, seed=100 * seed + i)) for i, stage in enumerate(made)]
    return [_stopping_early(stage, evaluate_every, patience) for stage in seeded]


def _stopping_early(stage: Stage, evaluate_every: int | None, patience: int) -> Stage:
    if stage.held_out is None:
        return stage
    every = evaluate_every or max(1, stage.options.steps // 10)
    rule = {"evaluate_every": every, "metric": "loss", "greater_is_better": False, "patience": patience}
    return replace(stage, options=replace(stage.options, **rule))  # type: ignore[arg-type]


def joint(states: Term, data: Data, options: Options, *, divergence: str = "mse") -> list[Stage]:
    """What the paper compares the schedule with: all losses at once, in one stage. Examples without a label count with
    their states and logits."""
    return [Stage("joint", [states, logits(divergence=divergence), labels()], data, options)]


def short_stages(
    states: Term,
    examples: Data,
    *,
    steps: int,
    lr: float = 5e-4,
    batch_size: int = 32,
    seed: int = 0,
    shares: tuple[float, float, float] = (0.2, 0.7, 0.1),
) -> list[Stage]:
    """A schedule for a few hundred steps in all, split over three stages by `shares`; a fresh AdamW each.

    Against the paper: the logits count in every stage, and the states still a little in the second, because states
    alone, and labels alone, taught less than the same steps on the logits; one optimisation a stage; KL at T = 1 for
    the logits. Raises ValueError where a stage would get no step.
    """
    counts = [round(steps * share) for share in shares]
    counts[1] = steps - counts[0] - counts[2]
    if min(counts) < 1:
        raise ValueError(
            f"xtremedistil.short_stages: steps is {steps}, which leaves a stage of {shares} without a step"
        )

    def options(index: int, factor: float = 1.0) -> Options:
        return Options(counts[index], lr=lr * factor, batch_size=batch_size, seed=3 * seed + index)

    return [
        Stage("representation", [states, logits()], examples, options(0)),
        Stage("logits", [replace(states, scale=0.3), logits()], examples, options(1)),
        Stage("labels", [logits(), labels(scale=0.5)], examples, options(2, 0.25)),
    ]
