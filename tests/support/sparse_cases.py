"""Small models for the sparse tests, and the selection that anyone would write: sort everything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.sparse import SparseMask, random_mask

HYPER = {"lr": 3e-3, "betas": (0.85, 0.99), "eps": 1e-7, "weight_decay": 0.1}  # of AdamW
LAYERS = ("0.weight", "0.bias", "2.weight", "2.bias")  # of network()
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


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(31, 47), nn.Tanh(), nn.Linear(47, 3)).to(dtype)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def masks(model: nn.Module, density: float = 0.2, head: bool = False) -> SparseMask:
    """A fifth of the first layer and, with `head`, of the second."""
    return random_mask(model, density=density, include=None if head else "0.", seed=1)


def gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=generator) * (1 + step % 7)).to(p.dtype)


def flat(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(name).detach().reshape(-1).clone()


def run_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, scheduler: Any = None) -> None:
    for step in steps:
        gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
