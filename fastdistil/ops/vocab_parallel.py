"""A vocabulary split over the ranks of a process group: one row's statistics from those of its parts.

Every rank has its own columns of both sides. What travels are ten numbers a row and rank, then two, and where hidden
states need a gradient its sum over the ranks; logits never do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from fastdistil.contracts.logit import DIVERGENCES, PHASE_STATISTICS, PHASE_VALUE, LogitRule
from fastdistil.ops import row_statistics

DIRECT = ("forward_kl", "mse")  # rules whose gradient needs no sum over the row (csrc/rules/divergence.h: not centred)
LARGEST_EXACT = 30.0  # lse(a) - lse(b) of a part, beyond which the rows lie far apart


def resolve(name: str) -> dist.ProcessGroup:
    """The group of that name (an op cannot take the group itself)."""
    found: dist.ProcessGroup = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    return found


class Ranks:
    """The ranks of the group of that name, this one with so many columns; the others' follow in the order of ranks."""

    def __init__(self, name: str, columns: int, device: torch.device) -> None:
        self.group = resolve(name)
        own = torch.tensor([columns], device=device)
        parts = [torch.empty_like(own) for _ in range(self.group.size())]
        dist.all_gather(parts, own, group=self.group)
        self.widths = torch.cat(parts)
        self.begin = self.widths[: self.group.rank()].sum()

    def sum(self, x: Tensor) -> Tensor:
        """Over the ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def log_sum(self, x: Tensor) -> Tensor:
        """ln of the sum over the ranks of e^x (n,)."""
        return _gather(x, self.group).logsumexp(0).to(x.dtype)

    def argmax(self, x: Tensor) -> Tensor:
        """The first largest column of each row (n, V_r), through the columns of all ranks."""
        top, column = x.max(1)
        tops, columns = _gather(torch.stack((top.double(), (column + self.begin).double())), self.group).unbind(1)
        return columns.gather(0, tops.argmax(0)[None])[0].to(torch.int64)

    def highest(self, x: Tensor) -> Tensor:
        """The largest of the ranks' (n,)."""
        return _gather(x, self.group).amax(0).to(x.dtype)

    def forward(self, module: ModuleType, rule: LogitRule) -> Callable[..., None]:
        """`_rows` with everything but its tensors."""
        return partial(_rows, module, rule, self.group)

    def merge_moments(self, moments: Tensor) -> Tensor:
        """Of the whole rows (n, MOMENTS) from those of this rank's columns."""
        return row_statistics.merged(_gather(moments, self.group), self.widths).to(moments.dtype)

    def cross_entropy(self, kernel: Callable[..., None], backend: str) -> Callable[..., None]:
        """A backend's cross_entropy_rows, for this rank's columns of rows and labels that count through all ranks'."""

        def rows(student: Tensor, labels: Tensor, scale: Tensor, loss: Tensor, gradient: Tensor | None) -> None:
            if student.device.type == "cpu":  # a GPU would have to be waited for
                self._check(labels[scale != 0])
            own = row_statistics.moments(student, student, scale, (1.0, 1.0), backend)
            # Apart: in largest + log(1 + others) a confident row's others would be lost.
            whole = row_statistics.merged(_gather(own, self.group), self.widths)[:, :2]
            share = torch.zeros_like(loss)
            kernel(student, labels - self.begin, scale, share, gradient, whole.to(scale.dtype).contiguous())
            loss += self.sum(share) + torch.where(scale == 0, 0.0, scale * whole[:, 1].log1p()).to(loss.dtype)

        return rows

    def _check(self, labels: Tensor) -> None:
        wrong, columns = (labels < 0) | (labels >= self.widths.sum()), int(self.widths.sum())
        if wrong.any():
            raise ValueError(
                f"labels has {int(labels[wrong][0])}, expected 0 to {columns - 1}, through the columns of all ranks"
            )


