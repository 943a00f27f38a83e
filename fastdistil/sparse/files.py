"""safetensors files, read tensor by tensor from the disk, and written whole or not at all. Needs no other package.

Every length is checked against the file before anything is mapped; an error names the file, the tensor and the reason.
What `write` makes carries a sha256 of header and data, which `Checkpoint.verify` compares.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistil.sparse._check import check_positions
from fastdistil.writing import replacing

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
INDEX = "model.safetensors.index.json"
CONTENT = "content_sha256"  # of the metadata


class Entry(NamedTuple):
    """Where a tensor lies: file, byte offset in it, dtype, shape."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of one file."""

    def wrong(message: str) -> ValueError:
        return ValueError(f"{path}: {message}")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise wrong(f"is not a safetensors file, or truncated: {size} bytes, header of {length}")
            raw = file.read(length)
    except OSError as error:
        raise wrong(f"cannot be read: {error.strerror}") from error
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise wrong(f"is not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise wrong("is not a safetensors file: its header is not an object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise wrong("its metadata is not a mapping of strings")
    return {name: _entry(path, name, entry, 8 + length, size) for name, entry in content.items()}, metadata


def _entry(path: Path, name: str, entry: Any, start: int, size: int) -> Entry:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        good = all(type(x) is int and x >= 0 for x in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"{path}: {name}: its header entry is not dtype, shape and data_offsets")
    if dtype not in _DTYPES:
        raise ValueError(f"{path}: {name}: has dtype {dtype!r}, expected one of {', '.join(_DTYPES)}")
    found = Entry(path, start + begin, _DTYPES[dtype], tuple(shape))
    if end - begin != found.nbytes:
        raise ValueError(f"{path}: {name}: has {end - begin} bytes, expected {found.nbytes} for {dtype} of {shape}")
    if start + end > size:
        raise ValueError(f"{path}: {name}: ends at byte {start + end}, but the file at {size}: truncated?")
    return found


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a safetensors file, or of a folder with one or with shards, by name; read when asked for.

    Each look maps the tensor's bytes anew and unmaps them with the last reference: nothing stays resident. Writing to a
    tensor never reaches the file.

    Args:
        path: a file, an index of shards (`*.index.json`) or a folder that holds `model.safetensors` or such an index.

    Raises:
        ValueError: naming the file and the tensor, for what is truncated, foreign or missing.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> from fastdistil.sparse import Checkpoint
        >>> folder = tempfile.TemporaryDirectory()
        >>> save_file({"weight": torch.ones(2, 3)}, f"{folder.name}/model.safetensors")
        >>> checkpoint = Checkpoint(folder.name)
        >>> list(checkpoint), checkpoint["weight"].shape
        (['weight'], torch.Size([2, 3]))
        >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        file = self.path
        if file.is_dir():
            file = file / INDEX if (file / INDEX).exists() else file / "model.safetensors"
            if not file.exists():
                raise ValueError(
                    f"{path}: is a folder without {INDEX} and model.safetensors, expected one that holds either, or a "
                    "safetensors file"
                )
        if file.suffix == ".json":
            self._read_shards(file)
        else:
            self.entries, self.metadata = _header(file)

    def _read_shards(self, index: Path) -> None:
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = {index.parent / file: None for file in places.values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: is not an index of safetensors shards ({error!r})") from error
        headers = {shard: _header(shard)[0] for shard in shards}
        for name, file in places.items():
            if name not in headers[index.parent / file]:
                raise ValueError(f"{index.parent / file}: {name}: is missing, {index.name} places it there")
            self.entries[name] = headers[index.parent / file][name]

    def verify(self) -> None:
        """Read everything and compare it with the sha256 that `write` left in the file; others' files have none.

        Raises ValueError naming the file where a bit has changed.
        """
        said = self.metadata.get(CONTENT)
        if said is None:
            return
        with self.path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            found = _begin(header)
            while block := file.read(1 << 20):
                found.update(block)
        if found.hexdigest() != said:
            raise self.error("contents", f"altered, their sha256 is {found.hexdigest()}, expected {said}")

    def error(self, name: str, message: str) -> ValueError:
        return ValueError(f"{self.path}: {name}: {message}")

    def __getitem__(self, name: str) -> Tensor:
        return map_tensor(self.entries[name])

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def map_tensor(entry: Entry, write: bool = False) -> Tensor:
    """The tensor on the file's own pages; `write` makes changes reach the file, else they stay in memory."""
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    begin = entry.offset - entry.offset % mmap.ALLOCATIONGRANULARITY
    access = mmap.ACCESS_WRITE if write else mmap.ACCESS_COPY
    with entry.path.open("r+b" if write else "rb") as file:
        pages = mmap.mmap(file.fileno(), entry.offset - begin + entry.nbytes, access=access, offset=begin)
    flat = torch.frombuffer(pages, dtype=torch.uint8, offset=entry.offset - begin, count=entry.nbytes)
    if entry.offset % entry.dtype.itemsize:  # a foreign writer that did not align its header
        if write:
            raise ValueError(f"{entry.path}: its tensors are not aligned, expected a header of a multiple of 8 bytes")
        flat = flat.clone()
    return flat.view(entry.dtype).view(entry.shape)


def raw_bytes(tensor: Tensor) -> Any:
    """The bytes of a dense CPU tensor, without a copy and without numpy; they live as long as the tensor."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()) if tensor.nbytes else b""


def check_target(path: Path) -> None:
    """Raise where no file can be written at `path`."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: cannot be written, {path.parent} is not a folder")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: cannot be written, it exists and is not a file")


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, tensor by tensor, to a temporary name beside `path`, then rename.

    Raises OSError naming the file where it cannot be written, RuntimeError where another process writes it.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise ValueError(f"{path}: {name}: has dtype {tensor.dtype}, expected one of {', '.join(map(str, _CODES))}")
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    check_target(path)
    content = _begin(header)
    header["__metadata__"][CONTENT] = content.hexdigest()  # of the right length, for now
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            dense = tensor.detach().to("cpu").contiguous()
            content.update(raw_bytes(dense))
            file.write(raw_bytes(dense))
        header["__metadata__"][CONTENT] = content.hexdigest()
        file.seek(8)
        file.write(json.dumps(header).encode())


def refresh(path: Path) -> None:
    """What the file says of its contents, after they were changed in place."""
    with path.open("r+b") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        if CONTENT not in header.get("__metadata__", {}):
            return
        content = _begin(header)
        while block := file.read(1 << 20):
            content.update(block)
        header["__metadata__"][CONTENT] = content.hexdigest()
        file.seek(8)
        file.write(json.dumps(header).encode().ljust(length))


def _begin(header: Mapping[str, Any]) -> Any:
    """The sha256 of a header, but for what it says of the contents; the data are still to come."""
    metadata = {name: value for name, value in header["__metadata__"].items() if name != CONTENT}
    return hashlib.sha256(json.dumps({**header, "__metadata__": metadata}, sort_keys=True).encode())


def hash_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """16 hexadecimal digits of names and shapes, in whatever order."""
    return hashlib.sha256(_shapes_json(shapes).encode()).hexdigest()[:16]


def _shapes_json(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return json.dumps({name: list(shapes[name]) for name in sorted(shapes)}, separators=(",", ":"))


def shape_metadata(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What a file says about the tensors that it is for."""
    return {"format": kind, "shapes": _shapes_json(shapes), "shapes_hash": hash_shapes(shapes)}


def decode_shapes(found: Checkpoint, kind: str) -> dict[str, torch.Size]:
    """The shapes of the tensors that the file is for. Raises ValueError where it is of another kind."""
    if found.metadata.get("format") != kind:
        raise found.error("metadata", f"format is {found.metadata.get('format')!r}, expected {kind!r}")
    try:
        content = json.loads(found.metadata["shapes"])
        shapes = {name: torch.Size(shape) for name, shape in content.items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise found.error("metadata", f"shapes cannot be read ({error!r})") from error
    if hash_shapes(shapes) != found.metadata.get("shapes_hash"):
        raise found.error("metadata", "shapes do not have the hash that stands beside them")
    return shapes


def read_positions(found: Checkpoint, tensor: str, name: str, shapes: Mapping[str, torch.Size]) -> Tensor:
    """A checked copy of the positions in parameter `name` that the file keeps as `tensor`."""
    if name not in shapes:
        raise found.error(tensor, f"the metadata has no shape for {name!r}")
    index = found[tensor].clone()
    try:
        check_positions("positions", "the tensor", index, shapes[name].numel())
    except (TypeError, ValueError) as error:
        raise found.error(tensor, str(error)) from error
    return index
