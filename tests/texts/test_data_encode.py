"""Words and texts as pieces: labels stay with their words, for every kind of tokenizer."""

import datasets
import pytest
import torch
from task_cases import TOKENIZERS, wordpiece
from transformers import BertConfig, XLMRobertaConfig

from fastdistil.data.encode import IGNORE, collate, encode_text, encode_words, length_limit, needs_spaces

WORDS = ["the", "Paris", "\x85", "", "a b", "\u200b", "København", "#mat", "\ufeff", "Danmark"]
TAGS = ["O", "B-LOC", "O", "O", "O", "O", "B-LOC", "I-LOC", "O", "B-LOC"]
LABELS = ["O", "B-LOC", "I-LOC"]


def data(words, tags=None):
    return datasets.Dataset.from_dict({"words": words} if tags is None else {"words": words, "tags": tags})


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_labels_stay_with_their_words(kind):
    tokenizer = TOKENIZERS[kind]()
    (row,) = encode_words(data([WORDS], [TAGS]), tokenizer, LABELS)
    assert [LABELS[i] for i in row["labels"]] == [TAGS[i] for i in row["word"]]
    assert {0, 1, 6, 7, 9} <= set(row["word"])
    assert len(row["first"]) + row["lost"] + row["empty"] == len(WORDS)
    assert row["lost"] == 0
    # Each word's pieces, from its first to the next one's, give the word back.
    ends = [*row["first"][1:], len(row["input_ids"]) - 1]
    for place, begin, end in zip(row["word"], row["first"], ends, strict=True):
        if place in (0, 1, 9):
            text = tokenizer.convert_ids_to_tokens(row["input_ids"][begin:end])
            assert "".join(text).replace("##", "").strip("▁Ġ") == WORDS[place], (kind, text)
    if kind == "wordpiece":
        assert row["empty"] == 4


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_words_are_cut_as_in_running_text(kind):
    tokenizer = TOKENIZERS[kind]()
    text = "the cat sat on the mat in Paris"
    (row,) = encode_words(data([text.split()]), tokenizer, [])
    assert row["input_ids"] == tokenizer(text)["input_ids"]
    assert needs_spaces(tokenizer) is (kind == "byte BPE")
    assert row["labels"] == [IGNORE] * 8


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_long_sentences_keep_whole_words_and_count_the_others(kind):
    tokenizer = TOKENIZERS[kind]()
    words = ["København", "mat", "Danmark"] * 6
    whole = encode_words(data([words]), tokenizer, [], 64 if kind == "wordpiece" else None)[0]
    for length in (3, 12, 13, 14, 15):
        (row,) = encode_words(data([words]), tokenizer, [], length)
        kept = len(row["first"])
        assert len(row["input_ids"]) <= length
        assert row["input_ids"][:-1] == whole["input_ids"][: len(row["input_ids"]) - 1]
        assert row["input_ids"][-1] == whole["input_ids"][-1]
        assert row["first"] == whole["first"][:kept]
        assert (row["lost"], row["empty"]) == (len(words) - kept, 0)
        if kept < len(whole["first"]):  # the next word would not fit
            after = [*whole["first"], len(whole["input_ids"]) - 1][kept + 1]
            assert after + 1 > length


def test_a_sentence_of_no_words_and_one_of_no_pieces():
    tokenizer = wordpiece()
    rows = list(encode_words(data([[], ["\x01"], ["cat"]], [[], ["B-LOC"], ["B-LOC"]]), tokenizer, LABELS))
    assert [row["input_ids"] for row in rows[:2]] == [[2, 3], [2, 3]]
    assert [row["empty"] for row in rows] == [0, 1, 0]
    batch = collate(0)(rows)
    assert batch["words"].sum(1).tolist() == [0, 0, 1]


def test_special_tokens_that_were_typed_are_text():
    tokenizer = wordpiece()
    (row,) = encode_words(data([["[SEP]", "cat"]]), tokenizer, [])
    assert row["input_ids"].count(tokenizer.sep_token_id) == 1
    assert row["word"] == [0, 1]
    text = datasets.Dataset.from_dict({"text": ["the [SEP] cat"], "label": ["a"]})
    assert encode_text(text, tokenizer, ["a"])[0]["input_ids"].count(tokenizer.sep_token_id) == 1


def test_collate():
    rows = [
        {"input_ids": [2, 7, 8, 9, 3], "first": [1, 3], "labels": [1, IGNORE], "word": [0, 1], "lost": 0, "empty": 0},
        {"input_ids": [2, 5, 3], "first": [1], "labels": [0], "word": [0], "lost": 2, "empty": 0},
    ]
    batch = collate(4)(rows)
    assert batch["input_ids"].tolist() == [[2, 7, 8, 9, 3], [2, 5, 3, 4, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 1, -100, -100, -100], [-100, 0, -100, -100, -100]]
    assert batch["words"].tolist() == [[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]]
    assert batch["labelled_words"].tolist() == [[0, 1, 0, 0, 0], [0, 1, 0, 0, 0]]
    assert {name: x.dtype for name, x in batch.items()} == {
        **dict.fromkeys(("input_ids", "attention_mask", "labels"), torch.int64),
        **dict.fromkeys(("words", "labelled_words"), torch.float32),
    }


def test_texts_and_pairs():
    tokenizer = wordpiece()
    single = datasets.Dataset.from_dict({"text": ["the cat", "Paris " * 80], "label": ["b", None]})
    rows = list(encode_text(single, tokenizer, ["a", "b"], 16))
    assert rows[0]["input_ids"] == tokenizer("the cat")["input_ids"]
    assert "token_type_ids" not in rows[0]
    assert [row["labels"] for row in rows] == [1, IGNORE]
    assert rows[1]["lost"] == len(tokenizer("Paris " * 80)["input_ids"]) - 16
    batch = collate(0)(rows)
    assert batch["labels"].tolist() == [1, IGNORE]
    assert batch["words"].tolist() == [1, 1]
    assert batch["labelled_words"].tolist() == [1, 0]
    pair = datasets.Dataset.from_dict({"text": ["the cat"], "text_pair": ["in Paris"], "label": ["a"]})
    (row,) = encode_text(pair, tokenizer, ["a", "b"])
    expected = tokenizer("the cat", "in Paris")
    assert (row["input_ids"], row["token_type_ids"]) == (expected["input_ids"], expected["token_type_ids"])
    assert 1 in collate(0)([row])["token_type_ids"]


def test_lengths():
    tokenizer = wordpiece()
    assert length_limit(tokenizer) == 64
    assert length_limit(tokenizer, BertConfig(max_position_embeddings=32)) == 32
    roberta = XLMRobertaConfig(max_position_embeddings=34, pad_token_id=1)
    assert length_limit(tokenizer, roberta) == 32
    with pytest.raises(ValueError, match="max_length is 33, expected 3 to 32, what the tokenizer and model can take"):
        length_limit(tokenizer, roberta, 33)


def test_a_tag_that_is_no_label():
    with pytest.raises(ValueError, match="encode_words: the data have the labels B-LOC, I-LOC, expected O, B-PER"):
        encode_words(data([WORDS], [TAGS]), wordpiece(), ["O", "B-PER"])
