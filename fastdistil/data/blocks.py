"""Packed blocks of text, and the batches made of them: micro-batch k is a function of (seed, k) alone.

A block is the tokenizer's first special tokens, `max_length` pieces less these and the last ones, and its last ones
([CLS] ... [SEP]). Documents follow each other with the separator between them ([SEP], </s>) and are cut where a block
is full; the last block of a language alone is shorter. As in RoBERTa's pretraining, a piece sees the other documents
of its block.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdistil.batches import batch_indices, generator_of
from fastdistil.data.corruption import IGNORED, Corruption
from fastdistil.data.text import Corpus, tokenizer_hash

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """What stands around the pieces of a block: ids before and behind them, between documents, and behind the end."""

    max_length: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    separator: tuple[int, ...]
    pad: int
    tokenizer: str  # a hash

    @classmethod
    def of(cls, tokenizer: Any, max_length: int) -> Layout:
        """As a fast `tokenizer` of transformers surrounds a text. Raises ValueError where nothing fits in between."""
        bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        at = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        ends = (tokenizer.sep_token_id, tokenizer.eos_token_id)
        separator = next(((i,) for i in ends if i is not None), ())
        prefix, suffix = tuple(whole[:at]), tuple(whole[at + len(bare) :])
        if max_length <= len(prefix) + len(suffix):
            raise ValueError(f"text: max_length is {max_length}, expected more than {len(prefix) + len(suffix)}")
        pad = tokenizer.pad_token_id
        return cls(max_length, prefix, suffix, separator, 0 if pad is None else pad, tokenizer_hash(tokenizer))

    @property
    def room(self) -> int:
        """Pieces of text in a block."""
        return self.max_length - len(self.prefix) - len(self.suffix)


class Blocks:
    """The blocks of some documents of a corpus, `chosen` (documents,) bool; block i is read when it is asked for."""

    def __init__(self, corpus: Corpus, layout: Layout, chosen: NDArray[np.bool_] | None = None) -> None:
        self.corpus, self.layout = corpus, layout
        self.documents = np.flatnonzero(chosen) if chosen is not None else np.arange(len(corpus.lengths))
        self._ends = np.cumsum(corpus.lengths[self.documents] + len(layout.separator))  # of the stream of documents

    def __len__(self) -> int:
        last = int(self._ends[-1]) if len(self._ends) else 0
        return -(-(last - len(self.layout.separator)) // self.layout.room) if last else 0

    @property
    def pieces(self) -> int:
        return int(self.corpus.lengths[self.documents].sum())

    def text(self, block: int) -> tuple[NDArray[np.int32], NDArray[np.bool_] | None]:
        """The pieces of a block without its special tokens, (n,), and whether each continues a word, where known."""
        if not 0 <= block < len(self):
            raise IndexError(f"text: block is {block}, expected 0 to {len(self) - 1}")
        gap = np.array(self.layout.separator, np.int32)
        first = block * self.layout.room
        last = min(first + self.layout.room, int(self._ends[-1]) - len(gap))
        ids, inside = list[NDArray[Any]](), list[NDArray[Any]]()
        place = int(np.searchsorted(self._ends, first, side="right"))
        while first < last:
            number, end = int(self.documents[place]), int(self._ends[place])
            length = int(self.corpus.lengths[number])
            begin = first - (end - len(gap) - length)  # within the document, or in the separator behind it
            stop = begin + last - first
            ids += [self.corpus.document(number, "ids", begin, stop)] if begin < length else []
            ids.append(gap[max(begin - length, 0) : max(stop - length, 0)])
            if self.corpus.has_words:
                inside += [self.corpus.document(number, "inside", begin, stop)] if begin < length else []
                inside.append(np.zeros(len(ids[-1]), bool))
            first, place = end, place + 1
        return np.concatenate(ids), np.concatenate(inside) if inside else None


def _drawn(seed: int, *what: Any) -> int:
    """A seed of 40 bits, what `batch_indices` has room for, from a seed and what it is for."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *what)).encode(), digest_size=5).digest())


