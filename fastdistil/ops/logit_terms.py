"""What may come on top of a divergence of two rows of logits, and the loop that does it chunk by chunk.

A source of tile pairs fills two buffers with the student's and the teacher's logits of a few rows (memory, or two
heads); the row op of `logit_loss` turns one of them into the gradient; the source takes that back to where it belongs.
In between come what the options ask for: a logit scale and softcap on either side, columns without a partner, the
cross entropy with labels, and statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from fastdistil.backends import choose, module
from fastdistil.backends.memory import new_empty
from fastdistil.contracts.logit import DIVERGENCES, LOSSES, STATS, LogitRule
from fastdistil.ops import acceptance, row_statistics, vocab_parallel
from fastdistil.ops.draft_vocabulary import Beyond, DraftVocabulary, with_whole
from fastdistil.ops.row_statistics import ROW_STATISTICS

# Backends whose logit_fwd adds the cross entropy with labels by itself.
ADDS_LABELS = ("cpu", "triton")
# Backends whose logit_fwd and logit_bwd take the difference of the logits in place of the student's.
TAKES_DIFFERENCES = ("reference", "cpu", "triton")
# Columns that rows of logits are padded to, so that every row of an odd vocabulary begins at 64 bytes.
ALIGNED_COLUMNS = 16


@dataclass(frozen=True)
class Terms:
    """The options of one call; the defaults ask for nothing.

    labels (N,) int64 with label_scale (N,), the factor of each row's cross entropy; a label_scale without labels is
    for the teacher's most likely column. vocab_map (V_s,) int64, -1 for a column without a partner; renormalize:
    whether the teacher is normalised over the mapped columns alone. scales and caps: z -> scale * z, then
    cap * tanh(z / cap) where the cap is not 0."""

    labels: Tensor | None = None
    label_scale: Tensor | None = None
    vocab_map: Tensor | None = None
    student_logit_scale: float = 1.0
    student_softcap: float = 0.0
    teacher_logit_scale: float = 1.0
    teacher_softcap: float = 0.0
    statistics: bool = False
    renormalize: bool = True

    @property
    def plain(self) -> bool:
        tensors = self.label_scale is None and self.vocab_map is None
        return tensors and not self.statistics and self.caps == (1.0, 0.0, 1.0, 0.0)

    @property
    def caps(self) -> tuple[float, float, float, float]:
        return self.student_logit_scale, self.student_softcap, self.teacher_logit_scale, self.teacher_softcap

    def counts(self, row_scale: Tensor) -> Tensor:
        """Which rows count for anything (N,)."""
        return row_scale != 0 if self.label_scale is None else (row_scale != 0) | (self.label_scale != 0)

    def rows(self, kept: Tensor) -> Terms:
        """The options of the rows `kept` alone."""
        if self.label_scale is None:
            return self
        labels = None if self.labels is None else self.labels[kept]
        return replace(self, labels=labels, label_scale=self.label_scale[kept])


def pack(rule: Sequence[float], caps: Sequence[float], renormalize: bool = True) -> list[float]:
    """The constants of LogitRule, in its order, `Terms.caps` and `Terms.renormalize`, as one argument of an op."""
    return [float(x) for x in (*rule, *caps, renormalize)]


def unpack(constants: list[float]) -> tuple[LogitRule, tuple[float, float, float, float], bool]:
    divergence, beta, t_s, t_t, factor, *caps, renormalize = constants
    rule: LogitRule = {
        "divergence": int(divergence),
        "beta": beta,
        "student_temperature": t_s,
        "teacher_temperature": t_t,
        "value_factor": factor,
    }
    return rule, (caps[0], caps[1], caps[2], caps[3]), bool(renormalize)


def composed(rule: LogitRule) -> bool:
    """Whether the loss is made of several rows of kernels."""
    return rule["divergence"] >= len(DIVERGENCES)


class Source(Protocol):
    columns: int  # V_s
    teacher_columns: int  # V_t

    def fill(self, rows: slice, student: Tensor, teacher: Tensor) -> None:
        """Writes the logits of `rows` (n, V_s); the teacher's in the order of the student's columns, or where it is not
        renormalised (n, V_t) in its own. A source of differences writes the student's less the teacher's in place of
        the student's."""

    def back(self, rows: slice, gradient: Tensor) -> None:
        """Takes the gradient of those logits (n, V_s)."""


