"""The judge's cases as computations: tensors, the loss on a backend, the textbook formula in PyTorch, and the truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import rows
import torch
import truth
from double_double import DD, NEVER
from judge import ULP, Part
from rows import LogitCase, Rows, generator
from torch import Tensor

import fastdistil as fd

Array = Any  # numpy.ndarray of float64

# Temperatures this close are to be as exact as equal ones.
NEARLY_EQUAL = 1e-4
DRAWS = 5

LARGEST = {"float32": 1e30, "bfloat16": 1e30, "float16": 6e4}


@dataclass
class Problem:
    """student: the leaves; loss(backend, *student) and eager(*student) give values; value and gradients are the truth."""

    student: list[Tensor]
    loss: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    value: Part
    gradients: list[Part]


def rounded(x: Array, dtype: str) -> Tensor:
    largest = LARGEST[dtype]
    return torch.from_numpy(np.where(np.isfinite(x), np.clip(x, -largest, largest), x)).to(getattr(torch, dtype))


def exactly(x: Tensor) -> Array:
    return x.detach().double().numpy()


def weights(case: Rows, rng: np.random.Generator) -> Array:
    """One a row; 0 where the row shall be garbage, but never everywhere."""
    w = rng.uniform(0.5, 2, case.rows) if case.garbage else np.ones(case.rows)
    if case.garbage and case.rows > 1:
        w[rng.integers(case.rows)] = 0
    return w.astype(np.float32).astype(np.float64)


def reduced(rows: Tensor, w: Tensor, reduction: str) -> Tensor:
    total = rows if reduction == "none" else rows.sum()
    return total / w.sum() if reduction == "mean" else total


def spoilt(x: Tensor, w: Array, rng: np.random.Generator) -> Tensor:
    """NaN and infinities where the weight is 0."""
    bad = torch.tensor([math.nan, math.inf, -math.inf])[torch.from_numpy(rng.integers(0, 3, x.shape))]
    return torch.where(torch.from_numpy(w == 0).reshape(-1, *[1] * (x.dim() - 1)), bad.to(x.dtype), x)


def value_part(value: Array, size: Array, extra: Array, w: Array, reduction: str) -> Part:
    """The truth of what the loss returns, from that of its rows (times w)."""
    extra = np.where(w == 0, 0.0, extra)
    if reduction == "none":
        return Part(value[:, None], size, extra)
    unit = w.sum() if reduction == "mean" else 1.0
    return Part(value.sum(keepdims=True)[:, None] / unit, size.sum(keepdims=True) / unit, extra.sum(keepdims=True) / unit)


def rounding_of_scores(
    function: Callable[[DD, DD], tuple[Array, Array]], a: DD, b: DD, rng: np.random.Generator, whole: bool
) -> tuple[Array, Array]:
    """How far half a unit in the last place of every score moves each row's value and gradient: the condition of the
    loss, by the largest of a few draws. A softmax's scores are rounded relative to their row's largest."""
    moved = []
    for x in (a, b):
        size = np.abs(x.hi if whole else (x - x.max()).hi)
        size = np.where(x.hi <= NEVER, 0.0, size) * ULP["float32"]
        signs = rng.choice([-1.0, 0.0, 1.0], (DRAWS, *x.shape))
        signs[0] = 0
        moved.append(DD(x.hi, x.lo)[None] + size * signs)
    value, gradient = function(*moved)
    with np.errstate(invalid="ignore"):
        values = np.nan_to_num(np.abs(value - value[:1]))
    return values.max(0), np.linalg.norm(gradient - gradient[:1], axis=-1).max(0)


def absent_columns(case: LogitCase, a: Array, b: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """-inf in some columns of one or both, in all but one at most."""
    if case.absent == "nobody" or case.columns == 1:
        return a, b
    gone = rng.random(a.shape) < 0.3
    gone[:, rng.integers(case.columns)] = True
    gone[:, rng.integers(case.columns)] = False
    a = np.where(gone & (case.absent in ("both", "student")), -np.inf, a)
    return a, np.where(gone & (case.absent in ("both", "teacher")), -np.inf, b)


def spread_out(x: Array, at: Array, columns: int, rng: np.random.Generator) -> Array:
    """x (N, V) in columns `at` of a wider row, whose others hold anything."""
    wide = np.where(rng.random((len(x), columns)) < 0.5, 1e3, -3.0)
    wide[:, at] = x
    return wide


def logit(case: LogitCase) -> Problem:
    rng = generator(case)
    b = rows.teacher_scores(case, rng, case.teacher)
    a = rows.student_scores(case, rng, b)
    t_s, t_t = case.temperature, case.teacher_temperature
    z_s, z_t = absent_columns(case, t_s * a + case.student_offset, t_t * b + case.teacher_offset, rng)
    mapping, columns_s, columns_t = None, case.columns, case.columns
    at_s = at_t = np.arange(case.columns)
    if case.mapped:
        columns_s, columns_t = columns_s + 2, columns_t + 3
        at_s, at_t = (rng.permutation(n)[: case.columns] for n in (columns_s, columns_t))
        mapping = np.full(columns_s, -1)
        mapping[at_s] = at_t
        z_s, z_t = spread_out(z_s, at_s, columns_s, rng), spread_out(z_t, at_t, columns_t, rng)
    w, alpha = weights(case, rng), case.label_weight
    labels = rng.integers(0, columns_s, case.rows)
    labels[rng.random(case.rows) < 0.2] = -100
    s, t = rounded(z_s, case.student_dtype), rounded(z_t, case.teacher_dtype)
    x_s, x_t = exactly(s), exactly(t)
    factor = t_s * t_t if case.scale_by_t2 else 1.0

    a_, b_ = truth.tempered(x_s[:, at_s], t_s), truth.tempered(x_t[:, at_t], t_t)
    value, gradient = truth.divergence(case.divergence, case.beta, a_, b_)
    value, gradient = value * factor, gradient * (factor / t_s)
    wide = np.zeros((case.rows, columns_s))
    wide[:, at_s] = gradient
    ce, ce_gradient = truth.cross_entropy(x_s, np.maximum(labels, 0))
    labelled = ((labels >= 0) & (w != 0)).astype(np.float64)
    # "mean" divides each by the weights of its own rows.
    unit, label_unit = (w.sum(), max((w * labelled).sum(), 1e-30)) if case.reduction == "mean" else (1.0, 1.0)
    first, second = (1 - alpha) * w / unit, alpha * w * labelled / label_unit
    first_value, second_value = _times(first, value), _times(second, ce)
    parts = _rowwise(first, wide), _rowwise(second, ce_gradient)
    tiny = np.abs(first) * factor * max(1.0, 1 / t_s) + second
    weight = torch.from_numpy(w).float()
    value_truth = first_value + second_value
    sizes = np.abs(first_value) + second_value
    if case.reduction != "none":
        value_truth, sizes, value_tiny = (x.sum(keepdims=True) for x in (value_truth, sizes, tiny))
    else:
        value_tiny = tiny
    if case.garbage:
        s, t = spoilt(s, w, rng), spoilt(t, w, rng)
    options: dict[str, Any] = {
        "divergence": case.divergence, "beta": case.beta, "temperature": t_s, "teacher_temperature": t_t,
        "scale_by_t2": case.scale_by_t2, "reduction": case.reduction,
    }  # fmt: skip
    if case.garbage:
        options["weight"] = weight
    if mapping is not None:
        options["vocab_map"] = torch.from_numpy(mapping)
    if alpha > 0:
        options |= {"labels": torch.from_numpy(labels), "label_weight": alpha}

    def loss(backend: str, student: Tensor) -> Tensor:
        return fd.logit_loss(student, t, backend=backend, **options)

    def eager(student: Tensor) -> Tensor:
        plain = textbook(student[:, at_s], t[:, at_t], case.divergence, case.beta, t_s, t_t) * factor
        found = _times_t(torch.from_numpy(first).float(), plain)
        if alpha > 0:
            ce = torch.nn.functional.cross_entropy(student.float(), torch.from_numpy(labels), reduction="none", ignore_index=-100)
            found = found + _times_t(torch.from_numpy(second).float(), ce)
        return found if case.reduction == "none" else found.sum()

    # Different temperatures: quotients that float32 rounds. Labels: p is rounded before 1 is subtracted.
    near = abs(t_s / t_t - 1) <= NEARLY_EQUAL
    moved_value, moved = (0.0, 0.0) if near else rounding_of_scores(
        lambda x, y: truth.divergence(case.divergence, case.beta, x, y), a_, b_, rng, case.divergence == "mse"
    )  # fmt: skip
    sum_of_p = second * ULP["float32"] * (1 + math.log2(columns_s))
    value_extra = np.abs(first) * factor * moved_value + sum_of_p
    gradient_extra = np.abs(first) * factor / t_s * moved + math.sqrt(2) * sum_of_p
    value = Part.of_values(value_truth, sizes, value_tiny, columns_s)
    value.extra = value.extra + (value_extra if case.reduction == "none" else value_extra.sum())
    whole = Part.of_gradient(parts[0] + parts[1], sum(np.linalg.norm(x, axis=-1) for x in parts), tiny, case.student_dtype)
    whole.extra = whole.extra + gradient_extra
    return Problem([s], loss, eager, value, [whole])


def _times(w: Array, x: Array) -> Array:
    return np.where(w == 0, 0.0, w * np.where(w == 0, 0.0, x))


def _rowwise(w: Array, x: Array) -> Array:
    return np.where(w[:, None] == 0, 0.0, w[:, None] * np.where(w[:, None] == 0, 0.0, x))


def _times_t(w: Tensor, x: Tensor) -> Tensor:
    return torch.where(w == 0, 0.0, w * torch.where(w == 0, 0.0, x))


def textbook(s: Tensor, t: Tensor, divergence: str, beta: float, t_s: float, t_t: float) -> Tensor:
    """The rows' values as the papers write them, in the inputs' dtype (float32 for softmaxes of 16-bit logits)."""
    s, t = s.float(), t.float()
    if divergence == "mse":
        return (s / t_s - t / t_t).square().mean(-1)
    return of_log_probabilities((s / t_s).log_softmax(-1), (t / t_t).log_softmax(-1), divergence, beta)


def of_log_probabilities(p: Tensor, q: Tensor, divergence: str, beta: float) -> Tensor:
    def kl(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(x == -math.inf, 0.0, x.exp() * (x - y)).sum(-1)

    def mixed(x: Tensor, y: Tensor) -> Tensor:
        return y if beta == 0 else torch.logaddexp(x + math.log(beta), y + math.log1p(-beta))

    return {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "jsd": lambda: beta * kl(q, mixed(q, p)) + (1 - beta) * kl(p, mixed(q, p)),
        "skew_kl": lambda: kl(q, mixed(q, p)),
        "skew_reverse_kl": lambda: kl(p, mixed(p, q)),
        "tvd": lambda: 0.5 * (p.exp() - q.exp()).abs().sum(-1),
    }[divergence]()


PROBLEMS: dict[str, Callable[[Any], Problem]] = {"logit": logit}
