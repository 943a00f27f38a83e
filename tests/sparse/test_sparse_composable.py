"""Files of composable-sft: every form that they come in, and those that are none."""

from __future__ import annotations

import math
import zipfile
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


def as_published(dense: Tensor) -> dict[str, Any]:
    """As composable-sft writes it: the first step is a numpy scalar."""
    encoded = column_major(dense)
    first, *others = encoded["index_steps"]
    return {**encoded, "index_steps": [np.int64(first), *others]}


@pytest.mark.parametrize("form", ["diffs", "body", "steps", "numpy"])
def test_composable_files(form: str, tmp_path: Path) -> None:
    dense, head = differences(), {"2.bias": torch.tensor([1.0, 2.0, 3.0])}
    if form in ("steps", "numpy"):
        encode = column_major if form == "steps" else as_published
        content = {"diffs": {n: encode(x) for n, x in dense.items()}, "abs": head}
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


def encoded_file(path: Path, steps: list[Any]) -> Path:
    torch.save({"diffs": {"0.bias": {"size": (47,), "index_steps": steps, "values": torch.ones(len(steps))}}}, path)
    return path


def renamed(path: Path, old: str, new: str) -> None:
    """The same archive with another module's name in its pickle."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data.replace(old.encode(), new.encode()))


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_numpy_scalars_of_either_version(module: str, dtype: Any, tmp_path: Path) -> None:
    path = encoded_file(tmp_path / "pytorch_diff.bin", [dtype(46)])
    renamed(path, dtype.__reduce__(dtype(46))[0].__module__, module)
    assert SparseDelta.load(path).positions["0.bias"].tolist() == [46]


def test_big_endian_numpy_scalar(tmp_path: Path) -> None:
    scalar = np._core.multiarray.scalar

    class Big:
        def __reduce__(self) -> Any:
            return scalar, (np.dtype(">i4"), (46).to_bytes(4, "big"))

    path = encoded_file(tmp_path / "pytorch_diff.bin", [Big()])
    assert SparseDelta.load(path).positions["0.bias"].tolist() == [46]


class Numpy:
    """Calls of numpy's that a file could try."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "hostile",
    [
        np.float64(1.0),
        np.str_("x"),
        np.zeros(2),
        np.dtype("O"),
        np.dtype([("a", "i8")]),
        Numpy(np.fromfile, "/etc/hostname"),
        Numpy(np._core.multiarray.scalar, np.dtype("i8"), b"short"),
        Numpy(np._core.multiarray.scalar, 8, b"12345678"),
    ],
    ids=["float", "str", "array", "object", "fields", "fromfile", "short", "no dtype"],
)
def test_hostile_numpy_is_refused(hostile: Any, tmp_path: Path) -> None:
    path = encoded_file(tmp_path / "pytorch_diff.bin", [1, hostile])
    before = torch.serialization.get_safe_globals()
    with pytest.raises(ValueError, match="pytorch_diff.bin: is no file of composable-sft that can be read as tensors"):
        SparseDelta.load(path)
    assert set(torch.serialization.get_safe_globals()) == set(before)  # nothing stays allowed for anyone else


class Trap:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


OUT = torch.sparse_coo_tensor(torch.tensor([[9], [0]]), torch.ones(1), (2, 2), check_invariants=False)
NOT_READ = "is no file of composable-sft that can be read as tensors alone"  # torch 2.14 checks positions itself
FOREIGN = [
    ({"diffs": {"x": Trap()}}, NOT_READ),
    ({"model": {}}, ".*holds neither 'diffs' nor 'body'"),
    ([1, 2], ".*holds neither 'diffs' nor 'body'"),
    ({"diffs": {"x": torch.ones(2)}}, "x: is Tensor, expected a sparse COO tensor"),
    ({"diffs": {"x": OUT}}, rf"x: its positions leave a tensor of shape \(2, 2\)|{NOT_READ}"),
    (
        {"diffs": {"x": {"size": (2, 2), "index_steps": [5], "values": torch.ones(1)}}},
        "x: its positions leave a tensor",
    ),
    ({"diffs": {"x": {"size": (2, 2)}}}, "x: 'index_steps'"),
    ({"diffs": {"x": {"size": (), "index_steps": [0], "values": torch.ones(1)}}}, "x: .*"),
    ({"diffs": {"x": {"size": (0,), "index_steps": [0], "values": torch.ones(1)}}}, "x: .*"),
    ({"diffs": {"x": {"size": (4,), "index_steps": [1.5], "values": torch.ones(1)}}}, "x: 'float' object"),
    ({"diffs": {"x": {"size": (4,), "index_steps": [2**70], "values": torch.ones(1)}}}, "x: .*"),
    (
        {"diffs": {"x": {"size": (2,), "index_steps": [1], "values": torch.tensor([math.nan])}}},
        r"SparseDelta: values\['x'\] holds NaN",
    ),
    ({"diffs": {3: OUT}}, f"diffs: cannot be applied|{NOT_READ}"),
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