def chunk_rows(rows: int, columns: int, itemsize: int, chunk_bytes: int, buffers: int = 2) -> int:
    """Rows a chunk, whose buffers of logits fit in `chunk_bytes`: a multiple of 16 where there are as many."""
    padded = -(-columns // ALIGNED_COLUMNS) * ALIGNED_COLUMNS
    fit = max(1, chunk_bytes // (buffers * padded * itemsize))
    return max(1, min(rows, fit - fit % 16 if fit >= 16 else fit))


def run(
    source: Source,
    scale: Tensor,
    rule: LogitRule,
    terms: Terms,
    chunk_bytes: int,
    backend: str,
    need_gradient: bool,
    group: str,
    differences: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rows (N,) times their scales, and statistics (N, ROW_STATISTICS), (0, ROW_STATISTICS) where not asked for.

    differences: the source writes differences; both sides have one logit scale and softcap. Of two temperatures the
    scores' difference Z_s/T_s - Z_t/T_t is ((Z_s - Z_t) + (1 - T_s/T_t) Z_t) / T_s, in which nothing is lost either:
    the rows then get T_s/T_t Z_t for a teacher's logits, and one temperature.

    scale (N,) is float32 or float64; so are the buffers. group: the name of the process group over whose ranks the
    columns are split, in the order of their ranks, or ""; labels then count through all of them, and a map is this
    rank's columns to this rank's teacher columns."""
    count, dtype, device = len(scale), scale.dtype, scale.device
    statistics = scale.new_zeros(count if terms.statistics else 0, ROW_STATISTICS)
    rows = torch.empty_like(scale)
    if count == 0:
        return rows, statistics
    stretch = rule["student_temperature"] / rule["teacher_temperature"] if differences else 1.0
    if stretch != 1:
        rule = {**rule, "teacher_temperature": rule["student_temperature"]}
    ranks = vocab_parallel.Ranks(group, source.columns, device) if group else None
    if terms.vocab_map is not None and rule["divergence"] == DIVERGENCES.index("mse"):
        scale = scale * _per_partner(terms.vocab_map, ranks, dtype)
    loss, columns, several = LOSSES[rule["divergence"]], source.columns, composed(rule)
    draft = None
    if terms.vocab_map is not None and not terms.renormalize:
        draft = DraftVocabulary(terms.vocab_map, source.teacher_columns)
    width = columns + (draft is not None)  # a column more has the teacher's unmapped ones
    name = choose(backend, device, dtype)
    logit = module("logit", name)
    joined = terms.vocab_map is None and ranks is None and name in ADDS_LABELS and not several
    joined = joined and not (differences and name == "triton")  # its loads of the student's logits are of logits
    forwards = {
        d: partial(logit.logit_fwd, **r) if ranks is None else ranks.forward(logit, r) for d, r in _rules(rule).items()
    }
    labelled = terms.label_scale is not None and not joined
    capped = terms.student_softcap != 0
    with_own = (differences and (terms.statistics or capped or several)) or ((differences or several) and labelled)
    with_raw = capped and (need_gradient or differences)
    with_cap = differences and capped
    buffer_count = 2 + with_own + with_raw + with_cap + several
    whole_count = 0 if draft is None else -(-draft.columns // width)
    step = chunk_rows(count, width, scale.element_size(), chunk_bytes, buffer_count + whole_count)
    padded = -(-width // ALIGNED_COLUMNS) * ALIGNED_COLUMNS
    buffers = new_empty(scale, (buffer_count, step, padded))[:, :, :width]
    wholes = None if draft is None else new_empty(scale, (step, draft.columns))
    row_stats = scale.new_empty(step, STATS)
    alone = None if terms.vocab_map is None else (terms.vocab_map < 0).nonzero()[:, 0]
    temperatures = (rule["student_temperature"], rule["teacher_temperature"])
    # The row op may overwrite the student's logits, unless they are needed afterwards.
    again = terms.label_scale is not None or terms.caps[:2] != (1.0, 0.0)
    for start in range(0, count, step):
        chunk = slice(start, min(start + step, count))
        some, value = scale[chunk], rows[chunk]
        student_buffer, teacher_buffer, *rest = buffers[:, : chunk.stop - start]
        student, teacher = student_buffer[:, :columns], teacher_buffer[:, :columns]
        own = rest[0][:, :columns] if with_own else student  # the student's logits, as far as somebody reads them
        raw = rest[with_own][:, :columns] if with_raw else None  # the same before their softcap, in its units
        spare = rest[-1] if several else student_buffer
        whole = teacher if wholes is None else wholes[: chunk.stop - start]
        source.fill(chunk, student, whole)
        if differences:
            room = rest[with_own + with_raw][:, :columns] if with_cap else None
            cap_difference(student, teacher, own if with_own else None, raw, room, *terms.caps[:2])
            if stretch != 1:
                student.add_(teacher, alpha=1 - stretch)
                teacher *= stretch
        else:
            cap(student, *terms.caps[:2], raw)
            cap(whole, *terms.caps[2:])
            if with_own:
                own.copy_(student)
        beyond = None if draft is None else draft.split(whole, teacher, temperatures[1])
        kept = None
        if alone is not None:
            kept = own[:, alone] if terms.label_scale is not None else None
            student.index_fill_(1, alone, 0.0 if differences else float("-inf"))
            teacher.index_fill_(1, alone, float("-inf"))
            if with_own:
                own.index_fill_(1, alone, float("-inf"))
        labels: dict[str, Tensor] = {}
        if terms.label_scale is not None:
            labels = _labels(terms, chunk, teacher, ranks, beyond)
        found = levels = log_share = log_alpha = None
        if terms.statistics or several or beyond is not None:
            found = part = row_statistics.moments(own, teacher, some, temperatures, backend)
            found = found if ranks is None else ranks.merge_moments(found)
            levels = acceptance.levels(own, teacher, part, found, None if ranks is None else ranks.highest)
            if beyond is not None:
                levels, log_share = with_whole(levels, beyond, temperatures[1])
                student_buffer[:, columns], teacher_buffer[:, columns] = float("-inf"), beyond.logit
            if terms.statistics or several:
                log_alpha = acceptance.log_acceptance(own, teacher, some, levels, temperatures, backend)
                log_alpha = log_alpha if ranks is None else ranks.log_sum(log_alpha)
        if terms.statistics and found is not None and log_alpha is not None:
            top = None if beyond is None else beyond.top
            statistics[chunk] = row_statistics.statistics(found, some, log_alpha, top)
        gradient = None if not need_gradient else teacher_buffer if again and not with_own else student_buffer
        launch = partial(
            _launch, forwards, student_buffer, teacher_buffer, some, row_stats[: len(value)], differences, log_share,
            rule["value_factor"], labels if joined else {},
        )  # fmt: skip
        if levels is None or log_alpha is None or not several:
            launch(loss, None, value, gradient)
        elif loss == "nla":
            logits = (student_buffer, teacher_buffer, own, spare)
            lifted = acceptance.lift(*logits, log_alpha, levels, temperatures, differences)
            acceptance.negative_log(launch, value, gradient, log_alpha, lifted, some * rule["value_factor"])
        else:
            acceptance.hybrid(launch, value, gradient, spare, log_alpha, rule["beta"])
        gradient = None if gradient is None else gradient[:, :columns]
        if labelled:
            if kept is not None and alone is not None:
                own.index_copy_(1, alone, kept)
            entropy = row_statistics.kernels("cross_entropy", backend, scale).cross_entropy_rows
            entropy = entropy if ranks is None else ranks.cross_entropy(entropy, backend)
            entropy(own, labels["labels"], labels["label_scale"], value, gradient)
        if gradient is not None:
            cap_back(gradient, raw, *terms.caps[:2])
            if alone is not None and terms.label_scale is None:
                gradient.index_fill_(1, alone, 0.0)  # capping back made NaN of what was -inf
            source.back(chunk, gradient)
    return rows, statistics


def _rules(rule: LogitRule) -> dict[str, LogitRule]:
    """The rules of the launches that a loss takes, by divergence."""
    if not composed(rule):
        return {DIVERGENCES[rule["divergence"]]: rule}
    return {d: {**rule, "divergence": DIVERGENCES.index(d), "beta": 0.5} for d in ("forward_kl", "tvd")}


def _labels(
    terms: Terms, chunk: slice, teacher: Tensor, ranks: vocab_parallel.Ranks | None, beyond: Beyond | None
) -> dict[str, Tensor]:
    """Labels and their scales (n,) of a chunk of rows, given ones or those of the teacher's logits (n, V_s)."""
    assert terms.label_scale is not None
    scale = terms.label_scale[chunk]
    if terms.labels is not None:
        return {"labels": terms.labels[chunk], "label_scale": scale}
    if beyond is None:
        found = teacher.argmax(1) if ranks is None else ranks.argmax(teacher)
        return {"labels": found, "label_scale": scale}
    # A column that the student does not have is no label.
    return {"labels": beyond.top.clamp(min=0), "label_scale": torch.where(beyond.top < 0, 0.0, scale)}


def _launch(
    forwards: dict[str, Callable[..., None]],
    student: Tensor,
    teacher: Tensor,
    scale: Tensor,
    stats: Tensor,
    differences: bool,
    log_share: Tensor | None,
    value_factor: float,
    labels: dict[str, Tensor],
    divergence: str,
    factor: Tensor | None,
    value: Tensor,
    gradient: Tensor | None,
) -> None:
    """One divergence's rows times scale and factor. log_share: ln of what the mapped columns have of a teacher that is
    not renormalised, whose other columns are one more, the last; the forward KL, infinite with that, leaves it out:
    sum q log(q/p) over the mapped ones is Q (KL of the renormalised rows + ln Q)."""
    scale = scale if factor is None else _times(scale, factor)
    if log_share is not None and divergence == "forward_kl":
        student, teacher, scale = student[:, :-1], teacher[:, :-1], _times(scale, log_share.exp())
        gradient = None if gradient is None else gradient[:, :-1]
    forwards[divergence](student, teacher, scale, value, stats, gradient, difference=differences, **labels)
    if log_share is not None and divergence == "forward_kl":
        value += _times(scale, value_factor * log_share)


def _times(scale: Tensor, factor: Tensor) -> Tensor:
    """Rows of scale 0 may have any factor."""
    return torch.where(scale == 0, 0.0, scale * factor)


def _per_partner(vocab_map: Tensor, ranks: vocab_parallel.Ranks | None, dtype: torch.dtype) -> Tensor:
    """The mse's kernels divide by the columns: the mean is over those of them that have a partner."""
    columns = torch.stack((vocab_map.new_tensor(len(vocab_map)), (vocab_map >= 0).sum()))
    columns = columns if ranks is None else ranks.sum(columns)
    return columns[0].to(dtype) / columns[1]


def cap(logits: Tensor, scale: float, cap: float, raw: Tensor | None = None) -> None:
    """z -> scale z -> cap tanh(scale z / cap), in place; in `raw`, if given, comes scale z / cap."""
    if scale != 1:
        logits *= scale
    if cap != 0:
        raw = logits if raw is None else raw
        torch.div(logits, cap, out=raw)
        torch.tanh(raw, out=logits).mul_(cap)


def cap_difference(
    difference: Tensor,
    teacher: Tensor,
    own: Tensor | None,
    raw: Tensor | None,
    spare: Tensor | None,
    scale: float,
    cap: float,
) -> None:
    """`cap` of both sides, of which the student's is the teacher's plus a difference. In `own` comes the student's
    logit, in `raw` the same before its softcap, as in `cap`; a softcap needs both, and `spare` for its own use.

    tanh(x) - tanh(y) = sinh(x - y) / (cosh(x) cosh(y)): no digit is lost where both are nearly 1. In numbers that do
    not overflow, with d = |x - y| and m = min(|x|, |y|), or 0 where x and y differ in sign, it is
    +-2 (1 - e^-2d) e^-2m / ((1 + e^-2|x|) (1 + e^-2|y|))."""
    if scale != 1:
        difference *= scale
        teacher *= scale
    if cap != 0 and own is not None and raw is not None and spare is not None:
        teacher.div_(cap)
        torch.add(teacher, difference.div_(cap), out=raw)
        torch.minimum(raw, teacher, out=spare)
        torch.maximum(raw, teacher, out=own).neg_()
        torch.maximum(own, spare, out=own).clamp_(min=0).mul_(-2).exp_()
        torch.abs(difference, out=spare).mul_(-2).expm1_()
        difference.sign_().mul_(spare).mul_(own)
        for side in (raw, teacher):
            difference /= torch.abs(side, out=own).mul_(-2).exp_().add_(1)
        difference *= -2 * cap
        teacher.tanh_().mul_(cap)
    if own is not None:
        torch.add(teacher, difference, out=own)


def cap_back(gradient: Tensor, raw: Tensor | None, scale: float, cap: float) -> None:
    """The gradient in the logits from that in the capped ones, in place: times scale / cosh(raw)^2, which has its
    digits also where 1 - tanh(raw)^2 has none. `raw`, as `cap` leaves it, is overwritten."""
    if cap != 0 and raw is not None:
        gradient /= raw.cosh_().square_()
    if scale != 1:
        gradient *= scale
