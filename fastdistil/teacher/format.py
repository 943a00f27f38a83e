"""The files of a store: index.json, head.safetensors and shard-NNNNN.safetensors.

index.json holds what the store is (kind, model, dtype, width, vocabulary, temperature, tail), whether it is complete,
and of each other file its size in bytes and its sha256. A shard holds its examples' tokens one after the other,
"hidden" (tokens, D) or "values" and "indices" (tokens, K) and "tail" (tokens,), and "offsets" (examples + 1,): example
i is offsets[i]:offsets[i+1]. Of kind "layers" it holds "input_ids" (tokens,), "hidden_<layer>" (tokens, D) of each
layer, and "logits" (tokens, C), or (examples, C) where the teacher classifies whole sequences.

Version 1 had no tails and no float64, version 2 no kind "layers". A store is written as the first version that knows
what it holds, so that versions of this library that know no other read it.

Every file is written under a temporary name, brought to disk and renamed, the index after the shard that it lists: at
any moment the folder is a store of the shards up to some example. The index carries a sha256 of itself ("digest"; those
of earlier versions have none).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistil.writing import digest, naming

FORMAT, VERSION = "fastdistil-teacher", 3
INDEX, HEAD = "index.json", "head.safetensors"
PARTIAL = ".partial-"
FIELDS = {"hidden": ("hidden",), "topk": ("values", "indices"), "layers": ("input_ids",)}
TAIL, IDS, LOGITS = "tail", "input_ids", "logits"
INTEGERS = ("indices", IDS)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class File:
    """One file of the store; `examples` and `tokens` are a shard's counts."""

    file: str
    bytes: int
    sha256: str
    examples: int = 0
    tokens: int = 0


