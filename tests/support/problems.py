"""The judge's cases as computations: tensors, the loss on a backend, the textbook formula in PyTorch, and the truth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import double_double as D
import numpy as np
import rows
import torch
import truth
from double_double import DD, NEVER
from judge import SMALLEST_TRUTH, ULP, Part
from rows import HiddenCase, LinearTopkCase, LogitCase, RelationCase, Rows, TopkCase, generator
from torch import Tensor

import fastdistil as fd

Array = Any  # numpy.ndarray of float64

# Temperatures this close are to be as exact as equal ones.
NEARLY_EQUAL = 1e-4
MILLION = 4.75  # standard deviations that one number of a million exceeds, upwards
DRAWS = 16  # of the roundings that a case's condition is estimated with
TWO_TEMPERATURES = ("logit", "linear")

LARGEST = {"float64": 1e300, "float32": 1e30, "bfloat16": 1e30, "float16": 6e4}


@dataclass
class Problem:
    """student: the leaves; loss(backend, *student) and eager(*student) give values; value and gradients are the truth."""

    student: list[Tensor]
    loss: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    value: Part
    gradients: list[Part]
    conditioning: Callable[[], None] | None = None  # adds to the parts what their products' rounding is allowed


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
    return Part(
        value.sum(keepdims=True)[:, None] / unit, size.sum(keepdims=True) / unit, extra.sum(keepdims=True) / unit
    )


def deviation(x: Array) -> Array:
    """Without infinities, whose place is the same on both sides."""
    return np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def three_sigma(squares: Array) -> Array:
    """From the sum of the draws' squares."""
    return 3 * np.sqrt(squares / DRAWS)


def of_one(squares: Array) -> Array:
    """`three_sigma` of single numbers, such as values: what one of a million exceeds."""
    return furthest(three_sigma(squares)[..., None])


def furthest(x: Array) -> Array:
    """The norm (...,) of rows (..., C) of independent numbers, three standard deviations of each given, that one row of a
    million exceeds: chi-squared of as many as count, by Wilson and Hilferty. Of five numbers and more it is their own."""
    squares = (x**2).sum(-1)
    many = squares**2 / np.maximum((x**4).sum(-1), 1e-300)
    part = 2 / (9 * np.maximum(many, 1.0))
    return np.sqrt(squares) * np.maximum(1.0, (1 - part + MILLION * np.sqrt(part)) ** 1.5 / 3)


def rounding_of_scores(
    function: Callable[[DD, DD], tuple[Array, Array]],
    a: DD,
    b: DD,
    rng: np.random.Generator,
    whole: bool,
    ties: bool = False,
) -> tuple[Array, Array]:
    """How far half a unit in the last place of every score moves each row's value and gradient: the condition of the
    loss. A softmax's scores are rounded relative to their row's largest. ties: of a loss whose slope is the sign of
    p - q; one more move takes every column against its sign, since of some columns the others may all miss a tie."""
    moved = []
    nearer = np.sign((truth.log_softmax(b) - truth.log_softmax(a)).hi) if ties else None
    for x, way in ((a, 1.0), (b, -1.0)):
        size = np.abs(x.hi if whole else (x - x.max()).hi)
        size = np.where(x.hi <= NEVER, 0.0, size) * ULP["float32"]
        signs = rng.choice([-1.0, 1.0], (DRAWS + 1, *x.shape))
        signs[0] = 0
        signs = signs if nearer is None else np.concatenate([signs, way * nearer[None]])
        moved.append(DD(x.hi, x.lo)[None] + size * signs)
    with np.errstate(invalid="ignore"):
        value, gradient = (deviation(x[1:] - x[:1]) ** 2 for x in function(*moved))
    return of_one(value.sum(0)), three_sigma(gradient.sum((0, -1)))


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


@dataclass
class Terms:
    """What a logit loss is of its rows: values, with the size that they are relative to (both times the weights), and
    gradients in the logits, likewise; value_extra: what is allowed besides."""

    value: Array
    size: Array
    value_extra: Array
    gradient: Array
    norm: Array
    tiny: Array


@dataclass
class Setting:
    """Weights, labels and a map, and which columns of the student (and teacher) are mapped to each other."""

    w: Array
    labels: Array
    columns_s: int
    columns_t: int
    at_s: Array
    at_t: Array

    def options(self, case: Any) -> dict[str, Any]:
        found: dict[str, Any] = {
            "divergence": case.divergence, "beta": case.beta, "temperature": case.temperature,
            "scale_by_t2": case.scale_by_t2, "reduction": case.reduction,
        }  # fmt: skip
        if case.divergence == "lk_hybrid":
            found["eta"] = found.pop("beta")
        if case.garbage:
            found["weight"] = torch.from_numpy(self.w).float()
        if case.mapped:
            mapping = np.full(self.columns_s, -1)
            mapping[self.at_s] = self.at_t
            found["vocab_map"] = torch.from_numpy(mapping)
        if case.label_weight > 0:
            found |= {"labels": torch.from_numpy(self.labels), "label_weight": case.label_weight}
        return found

    def factors(self, case: Any) -> tuple[Array, Array]:
        """Of the divergence and of the cross entropy, each row's; "mean" divides each by the weights of its own rows."""
        alpha, labelled = case.label_weight, ((self.labels >= 0) & (self.w != 0)).astype(np.float64)
        unit, label_unit = 1.0, 1.0
        if case.reduction == "mean":
            unit, label_unit = self.w.sum(), max((self.w * labelled).sum(), 1e-30)
        return (1 - alpha) * self.w / unit, alpha * self.w * labelled / label_unit


def chosen_labels(case: Any, place: Setting, student: Array) -> None:
    """The student's largest column in place of any, where the case says so."""
    if case.label == "top":
        place.labels = np.where(place.labels >= 0, student.argmax(-1), place.labels)


def setting(case: Any, rng: np.random.Generator) -> Setting:
    columns_s = columns_t = case.columns
    at_s = at_t = np.arange(case.columns)
    if case.mapped:
        columns_s, columns_t = columns_s + 2, columns_t + 3
        at_s, at_t = (rng.permutation(n)[: case.columns] for n in (columns_s, columns_t))
    labels = rng.integers(0, columns_s, case.rows)
    labels[rng.random(case.rows) < 0.2] = -100
    return Setting(weights(case, rng), labels, columns_s, columns_t, at_s, at_t)


