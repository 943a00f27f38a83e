"""Attention-map losses on the CPU: the map exists one cache-sized block at a time (losses.md, section 4).

A block is a few heads times a few query rows times all keys that the block can see, so every row is whole and its
softmaxes need no running maximum. Padding behind the last real token is never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastdistil.reference.exact import forward_kl_rows, softmax_difference

# Elements of one block buffer; three are alive at a time. 128 Ki (512 KiB of float32) keeps them in the L2 caches of
# two cores while the matrix products stay large enough to run at full speed.
BLOCK_ELEMENTS = 128 * 1024
# Beyond this difference of scores exp overflows or loses the mass of a row: such blocks take the reference's formulas.
LARGEST_DIFFERENCE = 40.0
# Below this divergence sum(q expm1(c)), whose terms have both signs, has lost more than a digit of float32.
SMALLEST_PLAIN_KL = 1e-2


def attention(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    key_mask: Tensor | None,
    row_scale: Tensor,
    kind: str,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `fastdistil.reference.attention.attention`, with the map never larger than a block."""
    dtype, (batch, heads, length) = row_scale.dtype, row_scale.shape
    rows = torch.zeros_like(row_scale)
    dq, dk = (torch.empty(x.shape, dtype=dtype) if need_grad else None for x in (student_q, student_k))
    for b in range(batch):
        real = None if key_mask is None else key_mask[b]
        n_keys = length if real is None else _extent(real)
        n_rows = _extent((row_scale[b] != 0).any(0))
        if dq is not None and dk is not None:  # the rest is written by the first block that reaches it
            dq[b, :, n_rows if n_keys else 0 :] = 0
            dk[b] = 0
        if n_keys == 0 or n_rows == 0:
            continue
        hidden_keys = None if real is None or bool(real[:n_keys].all()) else ~real[:n_keys]
        for h, row_blocks in _blocks(heads, n_rows, n_keys):
            keys = [_load(x[b, h, :n_keys], dtype, hidden_keys) for x in (student_k, teacher_k)]
            for r in row_blocks:
                seen = min(n_keys, r.stop) if causal else n_keys  # keys beyond the block's last row are invisible
                scale = row_scale[b, h, r]
                skipped = None if bool((scale != 0).all()) else (scale == 0)
                q_s, q_t = (_load(x[b, h, r], dtype, skipped) for x in (student_q, teacher_q))
                invisible = None if hidden_keys is None else hidden_keys[:seen].expand(r.stop - r.start, seen)
                if causal:
                    ahead = torch.arange(seen) > torch.arange(r.start, r.stop)[:, None]
                    invisible = ahead if invisible is None else ahead | invisible
                k_s, k_t = (k[:, :seen] for k in keys)
                teacher_scores, difference = _scores(q_s, q_t, k_s, k_t, student_scale, teacher_scale)
                plain = partial(torch.matmul, q_s * student_scale, k_s.mT)
                values, dscores = _RULES[kind](teacher_scores, difference, plain, invisible, need_grad)
                rows[b, h, r] = values * scale
                if dq is not None and dk is not None:
                    dscores *= (student_scale * scale)[..., None]
                    torch.bmm(dscores, k_s, out=dq[b, h, r])
                    dk[b, h, :seen].baddbmm_(dscores.mT, q_s)
    return rows, dq, dk


def _extent(keep: Tensor) -> int:
    """One more than the last index where `keep` (S,) is True."""
    found = keep.nonzero()
    return int(found[-1]) + 1 if found.numel() else 0


def _blocks(heads: int, n_rows: int, n_keys: int) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of heads, each with its slices of query rows."""
    group = max(1, min(heads, max(torch.get_num_threads(), BLOCK_ELEMENTS // (n_rows * n_keys))))
    height = max(1, min(n_rows, BLOCK_ELEMENTS // (group * n_keys)))
    row_blocks = [slice(i, min(i + height, n_rows)) for i in range(0, n_rows, height)]
    for h in range(0, heads, group):
        yield slice(h, min(h + group, heads)), row_blocks


def _load(x: Tensor, dtype: torch.dtype, skip: Tensor | None) -> Tensor:
    """x (h, n, d) in `dtype`; rows where `skip` (n,) or (h, n) is True become zeros, whatever they hold."""
    x = x.to(dtype)
    return x if skip is None else x.masked_fill(skip[..., None], 0.0)


def _scores(
    q_s: Tensor, q_t: Tensor, k_s: Tensor, k_t: Tensor, student_scale: float, teacher_scale: float
) -> tuple[Tensor, Tensor]:
    """The teacher's scores and student minus teacher, (h, r, n) each; exact differences where the head sizes agree."""
    x_t = q_t * teacher_scale
    teacher_scores = torch.bmm(x_t, k_t.mT)
    if q_s.shape[-1] != q_t.shape[-1]:
        return teacher_scores, torch.bmm(q_s * student_scale, k_s.mT).sub_(teacher_scores)
    dx = (q_s - q_t).mul_(student_scale)
    if student_scale != teacher_scale:
        dx.add_(q_t, alpha=student_scale - teacher_scale)
    return teacher_scores, torch.bmm(dx, k_s.mT).baddbmm_(x_t, (k_s - k_t).mT)


