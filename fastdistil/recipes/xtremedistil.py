"""XtremeDistil (Mukherjee & Awadallah 2020, arXiv 2004.05686): representation, then logits, then labels.

The student is initialised by `models.student.compact_student`; its pairs and stages are this page. The teacher's states
and logits come in the batch, so that it runs once, whatever the number of students:

| entry of the batch | shape | what |
|---|---|---|
| input_ids, attention_mask | (B, S) | pieces; 1 = real |
| teacher_hidden | (B, S, D) | the teacher's states, in whatever basis they are to be met |
| teacher_logits | (B, S, C) | logits of the task |
| labels | (B, S) | class |
| words, labelled_words | (B, S) | 1 where a piece carries a word's prediction; where its label is known, too |

Against the paper: the logits count in every stage, and the states still a little in the second, because states alone,
and labels alone, taught less than the same steps on the logits; one optimisation a stage, not one a group of layers
from the top down; KL at T = 1 for the logits, where the paper has ½‖·‖²; whitened targets for the states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import fastdistil as fd
from fastdistil.recipes.pairs import Pair, Stage, cross_entropy
from fastdistil.train import Options


def hidden_mse(student: Tensor, teacher: Tensor, weight: Tensor, items: Tensor) -> Tensor:
    """Sum over tokens of the mean squared difference of (B, S, D) states, / items."""
    return fd.hidden_loss(student, teacher, kind="mse", weight=weight, num_items=items)


def logit_kl(student: Tensor, teacher: Tensor, weight: Tensor, items: Tensor) -> Tensor:
    """Sum over tokens of KL(teacher || student) of (B, S, C) logits, T = 1, / items."""
    return fd.logit_loss(student, teacher, divergence="forward_kl", weight=weight, num_items=items)


def representation(projection: nn.Module, scale: float = 1.0) -> Pair:
    """The student's last states through `projection` (D_s -> D) against the teacher's, on every real piece.

    Those of the last block, as `fd.capture` takes them: before the norm that ModernBERT or Llama have behind it.
    """
    return Pair("hidden", -1, "teacher_hidden", hidden_mse, "attention_mask", projection, scale)


def logits(weight: str = "words", scale: float = 1.0) -> Pair:
    """The student's logits against the teacher's, on the pieces that `weight` names."""
    return Pair("logits", lambda out: out.logits, "teacher_logits", logit_kl, weight, scale=scale)


def labels(scale: float = 1.0) -> Pair:
    """The student's logits against the known labels."""
    return Pair("labels", lambda out: out.logits, "labels", cross_entropy, "labelled_words", scale=scale)


def stages(
    projection: nn.Module,
    examples: Sequence[Any],
    *,
    steps: int,
    lr: float = 2e-3,
    batch_size: int = 32,
    seed: int = 0,
    shares: tuple[float, float, float] = (0.2, 0.7, 0.1),
) -> list[Stage]:
    """The whole schedule in `steps` steps, split over the three stages by `shares`; a fresh AdamW each.

    Raises ValueError where a stage would get no step.
    """
    counts = [round(steps * share) for share in shares]
    counts[1] = steps - counts[0] - counts[2]
    if min(counts) < 1:
        raise ValueError(f"xtremedistil.stages: steps is {steps}, which leaves a stage of {shares} without a step")

    def options(index: int, factor: float = 1.0) -> Options:
        return Options(counts[index], lr=lr * factor, batch_size=batch_size, seed=3 * seed + index)

    return [
        Stage("representation", [representation(projection), logits()], examples, options(0)),
        Stage("logits", [representation(projection, 0.3), logits()], examples, options(1)),
        Stage("labels", [logits(), labels(0.5)], examples, options(2, 0.25)),
    ]
