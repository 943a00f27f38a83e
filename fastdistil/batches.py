"""What the training loop (train.py) reads: micro-batches by number, so that a run that continues repeats them."""

from __future__ import annotations

import hashlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from fastdistil.fingerprint import of_data

Example = TypeVar("Example")
Batch = Mapping[str, Tensor]


@runtime_checkable
class Batches(Protocol):
    """An endless stream of micro-batches. The loop asks for each number once and keeps no position: whatever is drawn
    for a batch (its examples, a corruption, a mask) is drawn from `generator_of(seed, k)`."""

    def batch(self, k: int) -> Batch:
        """Micro-batch `k` from 0; the same for the same `k`, whatever was asked before."""

    def __len__(self) -> int:
        """Number of examples behind the stream."""

    def fingerprint(self) -> Any:
        """What JSON holds; a checkpoint is refused where this is not what it was written with."""


def generator_of(seed: int, k: int) -> torch.Generator:
    """A generator on the CPU for micro-batch `k` of a run with `seed`: the same in every run, and after a resume."""
    digest = hashlib.blake2b(f"{seed} {k}".encode(), digest_size=4).digest()  # torch's generator takes 32 bits in
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)  # a prime apart: seeds share no epoch
    order: list[int] = torch.randperm(n, generator=generator).tolist()
    return order


def batch_indices(seed: int, n: int, batch_size: int, k: int) -> list[int]:
    """Indices of micro-batch `k` in an endless stream of shuffled epochs over `n` examples.

    A pure function: the data order needs no state in a checkpoint, and nobody can read it from the wrong place.
    """
    positions = range(k * batch_size, (k + 1) * batch_size)
    return [_permutation(seed, position // n, n)[position % n] for position in positions]


class Shuffled:
    """The `Batches` of a sequence: shuffled epochs, `batch_size` examples at a time, made a batch by `collate`.

    A `collate` with an argument `generator` gets `generator_of(seed, k)` there, to draw from it.
    """

    def __init__(self, data: Sequence[Example], collate: Callable[..., Batch], batch_size: int, seed: int) -> None:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            ways = {"DataLoader": "its dataset and its collate_fn", "generator": "list(data)"}
            way = f" ({ways[type(data).__name__]})" if type(data).__name__ in ways else ""
            raise TypeError(
                f"train: data is {type(data).__name__}, expected a sequence of examples{way}, or data with a method "
                "batch(k)"
            )
        if len(data) == 0:
            raise ValueError("train: data is empty, expected at least one example")
        self.data, self.collate, self.batch_size, self.seed = data, collate, batch_size, seed
        self._draws = _takes_generator(collate)

    def batch(self, k: int) -> Batch:
        rows = [self.data[i] for i in batch_indices(self.seed, len(self.data), self.batch_size, k)]
        found = self.collate(rows, generator=generator_of(self.seed, k)) if self._draws else self.collate(rows)
        if not isinstance(found, Mapping):
            raise TypeError(f"train: collate returned a {type(found).__name__}, expected a mapping of names to tensors")
        return found

    def __len__(self) -> int:
        return len(self.data)

    def fingerprint(self) -> Any:
        return of_data(self.data)


class InOrder:
    """Examples in their order, each once, `batch_size` at a time, as batches that can be gone through again."""

    def __init__(self, data: Sequence[Example], collate: Callable[..., Batch], batch_size: int, seed: int) -> None:
        self.data, self.collate, self.batch_size, self.seed = data, collate, batch_size, seed

    def __iter__(self) -> Iterator[Batch]:
        draws = _takes_generator(self.collate)
        for k, first in enumerate(range(0, len(self.data), self.batch_size)):
            rows = [self.data[i] for i in range(first, min(first + self.batch_size, len(self.data)))]
            yield self.collate(rows, generator=generator_of(self.seed, k)) if draws else self.collate(rows)


def _takes_generator(collate: Callable[..., Any]) -> bool:
    try:
        return "generator" in inspect.signature(collate).parameters
    except (TypeError, ValueError):  # a built-in function
        return False


def stream(data: Any, collate: Callable[..., Batch] | None, batch_size: int, seed: int) -> Batches:
    """`data` as the loop reads it. Raises ValueError where it is empty and where `collate` is missing or too much."""
    if isinstance(data, Batches):  # datasets.Dataset has a method `batch`, too, that is none of ours
        if collate is not None:
            raise ValueError(
                f"train: data is {type(data).__name__}, which makes its own batches, expected collate=None"
            )
        if len(data) == 0:
            raise ValueError("train: data is empty, expected at least one example")
        return data
    if collate is None:
        raise ValueError(
            f"train: collate is None and data is {type(data).__name__}, expected a function that makes a batch from a "
            "list of examples, or data with a method batch(k)"
        )
    return Shuffled(data, collate, batch_size, seed)


def first_batch(batches: Batches, k: int) -> Batch:
    """Micro-batch `k`, which is asked for twice: a resumed run would get others than the run that it continues where
    they depend on more than `k`. Raises ValueError then."""
    with kept_generators():
        first = batches.batch(k)
    second = batches.batch(k)
    if not _equal(first, second):
        raise ValueError(
            "train: data and collate give two different batches for one number, as a collate with a generator or a "
            "counter of its own does: a run that continues would not repeat them. Give collate an argument "
            "`generator` and draw from that, or pass data with a method batch(k) that draws from generator_of(seed, k)"
        )
    return second


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        try:
            torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
        except AssertionError:
            return False
        return True
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(_equal(x, y) for x, y in zip(first, second, strict=True))
    if isinstance(first, (bool, int, float, str, bytes, type(None))):
        return bool(first == second)
    return type(first) is type(second)


@contextmanager
def kept_generators() -> Iterator[None]:
    """What runs inside draws from Python's, NumPy's and torch's generators, and leaves them as they were."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def tokens_of(batch: Batch) -> int | Tensor:
    """Non-padding tokens of a batch (), 0 where it has neither attention_mask nor input_ids."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum()
    return batch["input_ids"].numel() if "input_ids" in batch else 0
