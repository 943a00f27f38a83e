"""The one place where a result is called right or wrong.

The truth is the textbook formula in float64. A backend may err at most twice as much as the eager formula in the same
dtype plus `SLACK`; near convergence, where the eager formula itself is lost, it must be within `EXACT` of the truth.
Errors are relative, in the Euclidean norm. Cases that tests/support/rows.py draws are judged row by row against tests/support/truth.py
(`judge_problem`): five digits, and what is allowed besides is computed from the case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
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

# Of a step on several processes against that of one process in float64.
SAME_STEP = {torch.float64: 1e-10, torch.float32: 1e-5}

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


# ---- cases drawn by tests/support/rows.py, against tests/support/truth.py

# Half a unit in the last place of a number near 1.
ULP = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Half the smallest number of a gradient's dtype.
UNDERFLOW = {"float64": 0.0, "float32": 2.0**-150, "float16": 2.0**-25, "bfloat16": 2.0**-134}
# Per unit of a row's loss and column: what a truth of 31 digits cannot tell from 0. A probability below float32's
# smallest normal number, which may be taken for 0, times the largest difference of log-probabilities that counts (1e4),
# is less than that.
SMALLEST_TRUTH = 1e-30


# Backends whose products of float32 inputs are float32 whatever they are compared with.
KEEPS_ROUNDING = ("reference", "triton", "eager")


@dataclass
class Part:
    """The truth of values or of one gradient: rows (R, C), each with the size that errors are relative to and with what
    is allowed besides: `extra` on every backend, `rounding`, what float32 products carry, on those that keep eager's
    digits there, and `tiles`, what products of 16-bit factors carry, in Triton (docs/losses.md, sections 3 and 4)."""

    truth: Any
    size: Any
    extra: Any
    dtype: str = "float32"
    rounding: Any = 0.0
    tiles: Any = 0.0

    @classmethod
    def of_values(cls, truth: Any, size: Any, tiny: Any, columns: int) -> Part:
        """tiny: the factors of the rows' probabilities in their values (R,)."""
        return cls(truth[:, None], size, tiny * columns * SMALLEST_TRUTH)

    @classmethod
    def of_gradient(cls, truth: Any, size: Any, tiny: Any, dtype: str) -> Part:
        root = math.sqrt(truth.shape[-1])
        # A row that contributes nothing has a gradient of exactly 0.
        floor = np.where(size > 0, UNDERFLOW[dtype], 0.0) + tiny * SMALLEST_TRUTH
        return cls(truth, size, root * floor, dtype)


def excess(found: Tensor, part: Part, backend: str = "") -> tuple[float, float]:
    """The largest error of a row in units of what is allowed, and the largest relative error of a row that is not tiny.
    Infinities and NaN must agree."""
    x = found.detach().double().cpu().numpy().reshape(part.truth.shape)
    largest = torch.finfo(getattr(torch, part.dtype)).max
    limit = largest * (1 + ULP[part.dtype] / 2)  # from here on the nearest number is infinite
    truth = np.where(np.abs(part.truth) >= limit, np.copysign(np.inf, part.truth), part.truth)
    same = (x == truth) | (np.isnan(x) & np.isnan(truth))
    same |= (np.abs(np.abs(part.truth) / limit - 1) < 2 * EXACT_VALUE) & (x * np.sign(part.truth) >= largest)
    with np.errstate(invalid="ignore"):
        error = np.linalg.norm(np.where(same, 0.0, x - truth), axis=-1)
    error = np.where(np.isnan(error), np.inf, error)
    size = np.where(np.isfinite(part.size), part.size, 0.0)
    relative = EXACT_VALUE + (0.0 if part.dtype == "float32" else ULP[part.dtype])
    extra = part.extra + (part.rounding if backend in KEEPS_ROUNDING else 0.0)
    extra = extra + (part.tiles if backend == "triton" else 0.0)
    allowed = relative * size + extra
    with np.errstate(divide="ignore", invalid="ignore"):
        units = np.where((error == 0) | np.isposinf(allowed), 0.0, error / allowed)
        plain = np.where((error <= extra) | (size == 0), 0.0, error / size)
    return (float(units.max()), float(plain.max())) if units.size else (0.0, 0.0)


def judge_problem(problem: Any, backend: str) -> dict[str, float]:
    """Every row's value and gradient to five digits, however student and teacher lie. The relative errors, by part."""
    leaves = [x.detach().clone().requires_grad_() for x in problem.student]
    value = problem.loss(backend, *leaves)
    parts = [("value", value, problem.value)]
    for i, (g, p) in enumerate(zip(torch.autograd.grad(value.sum(), leaves), problem.gradients, strict=True)):
        assert g.dtype == leaves[i].dtype, f"gradient {i} has dtype {g.dtype}, expected {leaves[i].dtype}"
        parts.append((f"gradient {i}", g, p))
    errors = {}
    for what, x, part in parts:
        units, errors[what] = excess(x, part, backend)
        if not units <= 1 and problem.conditioning is not None:
            problem.conditioning()
            problem.conditioning = None
            units, errors[what] = excess(x, part, backend)
        assert units <= 1, f"{what}: {units:.3g} times the error that is allowed ({errors[what]:.2e} relative)"
    return errors
