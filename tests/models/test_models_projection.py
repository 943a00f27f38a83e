"""tokenizer_projection: which of a student's pieces a teacher's goes to, against what the student's tokenizer does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_models_vocab import bpe, unigram, wordpiece
from tokenizers import Tokenizer, models, pre_tokenizers

import fastdistil as fd

transformers = pytest.importorskip("transformers")
KINDS = {
    "wordpiece": wordpiece,
    "unigram": unigram,
    "unigram with bytes": lambda: unigram(bytes_=True),
    "bytelevel": lambda: bpe("bytelevel"),
    "prefix": lambda: bpe("prefix"),
    "bpe with bytes": lambda: bpe("bytes"),
}


def partners(teacher: Any, student: Any) -> dict[str, str]:
    """Piece -> piece."""
    theirs, own = ({i: piece for piece, i in x.get_vocab().items()} for x in (teacher, student))
    projection = fd.tokenizer_projection(teacher, student)
    assert projection.shape == (max(own) + 1, max(theirs) + 1) and (projection.weights == 1).all()
    pairs = projection.matrix().coalesce().indices().T.tolist()
    assert len({column for _, column in pairs}) == len(pairs)  # each of the teacher's goes to one
    return {theirs[column]: own[row] for row, column in pairs}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokenizer_is_the_identity(kind: str) -> None:
    found = partners(KINDS[kind](), KINDS[kind]())
    # A single byte's piece goes to the character's own, where there is one.
    assert all(piece == partner or piece.startswith("<0x") for piece, partner in found.items())
    assert set(found) == set(KINDS[kind]().get_vocab())


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_a_word_goes_to_its_first_piece(teacher: str, student: str) -> None:
    """As the student's tokenizer itself cuts it behind another word."""
    theirs, own = KINDS[teacher](), KINDS[student]()
    found, words = partners(theirs, own), 0
    before = own.tokenize("xyz")
    for piece, partner in found.items():
        word = piece.lstrip("▁Ġ")
        begins = piece != word if teacher not in ("wordpiece", "prefix") else not piece.startswith("##")
        if begins and word.isascii() and word.isalpha():
            cut = own.tokenize(f"xyz {word}")
            assert cut[: len(before)] == before
            assert partner == cut[len(before)], (piece, cut)
            words += 1
    assert words >= 3


def test_marks_of_all_kinds() -> None:
    """The same text behind a word's beginning, its middle, characters of several bytes, and bytes."""
    found = partners(bpe("bytelevel"), unigram(bytes_=True))
    assert found["Ġabc"] == "▁abc" and found["abc"] == "abc" and found["Ġ"] == "▁" and found["Ċ"] == "<0x0A>"
    found = partners(unigram(bytes_=True), bpe("bytelevel"))
    assert found["▁é"] == bpe("bytelevel").tokenize("x é")[1]
    assert found["<0x0A>"] == "Ċ" and found["bc"] == "bc"
    found = partners(wordpiece(), unigram())
    assert found["abc"] == "▁abc" and found["##d"] == "d"
    found = partners(unigram(), wordpiece())
    assert found["▁x"] == "x" and found["cx"].startswith("##c")


def test_special_tokens_by_role_and_by_name() -> None:
    found = partners(wordpiece(), unigram())
    assert found["[PAD]"] == "<pad>" and found["[UNK]"] == "<unk>" and found["[MASK]"] == "<mask>"
    assert found.get("[SEP]") is None  # the student has no such role, nor name
    other = wordpiece()
    other.add_special_tokens({"additional_special_tokens": ["[C]"]})
    assert partners(other, unigram())["[C]"] == "[C]"


def test_punctuation_has_no_space_where_it_stands_apart() -> None:
    made = Tokenizer(models.WordPiece({"[UNK]": 0, ".": 1, "漢": 2, "a": 3, "##.": 4}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    teacher = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
    found = partners(teacher, bpe("bytelevel"))
    assert found["."] == "." and found["漢"] == "æ" and found["a"].startswith("Ġ")
    assert partners(bpe("bytelevel"), teacher)["."] == "."


def test_more_columns_than_pieces() -> None:
    projection = fd.tokenizer_projection(wordpiece(), unigram(), teacher_columns=64, student_columns=32)
    assert projection.shape == (32, 64)
    loss = fd.projected_logit_loss(torch.randn(2, 32), torch.randn(2, 64), projection)
    assert loss > 0


def _suffixed() -> Any:
    return bpe("suffix")


def _words() -> Any:
    made = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def _strangers() -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"##ü": 0}, unk_token="-")))


@pytest.mark.parametrize(
    ("teacher", "options", "kind", "message"),
    [
        (lambda: "gpt2", {}, TypeError, "teacher is a str, expected a PreTrainedTokenizerFast"),
        (_suffixed, {}, ValueError, "teacher marks the ends of words"),
        (_words, {}, ValueError, "teacher's model is WordLevel, expected Unigram, WordPiece or BPE"),
        (_strangers, {}, ValueError, "teacher and student have no piece in common"),
        (wordpiece, {"teacher_columns": 3}, ValueError, "teacher_columns is 3, expected at least 44"),
        (wordpiece, {"student_columns": 2.0}, ValueError, "student_columns is 2.0, expected at least"),
    ],
)
def test_bad_calls(teacher: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fd.tokenizer_projection(teacher(), unigram(), **options)
