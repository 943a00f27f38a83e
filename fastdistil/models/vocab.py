"""Vocabulary trimming: a tokenizer that keeps only chosen rows, renumbered in their original order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_KEPT = (
    "model_max_length", "model_input_names", "padding_side", "truncation_side", "chat_template",
    "clean_up_tokenization_spaces", "split_special_tokens",
)  # fmt: skip


def parts_of(node: Any) -> Iterator[dict[str, Any]]:
    """Every object in a piece of JSON: a Sequence holds its parts, whatever their key."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list):
        for part in node:
            yield from parts_of(part)


def _processor_ids(document: dict[str, Any]) -> Iterator[tuple[list[Any], int]]:
    """Where the ids are that post-processors and padding hold: a list, and the place in it."""
    for part in parts_of(document["post_processor"]):
        if part.get("type") == "TemplateProcessing":
            for token in part["special_tokens"].values():
                yield from ((token["ids"], place) for place in range(len(token["ids"])))
        elif part.get("type") in ("BertProcessing", "RobertaProcessing"):  # [piece, id]
            yield part["sep"], 1
            yield part["cls"], 1


def _pieces(model: dict[str, Any]) -> dict[str, int]:
    """Piece -> id."""
    vocab = model["vocab"]
    return vocab if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}


def _special_ids(tokenizer: PreTrainedTokenizerFast, document: dict[str, Any]) -> set[int]:
    model = document["model"]
    ids = {int(i) for i in tokenizer.all_special_ids}
    ids |= {int(token["id"]) for token in document["added_tokens"]}
    ids |= {holder[place] for holder, place in _processor_ids(document)}
    if document.get("padding"):
        ids.add(document["padding"]["pad_id"])
    if model["type"] == "Unigram":
        if model["unk_id"] is not None:
            ids.add(int(model["unk_id"]))
    elif model.get("unk_token") in model["vocab"]:
        ids.add(model["vocab"][model["unk_token"]])
    return ids


def _byte_ids(document: dict[str, Any]) -> set[int]:
    """The pieces that stand for single bytes, of which any text can be made."""
    pieces = _pieces(document["model"])
    names = [f"<0x{byte:02X}>" for byte in range(256)] if document["model"].get("byte_fallback") else []
    if any(part.get("type") == "ByteLevel" for part in parts_of([document["pre_tokenizer"], document["normalizer"]])):
        names += byte_characters().values()
    return {pieces[name] for name in names if name in pieces}


def byte_characters() -> dict[int, str]:
    """GPT-2's characters for the 256 bytes: those that print, and those from 256 on for the others."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in sorted(printed)} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _lowest(vocab: list[list[Any]], kept: set[int]) -> set[int]:
    """A piece of the lowest score, which unk's score follows: without it, unk would take the place of kept pieces."""
    lowest = min(score for _, score in vocab)
    places = [place for place, (_, score) in enumerate(vocab) if score == lowest]
    return set() if any(place in kept for place in places) else {places[0]}


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs, in either of tokenizers' two ways to write them."""
    split = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return [(first, second) for first, second in split]


def _on_the_way(model: dict[str, Any], kept: Iterable[int]) -> set[int]:
    """The pieces that BPE makes on its way to each of `kept`. In whatever word a piece ends up, nothing was merged
    across its ends, so that what happened inside is what happens to the piece alone."""
    vocab, prefix, suffix = (
        model["vocab"],
        model.get("continuing_subword_prefix") or "",
        model.get("end_of_word_suffix"),
    )
    ranks = {pair: rank for rank, pair in enumerate(_merges(model))}
    names, found = {i: piece for piece, i in vocab.items()}, set[int]()
    for i in kept:
        if i not in names:  # an added token
            continue
        parts = _characters(names[i], vocab, prefix, suffix, bool(model.get("byte_fallback")))
        found |= {vocab[part] for part in parts if part in vocab}
        while len(parts) > 1:
            rank, at = min((ranks.get(pair, len(ranks)), at) for at, pair in enumerate(pairwise(parts)))
            if rank == len(ranks):
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1].removeprefix(prefix)]
            found.add(vocab[parts[at]])
    return found


def _characters(piece: str, vocab: dict[str, int], prefix: str, suffix: str | None, bytes_: bool) -> list[str]:
    """What BPE begins with: characters, those within a word behind its prefix, the last one of a word with its suffix,
    or the bytes of one that is no piece."""
    inside = bool(prefix) and piece.startswith(prefix) and len(piece) > len(prefix)
    body = piece[len(prefix) :] if inside else piece
    ending = suffix if suffix and body.endswith(suffix) and len(body) > len(suffix) else ""
    characters = list(body[: len(body) - len(ending)])
    parts = [prefix + c if prefix and (inside or at) else c for at, c in enumerate(characters)]
    if parts:
        parts[-1] += ending
    if not bytes_:
        return parts
    return [b for part in parts for b in ([part] if part in vocab else [f"<0x{x:02X}>" for x in part.encode()])]


