"""Files of composable-sft: every form that they come in, and those that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sparse_cases import equal, network, state
from torch import Tensor

from fastdistil.sparse import SparseDelta, load_into


def differences() -> dict[str, Tensor]:
    dense = {"0.weight": torch.zeros(47, 31), "0.bias": torch.zeros(47)}
    dense["0.weight"][3, 4], dense["0.weight"][40, 0], dense["0.weight"][0, 30] = 0.5, -1.0, 2.0
    dense["0.bias"][46] = 0.25
    return dense


def column_major(dense: Tensor) -> dict[str, Any]:
    flat = dense.numpy().reshape(-1, order="F")
    at = np.flatnonzero(flat)
    return {"size": dense.shape, "index_steps": np.diff(at, prepend=0).tolist(), "values": torch.from_numpy(flat[at])}


@pytest.mark.parametrize("form", ["diffs", "body", "steps"])
def test_composable_files(form: str, tmp_path: Path) -> None:
    dense, head = differences(), {"2.bias": torch.tensor([1.0, 2.0, 3.0])}
    if form == "steps":
        content = {"diffs": {n: column_major(x) for n, x in dense.items()}, "abs": head}
    else:
        content = {
            form: {n: x.to_sparse().coalesce() for n, x in dense.items()},
            "abs" if form == "diffs" else "head": head,
        }
    torch.save(content, tmp_path / "pytorch_diff.bin")
    model = network()
    before = state(model)
    delta = load_into(model, tmp_path)  # the folder, as it is published
    for name, change in dense.items():
        assert torch.equal(state(model)[name], before[name] + change)
    assert model[2].bias.tolist() == [1.0, 2.0, 3.0]
    delta.revert_(model)
    assert equal(state(model), before)
    delta.save(tmp_path / "ours.safetensors")  # and on from there
    assert SparseDelta.load(tmp_path / "ours.safetensors").nnz == 4
    assert SparseDelta.load(tmp_path / "pytorch_diff.bin").nnz == 4


class Trap:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


OUT = torch.sparse_coo_tensor(torch.tensor([[9], [0]]), torch.ones(1), (2, 2), check_invariants=False)
FOREIGN = [
    ({"diffs": {"x": Trap()}}, "is no file of composable-sft that can be read as tensors alone"),
    ({"model": {}}, ".*holds neither 'diffs' nor 'body'"),
    ([1, 2], ".*holds neither 'diffs' nor 'body'"),
    ({"diffs": {"x": torch.ones(2)}}, "x: is Tensor, expected a sparse COO tensor"),
    ({"diffs": {"x": OUT}}, r"x: its positions leave a tensor of shape \(2, 2\)|can be read as tensors alone"),
    (
        {"diffs": {"x": {"size": (2, 2), "index_steps": [5], "values": torch.ones(1)}}},
        "x: its positions leave a tensor",
    ),
    ({"diffs": {"x": {"size": (2, 2)}}}, "x: 'index_steps'"),
    ({"diffs": {}, "abs": {"h": 3}}, "h: is int, expected a floating tensor"),
    ({"diffs": {}, "block_sparses": {"x": {}}}, "block_sparses: cannot be applied"),
]


@pytest.mark.parametrize(("content", "message"), FOREIGN)
def test_foreign_torch_files(content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(content, tmp_path / "pytorch_diff.bin")
    model = network()
    before = state(model)
    with pytest.raises(ValueError, match=f"pytorch_diff.bin: ({message})"):
        load_into(model, tmp_path)
    assert equal(state(model), before)
    assert "unpickled" not in capsys.readouterr().out


def test_truncated_torch_files(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_diff.bin"
    torch.save({"diffs": {n: x.to_sparse() for n, x in differences().items()}}, path)
    data = path.read_bytes()
    for length in (4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="pytorch_diff.bin: is no file of composable-sft"):
            SparseDelta.load(path)