class _TextBatches:
    """What both kinds of batches share. A batch holds, with S the longest row's length (max_length but for a language's
    last block):

    | entry | shape | what |
    |---|---|---|
    | input_ids, attention_mask | (B, S) int64 | corrupted pieces; 1 = no padding |
    | labels | (B, S) int64 | the piece where one was chosen, else -100 |
    | labelled_words | (B, S) float32 | 1 where there is a label |
    | languages | (B,) int64 | each row's language, an index of `languages` |
    """

    def __init__(self, blocks: Sequence[Blocks], corruption: Corruption, batch_size: int, seed: int) -> None:
        if not blocks:
            raise ValueError("text: blocks is empty, expected those of one language at least")
        for part in blocks:
            if len(part) == 0:
                raise ValueError(f"text: {part.corpus.language} has no block of text")
            if part.layout != blocks[0].layout:
                raise ValueError(f"text: {part.corpus.language} has another layout than {blocks[0].corpus.language}")
            if corruption.whole_words and not part.corpus.has_words:
                raise ValueError(f"text: {part.corpus.language} was cut without words, expected words for whole words")
        self.blocks, self.corruption = tuple(blocks), corruption
        self.batch_size, self.seed = batch_size, seed
        self.layout = blocks[0].layout

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(part.corpus.language for part in self.blocks)

    def __len__(self) -> int:
        raise NotImplementedError

    def rows(self, k: int) -> list[tuple[int, int]]:
        """(language, block) of each row of micro-batch k."""
        raise NotImplementedError

    def batch(self, k: int) -> Batch:
        """Micro-batch k, always the same."""
        rows = self.rows(k)
        texts = [self.blocks[language].text(block) for language, block in rows]
        prefix, suffix = (np.array(x, np.int32) for x in (self.layout.prefix, self.layout.suffix))
        longest = max(len(ids) for ids, _ in texts) + len(prefix) + len(suffix)
        ids = torch.full((len(rows), longest), self.layout.pad)
        mask, inside = torch.zeros_like(ids), torch.zeros(ids.shape, dtype=torch.bool)
        for row, (text, continues) in enumerate(texts):
            whole = np.concatenate([prefix, text, suffix])
            ids[row, : len(whole)] = torch.from_numpy(whole)
            mask[row, : len(whole)] = 1
            if continues is not None:
                inside[row, len(prefix) : len(prefix) + len(text)] = torch.from_numpy(continues)
        corrupted, labels = self.corruption(ids, generator_of(self.seed, k), inside)
        return {
            "input_ids": corrupted,
            "attention_mask": mask,
            "labels": labels,
            "labelled_words": (labels != IGNORED).float(),
            "languages": torch.tensor([language for language, _ in rows]),
        }

    def fingerprint(self) -> Any:
        """What a run must have in common with the one that it continues."""
        return {
            "kind": type(self).__name__,
            "languages": {x.corpus.language: [x.corpus.fingerprint(), len(x), x.pieces] for x in self.blocks},
            "tokenizer": self.layout.tokenizer,
            "max_length": self.layout.max_length,
            "corruption": self.corruption.fingerprint(),
            "batch_size": self.batch_size,
            "seed": self.seed,
        }


