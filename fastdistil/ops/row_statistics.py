"""What return_stats returns: entropies, cross entropy, agreement and acceptance of two rows of logits (docs/losses.md,
section 1).

A backend's ``row_moments`` leaves a few numbers a row; those of a vocabulary split over ranks merge into the whole's.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastdistil.backends import get
from fastdistil.contracts.row_moments import MOMENTS

# Student entropy, teacher entropy, cross entropy, whether both have the same top column, sum min(p, q).
ROW_STATISTICS = 5


def kernels(stem: str, backend: str, scale: Tensor) -> ModuleType:
    """The module of a stem that has no CUDA C++ kernel: what a GPU gets otherwise."""
    return get(stem, "auto" if backend == "cuda" else backend, scale.device, scale.dtype)


def moments(student: Tensor, teacher: Tensor, scale: Tensor, temperatures: tuple[float, float], backend: str) -> Tensor:
    """(N, MOMENTS) of student and teacher (N, V), in the dtype of scale (N,); 0 in rows of scale 0."""
    found = scale.new_empty(len(scale), MOMENTS)
    kernels("row_moments", backend, scale).row_moments(student, teacher, scale, found, *temperatures)
    return found


def statistics(moments: Tensor, scale: Tensor, log_acceptance: Tensor, top: Tensor | None = None) -> Tensor:
    """(N, ROW_STATISTICS) in nats, 0 in rows of scale 0. top: the teacher's largest column where it is not that of the
    moments."""
    _, others_a, first_a, _, others_b, first_b, cross, top_a, top_b = moments.unbind(-1)
    log_a, log_b, sum_a, sum_b = others_a.log1p(), others_b.log1p(), 1 + others_a, 1 + others_b
    agreement = (top_a == (top_b if top is None else top)).to(scale.dtype)
    entropies = (log_a - first_a / sum_a, log_b - first_b / sum_b, log_a - cross / sum_b)
    found = (*entropies, agreement, log_acceptance.exp())
    return torch.where((scale != 0)[:, None], torch.stack(found, -1), 0.0)


def merged(parts: Tensor, widths: Tensor) -> Tensor:
    """The moments (n, MOMENTS) of rows whose columns lie in R parts (R, n, MOMENTS), of widths (R,) columns each.

    With w the factor e^(max of a part - max of all), a part's first moment moves by its sum times (max of the part -
    max of all); the cross moment likewise, with the teacher's factor and the student's distance. The part that holds
    the largest column gives the others of its own, every other part its whole sum."""
    parts = parts.double()
    offsets = (widths.cumsum(0) - widths).to(parts)[:, None]
    max_a, others_a, first_a, max_b, others_b, first_b, cross, top_a, top_b = parts.unbind(-1)
    sum_a, sum_b = 1 + others_a, 1 + others_b

    def over(largest: Tensor, others: Tensor, top: Tensor) -> tuple[Tensor, ...]:
        whole, rank = largest.max(0)  # the first rank where several have it
        seen = largest > -torch.inf
        moved = torch.where(seen, largest - torch.where(whole > -torch.inf, whole, 0.0), 0.0)
        column = (top + offsets).gather(0, rank[None])[0]
        factor = torch.where(seen, moved.exp(), 0.0)
        beside = (factor * (1 + others)).scatter(0, rank[None], others.gather(0, rank[None])).sum(0)
        return whole, moved, factor, beside, column

    whole_a, moved_a, factor_a, beside_a, column_a = over(max_a, others_a, top_a)
    whole_b, moved_b, factor_b, beside_b, column_b = over(max_b, others_b, top_b)
    # Where a part has no student mass but some of the teacher's, its cross moment is -inf already.
    distance = torch.where(max_a > -torch.inf, moved_a, 0.0)
    found = (
        whole_a, beside_a, (factor_a * (first_a + moved_a * sum_a)).sum(0),
        whole_b, beside_b, (factor_b * (first_b + moved_b * sum_b)).sum(0),
        torch.where(factor_b == 0, 0.0, factor_b * (cross + distance * sum_b)).sum(0), column_a, column_b,
    )  # fmt: skip
    return torch.stack(found, -1)
