"""MiniLMv2 (Wang et al. 2021, arXiv 2012.15828): how one layer's tokens relate, whatever the student's width and depth.

    objective = Distillation(student, minilm.terms(heads=48), teacher)

The sum of KL divergences of the relations softmax(x xᵀ / sqrt(d)) of queries, keys and values, each split into `heads`
relation heads, of the student's last block and one block of the teacher: the last of a base-sized one, an upper middle
one of a large one (21 of 24 of BERT-large). No labels, no logits, no projection.
"""

from __future__ import annotations

from fastdistil.recipes.terms import Term, relation
from fastdistil.train import Options


def terms(teacher_layer: int = -1, heads: int = 48) -> list[Term]:
    """`heads` divides the width of the queries, keys and values of both models: 48 in the paper, 64 for large ones."""
    return [relation(-1, teacher_layer, of=of, heads=heads) for of in ("queries", "keys", "values")]


def options(steps: int, *, lr: float = 6e-4, batch_size: int = 256, seed: int = 0) -> Options:
    """AdamW at 6e-4 after 4,000 steps of warm-up, or a hundredth of shorter runs, falling linearly."""
    warmup = min(4000, steps // 100)
    return Options(steps, lr=lr, batch_size=batch_size, warmup=warmup, schedule="linear", seed=seed)
