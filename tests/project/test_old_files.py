"""Files of earlier versions open for ever (tests/data/formats, written at commit 5976e3a by its write.py)."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistil.sparse import Checkpoint, SparseDelta, SparseMask, lottery_ticket

FILES = Path(__file__).parents[1] / "data/formats"
TICKET = {"embed.weight": [0, 4, 12, 13, 18], "body.weight": [0]}


def _writer() -> Any:
    pytest.importorskip("accelerate")
    spec = importlib.util.spec_from_file_location("formats_write", FILES / "write.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_delta_and_a_mask() -> None:
    delta = SparseDelta.load(FILES / "delta.safetensors")
    assert {name: index.tolist() for name, index in delta.positions.items()} == {
        "embed.weight": [0, 5, 20],
        "body.weight": [3],
    }
    assert {name: (v.dtype, v.tolist()) for name, v in delta.values.items()} == {
        "embed.weight": (torch.float32, [0.5, -0.25, 2.0]),
        "body.weight": (torch.float64, [0.125]),
    }
    assert delta.whole["body.bias"].tolist() == [1.0, 2.0, 3.0] and delta.base_model == "tied"
    mask = SparseMask.load(FILES / "mask.safetensors")
    assert mask.nnz == 4 and mask.digest() == delta.mask.digest() and mask["embed.weight"].tolist() == [0, 5, 20]
    model = _writer().Tied()
    before = model.embed.weight.detach().clone()
    delta.apply_(model)
    moved = (model.head.weight - before).flatten()
    assert moved.nonzero().flatten().tolist() == [0, 5, 20] and model.body.bias.tolist() == [1.0, 2.0, 3.0]
    delta.revert_(model)
    assert torch.equal(model.embed.weight, before)


def test_a_finished_lottery_ticket(tmp_path: Path) -> None:
    writer = _writer()
    shutil.copytree(FILES / "ticket", tmp_path / "ticket")
    model = writer.Tied()

    def never(*_: object) -> None:
        raise AssertionError("a finished ticket is not trained again")

    delta = lottery_ticket(model, never, k=6, exclude="bias", out=tmp_path / "ticket", base_model="tied")
    tuned = torch.load(FILES / "ticket.pt")
    assert delta.nnz == 6 and all(torch.equal(x, tuned[name]) for name, x in model.state_dict().items())
    assert {name: index.tolist() for name, index in delta.positions.items()} == TICKET


def test_a_lottery_ticket_that_was_interrupted(tmp_path: Path) -> None:
    """With the start and the mask alone, it goes on where it was."""
    writer = _writer()
    shutil.copytree(FILES / "ticket", tmp_path / "ticket")
    for name in ("delta.safetensors", "tuned.safetensors"):
        (tmp_path / "ticket" / name).unlink()
    masks = []

    def phase(model: Any, mask: Any, out: Any) -> None:
        masks.append(mask)
        writer.phase(model, mask, out)

    model = writer.Tied()
    delta = lottery_ticket(model, phase, k=6, exclude="bias", out=tmp_path / "ticket", base_model="tied")
    assert len(masks) == 1 and masks[0].digest() == SparseMask.load(FILES / "ticket" / "mask.safetensors").digest()
    assert {name: index.tolist() for name, index in delta.positions.items()} == TICKET
    torch.testing.assert_close(model.state_dict(), dict(torch.load(FILES / "ticket.pt")))


def test_a_checkpoint_of_the_loop(tmp_path: Path) -> None:
    writer = _writer()
    shutil.copytree(FILES / "train", tmp_path / "train")
    saved = json.loads((FILES / "train" / "step-2" / "state.json").read_text(encoding="utf-8"))
    assert [entry["ce"] for entry in saved["history"]] == [2.0801122188568115, 1.9194514751434326]
    assert next(iter(Checkpoint(FILES / "train" / "step-2" / "model.safetensors"))) == "body.bias"
    seen = []

    def collate(rows: list[list[int]]) -> Any:
        seen.append(rows)
        return writer.collate(rows)

    model = writer.Tied()
    history = writer.train(model, writer.DATA, collate, writer.OPTIONS, out=tmp_path / "train")
    assert len(seen) == 3 and seen[0] == seen[1] and history[:2] == saved["history"] and len(history) == 4
    whole = writer.Tied()
    torch.testing.assert_close(history, writer.train(whole, writer.DATA, writer.collate, writer.OPTIONS))
    torch.testing.assert_close(model.state_dict(), whole.state_dict())
    assert model.head.weight is model.embed.weight
