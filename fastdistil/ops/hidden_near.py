"""Where a projection or an activation brings the student so near to its teacher that float32 loses their difference.

A product of float32 is off by 2^-24 of its own size and more, whatever it is compared with; a state that comes as it is
has no such rounding. On a CPU, where the answer costs no wait, some rows of a chunk are asked first, and a chunk that
is near is computed in float64 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SAMPLE = 16  # every 16th row, a few thousandths of the products' work
_SMALLEST = 1 / 32  # of the state: a smaller difference has lost five bits and more


def is_near(z: Tensor, teacher: Tensor, bias: Tensor | None, row_scale: Tensor, kind: str, activation: str) -> bool:
    """Whether most of what `kind` sees of act(z + bias) - teacher (N, D) is below 1/32 of the state (for cosine, which
    sees no length, of the teacher's part across the student below 1/32 of it); rows of scale 0 are not asked."""
    kept = row_scale[::_SAMPLE] != 0
    h, t = z[::_SAMPLE][kept], teacher[::_SAMPLE][kept].to(z.dtype)
    h = h if bias is None else h + bias
    h = torch.nn.functional.gelu(h) if activation == "gelu" else h
    if kind == "cosine":
        h, t = (torch.nn.functional.normalize(x.double(), dim=-1, eps=0.0).nan_to_num(0.0) for x in (h, t))
        cos = torch.linalg.vecdot(h, t)
        return bool((1 - cos.square()).sum() < _SMALLEST**2 * len(h))
    difference = h - t
    if kind == "kl":
        difference -= difference.mean(-1, keepdim=True)
    return bool(difference.square().sum() < _SMALLEST**2 * h.square().sum())