def _renumber(document: dict[str, Any], new_id: dict[int, int]) -> None:
    """Rewrite the tokenizer's JSON in place: the model's vocabulary and every id that refers to it."""
    model = document["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in new_id if old < len(model["vocab"])]
        model["unk_id"] = None if model["unk_id"] is None else new_id[model["unk_id"]]
    else:
        model["vocab"] = {piece: new_id[old] for piece, old in model["vocab"].items() if old in new_id}
    if model["type"] == "BPE":
        vocab, prefix = model["vocab"], model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            [a, b] for a, b in _merges(model) if a in vocab and b in vocab and a + b.removeprefix(prefix) in vocab
        ]
    for token in document["added_tokens"]:
        token["id"] = new_id[token["id"]]
    for holder, place in _processor_ids(document):
        holder[place] = new_id[holder[place]]
    if document.get("padding"):
        document["padding"]["pad_id"] = new_id[document["padding"]["pad_id"]]


def _settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What transformers keeps beside the tokenizers library's own tokenizer; special tokens with their flags."""
    flags = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    special = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    settings = {name: getattr(tokenizer, name) for name in _KEPT if hasattr(tokenizer, name)}
    settings |= {name: flags.get(value, value) for name, value in special.items() if name in _NAMED}
    own = {name: flags.get(value, value) for name, value in special.items() if name not in _NAMED}
    five = "_extra_special_tokens" in vars(tokenizer)  # before transformers 5 the list had the other one's name
    extra = tokenizer.extra_special_tokens if five else getattr(tokenizer, "additional_special_tokens", None)
    names = ("extra_special_tokens", "model_specific_special_tokens")
    if not five:
        names = ("additional_special_tokens", "extra_special_tokens")
    for name, value in zip(names, ([flags.get(str(x), x) for x in extra or []], own), strict=True):
        if value:
            settings[name] = value
    return settings


def trim_vocabulary(tokenizer: PreTrainedTokenizerFast, keep: Iterable[int]) -> tuple[PreTrainedTokenizerFast, Tensor]:
    """Drop all pieces but `keep` and what the tokenizer cannot do without: special and added tokens, unk, the pieces of
    single bytes, of a Unigram model one piece of the lowest score (unk's follows it), of BPE the pieces on the way to a
    kept one.

    Returns the new tokenizer and `rows` (V_new,) int64: new id -> old id, ascending, to slice embedding tables with.
    Text whose pieces are all kept, none of them WordPiece's or BPE's unk, is cut as before; elsewhere smaller kept
    pieces, then bytes or unk, take a lost piece's place. Ids in post-processors and padding follow; sides, lengths,
    chat template and special tokens stay; the class is PreTrainedTokenizerFast.
    Source: Ansell et al. 2023 (BiStil), who renumber only the embedding table; here the ids follow it.

    Raises TypeError where `tokenizer` is not a fast one, ValueError where its model is another than Unigram, WordPiece
    and BPE or an id of `keep` is not in its vocabulary.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TypeError(
            f"trim_vocabulary: tokenizer is a {type(tokenizer).__name__}, expected a PreTrainedTokenizerFast "
            "(AutoTokenizer.from_pretrained(...) loads one by its name)"
        )
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    model = document["model"]
    if model["type"] not in ("Unigram", "WordPiece", "BPE"):
        raise ValueError(f"trim_vocabulary: tokenizer's model is {model['type']}, expected Unigram, WordPiece or BPE")
    known = {*_pieces(model).values(), *(token["id"] for token in document["added_tokens"])}
    if model["type"] == "Unigram":
        known |= set(range(len(model["vocab"])))  # one piece may stand there twice
    kept = {int(i) for i in keep}
    if not kept <= known:
        wrong = min(kept - known)
        raise ValueError(f"trim_vocabulary: keep holds id {wrong}, expected 0 to {max(known)} and a piece there")
    kept |= (_special_ids(tokenizer, document) & known) | _byte_ids(document)
    if model["type"] == "Unigram":
        kept |= _lowest(model["vocab"], kept)
    elif model["type"] == "BPE":
        kept |= _on_the_way(model, kept)
    rows = sorted(kept)
    _renumber(document, {old: new for new, old in enumerate(rows)})
    made = Tokenizer.from_str(json.dumps(document))
    trimmed = PreTrainedTokenizerFast(tokenizer_object=made, **_settings(tokenizer))
    return trimmed, torch.tensor(rows)