class Mixture(_TextBatches):
    """Shuffled blocks of all languages (LightMBERT). An epoch has as many as there are; with `smoothing` 1 each of them
    once, below 1 language l with n_l blocks has a share of n_l^smoothing (0.7 in mBERT's pretraining, 0: all alike),
    and goes through its own blocks in shuffled rounds."""

    def __init__(
        self,
        blocks: Sequence[Blocks],
        corruption: Corruption,
        batch_size: int,
        seed: int = 0,
        smoothing: float = 1.0,
    ) -> None:
        super().__init__(blocks, corruption, batch_size, seed)
        if not 0 <= smoothing <= 1:
            raise ValueError(f"text: smoothing is {smoothing}, expected 0 to 1")
        self.smoothing = smoothing
        sizes = np.array([len(part) for part in blocks], np.float64)
        shares = sizes**smoothing
        self.quotas = [max(1, round(x)) for x in (sizes.sum() * shares / shares.sum()).tolist()]
        self._last = np.cumsum(self.quotas).tolist()
        self._places = lru_cache(maxsize=2 * len(blocks))(self._of_epoch)

    def __len__(self) -> int:
        return int(self._last[-1])

    def rows(self, k: int) -> list[tuple[int, int]]:
        # Which language, and which of its quota, is drawn by batch_indices as if each entry were a block of its own.
        count, first = len(self), k * self.batch_size
        entries = batch_indices(_drawn(self.seed, "order"), count, self.batch_size, k)
        found = []
        for position, entry in enumerate(entries, first):
            language = bisect_right(self._last, entry)
            place = entry - (self._last[language] - self.quotas[language])
            found.append((language, self._places(position // count, language)[place]))
        return found

    def _of_epoch(self, epoch: int, language: int) -> list[int]:
        """The blocks of a language that an epoch has, out of its endless shuffled rounds."""
        seed, quota = _drawn(self.seed, "blocks", language), self.quotas[language]
        return batch_indices(seed, len(self.blocks[language]), quota, epoch)

    def fingerprint(self) -> Any:
        return {**super().fingerprint(), "smoothing": self.smoothing}


class Alternating(_TextBatches):
    """Batches of one language each, in turn (BiStil): batch k is of language k modulo their number. Every language is
    cut to as many blocks as the smallest has, drawn by `seed` once; an epoch is all of these."""

    def __init__(self, blocks: Sequence[Blocks], corruption: Corruption, batch_size: int, seed: int = 0) -> None:
        super().__init__(blocks, corruption, batch_size, seed)
        self.count = min(len(part) for part in blocks)
        self._kept = [
            batch_indices(_drawn(seed, "kept", number), len(part), self.count, 0) for number, part in enumerate(blocks)
        ]
        self._places = lru_cache(maxsize=2 * len(blocks))(self._of_round)

    def __len__(self) -> int:
        return self.count * len(self.blocks)

    def rows(self, k: int) -> list[tuple[int, int]]:
        turn, language = divmod(k, len(self.blocks))
        positions = range(turn * self.batch_size, (turn + 1) * self.batch_size)
        return [(language, self._places(p // self.count, language)[p % self.count]) for p in positions]

    def _of_round(self, number: int, language: int) -> list[int]:
        """The language's kept blocks in the order of a round."""
        places = batch_indices(_drawn(self.seed, "order", language), self.count, self.count, number)
        return [self._kept[language][place] for place in places]


class HeldOut(_TextBatches):
    """Held-out blocks, `most` a language, evenly spread, language by language in batches of one language each: for a
    validation, so the corruption of batch k is always the same. `steps` is their number."""

    def __init__(
        self, blocks: Sequence[Blocks], corruption: Corruption, batch_size: int, seed: int = 0, most: int = 64
    ) -> None:
        super().__init__(blocks, corruption, batch_size, seed)
        picked = [np.unique(np.linspace(0, len(part) - 1, min(most, len(part))).astype(int)) for part in blocks]
        self._batches = [
            [(language, int(block)) for block in chosen[first : first + batch_size]]
            for language, chosen in enumerate(picked)
            for first in range(0, len(chosen), batch_size)
        ]

    def __len__(self) -> int:
        return sum(map(len, self._batches))

    @property
    def steps(self) -> int:
        return len(self._batches)

    def rows(self, k: int) -> list[tuple[int, int]]:
        return self._batches[k]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, range(self.steps))


def split(
    corpora: Sequence[Corpus], layout: Layout, held_out: float, seed: int
) -> tuple[list[Blocks], list[Blocks], Mapping[str, Any]]:
    """(blocks to train on, held-out blocks, sizes by language), the latter's documents apart from the former's."""
    train, held = list[Blocks](), list[Blocks]()
    for corpus in corpora:
        out = corpus.held_out(held_out, seed)
        train.append(Blocks(corpus, layout, ~out))
        held.append(Blocks(corpus, layout, out))
    sizes = {
        a.corpus.language: {
            "documents": len(a.documents), "pieces": a.pieces, "blocks": len(a), "unknown_pieces": a.corpus.unknown,
            "held_out_documents": len(b.documents), "held_out_blocks": len(b),
        }
        for a, b in zip(train, held, strict=True)
    }  # fmt: skip
    return train, held if held_out else [], sizes
