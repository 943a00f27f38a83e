"""Files of composable-sft (`pytorch_diff.bin`, Ansell et al. 2022), read with torch's weights_only unpickler alone.

Such a file is a dict with "diffs", names to sparse COO tensors of differences, and "abs", names to dense tensors (the
head); in older ones they are called "body" and "head". In newer ones a difference is a dict of "size", "index_steps"
(steps between flat positions in *column-major* order) and "values".

The first of these steps is a numpy scalar, the others are plain numbers. numpy itself is not let near the file: the two
names that such a scalar is made of stand for functions of this module, which make integers and nothing else.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistil.losses._check import FLOATS
from fastdistil.sparse._check import position_dtype

FILE = "pytorch_diff.bin"


class _Integer:
    """Stands for numpy.dtype: the integers, as `dtype("i8", False, True)` with a state that has the byte order."""

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or code not in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"):
            raise ValueError(f"numpy's {code!r} is no integer")
        self.size, self.signed, self.little = int(code[1]), code[0] == "i", True

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.little = state[1] != ">"


def _scalar(dtype: object, raw: object) -> int:
    """Stands for numpy's scalar: a number from its bytes."""
    if not isinstance(dtype, _Integer) or not isinstance(raw, bytes) or len(raw) != dtype.size:
        raise ValueError("a numpy scalar is no integer")
    return int.from_bytes(raw, "little" if dtype.little else "big", signed=dtype.signed)


# As the files name them, before and since numpy 2.
_STAND_INS: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    (_Integer, "numpy.dtype"),
]


def is_composable(path: Path) -> bool:
    """A folder with the file, or a file that begins as a torch archive or a pickle does."""
    if path.is_dir():
        return (path / FILE).exists()
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return False
    if start[4:] == b"\0\0\0\0{":  # safetensors': a length, whose first bytes may be any, and JSON
        return False
    return start[:4] == b"PK\x03\x04" or start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04")


def file_of(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def read(path: Path) -> dict[str, Any]:
    """The arguments of a SparseDelta. Raises ValueError naming the file, the tensor and the reason."""
    path = file_of(path)
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for what is cut off or holds other objects than tensors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path}: is no file of composable-sft that can be read as tensors alone ({reason})"
        ) from error
    if not isinstance(content, Mapping) or not ("diffs" in content or "body" in content):
        raise ValueError(f"{path}: is no file of composable-sft: it holds neither 'diffs' nor 'body'")
    for key, section in content.items():
        if (
            not isinstance(section, Mapping)
            or not all(isinstance(name, str) for name in section)
            or (section and key not in ("diffs", "body", "abs", "head"))
        ):
            raise ValueError(f"{path}: {key}: cannot be applied as a sparse difference, expected 'diffs' and 'abs'")
    positions, values, shapes = dict[str, Tensor](), dict[str, Tensor](), dict[str, torch.Size]()
    for name, encoded in {**content.get("body", {}), **content.get("diffs", {})}.items():
        positions[name], values[name], shapes[name] = _named_difference(path, name, encoded)
    whole = dict[str, Tensor]()
    for name, tensor in {**content.get("head", {}), **content.get("abs", {})}.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {name}: is {type(tensor).__name__}, expected a floating tensor")
        whole[name] = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach().clone()
    return {"positions": positions, "values": values, "shapes": shapes, "whole": whole}


def _named_difference(path: Path, name: str, encoded: Any) -> tuple[Tensor, Tensor, torch.Size]:
    try:
        return _difference(encoded)
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path}: {name}: {error}") from error


def _difference(encoded: Any) -> tuple[Tensor, Tensor, torch.Size]:
    """Sorted row-major positions, values and shape of one difference."""
    if isinstance(encoded, Mapping):
        shape = torch.Size(encoded["size"])
        steps = torch.tensor(list(itertools.accumulate(map(operator.index, encoded["index_steps"]))), dtype=torch.int64)
        strides = [math.prod(shape[:d]) for d in range(len(shape))]  # column-major
        coordinates = [steps // strides[d] % shape[d] for d in range(len(shape))]
        if len(steps) and not 0 <= int(steps.min()) <= int(steps.max()) < shape.numel():
            raise ValueError(f"its positions leave a tensor of shape {tuple(shape)}")
        values = encoded["values"]
    elif isinstance(encoded, Tensor) and encoded.layout == torch.sparse_coo:
        if encoded.dense_dim():
            raise ValueError(f"is a sparse tensor with {encoded.dense_dim()} dense dimensions, expected none")
        shape, values = encoded.shape, encoded._values()
        coordinates = list(encoded._indices())
        for d, at in enumerate(coordinates):
            if len(at) and not 0 <= int(at.min()) <= int(at.max()) < shape[d]:
                raise ValueError(f"its positions leave a tensor of shape {tuple(shape)}")
    else:
        raise ValueError(f"is {type(encoded).__name__}, expected a sparse COO tensor")
    if not isinstance(values, Tensor) or values.dtype not in FLOATS or values.shape != coordinates[0].shape:
        raise ValueError(f"has values that do not fit its {len(coordinates[0])} positions")
    flat = torch.zeros_like(coordinates[0])
    for d, at in enumerate(coordinates):
        flat += at * math.prod(shape[d + 1 :])
    values = values.detach().to(torch.float64 if values.dtype == torch.float64 else torch.float32)
    index, place = torch.unique(flat, sorted=True, return_inverse=True)  # an uncoalesced tensor may repeat positions
    total = torch.zeros(len(index), dtype=values.dtype).index_add_(0, place, values)
    return index.to(position_dtype(shape.numel())), total, shape
