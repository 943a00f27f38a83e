"""A task teacher's outputs for a data set's rows: written once, in batches of like length, and read by number."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdistil import teacher as stores
from fastdistil.data.encode import collate
from fastdistil.fingerprint import of_teacher
from fastdistil.models.vocab import trim_vocabulary
from fastdistil.systems.encoders import process_state
from fastdistil.teacher.format import DTYPES, INDEX, read_index

WINDOW = 4096  # rows that are sorted by their length at a time
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_CHUNK = 10_000  # rows of a data set that are in memory while their pieces are counted


def lengths(rows: datasets.Dataset) -> NDArray[np.int64]:
    """Pieces of each row (n,)."""
    parts = [
        chunk["input_ids"].combine_chunks().value_lengths().to_numpy()
        for chunk in rows.with_format("arrow").iter(_CHUNK)
    ]
    found: NDArray[np.int64] = np.concatenate(parts).astype(np.int64)
    return found


def by_length(sizes: NDArray[np.int64], window: int = WINDOW) -> NDArray[np.int64]:
    """An order of the rows in which neighbours are of like length: window by window, so that it can be streamed."""
    parts = [first + np.argsort(sizes[first : first + window], kind="stable") for first in range(0, len(sizes), window)]
    return np.concatenate(parts)


class InBatches:
    """The batches of rows that a teacher reads, in a given order; as often as they are gone through."""

    def __init__(self, rows: datasets.Dataset, order: NDArray[np.int64], pad_id: int, batch_size: int) -> None:
        self._rows, self._order, self._size, self._collate = rows, order, batch_size, collate(pad_id)

    def __len__(self) -> int:
        return -(-len(self._order) // self._size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for first in range(0, len(self._order), self._size):
            chosen = self._rows[self._order[first : first + self._size]]
            rows = [dict(zip(chosen, values, strict=True)) for values in zip(*chosen.values(), strict=True)]
            yield {name: x for name, x in self._collate(rows).items() if name in _INPUTS}


def cached(
    model: Any,
    rows: datasets.Dataset,
    path: Path,
    *,
    layers: Sequence[int],
    dtype: str,
    pad_id: int,
    batch_size: int,
    collate: Callable[[list[Any]], Mapping[str, Tensor]],
    pieces: Tensor | None,
    shard_bytes: int = 64 << 20,
) -> stores.Cached:
    """The outputs of `model` for `rows`, from the store in `path`, which one process writes where it is not complete.

    `collate` makes the student's batches, `pieces` are the teacher's ids of the student's (see `teacher.Cached`). While
    the store is written, about twice `shard_bytes` of it are in memory, and then a batch at a time.
    Raises ValueError where the store is of another teacher, of other rows or without one of the layers.
    """
    order = by_length(lengths(rows))
    state = process_state()
    if state.is_main_process and not _complete(path):
        device = state.device
        loader = InBatches(rows, order, pad_id, batch_size)
        options: dict[str, Any] = {"layers": layers, "dtype": DTYPES[dtype], "shard_bytes": shard_bytes}
        stores.write(model.to(device), loader, path, kind="layers", **options)
        model.to("cpu")
    while not _complete(path):  # a barrier would give up after some minutes, a teacher may take hours
        time.sleep(2)
    state.wait_for_everyone()
    store = stores.open(path)
    if store.index.teacher != of_teacher(model):
        raise ValueError(f"cache: {path} holds another teacher's outputs, expected an empty folder or this teacher's")
    if len(store) != len(rows):
        raise ValueError(
            f"cache: {path} holds the outputs of {len(store)} rows, expected {len(rows)}: it was written for other data"
        )
    if missing := sorted(set(layers) - set(store.index.layers)):
        raise ValueError(
            f"cache: {path} has layers {store.index.layers}, expected {missing[0]} among them: choose an empty folder"
        )
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.arange(len(order))
    return stores.Cached(store, rows, collate, numbers=torch.from_numpy(numbers), pieces=pieces, layers=layers)


def _complete(path: Path) -> bool:
    return (path / INDEX).is_file() and read_index(path).complete


def kept_pieces(parts: Sequence[datasets.Dataset]) -> list[int]:
    """Ids, ascending, of all pieces in the rows."""
    found: NDArray[np.int64] = np.empty(0, np.int64)
    for rows in parts:
        for chunk in rows.with_format("arrow").iter(_CHUNK):
            ids = chunk["input_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            found = np.union1d(found, ids.astype(np.int64))
    return [int(i) for i in found]


class Renumbered:
    """A collate whose batches have the student's ids: `input_ids` (B, S), and the teacher's as `teacher_input_ids`."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Tensor]], pieces: Tensor, size: int) -> None:
        """`pieces` (V_s,): the teacher's id of each student id; `size`: the teacher's number of ids."""
        self._collate = collate
        self._new = torch.full((size,), -1)
        self._new[pieces] = torch.arange(len(pieces))

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        batch = dict(self._collate(rows))
        batch["teacher_input_ids"] = batch["input_ids"]
        batch["input_ids"] = self._new[batch["input_ids"]]
        if bool((batch["input_ids"] < 0).any()):
            wrong = int(batch["teacher_input_ids"][batch["input_ids"] < 0][0])
            raise ValueError(f"Renumbered: a row has the teacher's piece {wrong}, which the student does not have")
        return batch


def vocabulary(tokenizer: Any, size: int, parts: Sequence[datasets.Dataset], trim: bool) -> tuple[Any, Tensor, Any]:
    """(student's tokenizer, its pieces in the teacher's ids (V_s,), the student's collate) for rows in the teacher's
    ids; `size` is the number of rows of the teacher's embedding table."""
    made: Any = collate(int(tokenizer.pad_token_id))
    if not trim:
        return tokenizer, torch.arange(size), made
    trimmed, pieces = trim_vocabulary(tokenizer, kept_pieces(parts))
    return trimmed, pieces, Renumbered(made, pieces, max(size, int(pieces.max()) + 1))
