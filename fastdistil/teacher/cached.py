"""Batches of a student's rows with the teacher's outputs beside them, read from a store when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistil.batches import InOrder, Shuffled
from fastdistil.fingerprint import of_data
from fastdistil.teacher import format as files
from fastdistil.teacher.store import Store

_NAME = "teacher.Cached"
_EXAMPLE = "__example__"


class _Batches(Shuffled):
    def fingerprint(self) -> Any:
        return self.data.fingerprint()  # type: ignore[attr-defined]


class Cached(Sequence[dict[str, Any]]):
    """Rows, and `collate`, which gives their batch with the entries that the distillation terms read:

        cached = Cached(store, rows, collate)
        train(objective, cached.batches(batch_size=32, seed=0), None, options)

    | entry | shape | dtype |
    |---|---|---|
    | teacher_hidden_<layer>, of each layer in the store or in `layers` | (B, S, D) | the store's |
    | teacher_logits, where the store has logits | (B, S, C), or (B, C) of whole sequences | float32 |

    They stand where attention_mask is 1, with 0 elsewhere, on whichever side the batch is padded. Nothing but the
    batch in hand is in memory: the store is memory-mapped.

    Args:
        store: of kind "layers".
        rows: a sequence of mappings, one for each of the store's examples, such as a datasets.Dataset.
        collate: makes a batch with input_ids and attention_mask (B, S) from a list of rows.
        numbers: (len(rows),) the store's example of each row, where that is not the row's own number.
        pieces: (V,) the teacher's id of each student id, where the student has ids of its own (models.vocab).
        layers: those of the store's layers that batches shall have, by default all.
        logits: whether batches shall have the teacher's logits where the store does.

    Raises:
        ValueError: for a store of another kind, one of another length, and a layer that it does not hold; and, when a
            batch is made, where the row's pieces are not those that the teacher saw.

    Example:
        >>> import tempfile, torch, fastdistil
        >>> from fastdistil.teacher import Cached, Writer
        >>> rows = [{"input_ids": [7, 8, 9]}, {"input_ids": [7, 9]}]
        >>> def collate(rows):
        ...     ids = [torch.tensor(row["input_ids"]) for row in rows]
        ...     padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        ...     return {"input_ids": padded, "attention_mask": (padded > 0).long()}
        ...
        >>> folder = tempfile.TemporaryDirectory()
        >>> with Writer(folder.name, kind="layers", width=4, vocabulary=0, layers=[6]) as writer:
        ...     for row in rows:
        ...         ids = torch.tensor(row["input_ids"], dtype=torch.int32)
        ...         writer.add(input_ids=ids, hidden_6=torch.ones(len(ids), 4))
        ...
        >>> cached = Cached(fastdistil.teacher.open(folder.name), rows, collate)
        >>> {name: tuple(x.shape) for name, x in cached.read([0, 1]).items()}
        {'input_ids': (2, 3), 'attention_mask': (2, 3), 'teacher_hidden_6': (2, 3, 4)}
        >>> folder.cleanup()
    """

    def __init__(
        self,
        store: Store,
        rows: Sequence[Mapping[str, Any]],
        collate: Callable[[list[Any]], Mapping[str, Tensor]],
        *,
        numbers: Sequence[int] | Tensor | None = None,
        pieces: Tensor | None = None,
        layers: Iterable[int] | None = None,
        logits: bool = True,
    ) -> None:
        if not isinstance(store, Store):
            raise TypeError(
                f"{_NAME}: store is {type(store).__name__}, expected a Store (fastdistil.teacher.open(path) opens one)"
            )
        index = store.index
        if index.kind != "layers":
            raise ValueError(f"{_NAME}: store {store.path} is of kind {index.kind!r}, expected 'layers'")
        if numbers is None and len(rows) != len(store):
            raise ValueError(f"{_NAME}: rows has {len(rows)} entries, expected {len(store)}, as {store.path} has")
        if numbers is not None and len(numbers) != len(rows):
            raise ValueError(f"{_NAME}: numbers has {len(numbers)} entries, expected {len(rows)}, one for each row")
        wanted = list(index.layers) if layers is None else sorted(set(layers))
        if missing := [layer for layer in wanted if layer not in index.layers]:
            raise ValueError(
                f"{_NAME}: layers holds {missing[0]}, {store.path} has {index.layers}, expected some of those"
            )
        self.store, self.rows, self._collate = store, rows, collate
        self._numbers, self._pieces = numbers, pieces
        self._names = [f"hidden_{layer}" for layer in wanted]
        if logits and index.logits:
            self._names.append(files.LOGITS)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        """Row i as `collate` takes it."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"{_NAME}: row {i}, expected less than {len(self)}")
        i %= len(self)
        return {**self.rows[i], _EXAMPLE: i if self._numbers is None else int(self._numbers[i])}

    def read(self, indices: Iterable[int]) -> dict[str, Tensor]:
        """The batch of these rows."""
        return self.collate([self[i] for i in indices])

    def batches(self, batch_size: int, seed: int) -> Shuffled:
        """Endless shuffled epochs for `train` and `Stage`, functions of `seed`: what a stage is given as its data."""
        return _Batches(self, self.collate, batch_size, seed)

    def in_order(self, batch_size: int) -> InOrder:
        """Every row once, in order, as often as it is gone through: what a stage is given to hold out."""
        return InOrder(self, self.collate, batch_size, seed=0)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of rows that this sequence gave."""
        numbers = [row[_EXAMPLE] for row in rows]
        batch = dict(self._collate([{name: x for name, x in row.items() if name != _EXAMPLE} for row in rows]))
        if missing := [name for name in ("input_ids", "attention_mask") if name not in batch]:
            raise ValueError(f"{_NAME}: collate gave {', '.join(batch)}, expected {' and '.join(missing)} among them")
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        examples = [self.store.read(i, (files.IDS, *self._names)) for i in numbers]
        self._check(ids, mask, [example[files.IDS] for example in examples], numbers)
        for name in self._names:
            parts = [example[name] for example in examples]
            if self.store.index.by_example(name):
                batch[f"teacher_{name}"] = torch.stack(parts)
                continue
            made = parts[0].new_zeros((*ids.shape, parts[0].shape[-1]))
            made[mask] = torch.cat(parts)
            batch[f"teacher_{name}"] = made
        return batch

    def _check(self, ids: Tensor, mask: Tensor, stored: list[Tensor], numbers: list[int]) -> None:
        """The teacher saw these very pieces: states of other tokens would be taken for theirs without any error."""
        for row, (keep, pieces) in enumerate(zip(mask, stored, strict=True)):
            own = ids[row][keep]
            own = own if self._pieces is None else self._pieces[own]
            if len(own) != len(pieces) or not torch.equal(own.long(), pieces.long()):
                raise ValueError(
                    f"{_NAME}: example {numbers[row]} of {self.store.path} has {len(pieces)} pieces, "
                    f"{pieces[:6].tolist()} at first, its row has {len(own)}, {own[:6].tolist()}: expected the same"
                )

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint's run must have in common with this one: rows and teacher's outputs, by their hashes."""
        index = self.store.index
        shards = [shard.sha256[:16] for shard in (*index.shards[:1], *index.shards[-1:])]
        said = {"kind": index.kind, "dtype": index.dtype, "teacher": index.teacher, "shards": shards}
        return {"rows": of_data(self.rows), "outputs": said, "entries": list(self._names)}
