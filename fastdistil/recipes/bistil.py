"""BiStil's first phase (Ansell et al. 2023, arXiv 2306.01709): every r-th teacher block, layer by layer.

    student = bistil.student(teacher, reduction=2)
    objective = LayerObjective(student, teacher, bistil.pairs(student, teacher))
    train(objective, examples, collate, bistil.options(steps))

The loss is the mean over student blocks l of prob_mse(A_s[l], A_t[l r]) plus the mean over states l = 0 .. L_s of
MSE(H_s[l], H_t[l r]); no labels, no logits. The vocabulary is trimmed before, by `models.vocab`; the examples are
corrupted as for masked language modelling. Against the authors' code, padded query rows do not count.
"""

from __future__ import annotations

from typing import Any

from fastdistil.models.student import with_blocks, without_dropout
from fastdistil.recipes.layers import LayerPair
from fastdistil.train import Options


def student(teacher: Any, reduction: int = 2) -> Any:
    """Block j is the teacher's block (j + 1) reduction - 1, embeddings are the teacher's, without dropout,
    also when it is saved and loaded again.

    Raises ValueError where `reduction` does not divide the teacher's number of blocks, and `with_blocks`' errors.
    """
    count = teacher.config.num_hidden_layers
    if reduction < 1 or count % reduction:
        raise ValueError(
            f"bistil.student: reduction is {reduction}, expected a divisor of the teacher's {count} blocks"
        )
    made = with_blocks(teacher, range(reduction - 1, count, reduction))
    without_dropout(made)
    return made


def pairs(student: Any, teacher: Any) -> list[LayerPair]:
    """Attention maps of every student block, states of every student layer and the embeddings."""
    blocks = student.config.num_hidden_layers
    r = teacher.config.num_hidden_layers // blocks
    maps = [LayerPair("prob_mse", l, l * r, 1 / blocks) for l in range(1, blocks + 1)]
    states = [LayerPair("hidden", l, l * r, 1 / (blocks + 1)) for l in range(blocks + 1)]
    return [*maps, *states]


def options(steps: int, *, lr: float = 1e-4, batch_size: int = 8, seed: int = 0) -> Options:
    """AdamW at 1e-4, falling linearly to 0."""
    return Options(steps, lr=lr, batch_size=batch_size, warmup=0, schedule="linear", seed=seed)