def terms(case: Any, place: Setting, value: Array, gradient: Array, z_s: DD) -> Terms:
    """From values and gradients in the tempered mapped logits, without any factor."""
    factor = case.temperature * (case.teacher_temperature if case.loss in TWO_TEMPERATURES else case.temperature)
    factor = factor if case.scale_by_t2 else 1.0
    first, second = place.factors(case)
    wide = np.zeros((case.rows, place.columns_s))
    wide[:, place.at_s] = gradient * (factor / case.temperature)
    values, parts = [_times(first, value * factor)], [_rowwise(first, wide)]
    if case.label_weight > 0:
        ce, ce_gradient = truth.cross_entropy(z_s, np.maximum(place.labels, 0))
        values.append(_times(second, ce))
        parts.append(_rowwise(second, ce_gradient))
    return Terms(
        sum(values), sum(np.abs(x) for x in values), np.zeros(case.rows), sum(parts),
        sum(np.linalg.norm(x, axis=-1) for x in parts),
        np.abs(first) * factor * max(1.0, 1 / case.temperature) + second,
    )  # fmt: skip


def value_of(found: Terms, reduction: str, columns: int) -> Part:
    each = found.value, found.size, found.tiny, found.value_extra
    if reduction != "none":
        each = tuple(x.sum(keepdims=True) for x in each)
    part = Part.of_values(*each[:3], columns)
    part.extra = part.extra + each[3]
    return part


def with_labels(case: Any, place: Setting, plain: Tensor, logits: Tensor) -> Tensor:
    """The eager total of the rows' divergences and the cross entropies."""
    first, second = (torch.from_numpy(x).float() for x in place.factors(case))
    factor = case.temperature * (case.teacher_temperature if case.loss in TWO_TEMPERATURES else case.temperature)
    found = _times_t(first, plain * (factor if case.scale_by_t2 else 1.0))
    if case.label_weight > 0:
        ce = torch.nn.functional.cross_entropy(logits.float(), torch.from_numpy(place.labels), reduction="none")
        found = found + _times_t(second, ce)
    return found if case.reduction == "none" else found.sum()


def logit(case: LogitCase) -> Problem:
    rng = generator(case)
    b = rows.teacher_scores(case, rng, case.teacher)
    a = rows.student_scores(case, rng, b)
    t_s, t_t = case.temperature, case.teacher_temperature
    z_s, z_t = absent_columns(case, t_s * a + case.student_offset, t_t * b + case.teacher_offset, rng)
    place = setting(case, rng)
    if case.mapped:
        z_s = spread_out(z_s, place.at_s, place.columns_s, rng)
        z_t = spread_out(z_t, place.at_t, place.columns_t, rng)
    s, t = rounded(z_s, case.student_dtype), rounded(z_t, case.teacher_dtype)
    x_s = exactly(s)
    chosen_labels(case, place, x_s)
    a_, b_ = truth.tempered(x_s[:, place.at_s], t_s), truth.tempered(exactly(t)[:, place.at_t], t_t)
    found = terms(case, place, *truth.divergence(case.divergence, case.beta, a_, b_), truth.tempered(x_s, 1.0))
    free = truth.infinite_by_underflow(case.divergence, case.beta, a_, b_) & (found.tiny > 0)
    found.value_extra = np.where(free, np.inf, found.value_extra)
    gradient = Part.of_gradient(found.gradient, found.norm, found.tiny, case.student_dtype)
    value = value_of(found, case.reduction, place.columns_s)

    def conditioning() -> None:
        """Different temperatures give quotients that float32 rounds."""
        moved_value, moved = rounding_of_scores(
            lambda x, y: truth.divergence(case.divergence, case.beta, x, y),
            a_,
            b_,
            rng,
            case.divergence == "mse",
            ties=case.divergence in ("tvd", "nla", "lk_hybrid"),
        )
        each = found.tiny * moved_value
        value.extra = value.extra + (each if case.reduction == "none" else each.sum())
        gradient.extra = gradient.extra + found.tiny * moved

    if case.garbage:
        s, t = spoilt(s, place.w, rng), spoilt(t, place.w, rng)
    options = place.options(case) | {"teacher_temperature": t_t}

    def loss(backend: str, student: Tensor) -> Tensor:
        return fd.logit_loss(student, t, backend=backend, **options)

    def eager(student: Tensor) -> Tensor:
        plain = textbook(student[:, place.at_s], t[:, place.at_t], case.divergence, case.beta, t_s, t_t)
        return with_labels(case, place, plain, student)

    different = abs(t_s / t_t - 1) > NEARLY_EQUAL
    return Problem([s], loss, eager, value, [gradient], conditioning if different else None)


@dataclass
class Known:
    """A top-k teacher as it is handed in: values and their columns (N, K), and the logarithm of the tail, if any."""

    values: Tensor
    indices: Array
    tail: Tensor | None


def known(case: Any, place: Setting, b: Array, rng: np.random.Generator) -> Known:
    """The most probable columns of scores b (N, V), and, with a map, of three columns more that have no partner."""
    wide = b.max(-1, keepdims=True) + rng.uniform(-9, 0, (case.rows, place.columns_t))
    wide[:, place.at_t] = b
    lq = truth.log_softmax(DD(wide))
    k = min(case.k, place.columns_s)
    order = np.argsort(-wide, -1, kind="stable")
    indices = np.array([rng.permutation(x) for x in order[:, :k]])
    values = rounded(np.take_along_axis(lq.double(), indices, -1), case.values_dtype)
    tail = None
    if case.given_tail:
        others = D.where(
            np.arange(place.columns_t) < k, NEVER, DD(*(np.take_along_axis(x, order, -1) for x in (lq.hi, lq.lo)))
        )
        tail = D.log(D.exp(others).sum()).double()
        tail = torch.from_numpy(np.where(tail <= NEVER, -np.inf, tail)).to(getattr(torch, case.given_tail))
    return Known(values, indices, tail)


