"""Labelled words and texts as piece ids, for any fast tokenizer, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastdistil.data.files import counts
from fastdistil.data.tables import quiet

IGNORE = -100  # label of a piece or an example that carries none
_UNLIMITED = 10**6  # transformers writes 1e30 where a tokenizer knows no limit
# Families whose first token has the position pad_token_id + 1.
_SHIFTED = ("roberta", "camembert", "xmod", "longformer", "mpnet", "ibert", "data2vec-text")
_PROBE = ["the", "cat", "in", "the", "house", "sat", "on", "10", "mats"]

Row = Mapping[str, Any]
Batch = dict[str, Tensor]


def length_limit(tokenizer: PreTrainedTokenizerBase, config: Any = None, max_length: int | None = None) -> int:
    """Pieces that one example may have: `max_length`, else what tokenizer and model can take, at most 512.

    Raises ValueError where `max_length` is beyond the model's positions or leaves no room beside the special pieces.
    """
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < _UNLIMITED else []
    positions = getattr(config, "max_position_embeddings", None)
    if positions and positions > 0:
        shifted = any(name in getattr(config, "model_type", "") for name in _SHIFTED)
        limits.append(positions - (config.pad_token_id + 1 if shifted else 0))
    most = min(limits, default=512)
    least = tokenizer.num_special_tokens_to_add() + 1
    if max_length is not None and not least <= max_length <= most:
        raise ValueError(
            f"max_length is {max_length}, expected {least} to {most}, what the tokenizer and model can take"
        )
    return min(512, most) if max_length is None else max_length


def _fast(tokenizer: PreTrainedTokenizerBase, caller: str) -> PreTrainedTokenizerBase:
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"{caller}: tokenizer is a {type(tokenizer).__name__}, expected a fast one")
    return tokenizer


def _encodings(tokenizer: Any, texts: list[list[str]]) -> list[Any]:
    """tokenizers' encodings of lists of words, uncut, with special pieces."""
    options = {"truncation": False, "padding": False, "verbose": False}
    # A special token that was typed, as the word "[SEP]", is text like any other.
    return list(tokenizer(texts, is_split_into_words=True, split_special_tokens=True, **options).encodings)


