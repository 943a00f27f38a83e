"""Reading a store: memory-mapped, example by example."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fastdistil.teacher import format as files

Example = dict[str, Tensor]


@dataclass(frozen=True)
class Head:
    """The teacher's last linear layer, a function of hidden states (..., D) that returns logits (..., V).

    Args:
        weight: (V, D).
        bias: (V,) or None.

    Example:
        >>> import torch
        >>> from fastdistil.teacher import Head
        >>> head = Head(torch.ones(5, 3), torch.zeros(5))
        >>> head(torch.ones(2, 3)).shape
        torch.Size([2, 5])
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., V), in the hidden states' dtype."""
        bias = None if self.bias is None else self.bias.to(hidden)
        return F.linear(hidden, self.weight.to(hidden), bias)


class Store(Dataset[Example]):
    """What `open` returns: a map-style torch Dataset of {"hidden": (tokens, D)}, of {"values", "indices": (tokens, K),
    "tail": (tokens,)}, without "tail" where the store has none (`index.tail`), or, of kind "layers", of {"input_ids":
    (tokens,), "hidden_<layer>": (tokens, D), "logits": (tokens, C) or (C,)}.

    An example is read from the memory-mapped shard when it is asked for. DataLoader workers map the files themselves.

    Args:
        path: the store's folder.
        check: as in `open`.

    Raises:
        FileNotFoundError, ValueError: naming the file and the reason; when an example is read, for a shard that is
            missing, truncated, altered or of another store.
        IndexError: for an example that the store does not have.

    Example:
        >>> import tempfile, torch, fastdistil
        >>> folder = tempfile.TemporaryDirectory()
        >>> head = {"vocabulary": 5, "head_weight": torch.ones(5, 3)}
        >>> with fastdistil.teacher.Writer(folder.name, kind="hidden", width=3, **head) as writer:
        ...     writer.add(hidden=torch.zeros(4, 3))
        ...     writer.add(hidden=torch.zeros(2, 3))
        ...
        >>> store = fastdistil.teacher.open(folder.name)
        >>> store.length(0), store[1]["hidden"].shape, store.head(store[1]["hidden"]).shape
        (4, torch.Size([2, 3]), torch.Size([2, 5]))
        >>> store.verify()
        >>> folder.cleanup()
    """

    def __init__(self, path: str | Path, check: bool = True) -> None:
        self.path, self._check = Path(path), check
        self.index = files.read_index(self.path)
        for file in self._files():
            files.check_file(self.path, file)
        self._starts = [0]
        for shard in self.index.shards:
            self._starts.append(self._starts[-1] + shard.examples)
        self._open: dict[int, tuple[Any, Tensor]] = {}
        self._head: Head | None = None

    def _files(self) -> list[files.File]:
        return [*([self.index.head] if self.index.head else []), *self.index.shards]

    def __repr__(self) -> str:
        i = self.index
        state = "" if i.complete else ", incomplete"
        return f"Store({str(self.path)!r}, {i.kind} of {i.model!r}, {i.examples} examples, {i.tokens} tokens{state})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_head": None}

    def __len__(self) -> int:
        return self.index.examples

    def __getitem__(self, i: int) -> Example:
        return self.read(i)

    def read(self, i: int, names: Iterable[str] | None = None) -> Example:
        """Example i, or some of its tensors: the others are not read."""
        shard, row, begin, end = self._place(i)
        found = {}
        for name in self.index.fields if names is None else names:
            if self.index.by_example(name):
                found[name] = shard.get_slice(name)[row : row + 1][0]
            else:
                found[name] = shard.get_slice(name)[begin:end]
        return found

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def length(self, i: int) -> int:
        """Tokens of example i, without reading them."""
        _, _, begin, end = self._place(i)
        return end - begin

    def _place(self, i: int) -> tuple[Any, int, int, int]:
        """The shard, the example's number in it, and its first and last token."""
        try:
            i = operator.index(i)
        except TypeError:
            raise TypeError(f"{self.path}: example is {i!r}, expected an integer") from None
        if not -len(self) <= i < len(self):
            raise IndexError(f"example {i} of {self.path}, expected less than {len(self)}")
        i %= len(self)
        number = bisect.bisect_right(self._starts, i) - 1
        if number not in self._open:
            self._open[number] = self._map(number, self._check)
        shard, offsets = self._open[number]
        row = i - self._starts[number]
        begin, end = offsets[row : row + 2].tolist()
        return shard, row, begin, end

    def _map(self, number: int, contents: bool) -> tuple[Any, Tensor]:
        """One shard, and its offsets, checked against the index."""
        from safetensors import SafetensorError, safe_open

        expected = self.index.shards[number]
        path = self.path / expected.file
        files.check_file(self.path, expected, contents)
        try:
            shard: Any = safe_open(path, framework="pt")
            offsets = shard.get_tensor("offsets")
            shapes = {name: tuple(shard.get_slice(name).get_shape()) for name in self.index.fields}
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read as a shard: {error}") from error
        wanted = {name: self.index.shard_shape(name, expected) for name in shapes}
        if shapes != wanted or len(offsets) != expected.examples + 1:
            raise ValueError(
                f"{path}: foreign, has shapes {shapes} and {len(offsets) - 1} examples, expected {wanted} "
                f"and {expected.examples}"
            )
        if offsets[0] != 0 or offsets[-1] != expected.tokens or (offsets.diff() < 0).any():
            raise ValueError(f"{path}: foreign, its offsets do not divide its {expected.tokens} tokens")
        return shard, offsets

    @property
    def head(self) -> Head:
        """The teacher's last linear layer (kind "hidden")."""
        if self.index.head is None:
            raise ValueError(f"{self.path}: has no head, it is a store of kind {self.index.kind!r}")
        if self._head is None:
            files.check_file(self.path, self.index.head, contents=self._check)
            self._head = self._load_head(self.path / self.index.head.file)
        return self._head

    def _load_head(self, path: Path) -> Head:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read as a head: {error}") from error
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        wanted = {"weight": (self.index.vocabulary, self.index.width), "bias": (self.index.vocabulary,)}
        if "weight" not in shapes or not shapes.items() <= wanted.items():
            raise ValueError(f"{path}: foreign, has {shapes}, expected {wanted}, bias or none")
        return Head(tensors["weight"], tensors.get("bias"))

    def verify(self) -> None:
        """Reads every file and compares its sha256: ValueError or FileNotFoundError name the first that is wrong."""
        if self.index.head is not None:
            files.check_file(self.path, self.index.head, contents=True)
        for number in range(len(self.index.shards)):
            self._map(number, contents=True)

    def to_datasets(self) -> Any:
        """A datasets.Dataset of the same examples: a column "example" that is looked up in the store when it is read,
        so that nothing is copied. Columns that are added stand beside what is looked up; one of the same name, such as
        a "hidden" that map makes, takes its place."""
        import datasets

        numbers = datasets.Dataset.from_dict({"example": list(range(len(self)))})
        return numbers.with_transform(self._look_up)

    def _look_up(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        if "example" not in batch:  # where it was left out with select_columns
            return batch
        examples = [self[i] for i in batch["example"]]
        return {name: [x[name] for x in examples] for name in self.index.fields} | batch


def open(path: str | Path, *, incomplete: bool = False, check: bool = True) -> Store:
    """Open the store in a folder. The files' sizes are checked, and the sha256 of each when it is first read.

    Args:
        path: the store's folder.
        incomplete: take one whose writing was cut off, as far as it goes.
        check: False leaves out the sha256, which reads a shard whole before its first example: in each process, about a
            second for 1.5 GB. A bit that changed on the disk is then an example like any other; `Store.verify` compares
            all files at once.

    Returns:
        A `Store`.

    Raises:
        FileNotFoundError, ValueError: naming the file and the reason.

    Example:
        >>> import tempfile, torch, fastdistil
        >>> folder = tempfile.TemporaryDirectory()
        >>> head = {"vocabulary": 5, "head_weight": torch.ones(5, 3)}
        >>> with fastdistil.teacher.Writer(folder.name, kind="hidden", width=3, **head) as writer:
        ...     writer.add(hidden=torch.zeros(4, 3))
        ...     writer.add(hidden=torch.zeros(2, 3))
        ...
        >>> store = fastdistil.teacher.open(folder.name)
        >>> len(store)
        2
        >>> folder.cleanup()
    """
    store = Store(path, check)
    if not store.index.complete and not incomplete:
        raise ValueError(
            f"{store.path / files.INDEX}: incomplete, {len(store)} examples are written; go on writing, or pass "
            "incomplete=True"
        )
    return store


def pad(examples: Sequence[Example], length: int | None = None) -> Example:
    """Examples of different lengths as one batch: zeros at the end, -inf for values, so that a top-k teacher has no
    entries there, and all of its probability in the tail.

    Args:
        examples: dicts of tensors, as a store gives them.
        length: S, by default the longest's; a student's batch must be as long, and padded at the end as well.

    Returns:
        A dict of tensors (B, S, ...); logits of whole sequences (C,) become (B, C).

    Raises:
        ValueError: where there is no example, or length is less than the longest's.

    Example:
        >>> import torch, fastdistil
        >>> batch = fastdistil.teacher.pad([{"hidden": torch.ones(4, 3)}, {"hidden": torch.ones(2, 3)}])
        >>> batch["hidden"].shape, batch["hidden"][1, :, 0].tolist()
        (torch.Size([2, 4, 3]), [1.0, 1.0, 0.0, 0.0])
    """
    if not examples:
        raise ValueError("teacher.pad: examples is empty, expected at least one")
    whole = [name for name, x in examples[0].items() if name == files.LOGITS and x.dim() == 1]
    lengths = [x.shape[0] for example in examples for name, x in example.items() if name not in whole]
    longest = max(lengths, default=0)
    size = longest if length is None else length
    if size < longest:
        raise ValueError(f"teacher.pad: length is {size}, expected at least {longest}, the longest example's")
    batch = {}
    for name, first in examples[0].items():
        if name in whole:
            batch[name] = torch.stack([example[name] for example in examples])
            continue
        fill = -torch.inf if name == "values" else 0
        batch[name] = first.new_full((len(examples), size, *first.shape[1:]), fill)
        for row, example in zip(batch[name], examples, strict=True):
            row[: example[name].shape[0]] = example[name]
    return batch