def topk(case: TopkCase) -> Problem:
    rng = generator(case)
    b = rows.teacher_scores(case, rng, case.teacher)
    a = rows.student_scores(case, rng, b)
    place = setting(case, rng)
    z_s = case.temperature * a + case.student_offset
    if case.mapped:
        z_s = spread_out(z_s, place.at_s, place.columns_s, rng)
    teacher = known(case, place, b, rng)
    s = rounded(z_s, case.student_dtype)
    x_s = exactly(s)
    chosen_labels(case, place, x_s)
    a_ = truth.tempered(x_s, case.temperature)
    found = terms(case, place, *topk_rows(case, place, teacher, a_), truth.tempered(x_s, 1.0))
    gradient = Part.of_gradient(found.gradient, found.norm, found.tiny, case.student_dtype)
    if case.tail == "zero":  # a difference of two numbers, which float64 rounds
        found.value_extra = found.value_extra + 64 * ULP["float64"] * found.tiny
    # The K + 1 scores are float64, relative to the largest (Triton's are not). A distance r from it weighs e^-r, so that
    # half a unit is that of 1, and of ln V in the tail's, a quotient and a logarithm, each rounded. It moves the log
    # ratios, of which a value is the square.
    largest = np.abs(np.where(np.isfinite(x_s), x_s, 0.0)).max(-1) / case.temperature
    moved = []
    for size in (1 + math.log(place.columns_s), largest):
        step = 2 * ULP["float64"] * size
        square = step * (step + np.sqrt(2 * np.abs(found.value) / np.maximum(found.tiny, 1e-300)))
        moved.append(found.tiny * np.where(np.isfinite(square), square, 0.0))
    found.value_extra = found.value_extra + moved[0]
    values, tail, indices = teacher.values, teacher.tail, torch.from_numpy(teacher.indices)
    if case.garbage:
        s, values = spoilt(s, place.w, rng), spoilt(values, place.w, rng)
        tail = None if tail is None else spoilt(tail, place.w, rng)
        indices = torch.where(torch.from_numpy(place.w == 0)[:, None], 10**9, indices)
    options = topk_options(case, place, tail)

    def loss(backend: str, student: Tensor) -> Tensor:
        return fd.topk_logit_loss(student, values, indices, backend=backend, **options)

    def eager(student: Tensor) -> Tensor:
        return with_labels(case, place, topk_eager(case, place, teacher, student), student)

    value = value_of(found, case.reduction, place.columns_s)
    value.rounding = value.rounding + (moved[1] if case.reduction == "none" else moved[1].sum(keepdims=True))

    def conditioning() -> None:
        """Half a unit of the scores in the gradient; and of float64 values that come without their tail, what it has of
        digits is what their rounding leaves it."""
        p = np.exp(truth.log_softmax(a_[:, place.at_s]).double())
        step = 2 * ULP["float64"] * (1 + math.log(place.columns_s))
        gradient.extra = gradient.extra + found.tiny * step * np.linalg.norm(p * (1 - p), axis=-1)
        if case.tail != "bucket" or case.values_dtype != "float64" or teacher.tail is not None:
            return
        rest, floor = truth.tail_of(exactly(teacher.values), ULP["float64"])
        rest = np.maximum(rest.double(), floor)
        for tail in (rest + floor, np.maximum(rest - floor, floor)):
            other = replace(teacher, tail=torch.from_numpy(np.log(tail)))
            other = terms(case, place, *topk_rows(case, place, other, a_), truth.tempered(x_s, 1.0))
            apart = np.abs(deviation(other.value - found.value))
            value.extra = value.extra + (apart if case.reduction == "none" else apart.sum(keepdims=True))
            gradient.extra = gradient.extra + np.linalg.norm(deviation(other.gradient - found.gradient), axis=-1)

    return Problem([s], loss, eager, value, [gradient], conditioning)


def topk_options(case: Any, place: Setting, tail: Tensor | None) -> dict[str, Any]:
    options = place.options(case) | {"tail": case.tail}
    return options if tail is None else options | {"teacher_tail": tail}


def student_columns(place: Setting, indices: Array) -> Array:
    """The mapped columns (as numbered in `at_s`) of the teacher's, -1 where there is none."""
    back = np.full(max(place.columns_t, int(indices.max()) + 1), -1)
    back[place.at_t] = np.arange(len(place.at_t))
    return back[indices]


def topk_rows(case: Any, place: Setting, teacher: Known, a: DD) -> tuple[Array, Array]:
    return truth.topk(
        case.divergence, case.beta, case.tail, a[:, place.at_s], exactly(teacher.values),
        student_columns(place, teacher.indices), None if teacher.tail is None else exactly(teacher.tail),
        ULP[case.values_dtype],
    )  # fmt: skip


def topk_eager(case: Any, place: Setting, teacher: Known, student: Tensor) -> Tensor:
    """float32 log-probabilities of K + 1 outcomes, or of all columns, as one writes them."""
    log_p = (student.float()[:, place.at_s] / case.temperature).log_softmax(-1)
    at = torch.from_numpy(student_columns(place, teacher.indices))
    u = torch.where(at < 0, -math.inf, teacher.values.float())
    at = at.clamp_min(0)
    if case.mapped and case.tail != "renormalize":
        kept = torch.where(
            torch.from_numpy(student_columns(place, teacher.indices)) < 0, teacher.values.float().exp(), 0.0
        )
        u = u - torch.log1p(-kept.nan_to_num().sum(-1, keepdim=True))
    there = u > -math.inf
    if case.tail == "zero":
        return torch.where(there, u.exp() * (u - log_p.gather(-1, at)), 0.0).sum(-1)
    chosen = torch.zeros_like(log_p).scatter_add(-1, at, there.float()) > 0
    p_rest = log_p.masked_fill(chosen, -math.inf).logsumexp(-1, keepdim=True)
    p = torch.cat((torch.where(there, log_p.gather(-1, at), -math.inf), p_rest), -1)
    q = u.log_softmax(-1) if case.tail == "renormalize" else u
    rest = torch.zeros_like(p_rest) if case.tail == "renormalize" else (1 - u.exp().sum(-1, keepdim=True)).clamp_min(0)
    if case.tail == "bucket" and teacher.tail is not None:
        rest = teacher.tail.float().exp()[:, None]
    return of_log_probabilities(p, torch.cat((q, rest.log()), -1), case.divergence, case.beta)


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
    alpha = torch.minimum(p, q).exp().sum(-1)

    def hybrid() -> Tensor:
        share = torch.exp(-beta * alpha.detach())
        return share * kl(q, p) + (1 - share) * 0.5 * (p.exp() - q.exp()).abs().sum(-1)

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
        "nla": lambda: -alpha.log(),
        "lk_hybrid": hybrid,
    }[divergence]()