@dataclass
class Index:
    """What index.json says."""

    kind: str  # "hidden", "topk" or "layers"
    model: str
    dtype: str  # of hidden states or "values"
    width: int  # D or K
    vocabulary: int  # V, or C of kind "layers"
    temperature: float = 1.0  # that the values of kind "topk" were made at
    tail: bool = False  # whether shards hold the logarithm of the mass of each token's other columns
    layers: list[int] = field(default_factory=list)  # of kind "layers", from 0, ascending
    logits: str = ""  # of kind "layers": one row of logits for each of the "tokens" or "examples", or none
    teacher: str = ""  # of kind "layers": a hash of the teacher
    complete: bool = False
    head: File | None = None
    shards: list[File] = field(default_factory=list)

    @property
    def examples(self) -> int:
        return sum(shard.examples for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def version(self) -> int:
        if self.kind == "layers":
            return 3
        return 2 if self.tail or self.dtype == "float64" else 1

    @property
    def fields(self) -> tuple[str, ...]:
        """The tensors of an example."""
        states = tuple(f"hidden_{layer}" for layer in self.layers)
        return (*FIELDS[self.kind], *states, *((TAIL,) if self.tail else ()), *((LOGITS,) if self.logits else ()))

    def by_example(self, name: str) -> bool:
        """Whether a tensor has one row for each example, not for each token."""
        return name == LOGITS and self.logits == "examples"

    def shape(self, name: str, tokens: int) -> tuple[int, ...]:
        """Of an example's tensor."""
        if self.by_example(name):
            return (self.vocabulary,)
        return (tokens,) if name in (TAIL, IDS) else (tokens, self.vocabulary if name == LOGITS else self.width)

    def shard_shape(self, name: str, shard: File) -> tuple[int, ...]:
        return (shard.examples, self.vocabulary) if self.by_example(name) else self.shape(name, shard.tokens)

    def torch_dtype(self, name: str) -> torch.dtype:
        """As which an example's tensor is kept; 16 bits would lose what the tail is there for."""
        if name in INTEGERS:
            return torch.int32
        if name in (TAIL, LOGITS) and self.dtype != "float64":
            return torch.float32
        return DTYPES[self.dtype]

    def settings(self) -> dict[str, Any]:
        """What two runs must agree on to write one store."""
        return {name: getattr(self, name) for name in (*_SETTINGS, TAIL, *_LAYERS)}


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """`write` to a temporary name beside `path`, bring it to disk, rename it."""
    partial = path.with_name(PARTIAL + path.name)
    try:
        with naming(path):
            write(partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def save(path: Path, tensors: dict[str, Tensor], examples: int = 0, tokens: int = 0) -> File:
    """Tensors as a safetensors file, and what the index says of it."""
    from safetensors.torch import save_file

    whole = {name: x.contiguous() for name, x in tensors.items()}
    write_file(path, lambda partial: save_file(whole, partial))
    return File(path.name, path.stat().st_size, digest(path), examples, tokens)


def write_index(folder: Path, index: Index) -> None:
    counts = {"examples": index.examples, "tokens": index.tokens}
    later = (*((TAIL,) if index.version < 2 else ()), *(_LAYERS if index.version < 3 else ()))
    said = {name: x for name, x in asdict(index).items() if name not in later}
    content = {"format": FORMAT, "version": index.version, **said, **counts}
    text = json.dumps({**content, _DIGEST: _digest(content)}, indent=1) + "\n"

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    write_file(folder / INDEX, write)


def read_index(folder: Path) -> Index:
    """Raises FileNotFoundError or ValueError, naming the file and the reason."""
    path = folder / INDEX
    if folder.is_file():
        raise ValueError(f"{folder}: is a file, expected the folder of a teacher's store")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, expected the index of a teacher's store")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    found = data.get("format") if isinstance(data, dict) else type(data).__name__
    if found != FORMAT:
        raise ValueError(f"{path}: foreign, its format is {found!r}, expected {FORMAT!r}")
    version = data.get("version")
    if version not in range(1, VERSION + 1):
        raise ValueError(f"{path}: has version {version!r}, expected 1 to {VERSION}")
    try:
        head = None if data["head"] is None else File(**data["head"])
        shards = [File(**shard) for shard in data["shards"]]
        known = (*((TAIL,) if version > 1 else ()), *(_LAYERS if version > 2 else ()))
        rest = {name: data[name] for name in (*_SETTINGS, "complete", *known)}
        counts = {name: data[name] for name in ("examples", "tokens")}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: incomplete, {error} is missing or wrong") from error
    index = Index(**rest, head=head, shards=shards)
    if counts != {"examples": index.examples, "tokens": index.tokens}:
        raise ValueError(f"{path}: says {counts}, its shards hold {index.examples} examples, {index.tokens} tokens")
    if index.kind not in FIELDS or index.dtype not in DTYPES:
        raise ValueError(f"{path}: has kind {index.kind!r} and dtype {index.dtype!r}, which this version does not know")
    if (wrong := data.pop(_DIGEST, None)) not in (None, _digest(data)):
        raise ValueError(f"{path}: altered, its digest is {_digest(data)}, expected {wrong}")
    return index


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_DIGEST = "digest"
_SETTINGS = ("kind", "model", "dtype", "width", "vocabulary", "temperature")
_LAYERS = ("layers", "logits", "teacher")


def check_file(folder: Path, expected: File, contents: bool = False) -> None:
    """Raises FileNotFoundError or ValueError unless the file has its size, and with `contents` its sha256."""
    path = folder / expected.file
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing, the index lists it")
    size = path.stat().st_size
    if size != expected.bytes:
        what = "truncated" if size < expected.bytes else "too long"
        raise ValueError(f"{path}: {what}, has {size} bytes, expected {expected.bytes}")
    if contents and (found := digest(path)) != expected.sha256:
        raise ValueError(f"{path}: altered, its sha256 is {found}, expected {expected.sha256}")


def check_head(folder: Path, expected: dict[str, Tensor]) -> None:
    """Raises ValueError unless the folder's head holds these very tensors: two teachers do not share a store."""
    from safetensors.torch import load_file

    found = load_file(folder / HEAD)
    for name in sorted(expected.keys() | found.keys()):
        ours, theirs = expected.get(name), found.get(name)
        if ours is None or theirs is None or ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            raise ValueError(f"{folder / HEAD}: {name} is not this teacher's: the store was begun with another one")
