"""The one place where a result is called right or wrong.

The truth is the textbook formula in float64. A backend may err at most twice as much as the eager formula in the same
dtype plus `SLACK`; near convergence, where the eager formula itself is lost, it must be within `EXACT` of the truth.
Errors are relative, in the Euclidean norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SLACK = {torch.float64: 1e-11, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}

# Gradients are rounded once to the input's dtype: 2^-11 and 2^-8 at most, plus 0.3%. Values stay float32.
EXACT_VALUE = 1e-5
EXACT_GRADIENT = {
    torch.float64: 1e-8,
    torch.float32: 1e-5,
    torch.float16: 2**-11 + 3e-3,
    torch.bfloat16: 2**-8 + 3e-3,
}

# Of sharp attention maps in float32: the rounding of a score of 20, a sum of products, is 2e-6 or more, and that is the
# relative error of a small probability.
EXACT_SHARP_GRADIENT = 1e-4

# Of rows whose truth may be 0: absolute, a row, of values in nats and gradients in the tempered logits.
SMALLEST = 1e-6


@dataclass
class Outcome:
    """A value and the gradients of one computation."""

    value: Tensor
    gradients: tuple[Tensor, ...]


def error(found: Tensor, truth: Tensor) -> float:
    """Relative error; infinities must agree, and a NaN where the truth has none is an infinite error."""
    found, truth = found.detach().double().cpu(), truth.detach().double().cpu()
    assert found.shape == truth.shape, f"shape {tuple(found.shape)}, expected {tuple(truth.shape)}"
    same = (found == truth) | (found.isnan() & truth.isnan())
    difference = torch.where(same, 0.0, found - truth)
    size = torch.where(truth.isfinite(), truth, 0.0).norm().item()
    distance = difference.norm().item()
    if distance == 0:
        return 0.0
    return distance / size if distance == distance and size > 0 else float("inf")


def judge(found: Outcome, truth: Outcome, eager: Outcome, dtype: torch.dtype) -> None:
    """Our error against the truth is at most twice the eager formula's, plus a little."""
    value_slack = SLACK[torch.float64 if dtype == torch.float64 else torch.float32]
    _at_most("value", error(found.value, truth.value), 2 * error(eager.value, truth.value) + value_slack)
    for i, (g, t, e) in enumerate(zip(found.gradients, truth.gradients, eager.gradients, strict=True)):
        assert g.dtype == dtype, f"gradient {i} has dtype {g.dtype}, expected {dtype}"
        _at_most(f"gradient {i}", error(g, t), 2 * error(e, t) + SLACK[dtype])


def judge_exact(found: Outcome, truth: Outcome, dtype: torch.dtype) -> None:
    """Right to five digits (before the gradient's one rounding), however close student and teacher are."""
    _at_most("value", error(found.value, truth.value), EXACT_VALUE)
    for i, (g, t) in enumerate(zip(found.gradients, truth.gradients, strict=True)):
        _at_most(f"gradient {i}", error(g, t), EXACT_GRADIENT[dtype])


def judge_sharp(found: Outcome, truth: Outcome) -> None:
    """As `judge_exact`, of float32 attention maps with all but 1e-7 of a query's probability on one key."""
    _at_most("value", error(found.value, truth.value), EXACT_VALUE)
    for i, (g, t) in enumerate(zip(found.gradients, truth.gradients, strict=True)):
        _at_most(f"gradient {i}", error(g, t), EXACT_SHARP_GRADIENT)


def judge_rows(found: Tensor, truth: Tensor, eager: Tensor) -> None:
    """As `judge`, of float32 rows (N, ...) that may be 0, which have no relative error."""
    ours, plain, size = (
        (x.double() - y.double()).norm() for x, y in ((found, truth), (eager, truth), (truth, 0 * truth))
    )
    allowed = 2 * plain + SLACK[torch.float32] * size + SMALLEST * len(truth) ** 0.5
    assert ours <= allowed, f"absolute error {ours:.2e}, allowed {allowed:.2e}"


def _at_most(what: str, found: float, allowed: float) -> None:
    assert found <= allowed, f"{what}: relative error {found:.2e}, allowed {allowed:.2e}"