def hidden(case: HiddenCase) -> Problem:
    rng = generator(case)
    b = rows.teacher_scores(case, rng, case.teacher)
    a = rows.student_scores(case, rng, b)
    z_t = case.teacher_length * b + case.teacher_offset
    z_s = case.student_length * a + case.student_offset
    w = weights(case, rng)
    form, factor = case.form, w / (w.sum() if case.reduction == "mean" else 1.0)
    dtype = case.student_dtype
    if not case.width:
        leaves, curved = [rounded(z_s, dtype)], False
        t = rounded(z_t, case.teacher_dtype)
        h, slope, size_h = DD(exactly(leaves[0])), np.ones((case.rows, case.columns)), None
        bent = np.zeros(slope.shape)
    else:
        # The teacher is the projected student and its difference: the projection is what makes them near.
        x = case.student_length * rng.standard_normal((case.rows, case.width))
        matrix = rng.standard_normal((case.columns, case.width)) / math.sqrt(case.width)
        leaves = [rounded(x, dtype), rounded(matrix, dtype)]
        x, matrix = map(exactly, leaves)
        h = truth.product(x, matrix)
        size_h = np.abs(x) @ np.abs(matrix).T
        if case.bias:
            leaves.append(rounded(case.student_length * rng.standard_normal(case.columns), dtype))
            h, size_h = h + exactly(leaves[2]), size_h + np.abs(exactly(leaves[2]))
        slope, bent = np.ones(h.shape), np.zeros(h.shape)
        # A GELU is rounded as its argument is: of a row without larger ones nothing may be left.
        curved = (
            case.gelu and (np.abs(truth.gelu(h)[0]) > 1e-4 * np.abs(h.double()).max(-1, keepdims=True)).any(-1).all()
        )
        if curved:
            found, slope = truth.gelu(h)
            # The slope's rounding: of the two terms that it is the sum of, and of what it is the slope at.
            z = h.double()
            bell = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
            bent = ULP["float32"] * (np.abs(slope - z * bell) + np.abs(z) * bell + size_h * bell * np.abs(2 - z * z))
            h, size_h = DD(found), size_h * np.abs(slope) + np.maximum(np.abs(z) / 2, np.abs(found))
        unit = np.abs(h.double()).max() or 1.0
        z_t = {"same": 0.0, "near": case.noise}.get(case.student, 3.0) * unit * rng.standard_normal(
            h.shape
        ) + h.double()
        t = rounded(z_t * (case.teacher_length / case.student_length) + case.teacher_offset, case.teacher_dtype)
    t_ = DD(exactly(t))
    value, dh = truth.hidden(form, h, t_)
    value, dh = _times(factor, value), _rowwise(factor, dh)
    dz = dh * slope
    length = np.maximum(np.linalg.norm(h.double(), axis=-1), 1e-45)
    # What float64 cannot tell from 0: directions that differ by less than its half ulp.
    unit = {"mse": np.abs(h.double()).max(-1) ** 2, "cosine": np.ones(case.rows), "kl": np.ones(case.rows)}[form]
    per_h = {"mse": np.sqrt(unit), "cosine": 1 / length, "kl": np.ones(case.rows)}[form]
    blind = 16 * ULP["float64"]
    extra_v = factor * unit * blind
    extra_z = np.repeat((factor * per_h * blind)[:, None], case.columns, 1) * np.abs(slope)
    if not case.width:
        gradients = [Part.of_gradient(dz, np.linalg.norm(dz, axis=-1), factor * per_h, dtype)]
        gradients[0].extra = gradients[0].extra + np.linalg.norm(extra_z, axis=-1)
    else:
        gradients = through_head(
            dz, extra_z, np.zeros_like(dz), *map(exactly, leaves[:2]), case.bias, dtype, form == "kl"
        )
    total = (lambda x: x) if case.reduction == "none" else (lambda x: x.sum(keepdims=True))
    value_part = Part(total(value)[:, None], total(value), total(extra_v))
    inputs = [exactly(x) for x in leaves]

    def conditioning() -> None:
        """A projected state is rounded; a CPU computes it in float64 where it is within 1/32 of its teacher."""
        d, y = h.double() - t_.double(), h.double()
        if form == "kl":
            d = d - d.mean(-1, keepdims=True)
        elif form == "cosine":
            d = t_.double() - y * ((t_.double() * y).sum(-1) / length**2)[:, None]
            y = t_.double()
        near = (np.linalg.norm(d, axis=-1) < np.linalg.norm(y, axis=-1) / 32).any()
        moved_v, moved = np.zeros(case.rows), np.zeros_like(dz)
        for _ in range(DRAWS):
            v, g = truth.hidden(form, h + rng.choice([-1.0, 1.0], h.shape) * ULP["float32"] * size_h, t_)
            moved_v = moved_v + deviation(_times(factor, v) - value) ** 2
            moved = moved + (deviation(_rowwise(factor, g) - dh) * slope) ** 2
        moved_v, moved = of_one(moved_v), three_sigma(moved) + 3 * np.abs(dh) * bent
        alike = np.zeros_like(dz)
        if form == "cosine":
            # A difference of two numbers, both rounded, the first by a quotient that the whole row has in common.
            lengths = length * np.maximum(np.linalg.norm(t_.double(), axis=-1), 1e-45)
            first, second = (x * (factor / lengths)[:, None] for x in (y, d))
            moved = moved + 3 * ULP["float32"] * (np.abs(first - second) + np.abs(first)) * np.abs(slope)
            alike = ULP["float32"] * (first - second) * slope
        more = through_head(dz, moved, moved, *inputs[:2], case.bias, dtype)
        for part, rounded_, product in zip(gradients, more, through_head_alike(alike, *inputs[:2]), strict=False):
            rounded_.rounding = rounded_.rounding + product
            if near:
                part.rounding = part.rounding + rounded_.rounding
            else:
                part.extra = part.extra + rounded_.rounding
        if near:
            value_part.rounding = value_part.rounding + total(moved_v)
        else:
            value_part.extra = value_part.extra + total(moved_v)

    options: dict[str, Any] = {"kind": form, "reduction": case.reduction}
    if case.garbage:
        leaves[0], t = spoilt(leaves[0], w, rng), spoilt(t, w, rng)
        options["weight"] = torch.from_numpy(w).float()
    if curved:
        options["activation"] = "gelu"

    def loss(backend: str, *tensors: Tensor) -> Tensor:
        named = dict(zip(("projection", "bias"), tensors[1:], strict=False))
        return fd.hidden_loss(tensors[0], t, backend=backend, **named, **options)

    def eager(*tensors: Tensor) -> Tensor:
        f = torch.nn.functional
        first, *rest = (x.float() for x in tensors)
        y = f.linear(first, *rest) if rest else first
        y, u = f.gelu(y) if curved else y, t.float()
        if form == "mse":
            plain = (y - u).square().mean(-1)
        elif form == "cosine":
            plain = 1 - f.cosine_similarity(y, u, dim=-1)
        else:
            plain = of_log_probabilities(y.log_softmax(-1), u.log_softmax(-1), "forward_kl", 0.5)
        found = _times_t(torch.from_numpy(factor).float(), plain)
        return found if case.reduction == "none" else found.sum()

    return Problem(leaves, loss, eager, value_part, gradients, conditioning if case.width else None)


