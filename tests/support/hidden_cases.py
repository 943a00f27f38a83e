"""Lists of three layers with projections, for the tests of hidden_loss: drawn, as one list, and layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from conftest import DEVICE
from torch import Tensor

from fastdistil import hidden_loss

ROWS, SIZE_T, FACTORS = 8, 37, [0.5, 2.0, 1.25]


class Launches:
    """The kernel in its module's place; `grids` of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return self.kernel[grid]


def draw(dtype: torch.dtype, shared: bool, sizes: tuple[int, ...] = (24, 24, 24)) -> tuple[list[Tensor], list[Tensor]]:
    """Students, projections, biases (one of each of these where shared), and the teachers."""
    parts = 1 if shared else len(sizes)
    students = [torch.randn(ROWS, size) for size in sizes]
    projections = [torch.randn(SIZE_T, size) / size**0.5 for size in sizes[:parts]]
    biases = [torch.randn(SIZE_T) for _ in range(parts)]
    teachers = [2 * torch.randn(ROWS, SIZE_T) for _ in sizes]
    inputs = [x.to(DEVICE, dtype) for x in (*students, *projections, *biases)]
    return inputs, [x.to(DEVICE, dtype) for x in teachers]


def parts(inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Students, projections and biases, one of these a layer."""
    layers, some = len(FACTORS), (len(inputs) - len(FACTORS)) // 2
    projections, biases = inputs[layers : layers + some], inputs[layers + some :]
    return [*inputs[:layers]], [*projections] * (layers // some), [*biases] * (layers // some)


def together(*inputs: Tensor, **options: Any) -> Tensor:
    students, projections, biases = parts(inputs)
    common = {"layer_weights": FACTORS, "activation": "gelu", "backend": "triton"} | options
    return hidden_loss(students, projection=projections, bias=biases, **common)


def apart(*inputs: Tensor, teacher: list[Tensor], **options: Any) -> Tensor:
    """The layers one by one."""
    layers = zip(*parts(inputs), teacher, FACTORS, strict=True)
    common = {"activation": "gelu", "backend": "triton"} | options
    losses = [f * hidden_loss(s, t, projection=p, bias=b, **common) for s, p, b, t, f in layers]
    return torch.stack(losses).sum(0)


def arguments_of(inputs: list[Tensor], teachers: list[Tensor], shared: bool) -> tuple[Any, ...]:
    some = 1 if shared else 3
    which = [0] * 3 if shared else [0, 1, 2]
    scale = torch.full((ROWS,), 1 / ROWS, device=DEVICE)
    lists = inputs[:3], teachers, inputs[3 : 3 + some], inputs[3 + some :]
    return *lists, scale, which, which, FACTORS, "mse", "gelu", "triton", True