# The rules: b and c of a block, both free to be overwritten, the student's scores for when they are needed, and the
# (h, r, n) or (r, n) mask of what is invisible -> the rows' values, and the gradient in the student's scores.
Scores = Callable[[], Tensor]


def _score_mse(b: Tensor, c: Tensor, plain: Scores, invisible: Tensor | None, need_grad: bool) -> tuple[Tensor, Tensor]:
    if invisible is not None:
        c.masked_fill_(invisible, 0.0)
    values = torch.linalg.vecdot(c, c)
    return values, c.mul_(2) if need_grad else c


def prob_kl(b: Tensor, c: Tensor, plain: Scores, invisible: Tensor | None, need_grad: bool) -> tuple[Tensor, Tensor]:
    if (found := _teacher(b, c, invisible)) is None:
        difference = softmax_difference(b, c, None if invisible is None else ~invisible, plain())
        return forward_kl_rows(difference), difference.p_minus_q
    weight, mass, largest = found
    growth = torch.expm1(c)
    log_ratio = torch.log1p(torch.linalg.vecdot(weight, growth)[..., None] / mass)
    values = log_ratio - torch.linalg.vecdot(weight, c)[..., None] / mass  # sum(q c) is 0 but for its rounding
    if not float(values.min()) > SMALLEST_PLAIN_KL:  # sum(q (expm1(c) - c)) term by term, which cannot cancel
        excess = torch.linalg.vecdot(weight, _expm1_minus_x(c, largest))[..., None] / mass
        values = torch.where(values > SMALLEST_PLAIN_KL, values, torch.log1p(excess))
    return values[..., 0], _p_minus_q(weight, mass, growth, log_ratio) if need_grad else b


def _prob_mse(b: Tensor, c: Tensor, plain: Scores, invisible: Tensor | None, need_grad: bool) -> tuple[Tensor, Tensor]:
    if (found := _teacher(b, c, invisible)) is None:
        difference = softmax_difference(b, c, None if invisible is None else ~invisible, plain())
        q, e = difference.q, difference.p_minus_q
    else:
        weight, mass, _ = found
        growth = c.expm1_()
        log_ratio = torch.log1p(torch.linalg.vecdot(weight, growth)[..., None] / mass)
        e = _p_minus_q(weight, mass, growth, log_ratio)
        q = weight.div_(mass)
    values = torch.linalg.vecdot(e, e)
    if not need_grad:
        return values, e
    p = q.add_(e)
    return values, e.sub_(torch.linalg.vecdot(p, e)[..., None]).mul_(p).mul_(2)


_RULES = {"prob_mse": _prob_mse, "prob_kl": prob_kl, "score_mse": _score_mse}


def _teacher(b: Tensor, c: Tensor, invisible: Tensor | None) -> tuple[Tensor, Tensor, float] | None:
    """exp(b - max) in place of b, its row sums, and the largest |c| of the block after its mean under q is taken off
    in place. With that mean gone, sum(q expm1(c)) is never negative (Jensen), so that log1p of it is always well
    conditioned. None, and nothing changed but c = 0 where invisible, for a block that this would lose: a difference
    that is too large or not a number, or a row that sees no key."""
    if invisible is not None:
        c.masked_fill_(invisible, 0.0)
        if bool(invisible.all(-1).any()):
            return None
    low, high = (float(x) for x in torch.aminmax(c))
    if not (low >= -LARGEST_DIFFERENCE and high <= LARGEST_DIFFERENCE):
        return None
    if invisible is not None:
        b.masked_fill_(invisible, float("-inf"))
    weight = b.sub_(b.amax(-1, keepdim=True)).exp_()
    mass = weight.sum(-1, keepdim=True)
    mean = torch.linalg.vecdot(weight, c)[..., None] / mass
    c.sub_(mean)
    return weight, mass, max(-low, high) + float(mean.abs().max())


def _p_minus_q(weight: Tensor, mass: Tensor, growth: Tensor, log_ratio: Tensor) -> Tensor:
    """q * expm1(c - log_ratio), in place of growth = expm1(c)."""
    return growth.mul_(torch.exp(-log_ratio) / mass).add_(torch.expm1(-log_ratio) / mass).mul_(weight)


def _expm1_minus_x(x: Tensor, largest: float) -> Tensor:
    """expm1(x) - x with |x| <= largest: its series below 0.5, as many terms as the precision needs."""
    bound, precision = min(largest, 0.5), torch.finfo(x.dtype).eps / 8
    terms, rest = 1, 1.0
    while rest > precision:
        rest *= bound / (terms + 2)
        terms += 1
    series = x / (terms + 1)
    for n in range(terms, 2, -1):
        series.add_(1).mul_(x).div_(n)
    series.add_(1).mul_(x).mul_(x).mul_(0.5)
    return series if largest < 0.5 else torch.where(x.abs() < 0.5, series, torch.expm1(x).sub_(x))
