"""Losses under torch.export and, with autocast, under torch.compile. One graph for any number of rows is test_contract.py's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import LOSSES
from judge import EXACT_GRADIENT, EXACT_VALUE, error
from torch import Tensor, nn

import fastdistil as fd


class Module(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.loss = LOSSES[name]
        self.options = next(iter(self.loss.options.values()))

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        return self.loss.function(**tensors, **self.options)


@pytest.mark.parametrize("name", ["logit", "linear topk", "projected", "attention"])
def test_export(name: str) -> None:
    """The exported program takes any number of rows (tokens, of attention) and gives the loss's value."""
    module = Module(name)
    inputs, constants = module.loss.draw(torch.float32)
    count = torch.export.Dim("count", min=2, max=4096)
    given = module.loss.resized(inputs | constants | module.loss.dropped(), 7)
    by_row = {*module.loss.by_row, *module.loss.dropped()}
    dim = 2 if module.loss.mask else 0
    dims: dict[str, Any] = {x: {(1 if x == "mask" else dim): count} if x in by_row else None for x in given}
    program = torch.export.export(module, (given,), dynamic_shapes=(dims,)).module()
    for rows in (7, 9):
        tensors = module.loss.resized(given, rows)
        assert error(program(tensors), module(tensors)) <= EXACT_VALUE


def test_autocast_in_one_graph() -> None:
    """A step whose body runs in bfloat16: value and gradients of eager mode, for other numbers of rows too."""
    torch.manual_seed(0)
    body, head = nn.Linear(12, 8), nn.Linear(8, 50, bias=False)
    teacher_head = torch.randn(50, 6)

    def step(x: Tensor, target: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            states = body(x)
            assert states.dtype == torch.bfloat16
            loss: Tensor = fd.linear_logit_loss(states, head.weight, target, teacher_head, temperature=2.0)
            return loss + fd.logit_loss(head(states), target @ teacher_head.T)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    parameters = [*body.parameters(), *head.parameters()]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (7, 9):
            tensors = torch.randn(rows, 12), torch.randn(rows, 6)
            found, wanted = compiled(*tensors), step(*tensors)
            assert error(found, wanted) <= EXACT_VALUE
            for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (found, wanted)), strict=True):
                assert error(a, b) <= EXACT_GRADIENT[torch.bfloat16]
