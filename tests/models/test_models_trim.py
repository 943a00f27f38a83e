"""Models and deltas cut to a smaller vocabulary: the same numbers on what is kept, also after saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from text_cases import SENTENCES, bert, sentencepiece, wordpiece, xlmr

from fastdistil.data.shares import compared, kept_pieces, segmentation
from fastdistil.data.text import tokenise
from fastdistil.models.trim import trim_delta, trim_model_
from fastdistil.models.vocab import trim_vocabulary
from fastdistil.sparse import SparseDelta


def _modernbert(tokenizer: Any, kind: str = "ModernBertForMaskedLM", **options: Any) -> Any:
    torch.manual_seed(0)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        bos_token_id=None, eos_token_id=None, **ids, **options,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def _distilbert(tokenizer: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=len(tokenizer), dim=16, n_layers=2, n_heads=2, hidden_dim=24, pad_token_id=0, **options
    )
    return transformers.DistilBertForMaskedLM(config).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [bert, xlmr, _modernbert, _distilbert])
def test_a_trimmed_model_answers_as_before_also_when_it_is_loaded_again(tmp_path: Path, kind: Any, tied: bool) -> None:
    old = sentencepiece() if kind is xlmr else wordpiece()
    keep = [i for i in range(len(old)) if i % 3]
    new, rows = trim_vocabulary(old, keep)
    model = kind(old, tie_word_embeddings=tied)
    size = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(len(rows)).repeat(2, 1)[:, :40]
    with torch.no_grad():
        wanted = model(input_ids=rows[ids]).logits[..., rows]
        trim_model_(model, rows)
        torch.testing.assert_close(model(input_ids=ids).logits, wanted)
        assert all(size not in p.shape for p in model.parameters())
        same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert same is tied
        model.save_pretrained(tmp_path)
        loaded, said = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not any(said[name] for name in said), said
        assert torch.equal(loaded.eval()(input_ids=ids).logits, model(input_ids=ids).logits)
    assert loaded.config.vocab_size == len(rows) == len(new)
    assert loaded.config.pad_token_id == new.pad_token_id
    assert loaded.get_input_embeddings().padding_idx == new.pad_token_id


def test_rows_and_positions_that_do_not_fit_are_refused() -> None:
    tokenizer = sentencepiece()
    model = xlmr(tokenizer)
    with pytest.raises(ValueError, match="padding id 1 becomes 0, but XLMRobertaForMaskedLM counts positions"):
        trim_model_(model, torch.arange(1, len(tokenizer)))
    with pytest.raises(ValueError, match="rows are 0 to 17, expected ids from 0 to 16"):
        trim_model_(_small(), torch.arange(18))
    with pytest.raises(ValueError, match="rows are none"):
        trim_model_(_small(), torch.arange(0))


def _small() -> Any:
    config = transformers.BertConfig(
        vocab_size=17, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
    )
    return transformers.BertModel(config)


def test_a_delta_follows_the_model() -> None:
    old = wordpiece()
    base, tuned = bert(old), bert(old)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += torch.randn_like(parameter).div(8) * (torch.rand_like(parameter) < 0.3)
    mask = {n: (p != dict(base.named_parameters())[n]).flatten().nonzero()[:, 0] for n, p in tuned.named_parameters()}
    head = {"cls.predictions.bias": tuned.cls.predictions.bias}
    delta = SparseDelta.from_params(tuned, base, {n: x for n, x in mask.items() if n not in head}, whole=head)
    rows = trim_vocabulary(old, [i for i in range(len(old)) if i % 2])[1]
    trimmed = trim_delta(delta, rows, len(old))
    trim_model_(base, rows)
    trim_model_(tuned, rows)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    trimmed.apply_(base)
    for (name, ours), theirs in zip(base.named_parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        assert name in head or not torch.equal(before[name], ours)
    trimmed.revert_(base)
    assert all(torch.equal(before[n], p) for n, p in base.named_parameters())


def test_pieces_are_kept_by_their_share_in_one_language(tmp_path: Path) -> None:
    tokenizer = wordpiece()
    (tmp_path / "fr.txt").write_text("abc\n" * 999 + "xyz\n", encoding="utf-8")
    (tmp_path / "sw.txt").write_text("dexy dexy dd\n", encoding="utf-8")
    corpora = tokenise([tmp_path / "fr.txt", tmp_path / "sw.txt"], tokenizer, tmp_path / "cache")
    ids = {word: tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("abc", "xyz", "dexy", "dd")}
    assert all(len(x) == 1 for x in ids.values())
    assert kept_pieces(corpora, len(tokenizer), 0.01) == sorted(ids["abc"] + ids["dexy"] + ids["dd"])
    assert kept_pieces(corpora, len(tokenizer)) == sorted(i for x in ids.values() for i in x)
    with pytest.raises(ValueError, match="no piece has a share of 0.9999"):
        kept_pieces(corpora, len(tokenizer), 0.9999)
    with pytest.raises(ValueError, match="threshold is 0"):
        kept_pieces(corpora, len(tokenizer), 0)


def _pieces_of(tokenizer: Any, *pieces: str) -> Any:
    return trim_vocabulary(tokenizer, tokenizer.convert_tokens_to_ids(list(pieces)))[0]


def test_the_segmentation_check_counts_words_that_are_cut_otherwise(tmp_path: Path) -> None:
    old = wordpiece()
    (tmp_path / "fr.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    corpora = tokenise([tmp_path / "fr.txt"], old, tmp_path / "cache")
    same, _ = trim_vocabulary(old, kept_pieces(corpora, len(old)))
    found = segmentation(corpora, old, same, cache=tmp_path / "cache" / "raw")["fr"]
    assert found["changed"] == found["unknown"] == 0 and found["pieces_before"] == found["pieces_after"]
    assert found["words"] == sum(len(text.split()) for text in SENTENCES)
    (lost,) = old("xyz", add_special_tokens=False)["input_ids"]
    other, _ = trim_vocabulary(old, set(kept_pieces(corpora, len(old))) - {lost})
    words = [word for text in SENTENCES for word in text.split()]
    found = compared(words, old, other)
    assert found["changed"] == sum(word in ("xyz", "xyz.") for word in words) / len(words) > 0
    assert found["unknown"] == found["changed"], "nothing smaller is left of it"
    assert compared(["abcd"], old, _pieces_of(old, "abc", "##d"))["pieces_after"] == 2
    assert compared([], old, other)["words"] == 0
