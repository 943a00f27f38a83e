"""Sentences of words as padded piece ids, with the place of each word's first piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fastdistil.demo.corpora import Sentence

MARK = "\u2581"  # stands for a space before a word, as in XLM-R's pieces
IGNORE = -100  # label of a piece that carries none


@dataclass(frozen=True)
class Encoded:
    """One sentence: `ids` with bos and eos, `first` the index in `ids` of each kept word's first piece, and `tags` the
    kept words' tags. len(first) == len(tags) <= the sentence's number of words."""

    ids: list[int]
    first: list[int]
    tags: list[int]


class WordEncoder:
    """Cuts words into pieces one by one, as the tokenizer would cut the running text at these word boundaries."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._ends = (int(tokenizer.bos_token_id), int(tokenizer.eos_token_id))
        self._unk = int(tokenizer.unk_token_id)
        self._known: dict[tuple[str, bool], list[int]] = {}

    def word(self, word: str, space: bool) -> list[int]:
        """Piece ids of one word, at least one; `space` says whether a space stands before it."""
        key = (word, space)
        if key not in self._known:
            text = self._backend.normalizer.normalize_str(word).strip().replace(" ", MARK)
            pieces = self._backend.model.tokenize((MARK if space else "") + text) if text else []
            self._known[key] = [piece.id for piece in pieces] or [self._unk]
        return self._known[key]

    def sentence(self, sentence: Sentence, max_pieces: int, max_words: int | None = None) -> Encoded:
        """Ids of as many whole words as fit in `max_pieces` with bos and eos (and in `max_words`)."""
        bos, eos = self._ends
        ids, first = [bos], list[int]()
        for word, space in list(zip(sentence.words, sentence.spaces, strict=True))[:max_words]:
            pieces = self.word(word, space)
            if len(ids) + len(pieces) + 1 > max_pieces:
                break
            first.append(len(ids))
            ids += pieces
        return Encoded([*ids, eos], first, list(sentence.tags[: len(first)]))


def pad(rows: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """A batch, B sentences padded to S pieces: input_ids (B, S) int64, attention_mask (B, S) int64, labels (B, S) int64
    with IGNORE where a piece is not the first of a word."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORE)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
        labels[i, row.first] = torch.tensor(row.tags)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
