"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108): every second block, then logits, labels and the direction of states.

    student = distilbert.student(teacher)        # a masked language model
    objective = Distillation(student, distilbert.terms(), teacher)

5 T² KL(teacher || student) at T = 2 on every piece + 2 cross entropy of the masked pieces + 1 - cos of the last states:
the weights of the authors' training script. The batch's `labelled_words` are the masked pieces, its `labels` what they
were.
"""

from __future__ import annotations

from typing import Any

from fastdistil.models.capture import depth_of
from fastdistil.models.student import with_blocks
from fastdistil.recipes.terms import Term, hidden, labels, logits


def student(teacher: Any) -> Any:
    """Blocks 0, 2, 4, ... of the teacher with its embeddings and head."""
    return with_blocks(teacher, range(0, depth_of(teacher, "distilbert.student", "teacher"), 2))


def terms(temperature: float = 2.0) -> list[Term]:
    """The triple loss."""
    soft = logits(temperature=temperature, weight="attention_mask", scale=5.0)
    return [soft, labels(scale=2.0), hidden(-1, -1, kind="cosine")]
