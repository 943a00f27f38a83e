"""TinyBERT (Jiao et al. 2020, arXiv 1909.10351): every layer against every r-th of the teacher, then the logits.

    objective = Distillation(student, tinybert.terms(student, teacher), teacher)          # transformer distillation
    objective = Distillation(student, tinybert.prediction_terms(), teacher)               # prediction distillation

The sum over student blocks l of the mean squared difference of the attention scores of blocks l and l r, and of the
states H_s[l] W_h and H_t[l r], and of the embeddings' E_s W_e and E_t. The paper's sequence is general distillation
with `terms` on a corpus, then the same on augmented data of the task, then the prediction there.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastdistil.models.capture import depth_of
from fastdistil.recipes.terms import Term, attention, hidden, logits


def terms(student: Any, teacher: Any) -> list[Term]:
    """Maps, states and embeddings, all of weight 1. W_h, shared by all layers, and W_e are drawn from torch's generator
    where the widths differ. Both models have as many heads.

    Raises ValueError where the student's depth does not divide the teacher's.
    """
    blocks, depth = (
        depth_of(model, "tinybert.terms", name) for model, name in ((student, "student"), (teacher, "teacher"))
    )
    if depth % blocks:
        raise ValueError(f"tinybert.terms: student has {blocks} blocks, expected a divisor of the teacher's {depth}")
    r, widths = depth // blocks, (student.config.hidden_size, teacher.config.hidden_size)
    shared, embedding = (None if widths[0] == widths[1] else nn.Linear(*widths, bias=False) for _ in range(2))
    maps = [attention(l, l * r, kind="score_mse") for l in range(1, blocks + 1)]
    states = [hidden(l, l * r, projection=shared) for l in range(1, blocks + 1)]
    return [*maps, *states, hidden(0, 0, projection=embedding)]


def prediction_terms(temperature: float = 1.0, weight: str = "words") -> list[Term]:
    """The soft cross entropy of the logits, at T = 1 in the paper, without T²; reported is the KL divergence, which has
    its gradient. `weight`: what the logits are of."""
    return [logits(temperature=temperature, scale_by_t2=False, weight=weight)]
