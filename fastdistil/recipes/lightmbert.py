"""LightMBERT (Jiao et al. 2021, arXiv 2103.06418): the teacher's bottom blocks and embeddings, then its last layer.

    student = lightmbert.student(teacher)        # 6 of 12 blocks, word embeddings frozen
    objective = Distillation(student, lightmbert.terms(), teacher)
    train(objective, examples, collate, lightmbert.options(steps))

The loss is MSE(H_s[last], H_t[last]) + MSE(attention of the last blocks), weights 1 and 1: no projection, no logits, no
labels. Whether the paper's maps are scores or probabilities is not known to us: `kind` is "prob_mse" or "score_mse".
The examples are blocks of multilingual text, corrupted as for masked language modelling.
"""

from __future__ import annotations

from typing import Any

from fastdistil.models.capture import depth_of
from fastdistil.models.student import with_blocks
from fastdistil.recipes.terms import Term, attention, hidden
from fastdistil.train import Options


def student(teacher: Any, blocks: int | None = None) -> Any:
    """The teacher's bottom `blocks` (half of them by default) with its embeddings, the word embeddings frozen."""
    count = depth_of(teacher, "lightmbert.student", "teacher")
    if blocks is not None and not 1 <= blocks <= count:
        raise ValueError(f"lightmbert.student: blocks is {blocks}, expected 1 to {count}, as the teacher has")
    made: Any = with_blocks(teacher, range(count // 2 if blocks is None else blocks))
    made.get_input_embeddings().weight.requires_grad_(False)
    return made


def terms(kind: str = "prob_mse") -> list[Term]:
    """The last states and the last attention maps."""
    return [hidden(-1, -1), attention(-1, -1, kind=kind)]


def options(steps: int, *, lr: float = 1e-4, batch_size: int = 8, seed: int = 0) -> Options:
    """AdamW at 1e-4 with a tenth of the steps as warm-up."""
    return Options(steps, lr=lr, batch_size=batch_size, warmup=steps // 10, schedule="linear", seed=seed)
