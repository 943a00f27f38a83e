"""A trimmed tokenizer against the one that it was made of, on text: the same pieces wherever all of them were kept."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fastdistil.models.vocab import trim_vocabulary

transformers = pytest.importorskip("transformers")

LETTERS = "abcdexyz"
WORDS = ["abc", "abcd", "bca", "cab", "dexy", "xyz", "zyx", "abcxyz", "exa", "dd", "éa", "漢b"]
TEXTS = st.text(alphabet=LETTERS + "  .é漢\U0001f642", max_size=24)


def _corpus() -> list[str]:
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(len(WORDS), (200, 5), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) for row in picks]


def _fast(made: Tokenizer, **special: Any) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def _template(made: Tokenizer, cls: str, sep: str) -> processors.TemplateProcessing:
    ids = [(cls, made.token_to_id(cls)), (sep, made.token_to_id(sep))]
    return processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B:1 {sep}:1", special_tokens=ids
    )


def wordpiece() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(_corpus(), trainers.WordPieceTrainer(vocab_size=70, special_tokens=special))
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return _fast(made, **names)


def _unigram_pieces() -> list[tuple[str, float]]:
    pieces = {"▁": -3.0, "▁abc": -3.5, "abc": -4.0, "xyz": -4.2, "▁dexy": -4.1, "ab": -4.6, "▁x": -5.0, "yz": -4.8}
    pieces |= {letter: -6.0 - i / 4 for i, letter in enumerate(LETTERS + ".")}
    pieces |= {"bc": -4.9, "cx": -4.4, "zyx": -7.5, "▁é": -8.0, "a": -6.1}
    return list(pieces.items())


def unigram(unk: str = "<unk>", bytes_: bool = False, scheme: str = "always", split: bool = True) -> Any:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces = [(piece, 0.0) for piece in special] + _unigram_pieces()
    if bytes_:
        pieces += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    made = Tokenizer(models.Unigram(pieces, unk_id=special.index(unk), byte_fallback=bytes_))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    made.add_special_tokens([*special[:3], AddedToken("<mask>", lstrip=True, special=True)])
    made.add_tokens([AddedToken("zyx", normalized=False)])  # inside of the vocabulary
    made.add_tokens([AddedToken("zz", normalized=False), AddedToken("[C]", special=True)])  # behind it
    made.post_processor = processors.Sequence([_template(made, "<s>", "</s>")])
    return _fast(
        made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token=unk,
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )


def bpe(kind: str) -> Any:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    options: dict[str, Any] = {"special_tokens": special, "vocab_size": 300 if kind == "bytelevel" else 64}
    if kind == "suffix":
        made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        made.pre_tokenizer, options["end_of_word_suffix"] = pre_tokenizers.Whitespace(), "</w>"
    elif kind == "prefix":
        made = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
        made.pre_tokenizer, options["continuing_subword_prefix"] = pre_tokenizers.Whitespace(), "##"
    elif kind == "bytelevel":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    else:
        made = Tokenizer(
            models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True, ignore_merges=kind == "ignoring")
        )
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        options["special_tokens"] = special + [f"<0x{byte:02X}>" for byte in range(256)]
        options["vocab_size"], options["limit_alphabet"] = 320, 11
    made.train_from_iterator(_corpus(), trainers.BpeTrainer(show_progress=False, **options))
    if kind in ("bytes", "ignoring"):  # byte pieces are no special tokens
        document = json.loads(made.to_str())
        document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] in special]
        made = Tokenizer.from_str(json.dumps(document))
    last = processors.ByteLevel(trim_offsets=True) if kind == "bytelevel" else None
    ends = processors.RobertaProcessing(("</s>", 2), ("<s>", 0)) if kind == "suffix" else _template(made, "<s>", "</s>")
    made.post_processor = processors.Sequence([last, ends]) if last is not None else ends
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    return _fast(made, **names, unk_token="<unk>")


KINDS: dict[str, Callable[[], Any]] = {
    "wordpiece": wordpiece,
    "unigram": unigram,
    "unigram, unk is pad": lambda: unigram(unk="<pad>"),
    "unigram, bytes": lambda: unigram(bytes_=True),
    "unigram, first, whole text": lambda: unigram(scheme="first", split=False),
    "unigram, never": lambda: unigram(scheme="never"),
    **{
        f"bpe, {kind}": (lambda kind=kind: bpe(kind)) for kind in ("suffix", "prefix", "bytelevel", "bytes", "ignoring")
    },
}
_made: dict[str, Any] = {}


def made(kind: str) -> Any:
    return _made.setdefault(kind, KINDS[kind]()) if kind not in _made else _made[kind]


def _same(kind: str, full: Any, small: Any, rows: torch.Tensor, texts: list[str]) -> int:
    """How many of the texts had all of their pieces kept, and were cut as before."""
    kept, compared = set(rows.tolist()), 0
    for text in texts:
        ids = full(text).input_ids
        if not set(ids) <= kept or (full.unk_token_id in ids and "unigram" not in kind):
            continue
        assert rows[small(text).input_ids].tolist() == ids, text
        compared += 1
    return compared


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(chosen=st.lists(TEXTS, min_size=1, max_size=3), others=st.lists(TEXTS, max_size=6), data=st.data())
def test_text_whose_pieces_are_kept_is_cut_as_before(
    kind: str, chosen: list[str], others: list[str], data: Any
) -> None:
    full = made(kind)
    ids = {i for text in chosen for i in full(text).input_ids}
    extra = data.draw(st.sets(st.sampled_from(sorted(full.get_vocab().values())), max_size=20))
    small, rows = trim_vocabulary(full, ids | extra)
    assert ids | extra <= set(rows.tolist()) and rows.tolist() == sorted(rows.tolist())
    assert small.convert_ids_to_tokens(list(range(len(rows)))) == full.convert_ids_to_tokens(rows.tolist())
    _same(kind, full, small, rows, chosen + others)
    for text in chosen:
        if full.unk_token_id not in full(text).input_ids:
            assert small.decode(small(text).input_ids) == full.decode(full(text).input_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_batched(kind: str) -> None:
    full = made(kind)
    full.padding_side = "right"
    texts = _corpus()[:4]
    small, rows = trim_vocabulary(full, {i for text in texts for i in full(text).input_ids})
    assert len(small) == len(rows) < len(full) and _same(kind, full, small, rows, texts) >= 1
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
    pairs = list(zip(texts, reversed(texts), strict=True))
    for tokenizer in (small, loaded):
        for batch in (texts, pairs):
            found = tokenizer(batch, padding=True, return_tensors="pt")
            wanted = full(batch, padding=True, return_tensors="pt")
            assert torch.equal(rows[found.input_ids], wanted.input_ids)
            assert torch.equal(found.attention_mask, wanted.attention_mask)
    assert set(loaded.all_special_tokens) == set(full.all_special_tokens)


def test_unk_does_not_take_the_place_of_kept_pieces() -> None:
    pieces = [("<unk>", 0.0), ("xy", -4.9), ("zw", -4.9), ("uv", -4.9), ("st", -4.9), ("yzwuvst", -4.0), ("x", -16.0)]
    full = _fast(Tokenizer(models.Unigram(pieces, unk_id=0)), unk_token="<unk>")
    ids = full("xyzwuvst").input_ids
    assert full.convert_ids_to_tokens(ids) == ["xy", "zw", "uv", "st"]
    small, rows = trim_vocabulary(full, [*ids, 5])
    assert rows[small("xyzwuvst").input_ids].tolist() == ids and 6 in rows.tolist()
    again, rows = trim_vocabulary(full, ids)
    assert rows[again("xyzwuvst").input_ids].tolist() == ids


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("processor", ["template", "bert", "roberta"])
def test_ids_in_post_processors_and_padding_follow(processor: str, nested: bool) -> None:
    full = wordpiece()
    document = json.loads(full.backend_tokenizer.to_str())
    vocab = document["model"]["vocab"]  # the special tokens go behind, so that their ids move
    order = [p for p in vocab if not p.startswith("[")] + [p for p in vocab if p.startswith("[")]
    moved = {vocab[piece]: place for place, piece in enumerate(order)}
    document["model"]["vocab"] = {piece: place for place, piece in enumerate(order)}
    for token in document["added_tokens"]:
        token["id"] = moved[token["id"]]
    full = _fast(Tokenizer.from_str(json.dumps(document)), **full.special_tokens_map)
    backend = full.backend_tokenizer
    cls, sep = full.cls_token_id, full.sep_token_id
    part = {
        "template": _template(backend, "[CLS]", "[SEP]"),
        "bert": processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls)),
        "roberta": processors.RobertaProcessing(("[SEP]", sep), ("[CLS]", cls)),
    }[processor]
    backend.post_processor = processors.Sequence([processors.ByteLevel(), part]) if nested else part
    ids = full("abc").input_ids
    backend.enable_padding(pad_id=full.pad_token_id, pad_token="[PAD]")
    assert ids[0] == cls > 20
    small, rows = trim_vocabulary(full, ids)
    raw = [x.ids for x in small.backend_tokenizer.encode_batch(["abc", "abc abc"])]
    assert raw[0][-1] == small.pad_token_id < full.pad_token_id
    assert rows[small("abc").input_ids].tolist() == ids
    assert small("abc").input_ids[0] == small.cls_token_id < cls


def test_what_transformers_keeps_beside_it_stays() -> None:
    special = {"extra_special_tokens": ["<x>", "[C]"], "padding_side": "left", "truncation_side": "left"}
    other = {
        "model_max_length": 9,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": "{{ messages }}",
    }
    mask = AddedToken("<mask>", lstrip=True, special=True)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": mask}
    full = _fast(unigram().backend_tokenizer, **names, **special, **other, clean_up_tokenization_spaces=True)
    small, rows = trim_vocabulary(full, full("abc xyz").input_ids)
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        loaded = transformers.AutoTokenizer.from_pretrained(folder)
    for tokenizer in (small, loaded):
        for name in ("padding_side", "truncation_side", "chat_template", "model_max_length", "model_input_names"):
            assert getattr(tokenizer, name) == getattr(full, name), name
        assert tokenizer.clean_up_tokenization_spaces is True
        assert tokenizer.all_special_tokens == full.all_special_tokens and "<x>" in tokenizer.all_special_tokens
        assert rows[tokenizer.all_special_ids].tolist() == full.all_special_ids
        assert rows[tokenizer("abc <mask> xyz").input_ids].tolist() == full("abc <mask> xyz").input_ids
        assert tokenizer(["abc", "abc xyz"], padding=True).input_ids[0][0] == tokenizer.pad_token_id
    batch = torch.tensor([small("abc <x> xyz [C]").input_ids])
    masked = torch.tensor(small.get_special_tokens_mask(batch[0].tolist(), already_has_special_tokens=True))
    wanted = full.get_special_tokens_mask(rows[batch[0]].tolist(), already_has_special_tokens=True)
    assert masked.tolist() == wanted and masked.sum() == 4


def test_special_tokens_with_names_of_their_own() -> None:
    names = {"bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    full = _fast(unigram().backend_tokenizer, **names, extra_special_tokens={"image_token": "[C]"})
    small, _ = trim_vocabulary(full, full("abc").input_ids)
    assert small.image_token == "[C]" and small.all_special_tokens == full.all_special_tokens


def test_merges_on_the_way_to_a_kept_piece() -> None:
    vocab = {piece: i for i, piece in enumerate(["<unk>", "a", "b", "c", "d", "ab", "cd", "abcd", "bc", "abc", "dd"])}
    merges = [("b", "c"), ("a", "b"), ("c", "d"), ("ab", "cd"), ("a", "bc"), ("d", "d")]
    full = _fast(Tokenizer(models.BPE(vocab, merges, unk_token="<unk>")), unk_token="<unk>")
    assert full.tokenize("abc") == ["abc"] and full.tokenize("abcd") == ["abc", "d"]
    small, rows = trim_vocabulary(full, [vocab["abc"]])
    assert [list(vocab)[i] for i in rows] == ["<unk>", "a", "b", "c", "bc", "abc"] and small.tokenize("abc") == ["abc"]
    lost, _ = trim_vocabulary(full, [vocab["bc"], vocab["d"]])
    assert lost.tokenize("dbcd") == ["d", "bc", "d"] and lost.tokenize("ddbc") == ["d", "d", "bc"]
    anything, rows = trim_vocabulary(made("bpe, bytelevel"), [])
    assert anything.decode(anything("漢 nobody kept 🙂").input_ids, skip_special_tokens=True) == "漢 nobody kept 🙂"
