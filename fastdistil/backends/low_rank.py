"""score_mse without any map: the squared difference of two low-rank matrices (losses.md, section 5).

X_s Y_s^T - X_t Y_t^T = [X_s - X_t, X_t] [Y_s, Y_s - Y_t]^T =: U W^T with X = scale * Q and Y = K, so that the squared
norm of row i is U_i (W^T W) U_i^T: time linear in S, and nothing cancels as the student nears its teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of U and of W in one chunk on a CPU: 1 MiB of float32 each, so that both stay in the caches.
CHUNK_ELEMENTS = 256 * 1024


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
    """Rows sum over keys of (A_s - A_t)^2 times `row_scale`, and gradients, for equal head sizes and no causal mask.

    Arguments and results as in `fastdistil.reference.attention.attention`. On a GPU all heads are one chunk.
    """
    batch, heads, length, size = student_q.shape
    if student_q.device.type == "cpu":
        group = max(1, min(heads, CHUNK_ELEMENTS // max(1, 2 * size * length)))
        chunks = [(slice(b, b + 1), slice(h, h + group)) for b in range(batch) for h in range(0, heads, group)]
    else:
        chunks = [(slice(0, batch), slice(0, heads))]
    dtype = row_scale.dtype
    rows = torch.empty_like(row_scale)
    dq, dk = (torch.empty(x.shape, dtype=dtype, device=x.device) if need_grad else None for x in (student_q, student_k))
    for chunk in chunks:
        scale = row_scale[chunk]
        skipped = (scale == 0)[..., None]
        hidden = None if key_mask is None else ~key_mask[chunk[0], None, :, None]
        q_s, q_t = (x[chunk].to(dtype).masked_fill(skipped, 0.0) for x in (student_q, teacher_q))
        k_s, k_t = (x[chunk].to(dtype) for x in (student_k, teacher_k))
        if hidden is not None:
            k_s, k_t = k_s.masked_fill(hidden, 0.0), k_t.masked_fill(hidden, 0.0)
        dx = (q_s - q_t) * student_scale + q_t * (student_scale - teacher_scale)
        u = torch.cat((dx, q_t * teacher_scale), -1)
        w = torch.cat((k_s, k_s - k_t), -1)
        projected = u @ (w.mT @ w)  # (.., S, 2d); its first half is (A_s - A_t) K_s, since W begins with K_s
        rows[chunk] = torch.linalg.vecdot(projected, u) * scale
        if dq is not None and dk is not None:
            factor = (2 * student_scale * scale)[..., None]
            dq[chunk] = projected[..., :size] * factor
            dk[chunk] = w @ (u.mT @ (q_s * factor))
    return rows, dq, dk
