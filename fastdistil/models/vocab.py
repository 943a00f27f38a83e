"""Vocabulary trimming: a tokenizer that keeps only chosen rows, renumbered in their original order."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast


def _special_ids(tokenizer: PreTrainedTokenizerFast, document: dict[str, Any]) -> set[int]:
    ids = {int(i) for i in tokenizer.all_special_ids}
    ids |= {int(token["id"]) for token in document["added_tokens"]}
    if document["model"]["type"] == "Unigram" and document["model"]["unk_id"] is not None:
        ids.add(int(document["model"]["unk_id"]))
    return ids


def _renumber(document: dict[str, Any], new_id: dict[int, int]) -> None:
    """Rewrite the tokenizer's JSON in place: the model's vocabulary and every id that refers to it."""
    model = document["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in new_id if old < len(model["vocab"])]
        model["unk_id"] = None if model["unk_id"] is None else new_id[model["unk_id"]]
    else:
        model["vocab"] = {piece: new_id[old] for piece, old in model["vocab"].items() if old in new_id}
    for token in document["added_tokens"]:
        token["id"] = new_id[token["id"]]
    processor = document["post_processor"] or {}
    for token in (processor.get("special_tokens") or {}).values():  # TemplateProcessing
        if isinstance(token, dict):
            token["ids"] = [new_id[old] for old in token["ids"]]
    for field in ("sep", "cls"):  # BertProcessing, RobertaProcessing: [piece, id]
        if isinstance(processor.get(field), list):
            processor[field][1] = new_id[processor[field][1]]


def trim_vocabulary(tokenizer: PreTrainedTokenizerFast, keep: Iterable[int]) -> tuple[PreTrainedTokenizerFast, Tensor]:
    """Drop all pieces but `keep` and the special tokens.

    Returns the new tokenizer and `rows` (V_new,) int64: new id -> old id, ascending, to slice embedding tables with.
    Text whose pieces are all kept is cut as before; elsewhere smaller kept pieces, then unk, take a lost piece's place.
    Source: Ansell et al. 2023 (BiStil), who renumber only the embedding table; here the ids follow it.

    Raises TypeError where `tokenizer` is not a fast one, ValueError where its model is neither Unigram nor WordPiece or
    an id of `keep` is not in its vocabulary.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TypeError(
            f"trim_vocabulary: tokenizer is a {type(tokenizer).__name__}, expected a PreTrainedTokenizerFast"
        )
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = document["model"]["type"]
    if kind not in ("Unigram", "WordPiece"):
        raise ValueError(f"trim_vocabulary: tokenizer's model is {kind}, expected Unigram or WordPiece")
    rows = sorted({int(i) for i in keep} | _special_ids(tokenizer, document))
    if rows[0] < 0 or rows[-1] >= len(tokenizer):
        wrong = rows[0] if rows[0] < 0 else rows[-1]
        raise ValueError(f"trim_vocabulary: keep holds id {wrong}, expected 0 to {len(tokenizer) - 1}")
    _renumber(document, {old: new for new, old in enumerate(rows)})
    trimmed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(document)),
        model_max_length=tokenizer.model_max_length,
        model_input_names=tokenizer.model_input_names,
        **tokenizer.special_tokens_map,
    )
    return trimmed, torch.tensor(rows)