def _rows(
    module: ModuleType,
    rule: LogitRule,
    group: dist.ProcessGroup,
    student: Tensor,
    teacher: Tensor,
    scale: Tensor,
    loss: Tensor,
    stats: Tensor,
    gradient: Tensor | None,
    difference: bool = False,
) -> None:
    """As a backend's logit_fwd, for this rank's columns (n, V_r) of rows whose other columns are on other ranks: the
    whole rows' loss (n,) on every rank, and the gradient in the own columns. Not differentiable by itself."""
    divergence = DIVERGENCES[rule["divergence"]]
    module.logit_fwd(student, teacher, scale, loss, stats, None, phase=PHASE_STATISTICS, difference=difference, **rule)
    if divergence == "mse":
        count(stats, group)
    else:
        merge(stats, rule, group, difference)
    centred = divergence not in DIRECT
    direct = None if centred else gradient
    module.logit_fwd(student, teacher, scale, loss, stats, direct, phase=PHASE_VALUE, difference=difference, **rule)
    shares = torch.stack((loss, stats[:, 4]))
    dist.all_reduce(shares, group=group)
    loss.copy_(shares[0])
    stats[:, 4] = shares[1]
    if centred and gradient is not None:
        ones = torch.ones_like(scale)
        module.logit_bwd(student, teacher, scale, stats, gradient, ones, False, difference=difference, **rule)


def _gather(stats: Tensor, group: dist.ProcessGroup) -> Tensor:
    own = stats.double().contiguous()
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own, group=group)
    return torch.stack(parts)


def count(stats: Tensor, group: dist.ProcessGroup) -> None:
    """For the mse, which divides by the number of columns: 1 / V of all ranks in place of 1 / V of this one."""
    stats[:, 1] = (1 / (1 / _gather(stats, group)[:, :, 1]).sum(0)).to(stats.dtype)


def merge(stats: Tensor, rule: LogitRule, group: dist.ProcessGroup, difference: bool = False) -> None:
    """The statistics (n, STATS) of these columns become those of all ranks' columns, the same on every rank.

    With pi the teacher's mass of each part and D_r = lse(a) - lse(b) within it, relative to the reference r of the part
    that holds the teacher's largest column: D = log1p(sum pi_r expm1(D_r - r)): nothing cancels as the student nears
    its teacher. Each part took its own shift off its differences; the one of that part becomes everybody's."""
    t_s, t_t = rule["student_temperature"], rule["teacher_temperature"]
    parts = _gather(stats, group).unbind(-1)  # (R, n) each
    largest, inv_sum, shift, log_ratio, _, reference, own_max, own_log, top_student, top_teacher, shift_t = parts
    at = largest.argmax(0, keepdim=True)
    offset = shift / t_s - shift_t / t_t
    common = offset.gather(0, at)[0]
    back = offset - common
    own_top = own_max.amax(0)
    own_mass = torch.where(own_max == -torch.inf, 0.0, torch.exp((own_max - own_top) / t_s + own_log)).sum(0)
    seen = largest != -torch.inf
    top = largest.amax(0)
    level = torch.where(top == -torch.inf, 0.0, top)
    mass = torch.where(seen, torch.exp((largest - level) / t_t) / inv_sum, 0.0)
    total = mass.sum(0)
    shared = reference.gather(0, at)[0]
    own = own_max / t_s + own_log - common  # lse(a)
    plain = own - (largest / t_t - inv_sum.log())  # lse(a) - lse(b) of a part that lies far from its teacher
    moved = torch.where(log_ratio.isinf(), plain - shared, log_ratio + (reference + back - shared))
    absent = torch.exp(own - level / t_t - total.log() - shared)
    growth = torch.where(seen, mass / total * torch.expm1(moved.clamp(max=LARGEST_EXACT)), absent)
    ratio = growth.sum(0)
    near = (torch.where(seen, moved, 0.0) <= LARGEST_EXACT).all(0) & (ratio > -0.9) & (ratio < 1e3)
    student_at = (top_student + top_teacher if difference else top_student).argmax(0, keepdim=True)
    stats[:, 0] = torch.where(top == -torch.inf, torch.nan, top)
    stats[:, 1] = 1 / total
    stats[:, 2] = shift.gather(0, at)[0]
    stats[:, 3] = torch.where(near, torch.log1p(torch.where(near, ratio, 0.0)), torch.inf)
    stats[:, 4] = 0
    stats[:, 5] = shared
    stats[:, 6] = own_top
    stats[:, 7] = own_mass.log()
    stats[:, 8] = top_student.gather(0, student_at)[0]
    stats[:, 9] = top_teacher.gather(0, student_at)[0]
    stats[:, 10] = shift_t.gather(0, at)[0]