def through_head(
    dz: Array, extra: Array, moved: Array, x: Array, matrix: Array, bias: bool, dtype: str, softmax: bool = True
) -> list[Part]:
    """The gradients of x, matrix and bias of z = x matrixᵀ + bias, from that of z (N, V), with what is allowed in z
    carried on, and the rounding of these products themselves: half a unit of their terms; of a softmax three others: of
    the exponential, of the logarithm of a sum, which moves all of a row's dz alike, and of their product."""
    unit, parts = ULP["float32"] * (4 if softmax else 1), []
    tiny = np.abs(dz).max(initial=0.0)
    for left, right, rows_of_its_own in ((dz, matrix, True), (dz.T, x, False), (dz.T, np.ones((len(dz), 1)), False)):
        allowed, movement = (e if rows_of_its_own else e.T for e in (extra, moved))
        found = left @ right
        terms = np.abs(left) @ np.abs(right) * unit
        carried, changed = np.sqrt(allowed**2 @ right**2), np.sqrt(movement**2 @ right**2)
        if not rows_of_its_own:  # one matrix, one norm
            found, terms, carried, changed = (e.reshape(1, -1) for e in (found, terms, carried, changed))
        part = Part.of_gradient(found, np.linalg.norm(found, axis=-1), np.full(len(found), 1e-10 * tiny), dtype)
        part.extra = part.extra + np.linalg.norm(terms, axis=-1) + np.linalg.norm(carried, axis=-1)
        part.rounding = furthest(changed)
        parts.append(part)
    return parts if bias else parts[:2]


def through_head_alike(dz: Array, x: Array, matrix: Array) -> list[Array]:
    """The norms of what dz (N, V) becomes in the gradients of x (of every row), matrix and bias: of a rounding that the
    columns of a row have in common."""
    return [np.linalg.norm(dz @ matrix, axis=-1), np.linalg.norm(dz.T @ x, keepdims=True)[0], np.linalg.norm(dz.sum(0))]


