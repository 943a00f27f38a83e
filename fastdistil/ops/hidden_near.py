"""Where a projection or an activation brings the student so near to its teacher that float32 loses their difference.

A product of float32 is off by 2^-24 of its own size and more, whatever it is compared with; a state that comes as it is
has no such rounding. On a CPU, where the answer costs no wait, some rows of a chunk are asked first, and a chunk that
is near is computed in float64 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SAMPLE, _FEW = 16, 256  # every 16th row of more than 256, a few thousandths of the products' work
_SMALLEST = 1 / 32  # of the state: a smaller difference has lost five bits and more


def is_near(z: Tensor, teacher: Tensor, bias: Tensor | None, row_scale: Tensor, kind: str, activation: str) -> bool:
    """Whether what `kind` sees of act(z + bias) - teacher (N, D) is below 1/32 of the state in some row (for cosine,
    which sees no length, the teacher's part across the student below 1/32 of it); rows of scale 0 are not asked."""
    step = _SAMPLE if len(z) > _FEW else 1
    kept = row_scale[::step] != 0
    h, t = z[::step][kept], teacher[::step][kept].to(z.dtype)
    h = h if bias is None else h + bias
    h = torch.nn.functional.gelu(h) if activation == "gelu" else h
    if kind == "cosine":
        h, t = (torch.nn.functional.normalize(x.double(), dim=-1, eps=0.0).nan_to_num(0.0) for x in (h, t))
        cos = torch.linalg.vecdot(h, t)
        return bool((1 - cos.square() < _SMALLEST**2).any())
    difference = h - t
    if kind == "kl":
        difference -= difference.mean(-1, keepdim=True)
    return bool((difference.square().sum(-1) < _SMALLEST**2 * h.square().sum(-1)).any())
