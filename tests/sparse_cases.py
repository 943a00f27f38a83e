"""Small models for the sparse tests, and the selection that anyone would write: sort everything."""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def model(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Names to tensors of ugly shapes: empty, one element, odd, beyond a kernel's chunk of 65,536."""
    shapes = {
        "a.weight": (257, 301),
        "a.bias": (301,),
        "empty": (0, 4),
        "scalar": (),
        "b.weight": (3, 5, 7),
        "head": (2, 9),
    }
    return {name: (scale * torch.randn(shape)).to(dtype) for name, shape in shapes.items()}


def moved(base: dict[str, torch.Tensor], scale: float = 0.1) -> dict[str, torch.Tensor]:
    return {name: (x + scale * torch.randn(x.shape)).to(x.dtype) for name, x in base.items()}


def sorted_selection(params: dict[str, torch.Tensor], base: dict[str, torch.Tensor], k: int) -> dict[str, list[int]]:
    """By a stable sort of everything: the judge of ties and of exactly k."""
    changes = torch.cat([(params[n].double() - base[n].double()).abs().float().reshape(-1) for n in params])
    chosen = changes.sort(descending=True, stable=True).indices[:k].sort().values
    found, start = {}, 0
    for name, x in params.items():
        inside = chosen[(chosen >= start) & (chosen < start + x.numel())] - start
        found[name] = inside.tolist()
        start += x.numel()
    return found