def needs_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a word must come with the space before it to be cut as in running text: byte-level BPE without
    add_prefix_space (ModernBERT's) cuts "cat" and " cat" differently. Found by trying."""
    tokenizer = _fast(tokenizer, "needs_spaces")
    running = tokenizer(" ".join(_PROBE), truncation=False, padding=False, verbose=False)["input_ids"]
    plain, spaced = (_encodings(tokenizer, [words])[0].ids for words in (_PROBE, _spaced(_PROBE)))
    return bool(plain != running and spaced == running)


def _spaced(words: Sequence[str]) -> list[str]:
    return [*words[:1], *(" " + word for word in words[1:])]


def encode_words(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int | None = None,
) -> datasets.Dataset:
    """Rows for `collate` from a data set of words and tags (`files.read`), a row for a row.

    A row has input_ids (with special pieces), first (the index there of each kept word's first piece), labels (the
    index of its tag in `labels`, IGNORE where the tag is not known or the data has none), word (the kept words' places
    in the sentence), and two counts: lost, the words beyond `max_length` pieces, of which none is cut in two, and
    empty, words that the tokenizer makes no piece of, as a control character alone. len(first) + lost + empty is the
    number of words. `max_length` None: `length_limit`'s.

    Raises TypeError where the tokenizer is not a fast one, ValueError where a tag is not in `labels`.
    """
    tokenizer = _fast(tokenizer, "encode_words")
    if "tags" in dataset.column_names:
        _check_labels("encode_words", dataset, "tags", labels)
    given = {
        "tokenizer": tokenizer,
        "index": {label: i for i, label in enumerate(labels)},
        "length": length_limit(tokenizer, None, max_length),
        "spaced": needs_spaces(tokenizer),
    }
    integers = datasets.List(datasets.Value("int32"))
    features = datasets.Features(
        {
            "input_ids": integers,
            "first": integers,
            "labels": integers,
            "word": integers,
            "lost": datasets.Value("int32"),
            "empty": datasets.Value("int32"),
        }
    )
    return _mapped(dataset, _word_rows, given, features)


def _check_labels(caller: str, dataset: datasets.Dataset, column: str, labels: Sequence[str]) -> None:
    unknown = sorted(set(counts(dataset, column)) - {*labels, None})
    if unknown:
        raise ValueError(f"{caller}: the data have the labels {', '.join(unknown)}, expected {', '.join(labels)}")


def _mapped(
    dataset: datasets.Dataset, function: Callable[..., Any], given: dict[str, Any], features: datasets.Features
) -> datasets.Dataset:
    with quiet():
        return dataset.map(
            function, batched=True, fn_kwargs=given, features=features, remove_columns=dataset.column_names
        )


def _word_rows(
    batch: Mapping[str, list[Any]], tokenizer: Any, index: Mapping[str, int], length: int, spaced: bool
) -> dict[str, list[Any]]:
    texts = [_spaced(words) if spaced else list(words) for words in batch["words"]]
    tags = batch.get("tags") or [[None] * len(words) for words in texts]
    names = ("input_ids", "first", "labels", "word", "lost", "empty")
    found: dict[str, list[Any]] = {name: [] for name in names}
    for words, own, encoding in zip(texts, tags, _encodings(tokenizer, texts), strict=True):
        ids, first, places = _cut(encoding, length)
        lost = len({word for word in encoding.word_ids if word is not None} - set(places))
        row = (ids, first, [index.get(own[i], IGNORE) for i in places], places, lost, len(words) - len(places) - lost)
        for name, value in zip(names, row, strict=True):
            found[name].append(value)
    return found


def _cut(encoding: Any, length: int) -> tuple[list[int], list[int], list[int]]:
    """ids of at most `length` pieces, first, words: whole words from the start, between the special pieces."""
    ids, words = list(encoding.ids), list(encoding.word_ids)
    inside = [i for i, word in enumerate(words) if word is not None]
    if len(ids) > length and inside:
        end = inside[-1] + 1
        keep = end - (len(ids) - length)
        while keep > inside[0] and words[keep] == words[keep - 1]:
            keep -= 1
        keep = max(keep, inside[0])
        ids, words = ids[:keep] + ids[end:], words[:keep] + words[end:]
    first, places = list[int](), list[int]()
    for i, word in enumerate(words):
        if word is not None and (not places or places[-1] != word):
            first.append(i)
            places.append(word)
    return ids, first, places


def encode_text(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int | None = None,
) -> datasets.Dataset:
    """Rows for `collate` from a data set of text, label and, of pairs, text_pair: input_ids, labels (an index of
    `labels`, IGNORE where it is not known), lost (the pieces beyond `max_length`; of a pair the longer text is cut
    first) and, of pairs, token_type_ids where the tokenizer has them. Errors as `encode_words`."""
    tokenizer = _fast(tokenizer, "encode_text")
    if "label" in dataset.column_names:
        _check_labels("encode_text", dataset, "label", labels)
    typed = "text_pair" in dataset.column_names and "token_type_ids" in tokenizer.model_input_names
    given = {
        "tokenizer": tokenizer,
        "index": {label: i for i, label in enumerate(labels)},
        "length": length_limit(tokenizer, None, max_length),
        "typed": typed,
    }
    integers = datasets.List(datasets.Value("int32"))
    features = {"input_ids": integers, "labels": datasets.Value("int32"), "lost": datasets.Value("int32")}
    if typed:
        features["token_type_ids"] = integers
    return _mapped(dataset, _text_rows, given, datasets.Features(features))


def _text_rows(
    batch: Mapping[str, list[Any]], tokenizer: Any, index: Mapping[str, int], length: int, typed: bool
) -> dict[str, list[Any]]:
    texts, pairs = list(batch["text"]), batch.get("text_pair")
    arguments = (texts,) if pairs is None else (texts, list(pairs))
    options = {"padding": False, "split_special_tokens": True, "verbose": False}
    whole = tokenizer(*arguments, truncation=False, **options)["input_ids"]
    cut = tokenizer(*arguments, truncation="longest_first", max_length=length, return_token_type_ids=typed, **options)
    labels = [index.get(label, IGNORE) for label in batch.get("label") or [None] * len(texts)]
    found = {
        "input_ids": cut["input_ids"],
        "labels": labels,
        "lost": [len(a) - len(b) for a, b in zip(whole, cut["input_ids"], strict=True)],
    }
    return {**found, "token_type_ids": cut["token_type_ids"]} if typed else found


def collate(pad_id: int) -> Callable[[Sequence[Row]], Batch]:
    """A function that makes a batch of B rows of `encode_words` or `encode_text`, padded at the end to S pieces.

    input_ids, attention_mask (B, S) int64, and token_type_ids (B, S) where the rows have them. Of words: labels (B, S)
    int64, IGNORE where a piece carries none; words (B, S) float32, 1 at the first piece of each kept word;
    labelled_words (B, S), 1 where its tag is known. Of texts: labels, words (1) and labelled_words, all (B,).
    """
    return partial(_collate, pad_id=pad_id)


def _collate(rows: Sequence[Row], pad_id: int) -> Batch:
    size = (len(rows), max(len(row["input_ids"]) for row in rows))
    batch = {"input_ids": torch.full(size, pad_id), "attention_mask": torch.zeros(size, dtype=torch.int64)}
    for name in ("input_ids", "token_type_ids"):
        if name in rows[0]:
            batch.setdefault(name, torch.zeros(size, dtype=torch.int64))
            for line, row in zip(batch[name], rows, strict=True):
                line[: len(row[name])] = torch.as_tensor(row[name])
    for line, row in zip(batch["attention_mask"], rows, strict=True):
        line[: len(row["input_ids"])] = 1
    if "first" in rows[0]:
        batch["labels"] = torch.full(size, IGNORE)
        batch["words"] = torch.zeros(size)
        for i, row in enumerate(rows):
            first = torch.as_tensor(row["first"], dtype=torch.int64)
            batch["labels"][i, first] = torch.as_tensor(row["labels"], dtype=torch.int64)
            batch["words"][i, first] = 1
    else:
        batch["labels"] = torch.tensor([int(row["labels"]) for row in rows])
        batch["words"] = torch.ones(len(rows))
    batch["labelled_words"] = (batch["labels"] != IGNORE).float()
    return batch
