"""score_mse on a GPU without any map: the squared difference of two low-rank matrices (losses.md, section 5).

X_s Y_s^T - X_t Y_t^T = [X_s - X_t, X_t] [Y_s, Y_s - Y_t]^T =: U W^T with X = scale * Q and Y = K, so that the squared
norm of row i is U_i (W^T W) U_i^T: time linear in S, and nothing cancels as the student's factors near its teacher's.
Where only the maps are alike (factors in another basis) the halves of U W^T cancel each other, so all is in float64: to
ask first would be to wait for the device. Head sizes that differ leave U = [X_s, X_t], W = [Y_s, -Y_t]. The CPU's form
of it is csrc/cpu/attention_low_rank.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.contracts.attention import sum_of_groups

# Of float64 factors at a time; not yet measured on a GPU. Those that come here have 40 GiB and more.
CHUNK_BYTES = 2**30
_FACTORS = 11  # queries and keys of both sides, U, W, U W^T W and what they are made of, in units of one of them


def score_mse(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    key_mask: Tensor | None,
    row_scale: Tensor,
    student_scale: float,
    teacher_scale: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows sum over keys of (A_s - A_t)^2 times `row_scale`, and gradients, without a causal mask.

    Arguments and results as in `fastdistil.reference.attention.attention`, all in the vendor's matrix products.
    """
    tensors = (student_q, student_k, teacher_q, teacher_k, row_scale, *(() if key_mask is None else (key_mask,)))
    step = max(1, CHUNK_BYTES // max(1, _FACTORS * 4 * (student_q[:1].numel() + teacher_q[:1].numel())))
    rows = torch.empty_like(row_scale, memory_format=torch.contiguous_format)
    dq, dk = (rows.new_empty(x.shape) if need_grad else None for x in (student_q, student_k))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        found = _score_mse(*(x[part] for x in tensors), scales=(student_scale, teacher_scale), need_grad=need_grad)
        rows[part] = found[0]
        if dq is not None and dk is not None:
            dq[part], dk[part] = found[1:]
    return rows, dq, dk


def _score_mse(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    row_scale: Tensor,
    key_mask: Tensor | None = None,
    *,
    scales: tuple[float, float],
    need_grad: bool,
) -> tuple[Tensor, ...]:
    dtype, (heads, size) = torch.float64, (student_q.shape[1], student_q.shape[-1])
    student_scale, teacher_scale = scales
    skipped = (row_scale == 0)[..., None]
    q_s, q_t = (x.to(dtype).masked_fill(skipped, 0.0) for x in (student_q, teacher_q))
    k_s, k_t = (x.to(dtype) for x in (student_k, teacher_k))
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        k_s, k_t = k_s.masked_fill(hidden, 0.0), k_t.masked_fill(hidden, 0.0)
    k_s, k_t = (k.repeat_interleave(heads // k.shape[1], 1) for k in (k_s, k_t))
    if size == teacher_q.shape[-1]:
        dx, dy = (q_s - q_t) * student_scale + q_t * (student_scale - teacher_scale), k_s - k_t
    else:
        dx, dy = q_s * student_scale, -k_t
    u, w = torch.cat((dx, q_t * teacher_scale), -1), torch.cat((k_s, dy), -1)
    projected = u @ (w.mT @ w)  # (.., S, d_s + d_t); it begins with (A_s - A_t) K_s, since W begins with K_s
    rows = torch.linalg.vecdot(projected, u) * row_scale
    if not need_grad:
        return (rows,)
    factor = (2 * student_scale * row_scale.to(dtype))[..., None]
    return rows, projected[..., :size] * factor, sum_of_groups(w @ (u.mT @ (q_s * factor)), student_k.shape[1])
