"""attention_loss where the maps are alike but the queries and keys are not: a student that learned from scratch, or at
another head size than its teacher's. Nothing of the factors' difference is small there, only the scores' is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import KINDS, near_scores, outcome, textbook
from conftest import DEVICE, available
from judge import error, judge_exact

from fastdistil import attention_loss

NOISES = (1e-1, 1e-2, 1e-3, 1e-4)
SIZES = ((16, 16), (16, 24), (40, 24))
# S, padded, causal, query heads a key head; the CPU's low-rank form begins at S = 2 d or 4 d.
LAYOUTS = {
    "long": (170, False, False, 1),
    "padded": (170, True, False, 2),
    "short": (21, False, False, 1),
    "causal": (45, True, True, 2),
}


def _judge(backend: str, kind: str, sizes: tuple[int, int], layout: Any, noise: float) -> None:
    length, padded, causal, groups = layout
    tensors = near_scores(sizes, length, groups, noise)
    mask = None
    if padded:
        mask = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
        mask[0, 3] = mask[1, 2 * length // 3 :] = False
    truth = outcome(
        lambda *x: textbook(*(y.repeat_interleave(2 * groups // y.shape[1], 1) for y in x), kind, mask, causal),
        [x.double() for x in tensors],
    )
    options: dict[str, Any] = {"kind": kind, "mask": mask, "causal": causal, "backend": backend}
    judge_exact(outcome(lambda *x: attention_loss(*x, **options), tensors), truth, torch.float32)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", available("reference", "cpu"))
def test_near_convergence(backend: str, kind: str, sizes: tuple[int, int], layout: Any, noise: float) -> None:
    _judge(backend, kind, sizes, layout, noise)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("layout", [x for x in LAYOUTS.values() if not x[2]], ids=[x for x in LAYOUTS if x != "causal"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backend", available("triton"))
def test_scores_without_a_map(backend: str, sizes: tuple[int, int], layout: Any, noise: float) -> None:
    """Where a GPU has float64, its low-rank form computes in it; the tiles of the others keep what eager keeps."""
    _judge(backend, "score_mse", sizes, layout, noise)


def test_only_some_heads_arenear_scores() -> None:
    """Of a head, only some blocks of rows: which form a head takes is found out tile by tile."""
    tensors = near_scores((24, 16), 300, 1, 1e-3)
    tensors[0][:, 0] *= 2  # the whole head
    tensors[0][:, 1, :130] *= 2  # its first rows
    for kind in KINDS:
        truth = outcome(lambda *x: textbook(*x, kind, None, True), [x.double() for x in tensors])  # noqa: B023
        found = outcome(lambda *x: attention_loss(*x, kind=kind, causal=True), tensors)  # noqa: B023
        for one, other in zip(found.gradients, truth.gradients, strict=True):
            assert error(one[:, 1, 150:], other[:, 1, 150:]) < 1e-4
        judge_exact(found, truth, torch.float32)
