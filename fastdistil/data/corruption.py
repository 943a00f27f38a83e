"""Corruption of text as for masked language modelling (Devlin et al. 2019): a function of the pieces and a generator.

transformers' collator draws from a generator of its own, which a resumed run finds in another place, and which begins
anew in every epoch where it has a seed and its workers do not persist. Here the caller brings the generator, made from
(seed, number of the batch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # a label that no loss counts
LONGEST_WORD = 8  # pieces; what is longer is a sentence of a script without spaces


def special_ids(tokenizer: Any) -> set[int]:
    """Ids that stand for no text: the special tokens, unk among them, and added tokens that are marked special."""
    added = {int(i) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | {int(i) for i in tokenizer.all_special_ids}


@dataclass(frozen=True)
class Corruption:
    """`share` of the pieces are chosen; of those 80% become `mask_id`, 10% another piece, 10% stay as they are.

    `ordinary` (n,) int64 are the ids that may be chosen, and that replace others: every piece but the special ones. So
    an unknown word of the text is never chosen: there is nothing to learn from its label. Of `whole_words` all pieces
    of a word are chosen or none; a word of more than 8 pieces is a sentence of a script without spaces, whose pieces
    are chosen one by one. `share` 0 leaves everything as it is.
    """

    ordinary: Tensor
    mask_id: int | None
    share: float = 0.15
    whole_words: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"Corruption: share is {self.share}, expected at least 0 and less than 1")
        if self.share and self.mask_id is None:
            raise ValueError("Corruption: the tokenizer has no mask token, expected one, or a share (corruption) of 0")

    @classmethod
    def of(cls, tokenizer: Any, share: float = 0.15, whole_words: bool = False) -> Corruption:
        """For the pieces of a tokenizer of transformers. Raises ValueError where it has no mask token."""
        ordinary = sorted(set(tokenizer.get_vocab().values()) - special_ids(tokenizer))
        return cls(torch.tensor(ordinary), tokenizer.mask_token_id, share, whole_words)

    def __call__(
        self, input_ids: Tensor, generator: torch.Generator, inside: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Corrupted ids and labels, both (B, S) int64: a label is the piece where one was chosen, else -100.

        `input_ids` (B, S) int64 on the CPU; `inside` (B, S) bool, True where a piece continues a word: for whole words.
        """
        labels = torch.full_like(input_ids, IGNORED)
        if not self.share:
            return input_ids, labels
        draws = torch.rand(input_ids.shape, generator=generator)
        fate = torch.rand(input_ids.shape, generator=generator)
        others = self.ordinary[torch.randint(len(self.ordinary), input_ids.shape, generator=generator)]
        if self.whole_words:
            if inside is None:
                raise ValueError("Corruption: inside is None, expected it for whole words")
            draws = _of_words(draws, inside)
        allowed = torch.zeros(int(max(input_ids.max(), self.ordinary.max())) + 1, dtype=torch.bool)
        allowed[self.ordinary] = True
        chosen = (draws < self.share) & allowed[input_ids]
        labels[chosen] = input_ids[chosen]
        corrupted = torch.where(chosen & (fate < 0.8), self.mask_id or 0, input_ids)
        return torch.where(chosen & (fate >= 0.9), others, corrupted), labels

    def fingerprint(self) -> dict[str, Any]:
        return {"share": self.share, "whole_words": self.whole_words, "pieces": len(self.ordinary)}


def _of_words(draws: Tensor, inside: Tensor) -> Tensor:
    """Each piece's draw replaced by that of its word's first piece, except in what is too long to be a word."""
    first = torch.where(inside, 0, torch.arange(inside.shape[1])).cummax(1).values
    lengths = torch.zeros_like(first).scatter_add_(1, first, torch.ones_like(first)).gather(1, first)
    return torch.where(lengths > LONGEST_WORD, draws, draws.gather(1, first))
