"""Masks, optimizer, differences and tickets of a compiled model have the bare model's names, and go from one to the
other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastdistil.sparse import SparseAdamW, SparseDelta, lottery_ticket, random_mask

COMPILED = "_orig_mod."


def model(kind: str) -> Any:
    torch.manual_seed(0)
    made: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    if kind == "a part":
        made[1] = torch.compile(made[1], backend="eager")
    return torch.compile(made, backend="eager") if kind == "whole" else made


def step(module: Any, mask: Any) -> None:
    optimizer = SparseAdamW(module.named_parameters(), mask, lr=0.1)
    module(torch.arange(8.0).reshape(2, 4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["whole", "a part"])
def test_one_steps_difference_is_the_same_and_applies_to_either(kind: str, tmp_path: Path) -> None:
    bare, compiled = model("bare"), model(kind)
    masks = [random_mask(dict(x.named_parameters()), density=0.3, seed=1) for x in (bare, compiled)]
    assert masks[0].digest() == masks[1].digest() and not any(COMPILED in name for name in masks[1])
    start = {name: x.detach().clone() for name, x in bare.state_dict().items()}
    step(bare, masks[0])
    step(compiled, masks[0])
    one = SparseDelta.from_params(bare, start, masks[0])
    other = SparseDelta.from_params(compiled, {COMPILED + name: x for name, x in start.items()}, masks[0])
    other.save(tmp_path / "delta.safetensors")
    loaded = SparseDelta.load(tmp_path / "delta.safetensors")
    assert list(loaded.values) == list(one.values)
    assert all(torch.equal(x, one.values[name]) for name, x in loaded.values.items())
    for target in (model("bare"), model(kind)):
        loaded.apply_(target)
        torch.testing.assert_close(list(target.parameters()), list(bare.parameters()), rtol=1e-6, atol=1e-7)
        loaded.revert_(target)
        assert all(torch.equal(x, y) for x, y in zip(target.parameters(), start.values(), strict=True))


def test_a_difference_with_the_compiled_names_of_an_earlier_version_applies() -> None:
    positions = {COMPILED + "0.weight": torch.tensor([1], dtype=torch.int32)}
    delta = SparseDelta(positions, {COMPILED + "0.weight": torch.tensor([5.0])}, {COMPILED + "0.weight": (4, 4)})
    target = model("bare")
    before = target[0].weight[0, 1].item()
    delta.apply_(target)
    assert target[0].weight[0, 1] == before + 5


def test_a_ticket_begun_with_a_compiled_model_ends_with_a_bare_one(tmp_path: Path) -> None:
    def phase(module: Any, mask: Any, out: Any) -> None:
        if mask is None:
            with torch.no_grad():
                for p in module.parameters():
                    p += torch.arange(p.numel()).reshape(p.shape) / 10
            return
        if stop:
            raise RuntimeError("stopped")
        step(module, mask)

    stop = True
    with pytest.raises(RuntimeError, match="stopped"):
        lottery_ticket(model("whole"), phase, k=5, exclude="bias", out=tmp_path / "one")
    stop = False
    deltas = [lottery_ticket(model("bare"), phase, k=5, exclude="bias", out=tmp_path / name) for name in ("one", "two")]
    assert all(torch.equal(x, deltas[1].values[name]) for name, x in deltas[0].values.items())
