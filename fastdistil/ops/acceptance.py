"""The acceptance rate alpha = sum min(p, q) of rows of logits, and the losses made of it (docs/losses.md, section 1e).

Both losses are launches of the divergences' own kernels with a factor of alpha on each row: the gradient of -log(alpha)
is that of the total variation over alpha. A backend's ``acceptance`` leaves ln(alpha), which has its digits where alpha
itself is below the smallest float.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastdistil.ops.row_statistics import kernels

# ln(alpha) below which a row's small probabilities are lifted before the total variation sees them: float32 holds e^-60
# and 1e-7 of it, and its inverse.
FARTHEST = -60.0
# What is lifted stays below this, which no column with min(p, q) reaches.
CEILING = FARTHEST + 1.0

# launch(divergence, factor (n,), value (n,), gradient (n, V) or None): a divergence's rows times scale and factor.
Launch = Callable[[str, Tensor, Tensor, Tensor | None], None]


def levels(
    student: Tensor, teacher: Tensor, own: Tensor, whole: Tensor, highest: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """(n, LEVELS) of rows of student and teacher (n, V) from their moments: `own` of these columns, which tell where
    the largest logits are, and those of the `whole` row, whose columns may lie on several ranks; `highest` is then the
    largest of the ranks' numbers."""
    _, others_a, _, _, others_b, *_ = whole.unbind(-1)
    *_, top_a, top_b = own.unbind(-1)
    found = []
    for z, top, others in ((student, top_a, others_a), (teacher, top_b, others_b)):
        largest = z.gather(1, top.to(torch.int64)[:, None])[:, 0].to(whole.dtype)
        largest = largest if highest is None else highest(largest)
        found += [torch.where(largest.isinf(), 0.0, largest), others.log1p()]
    return torch.stack(found, -1)


def log_acceptance(
    student: Tensor, teacher: Tensor, scale: Tensor, levels: Tensor, temperatures: tuple[float, float], backend: str
) -> Tensor:
    """ln(alpha) of rows (n,), or of these columns' share of it; 0 in rows of scale 0."""
    found = torch.empty_like(scale)
    kernels("acceptance", backend, scale).acceptance(student, teacher, scale, levels, found, *temperatures)
    return found


def lift(
    student: Tensor,
    teacher: Tensor,
    own: Tensor,
    spare: Tensor,
    log_alpha: Tensor,
    levels: Tensor,
    temperatures: tuple[float, float],
    difference: bool,
) -> Tensor:
    """Brings the large probabilities of rows whose alpha is below e^FARTHEST nearer, in place; the new ln(alpha).

    The gradient of -log(alpha) in a score is S (p - p of L), with L the columns where p < q, `p of L` the student's
    distribution on them alone, and S = sum of p over L / alpha. With every log-probability x replaced by max(x - c,
    min(x, CEILING - c)) it stays as it is to e^FARTHEST, since that keeps the order of p and q, and all min(p, q) grow
    by e^c beside the rest. Rows of another alpha keep their logits bit for bit, in the others the small logits do.
    difference: `student` has the student's logits, which are in `own`, less the teacher's."""
    near = log_alpha.isinf() | ~(log_alpha < FARTHEST)  # alpha of 0: nothing could be lifted
    move = torch.where(near, 0.0, FARTHEST - log_alpha)
    lifted = torch.where(log_alpha.isinf(), 0.0, torch.where(near, log_alpha, FARTHEST))
    if move.device.type == "cpu" and not move.any():  # a GPU would have to be waited for
        return lifted
    t_s, t_t = temperatures
    level_s, log_s, level_t, log_t = levels[:, :, None].unbind(1)

    def step(z: Tensor, level: Tensor, log: Tensor, t: float) -> Tensor:
        torch.sub(level + t * (log + (CEILING - move[:, None])), z, out=spare)
        return torch.maximum(spare.clamp_(max=0.0), -t * move[:, None], out=spare)

    student += step(own if difference else student, level_s, log_s, t_s)
    moved = step(teacher, level_t, log_t, t_t)
    teacher += moved
    if difference:
        student -= moved
    return lifted


def negative_log(
    launch: Launch, value: Tensor, gradient: Tensor | None, log_alpha: Tensor, lifted: Tensor, unit: Tensor
) -> None:
    """-log(alpha) of rows times `unit` (n,), the scale and the value's factor; `lifted` is ln(alpha) of the logits as
    they are now.

    Where alpha is near 1 the value is -log1p(-TVD), with the total variation's own digits."""
    factor = torch.exp(-lifted)
    launch("tvd", factor, value, gradient)
    tvd = torch.where(unit == 0, 0.0, value / (unit * factor))
    loss = torch.where(log_alpha > -math.log(2), -torch.log1p(-tvd), -log_alpha)
    # A row that is NaN stays so.
    value.copy_(torch.where(value.isnan(), value, torch.where(unit == 0, 0.0, unit * loss)))


def hybrid(
    launch: Launch, value: Tensor, gradient: Tensor | None, spare: Tensor | None, log_alpha: Tensor, eta: float
) -> None:
    """lambda KL + (1 - lambda) TVD with lambda = e^(-eta alpha), a constant to the gradient. `spare` (n, V) is for the
    first gradient."""
    decay = -eta * log_alpha.exp()
    launch("forward_kl", decay.exp(), value, None if gradient is None else spare)
    first = value.clone()
    launch("tvd", -torch.expm1(decay), value, gradient)
    value += first
    if gradient is not None and spare is not None:
        gradient += spare
