"""Masks drawn at random, the control of every experiment with a chosen one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastdistil.sparse._check import Named, chosen_names, float_param, named_tensors
from fastdistil.sparse.mask import SparseMask
from fastdistil.sparse.select import select_topk


def random_mask(
    params: Named,
    *,
    k: int | None = None,
    density: float | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    seed: int = 0,
) -> SparseMask:
    """Exactly k entries drawn uniformly over all tensors together: the control that a chosen mask is compared with.

    Args:
        params, k, density, include, exclude: as in `select_topk`.
        seed: the same seed gives the same mask.

    Returns:
        A SparseMask.

    Raises:
        TypeError, ValueError: as `select_topk`.

    Example:
        >>> import torch
        >>> from fastdistil.sparse import random_mask
        >>> random_mask(torch.nn.Linear(10, 10), density=0.08, exclude="bias")
        SparseMask(8 of 100 entries in 1 tensors)
    """
    found = named_tensors("random_mask", "params", params)
    names = chosen_names("random_mask", found, include, exclude)
    sizes = {name: float_param("random_mask", "params", name, found[name]).shape for name in names}
    return select_topk(_Draws(sizes, seed), _Zeros(sizes), k=k, density=density)


class _Draws(Mapping[str, Tensor]):
    """Uniform draws, the same ones at every look, so that no more than one tensor is in memory."""

    def __init__(self, shapes: Mapping[str, torch.Size], seed: int) -> None:
        self.shapes, self.order, self.seed = shapes, {name: i for i, name in enumerate(shapes)}, seed

    def __getitem__(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.order[name])
        return torch.rand(self.shapes[name], generator=generator, dtype=torch.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class _Zeros(_Draws):
    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__(shapes, 0)

    def __getitem__(self, name: str) -> Tensor:
        return torch.zeros((), dtype=torch.float32).expand(self.shapes[name])
