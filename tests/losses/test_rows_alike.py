"""Losses that are logit_loss in a special case, on its drawn rows (tests/support/rows.py): a matrix of one entry a row, and all
columns as the student's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import rows
import torch
from conftest import available
from hypothesis import given
from judge import judge_problem
from problems import PROBLEMS
from test_rows import quickly
from torch import Tensor

import fastdistil as fd
from fastdistil.contracts.logit import DIVERGENCES

COUNT = 60
COMPARED = set(DIVERGENCES) - {"mse"}


def projected(student: Tensor, teacher: Tensor, vocab_map: Tensor | None = None, **options: Any) -> Tensor:
    columns = torch.arange(student.shape[-1]) if vocab_map is None else vocab_map
    mapped = (columns >= 0).nonzero()[:, 0]
    entries = torch.stack((mapped, columns[mapped]))
    shape = (student.shape[-1], teacher.shape[-1])
    matrix = torch.sparse_coo_tensor(entries, torch.ones(len(mapped)), shape, check_invariants=True)
    return fd.projected_logit_loss(student, teacher, fd.VocabProjection.of(matrix), **options)


def student_topk(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return fd.student_topk_logit_loss(student, teacher, k=student.shape[-1], **options)


@pytest.mark.parametrize(
    ("function", "fits"),
    [
        (projected, lambda case: case.divergence in COMPARED),
        # The teacher's log-probabilities are rounded once: a student that is its teacher has 2^-24 p for a gradient, not 0.
        (
            student_topk,
            lambda case: (
                case.divergence in COMPARED and not case.mapped and not case.label_weight and case.student != "same"
            ),
        ),
    ],
    ids=["projected", "student topk"],
)
def test_as_logit_loss(
    function: Callable[..., Tensor], fits: Callable[[Any], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, right = list[str](), 0
    monkeypatch.setattr(fd, "logit_loss", function)  # what the problems call

    @quickly(COUNT)
    @given(rows.STRATEGIES["logit"]().filter(fits))
    def judged(case: Any) -> None:
        nonlocal right
        problem = PROBLEMS["logit"](case)
        for backend in available("reference", "cpu"):
            try:
                judge_problem(problem, backend)
                right += 1
            except Exception as error:
                failures.append(f"{backend}: {type(error).__name__}: {error}\n{rows.as_line(case)}")

    judged()
    assert not failures, f"{len(failures)} failures:\n" + "\n".join(failures[:5])
    assert right >= COUNT