def attention(case: Any) -> Problem:
    rng = generator(case)
    relation = isinstance(case, RelationCase)
    parts = rows.factors(case, rng)
    kinds = (case.student_dtype,) * 2 + (case.teacher_dtype,) * 2
    q_s, k_s, q_t, k_t = (rounded(x, kind) for x, kind in zip(parts, kinds, strict=True))
    shape, groups, length = q_s.shape, case.groups, case.length
    real = np.ones((case.batch, length), bool)
    if case.padded and length > 1:
        real = rng.random(real.shape) < 0.7
        real[:, rng.integers(length)] = True
    query = real if case.mask_queries else np.ones_like(real)
    visible = (real[:, None, None, :] & query[:, None, :, None]) & (np.tri(length, dtype=bool) | (not case.causal))
    x, y, x_t, y_t = (exactly(z) for z in (q_s, k_s, q_t, k_t))
    scales = [z.shape[-1] ** -0.5 for z in (x, x_t)]
    # Between means over heads score_mse's scores are one product of all heads' columns and of both sides.
    one_product = case.mean_of_heads and case.form == "score_mse"
    rounding = rounding_of_heads if one_product else rounding_of_sums
    scores, sizes, whole_sizes = [], [], []
    for q, k, scale in ((x, y, scales[0]), (x_t, y_t, scales[1])):
        k = np.repeat(k, groups, 1)
        scores.append(truth.product(q, k) * scale)
        # A softmax does not see what all keys have in common.
        middle = k if case.form == "score_mse" else k - k.mean(2, keepdims=True)
        sizes.append(scale * rounding(q, middle))
        whole_sizes.append(scale * rounding_of_sums(q, k))
    value, da = truth.maps(case.form, *scores, visible, case.mean_of_heads)
    counted = 1 if case.mean_of_heads else case.heads
    heads_of = np.broadcast_to(visible, (case.batch, 1, length, length))
    count = int(heads_of.sum() if case.form != "prob_kl" else query.sum()) * counted
    unit = 1 / max(1, count) if case.reduction == "mean" else 1.0
    seen = np.broadcast_to(query[:, None, :], value.shape)
    value, da = np.where(seen, value, 0.0) * unit, da * unit
    tiny = np.where(seen, unit, 0.0)
    blind = rounded_maps(case, value, unit)
    if case.reduction == "none":
        flat = value.reshape(-1)
        value_part = Part.of_values(flat, flat, tiny.reshape(-1), length)
        value_part.extra = value_part.extra + blind.reshape(-1)
    else:
        total = value.sum().reshape(1)
        value_part = Part.of_values(total, total, tiny.sum().reshape(1), length)
        value_part.extra = value_part.extra + blind.sum()

    def through(left: Array, right: Array, scale: float) -> tuple[Array, Array]:
        """left right, and its terms' rounding: of the scores' gradient, which is a float32 number, and of the sum."""
        return scale * (left @ right), 2 * scale * ULP["float32"] * (np.abs(left) @ np.abs(right))

    def carried(left: Array, right: Array, scale: float) -> Array:
        return scale * np.sqrt(left**2 @ right**2)

    def grouped(z: Array, root: bool = False) -> Array:
        z = z.reshape(case.batch, case.heads // groups, groups, *z.shape[2:])
        return np.sqrt((z**2).sum(2)) if root else z.sum(2)

    keys, turned = np.repeat(y, groups, 1), (lambda z: z.swapaxes(-1, -2))
    dq, terms_q = through(da, keys, scales[0])
    dk, terms_k = through(turned(da), x, scales[0])
    dk, terms_k = grouped(dk), grouped(terms_k)
    floor = scales[0] * unit * length
    gradients = []
    if relation:  # the sum through both sides
        pairs = [(dq + dk, terms_q + terms_k, False)]
    else:
        pairs = [(dq, terms_q, True), (dk, terms_k, False)]

    def by_rows(z: Array, each: bool) -> Array:
        """A query's gradient is its own row's; one of a key is a sum over queries."""
        return z.reshape((-1, z.shape[-1]) if each else (case.batch * z.shape[1], -1))

    for g, terms_g, each in pairs:
        flat = [by_rows(z, each) for z in (g, terms_g)]
        norms = [np.linalg.norm(z, axis=-1) for z in flat]
        part = Part.of_gradient(
            flat[0],
            norms[0],
            np.full(len(norms[0]), floor * max(np.abs(keys).max(), np.abs(x).max())),
            case.student_dtype,
        )
        part.extra = part.extra + norms[1]
        gradients.append(part)
    if not relation and not case.mean_of_heads and case.form != "score_mse":
        # The mean that comes off a row's slopes, and the sum that p is divided by, are one rounded number for all keys.
        log_p = np.where(visible, scores[0].double(), -np.inf)
        p = np.exp(log_p - np.where(visible, log_p, -1e30).max(-1, keepdims=True))
        p = p / np.maximum(p.sum(-1, keepdims=True), 1e-300)
        top = p.argmax(-1)[..., None]
        mean = np.abs(np.take_along_axis(da, top, -1)) / np.maximum(np.take_along_axis(p, top, -1), 1e-300)
        alike = 2 * ULP["float32"] * scales[0] * np.linalg.norm(mean * (p @ keys), axis=-1)
        gradients[0].extra = gradients[0].extra + alike.reshape(-1)

    def conditioning() -> None:
        """Scores are rounded: both sides' alike where their difference is exact, else each by itself. Of factors of one
        shape the exact difference is a product itself. Triton leaves 16-bit keys as they are, with what they have in
        common."""
        far = np.ones((case.batch, case.heads, length, 1), bool)
        apart = np.zeros(sizes[0].shape)
        alike = one_product or not case.mean_of_heads
        if not case.mean_of_heads:
            far = far_rows(case, (x, keys, x_t, np.repeat(y_t, groups, 1)), scales, scores, visible, query)
        if alike and x.shape == x_t.shape:
            between = y - y_t
            if case.form != "score_mse":
                between = between - between.mean(2, keepdims=True)
            middle = [z if case.form == "score_mse" else z - z.mean(2, keepdims=True) for z in (y, between)]
            middle = [np.repeat(z, groups, 1) for z in middle]
            apart = scales[0] * (rounding(x - x_t, middle[0]) + rounding(x_t, middle[1]))

        def condition(sizes: list[Array], shared: bool) -> tuple[Array, Array]:
            moved_v, moved = np.zeros_like(value), np.zeros_like(da)
            for _ in range(DRAWS):
                signs = [rng.choice([-1.0, 1.0], s.shape) * ULP["float32"] for s in sizes]
                steps = [sign * size for sign, size in zip(signs, sizes, strict=True)]
                if shared and alike:  # of the side whose scores are the larger numbers
                    steps = [signs[0] * np.maximum(*sizes)] * 2
                both = [scores[0] + steps[0], scores[1] + steps[1]]
                if shared:
                    both[0] = both[0] + rng.choice([-1.0, 1.0], apart.shape) * ULP["float32"] * apart
                v, g = truth.maps(case.form, *both, visible, case.mean_of_heads)
                moved_v = moved_v + deviation(np.where(seen, v, 0.0) * unit - value) ** 2
                moved = moved + deviation(g * unit - da) ** 2
            return of_one(moved_v), three_sigma(moved)

        def allow(kind: str, moved_v: Array, moved: Array) -> None:
            moved_q, moved_k = carried(moved, keys, scales[0]), grouped(carried(turned(moved), x, scales[0]), True)
            carried_on = [np.hypot(moved_q, moved_k)] if relation else [moved_q, moved_k]
            for part, z, (_, _, each) in zip(gradients, carried_on, pairs, strict=True):
                setattr(part, kind, getattr(part, kind) + furthest(by_rows(z, each)))
            total = moved_v.reshape(-1) if case.reduction == "none" else moved_v.sum()
            setattr(value_part, kind, getattr(value_part, kind) + total)

        allow("extra", *condition(sizes, shared=True))
        moved_v, moved = condition(sizes, shared=False)
        allow("extra", moved_v if case.mean_of_heads else moved_v * far[..., 0], moved * far)
        allow("rounding", moved_v, moved)
        if case.student_dtype != "float32" and case.form != "score_mse":
            moved_v, moved = condition(whole_sizes, shared=False)
            largest = np.max([np.where(visible, np.abs(s.double()), 0.0).max(-1) for s in scores], 0)
            if case.mean_of_heads:
                largest = largest.max(1, keepdims=True)
            allow("tiles", moved_v + 2 * ULP["float32"] * largest * value, moved)  # of a row's logsumexp

    if case.padded and case.mask_queries:
        hole = torch.from_numpy(~real)[:, None, :, None]
        q_s, k_s, q_t, k_t = (torch.where(hole, torch.tensor(math.nan, dtype=z.dtype), z) for z in (q_s, k_s, q_t, k_t))
    options: dict[str, Any] = {
        "kind": case.form, "causal": case.causal, "reduction": case.reduction, "mask_queries": case.mask_queries,
    }  # fmt: skip
    if case.padded:
        options["mask"] = torch.from_numpy(real)
    if case.mean_of_heads:
        options["heads"] = "mean"

    def side_by_side(z: Tensor) -> Tensor:
        return z.transpose(1, 2).flatten(2)

    def loss(backend: str, *student: Tensor) -> Tensor:
        if relation:
            xs = side_by_side(student[0]), side_by_side(q_t)
            return fd.relation_loss(*xs, relation_heads=case.heads, backend=backend, **options)
        return fd.attention_loss(*student, q_t, k_t, backend=backend, **options)

    def eager(*student: Tensor) -> Tensor:
        sides = (student[0], student[-1]), (q_t, q_t if relation else k_t)
        hide = torch.from_numpy(~visible)
        a, b = (
            (q.nan_to_num().float() @ k.nan_to_num().float().repeat_interleave(groups, 1).mT) * scale
            for (q, k), scale in zip(sides, scales, strict=True)
        )
        p, q = (z.masked_fill(hide, torch.finfo(z.dtype).min).softmax(-1).masked_fill(hide, 0.0) for z in (a, b))
        if case.mean_of_heads:
            a, b, p, q = (z.mean(1, keepdim=True) for z in (a, b, p, q))
        if case.form == "score_mse":
            found = (a - b).masked_fill(hide, 0.0).square().sum(-1)
        elif case.form == "prob_mse":
            found = (p - q).square().sum(-1)
        else:
            found = torch.where(q > 0, q * (q.clamp_min(1e-45).log() - p.clamp_min(1e-45).log()), 0.0).sum(-1)
        found = found * unit
        return found if case.reduction == "none" else found.sum()

    assert shape[1] == case.heads
    return Problem([q_s] if relation else [q_s, k_s], loss, eager, value_part, gradients, conditioning)


def far_rows(
    case: Any, factors: tuple[Array, ...], scales: list[float], scores: list[DD], visible: Array, query: Array
) -> Array:
    """Query rows (B, H, S, 1) in whose tile a CPU may have taken two float32 products: keys of one shape and less than
    half of themselves apart have an exact difference; else a head is float64 from the first tile on in which the
    scores' differences are within 1/32 of a score of directions at random (docs/losses.md, section 4). A difference's
    mean square is taken to be a sixteenth of its squared range where a softmax follows, and tiles to be of 4 or 8 rows."""
    x, y, _, y_t = factors
    if case.form != "score_mse":
        y, y_t = (z - z.mean(2, keepdims=True) for z in (y, y_t))
    close = np.zeros(x.shape[:2], bool)
    if x.shape == factors[2].shape:
        close = ((y - y_t) ** 2).sum((2, 3)) <= 0.25 * (y_t**2).sum((2, 3))
    shown = np.broadcast_to(visible, (*x.shape[:3], x.shape[2]))
    keys = shown.sum(-1)
    c = (scores[0] - scores[1]).double()
    if case.form == "score_mse":
        found = np.where(shown, c**2, 0.0).sum(-1)
    else:
        high, low = np.where(shown, c, -np.inf).max(-1), np.where(shown, c, np.inf).min(-1)
        found = keys * np.where(keys > 0, high - low, 0.0) ** 2 / 16
    expected = keys * scales[0] ** 2 * (x**2).sum(-1) * (y**2).mean((2, 3))[..., None]
    far = np.zeros(x.shape[:3], bool)
    for b, h in np.ndindex(*x.shape[:2]):
        counted = np.flatnonzero(query[b])
        for tile in (4, 8):
            for first in range(0, len(counted) * (not close[b, h]), tile):
                some = counted[first : first + tile]
                if found[b, h, some].sum() < 0.9 * expected[b, h, some].sum() / 1024:
                    break
                far[b, h, some] = True
    return far[..., None]


def rounding_of_heads(x: Array, y: Array) -> Array:
    """As `rounding_of_sums`, of the sum over both sides and all heads, whose mean is taken: each head's equal share."""
    heads = x.shape[1]
    joined = [z.swapaxes(1, 2).reshape(len(z), z.shape[2], -1) for z in (x, y)]
    whole = rounding_of_sums(*joined, sides=2)[:, None] / math.sqrt(heads)
    return np.repeat(whole, heads, 1)


def rounding_of_sums(x: Array, y: Array, sides: int = 1) -> Array:
    """Of x y^T, in units of a float32's last place of 1: of n terms of one sign every partial sum is rounded, with a
    variance of a third each, which is a half unit of the sum times sqrt(n) / 3; of others their sizes are more."""
    turned = y.swapaxes(-1, -2)
    return np.maximum(np.abs(x) @ np.abs(turned), np.abs(x @ turned) * (math.sqrt(sides * x.shape[-1]) / 3))


def rounded_maps(case: Any, value: Array, unit: float) -> Array:
    """What float64, in which near maps are computed, cannot tell from 0 in a row's value."""
    return np.full(value.shape, unit * ULP["float64"] ** 2 * case.length)


def linear(case: Any) -> Problem:
    """linear_logit_loss and linear_topk_logit_loss."""
    rng = generator(case)
    of_known = isinstance(case, LinearTopkCase)
    h_s, w_s, b_s, h_t, w_t, b_t = rows.heads(case, rng)
    place = setting(case, rng)
    if case.mapped:
        w_s, b_s = (_among(x, place.at_s, place.columns_s, rng) for x in (w_s, b_s))
        if not of_known:
            w_t, b_t = (_among(x, place.at_t, place.columns_t, rng) for x in (w_t, b_t))
    student = [rounded(x, case.student_dtype) for x in (h_s, w_s, b_s)]
    teacher = [rounded(x, case.teacher_dtype) for x in (h_t, w_t, b_t)]
    if case.head in ("shared", "equal"):
        student[1], student[2] = teacher[1], teacher[2]
    x_s, x_t = [exactly(x) for x in student], [exactly(x) for x in teacher]
    (z_s, size_s), (z_t, size_t) = (
        (truth.product(h, w) + (b if case.bias else 0.0 * b), np.abs(h) @ np.abs(w).T + (np.abs(b) if case.bias else 0))
        for h, w, b in (x_s, x_t)
    )
    chosen_labels(case, place, z_s.double())
    caps = case.logit_scale, case.softcap
    b_ = truth.capped(z_t, *caps)[0]
    stored = known(case, place, b_.double(), rng) if of_known else None
    teacher_temperature = case.temperature if of_known else case.teacher_temperature

    def found_for(z: DD, other: DD, steps: tuple[Any, Any] = (0.0, 0.0)) -> tuple[Terms, Array]:
        """steps: relative, of the capped logits."""
        y, slope = truth.capped(z, *caps)
        y = y + y.double() * steps[0]
        a = y / case.temperature
        if stored is not None:
            pair = topk_rows(case, place, stored, a)
        else:
            b = truth.capped(other, *caps)[0]
            b = (b + b.double() * steps[1])[:, place.at_t] / teacher_temperature
            pair = truth.divergence(case.divergence, case.beta, a[:, place.at_s], b)
        return terms(case, place, *pair, y), slope

    found, slope = found_for(z_s, z_t)
    dz = found.gradient * slope
    # 16-bit states: the gradient in the logits is rounded once, before its products.
    extra = (SMALLEST_TRUTH * found.tiny)[:, None] * slope
    if case.student_dtype != "float32":
        extra = extra + 2 * ULP[case.student_dtype] * np.abs(dz)
    softmax = case.divergence != "mse" or case.label_weight > 0
    gradients = through_head(dz, extra, np.zeros_like(dz), x_s[0], x_s[1], case.bias, case.student_dtype, softmax)
    value = value_of(found, case.reduction, place.columns_s)
    wanted = [True, not case.frozen, case.bias and not case.frozen]
    gradients = [g for g, w in zip(gradients, wanted, strict=False) if w]

    equal = abs(case.temperature / teacher_temperature - 1) <= NEARLY_EQUAL and not of_known

    def conditioning() -> None:
        """Logits are rounded: both sides' alike where their difference is exact, else each by itself. A CPU has it
        exactly where `sampled_near`, but of a stored teacher or at two temperatures. Of heads of one width the exact
        difference is a product itself, and the student's logit the teacher's plus it, rounded as both are."""
        near = equal and sampled_near(case, place, z_s.double(), z_t.double())
        size_d, size_own = np.zeros_like(size_s), size_s.copy()
        if equal and case.head != "apart":
            (h_s, w_s, b_s), (h_t, w_t, b_t) = (
                (x[0], x[1][at], x[2][at] * case.bias) for x, at in ((x_s, place.at_s), (x_t, place.at_t))
            )
            parts = np.abs(h_s - h_t) @ np.abs(w_s).T, np.abs(h_t) @ np.abs(w_s - w_t).T, np.abs(b_s - b_t)
            size_d[:, place.at_s] = sum(parts)
            size_own[:, place.at_s] = np.maximum(size_s[:, place.at_s], size_t[:, place.at_t])
        for shared in (True, False):
            moved_v, moved = np.zeros(case.rows), np.zeros_like(dz)
            for _ in range(DRAWS):
                signs = [rng.choice([-1.0, 1.0], x.shape) * ULP["float32"] for x in (size_s, size_t, size_s, size_t)]
                if shared and equal:
                    for first, second in ((0, 1), (2, 3)):
                        signs[second] = np.zeros_like(size_t)
                        signs[second][:, place.at_t] = signs[first][:, place.at_s]
                steps = signs[0] * size_s, signs[1] * size_t
                if shared and equal:
                    steps = signs[0] * size_own, steps[1]
                    steps[1][:, place.at_t] = steps[0][:, place.at_s]
                    steps[0][...] += rng.choice([-1.0, 1.0], size_d.shape) * ULP["float32"] * size_d
                other, their_slope = found_for(z_s + steps[0], z_t + steps[1], (signs[2], signs[3]))
                moved_v = moved_v + deviation(other.value - found.value) ** 2
                moved = moved + deviation(other.gradient * their_slope - dz) ** 2
            moved_v, moved = of_one(moved_v), three_sigma(moved)
            moved_v = moved_v if case.reduction == "none" else moved_v.sum(keepdims=True)
            rounded_ = through_head(dz, moved, moved, x_s[0], x_s[1], case.bias, case.student_dtype)
            everywhere = shared or not near
            for part, more in zip(gradients, [g for g, w in zip(rounded_, wanted, strict=False) if w], strict=True):
                if everywhere:
                    part.extra = part.extra + more.rounding
                else:
                    part.rounding = part.rounding + more.rounding
            if everywhere:
                value.extra = value.extra + moved_v
            else:
                value.rounding = value.rounding + moved_v

    if case.head == "equal":
        student[1], student[2] = student[1].clone(), student[2].clone()
    leaves = [x for x, w in zip(student, wanted, strict=True) if w]
    held = [None if w else x for x, w in zip(student, wanted, strict=True)]
    given_values = None if stored is None else stored.values
    if case.garbage:
        leaves[0], teacher[0] = spoilt(leaves[0], place.w, rng), spoilt(teacher[0], place.w, rng)
        if stored is not None:
            given_values = spoilt(stored.values, place.w, rng)
    options = place.options(case) | {"student_logit_scale": caps[0], "student_softcap": caps[1] or None}
    if stored is None:
        options |= {
            "teacher_temperature": teacher_temperature, "teacher_logit_scale": caps[0], "teacher_softcap": caps[1] or None,
        }  # fmt: skip

    def filled(leaves: tuple[Tensor, ...]) -> list[Tensor]:
        given = iter(leaves)
        return [next(given) if x is None else x for x in held]

    def loss(backend: str, *leaves: Tensor) -> Tensor:
        h, w, b = filled(leaves)
        named = options | ({"student_bias": b} if case.bias else {})
        if stored is not None:
            tail = {} if stored.tail is None else {"teacher_tail": stored.tail}
            named |= {"tail": case.tail, **tail}
            return fd.linear_topk_logit_loss(
                h, w, given_values, torch.from_numpy(stored.indices), backend=backend, **named
            )
        named |= {"teacher_bias": teacher[2]} if case.bias else {}
        # One storage for both sides, as a student with its teacher's head has it.
        other = w.detach() if case.head == "shared" else teacher[1]
        return fd.linear_logit_loss(h, w, teacher[0], other, backend=backend, **named)

    def eager(*leaves: Tensor) -> Tensor:
        def logits(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            z = torch.nn.functional.linear(h.float(), w.float(), b.float() if case.bias else None) * caps[0]
            return caps[1] * torch.tanh(z / caps[1]) if caps[1] else z

        y = logits(*filled(leaves))
        if stored is not None:
            return with_labels(case, place, topk_eager(case, place, stored, y), y)
        t = logits(*teacher)
        plain = textbook(y[:, place.at_s], t[:, place.at_t], case.divergence, case.beta, case.temperature, teacher_temperature)  # fmt: skip
        return with_labels(case, place, plain, y)

    return Problem(leaves, loss, eager, value, gradients, conditioning)


def sampled_near(case: Any, place: Setting, z_s: Array, z_t: Array) -> bool:
    """Whether a CPU takes the student for near (docs/losses.md, section 2), from the heads' logits: in half of the rows
    that count the difference is within 1/32 of the teacher's logits, a constant left out where the loss sees none."""
    counted = (place.w != 0) | ((place.labels >= 0) & (case.label_weight > 0))
    own, their = (z[counted][:, at] for z, at in ((z_s, place.at_s), (z_t, place.at_t)))
    columns = slice(None, None, -(-own.shape[1] // 128))
    difference, their = (own - their)[:, columns], their[:, columns]
    if case.divergence != "mse" and not case.softcap:
        difference = difference - difference.mean(-1, keepdims=True)
    near = np.linalg.norm(difference, axis=-1) < np.linalg.norm(their, axis=-1) / 32
    return bool(2 * near.sum() >= len(near))


def _among(x: Array, at: Array, columns: int, rng: np.random.Generator) -> Array:
    """The rows of a head among those of a larger one."""
    wide = rng.standard_normal((columns, *x.shape[1:]))
    wide[at] = x
    return wide


PROBLEMS: dict[str, Callable[[Any], Problem]] = {
    "logit": logit,
    "hidden": hidden,
    "topk": topk,
    "attention": attention,
    "relation": attention,
    "linear": linear,
    "linear_topk": linear,
}
