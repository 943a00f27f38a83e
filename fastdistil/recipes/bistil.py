"""BiStil (Ansell et al. 2023, arXiv 2306.01709): every r-th teacher block, layer by layer; then the task.

    student = bistil.student(teacher, reduction=2)
    train(Distillation(student, bistil.terms(student, teacher), teacher), examples, collate, bistil.options(steps))

Phase 1: the mean over student blocks l of prob_mse(A_s[l], A_t[l r]) plus the mean over states l = 0 .. L_s of
MSE(H_s[l], H_t[l r]); no labels, no logits. The vocabulary is trimmed before, by `models.vocab`; the examples are
corrupted as for masked language modelling.

Phase 2: `task_terms` has the same and the task's soft cross entropy; the teacher is the tuned one, and
`fd.lottery_ticket` chooses the 8% of the entries that are trained. Against the authors' code, padded query rows do not
count.
"""

from __future__ import annotations

from typing import Any

from fastdistil.models.capture import depth_of
from fastdistil.models.student import with_blocks, without_dropout
from fastdistil.recipes.terms import Term, attention, hidden, logits
from fastdistil.train import Options


def student(teacher: Any, reduction: int = 2) -> Any:
    """Block j is the teacher's block (j + 1) reduction - 1, embeddings are the teacher's, without dropout,
    also when it is saved and loaded again.

    Raises ValueError where `reduction` does not divide the teacher's number of blocks, and `with_blocks`' errors.
    """
    count = depth_of(teacher, "bistil.student", "teacher")
    if reduction < 1 or count % reduction:
        raise ValueError(
            f"bistil.student: reduction is {reduction}, expected a divisor of the teacher's {count} blocks"
        )
    made = with_blocks(teacher, range(reduction - 1, count, reduction))
    without_dropout(made)
    return made


def terms(student: Any, teacher: Any) -> list[Term]:
    """Attention maps of every student block, states of every student layer and the embeddings."""
    blocks = depth_of(student, "bistil.terms", "student")
    r = depth_of(teacher, "bistil.terms", "teacher") // blocks
    maps = [attention(l, l * r, scale=1 / blocks) for l in range(1, blocks + 1)]
    states = [hidden(l, l * r, scale=1 / (blocks + 1)) for l in range(blocks + 1)]
    return [*maps, *states]


def task_terms(student: Any, teacher: Any) -> list[Term]:
    """Phase 2: `terms`, and the soft cross entropy of the task's logits on labelled words at T = 2, without T²; what is
    reported is the KL divergence, which is less by the teacher's entropy and has the same gradient."""
    soft = logits(temperature=2.0, scale_by_t2=False, weight="labelled_words")
    return [*terms(student, teacher), soft]


def options(steps: int, *, lr: float = 1e-4, batch_size: int = 8, seed: int = 0) -> Options:
    """AdamW at 1e-4, falling linearly to 0."""
    return Options(steps, lr=lr, batch_size=batch_size, warmup=0, schedule="linear", seed=seed)
