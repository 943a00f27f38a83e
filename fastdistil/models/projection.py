"""A projection from one tokenizer's vocabulary into another's, by the text that their pieces stand for."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from fastdistil.losses.vocab_projection import VocabProjection
from fastdistil.models.vocab import byte_characters, parts_of

_NAME = "tokenizer_projection"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "▁"
_CHARACTERS = byte_characters()
_CODES = {character: byte for byte, character in _CHARACTERS.items()}


def tokenizer_projection(
    teacher: PreTrainedTokenizerFast,
    student: PreTrainedTokenizerFast,
    *,
    teacher_columns: int | None = None,
    student_columns: int | None = None,
) -> VocabProjection:
    """The projection of a teacher's probabilities into a student's vocabulary, read from both tokenizers.

    Each of the teacher's pieces goes, with weight 1, to one of the student's: the piece of the same text, or else the
    first of the pieces that the student's own model cuts this text into, which is what the student would predict next
    where the teacher predicts the whole. (X-Token, arXiv 2605.21699, gives all of these pieces a share; the later ones
    are predicted at later positions.) A piece's text is its bytes behind the marks of its kind: the byte alphabet of
    GPT-2, the "▁" of SentencePiece with its <0x..> bytes, the "##" of WordPiece. Special tokens go to the one of the
    same role (bos, eos, unk, sep, pad, cls, mask), else of the same name.

    What it does not see:

    - Normalisers: a lowercasing student has no piece for the teacher's capitals, and none is looked for.
    - What comes before: pieces are cut alone. Rules of a pre-tokenizer (digits one by one) count as far as the
      student's model has learned them. WordPiece has no space before punctuation and CJK characters, where the other
      kinds may have one, and no piece for a space alone.
    - The other direction: where the teacher predicts a part of a student's longer piece, the part gets all of it. Such
      a piece of the student, if nothing else is mapped to it, is left out of the loss.
    - Bytes: a piece that ends inside of a character has a partner of the same bytes or none.

    `VocabProjection.mass` tells how much of the teacher's probability arrives.

    Args:
        teacher, student: fast tokenizers (BPE, Unigram or WordPiece).
        teacher_columns, student_columns: columns of the models' logits, where they are more than the tokenizers'
            pieces; by default these.

    Returns:
        A VocabProjection (student_columns, teacher_columns) on the CPU.

    Raises:
        TypeError: a tokenizer that is not a fast one.
        ValueError: another model, or one with marks at the ends of words; fewer columns than pieces; tokenizers that
            have nothing in common.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> import fastdistil
        >>> def fast(pieces, unk, pre_tokenizer):
        ...     made = Tokenizer(models.WordPiece(dict(zip(pieces, range(9))), unk_token=unk))
        ...     made.pre_tokenizer = pre_tokenizer
        ...     return PreTrainedTokenizerFast(tokenizer_object=made, unk_token=unk)
        >>> teacher = fast(["[UNK]", "dog", "dogs", "##s"], "[UNK]", pre_tokenizers.BertPreTokenizer())
        >>> student = fast(["<unk>", "##s", "dog"], "<unk>", pre_tokenizers.BertPreTokenizer())
        >>> projection = fastdistil.tokenizer_projection(teacher, student)  # "dogs" is "dog", then "##s"
        >>> projection.matrix().to_dense().int().tolist()
        [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 0]]
    """
    theirs, own = _Pieces("teacher", teacher), _Pieces("student", student)
    shape = (own.columns(student_columns), theirs.columns(teacher_columns))
    by_text = own.by_text()
    partners = dict[int, int]()
    for i, text in theirs.texts.items():
        partner = by_text.get(text)
        if partner is None:
            partner = own.first_of(text)
        if partner is not None:
            partners[i] = partner
    names = {name: i for i, name in own.special.items()}
    for i, name in theirs.special.items():
        if name in names:
            partners[i] = names[name]
    for role in _ROLES:
        their_id, own_id = (getattr(x, f"{role}_id", None) for x in (teacher, student))
        if their_id is not None and own_id is not None:
            partners[int(their_id)] = int(own_id)
    if not partners:
        raise ValueError(f"{_NAME}: teacher and student have no piece in common, expected at least one")
    entries = torch.tensor([list(partners.values()), list(partners)])
    weights = torch.ones(len(partners), dtype=torch.float64)
    return VocabProjection.of(torch.sparse_coo_tensor(entries, weights, shape, check_invariants=True))


class _Pieces:
    """The text of each of a tokenizer's pieces, as bytes, and how its model cuts such a text."""

    def __init__(self, side: str, tokenizer: PreTrainedTokenizerFast) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise TypeError(
                f"{_NAME}: {side} is a {type(tokenizer).__name__}, expected a PreTrainedTokenizerFast "
                "(AutoTokenizer.from_pretrained(...) loads one by its name)"
            )
        self.side, self.model = side, tokenizer.backend_tokenizer.model
        document: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        model = document["model"]
        if model["type"] not in ("Unigram", "WordPiece", "BPE"):
            raise ValueError(f"{_NAME}: {side}'s model is {model['type']}, expected Unigram, WordPiece or BPE")
        if model.get("end_of_word_suffix"):
            raise ValueError(
                f"{_NAME}: {side} marks the ends of words ({model['end_of_word_suffix']!r}), expected marks at their "
                "beginnings: which pieces a space follows is not what the others tell"
            )
        around = list(parts_of([document[x] for x in ("normalizer", "pre_tokenizer", "decoder")]))
        self.byte_level = any(part.get("type") == "ByteLevel" for part in around)
        self.prefix: str = model.get("continuing_subword_prefix") or ""
        self.byte_pieces = bool(model.get("byte_fallback"))
        added = {int(x["id"]): x for x in document["added_tokens"]}
        special = {int(i) for i in tokenizer.all_special_ids} | {i for i, x in added.items() if x["special"]}
        vocabulary = {i: piece for piece, i in tokenizer.get_vocab().items()}
        self.special = {i: vocabulary[i] for i in sorted(special) if i in vocabulary}
        self.unk: int | None = tokenizer.unk_token_id
        self.pieces = int(max(vocabulary)) + 1
        self.texts = dict[int, bytes]()
        for i, piece in sorted(vocabulary.items()):
            if i not in special:
                text = piece.encode() if i in added else self.text(piece)
                if text:
                    self.texts[i] = text
        self.bytes = {i for i in self.texts if self.byte_pieces and _BYTE.fullmatch(vocabulary[i])}

    def columns(self, wanted: int | None) -> int:
        if wanted is None:
            return self.pieces
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < self.pieces:
            raise ValueError(
                f"{_NAME}: {self.side}_columns is {wanted!r}, expected at least {self.pieces}, the tokenizer's pieces"
            )
        return wanted

    def by_text(self) -> dict[bytes, int]:
        """The lowest id of each text, of a character before a single byte's."""
        found = dict[bytes, int]()
        for i, text in sorted(self.texts.items(), key=lambda x: (x[0] in self.bytes, x[0])):
            found.setdefault(text, i)
        return found

    def text(self, piece: str) -> bytes | None:
        """What a piece stands for, with a space before the beginning of a word."""
        if self.byte_level:
            codes = [_CODES.get(character) for character in piece]
            return None if None in codes else bytes(x for x in codes if x is not None)
        if self.prefix:
            if piece.startswith(self.prefix) and piece != self.prefix:
                return piece.removeprefix(self.prefix).encode()
            return piece.encode() if _stands_apart(piece) else b" " + piece.encode()
        byte = _BYTE.fullmatch(piece) if self.byte_pieces else None
        return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()

    def first_of(self, text: bytes) -> int | None:
        """The first of the pieces that the model cuts a text into; None where that is unk, or no text."""
        if self.byte_level:
            written = "".join(_CHARACTERS[x] for x in text)
        else:
            try:
                written = text.decode()
            except UnicodeDecodeError:
                return None
            written = self._in_words(written) if self.prefix else written.replace(" ", _SPACE)
        cut = self.model.tokenize(written) if written else []
        if not cut or cut[0].id == self.unk or cut[0].id in self.special:
            return None
        return int(cut[0].id)

    def _in_words(self, text: str) -> str:
        """The first word, as WordPiece begins it: behind a space, or inside of one that has begun."""
        words = text.split()
        if not words:
            return ""
        first = words[0]
        apart = next((at for at, x in enumerate(first) if _stands_apart(x)), len(first))
        first = first[: max(apart, 1)]  # punctuation is cut off before the model sees a word
        return first if text[0] == " " or _stands_apart(first[0]) else self.prefix + first


def _stands_apart(piece: str) -> bool:
    """Whether BERT's pre-tokenizer makes a word of each of these characters, whatever is before it."""
    return all(
        unicodedata.category(x)[0] in "PS" or unicodedata.name(x, "").startswith("CJK UNIFIED IDEOGRAPH") for x in piece
    )
