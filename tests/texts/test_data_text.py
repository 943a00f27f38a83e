"""Raw text to packed, corrupted batches: each micro-batch a function of (seed, k), every piece where it should be."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_cases import SENTENCES, sentencepiece, wordpiece

from fastdistil.data.blocks import Alternating, Blocks, HeldOut, Layout, Mixture, split
from fastdistil.data.corruption import Corruption
from fastdistil.data.text import Corpus, read, sources, tokenise

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two languages: fr.txt has 300 documents, sw.jsonl 90."""
    out = tmp_path_factory.mktemp("text")
    (out / "fr.txt").write_text("\n".join(SENTENCES[:300]) + "\n\n   \n", encoding="utf-8")
    (out / "sw.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in SENTENCES[300:390]), encoding="utf-8")
    return out


def _corpora(folder: Path, cut: Any = None, **options: Any) -> list[Corpus]:
    return tokenise([folder / "fr.txt", folder / "sw.jsonl"], cut or wordpiece(), folder / "cache", **options)


def test_sources_are_named_by_the_user_or_by_the_file(tmp_path: Path) -> None:
    odd = tmp_path / "a=b.txt"
    odd.touch()
    asked = ["fr=x/1.txt", "y/sw.part.jsonl.gz", "fr=2.txt", str(odd), "wikimedia/wiki:20231101.fr"]
    assert sources(asked) == {
        "fr": ["x/1.txt", "2.txt"],
        "sw": ["y/sw.part.jsonl.gz"],
        "a=b": [str(odd)],
        "wiki": ["wikimedia/wiki:20231101.fr"],
    }
    with pytest.raises(ValueError, match="text: there is none"):
        sources([])
    with pytest.raises(ValueError, match="'fr=' names no language or no file"):
        sources(["fr="])


def test_every_kind_of_file_gives_the_same_texts(tmp_path: Path) -> None:
    texts = ["un, deux", 'trois "quatre"', "#5"]
    table = datasets.Dataset.from_dict({"text": texts, "id": [1, 2, 3]})
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    table.to_json(tmp_path / "a.jsonl")
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(texts))
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet", "saved", "splits", "a.txt", "a.txt.gz"):
        assert read(str(tmp_path / name), cache=tmp_path / "c")["text"][:] == texts, name
    (tmp_path / "b.txt").write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    paragraphs = read(str(tmp_path / "b.txt"), documents="paragraph", cache=tmp_path / "c")["text"][:]
    assert [x.split() for x in paragraphs] == [["one", "two"], ["three"]]
    with pytest.raises(FileNotFoundError, match="nowhere.txt is no file"):
        read("nowhere.txt")
    table.rename_column("text", "body").add_column("title", texts).to_json(tmp_path / "two.jsonl")
    with pytest.raises(ValueError, match=r"\['body', 'title'\] hold strings"):
        read(str(tmp_path / "two.jsonl"), cache=tmp_path / "c")
    assert read(str(tmp_path / "two.jsonl"), column="title", cache=tmp_path / "c")["text"][:] == texts


@pytest.mark.parametrize("cut", [wordpiece, sentencepiece])
def test_blocks_hold_every_piece_once_between_special_tokens(folder: Path, cut: Any) -> None:
    tokenizer = cut()
    corpus = _corpora(folder, tokenizer)[0]
    layout = Layout.of(tokenizer, 16)
    blocks = Blocks(corpus, layout)
    stream: list[int] = []
    for text in SENTENCES[:300]:
        stream += [*tokenizer(text, add_special_tokens=False)["input_ids"], *layout.separator]
    stream = stream[:-1]
    read_back = [blocks.text(i)[0].tolist() for i in range(len(blocks))]
    assert [x for row in read_back for x in row] == stream
    assert {len(x) for x in read_back[:-1]} == {14} and 0 < len(read_back[-1]) <= 14
    batches = Mixture([blocks], Corruption.of(tokenizer, 0.0), batch_size=4)
    whole = next(b for b in map(batches.batch, range(9)) if b["input_ids"].shape[1] == 16)
    assert (whole["input_ids"][:, 0] == tokenizer.cls_token_id).all()
    assert (whole["input_ids"][:, -1] == tokenizer.sep_token_id).sum() >= 3
    assert whole["attention_mask"].dtype == torch.int64


@pytest.mark.parametrize("cut", [wordpiece, sentencepiece])
def test_typed_special_tokens_are_text_and_never_end_a_document(tmp_path: Path, cut: Any) -> None:
    tokenizer = cut()
    typed = f"{tokenizer.sep_token} abc {tokenizer.mask_token}{tokenizer.cls_token} ζ"
    (tmp_path / "fr.txt").write_text(f"abc\n{typed}\n\u0000\n", encoding="utf-8")
    corpus = tokenise([tmp_path / "fr.txt"], tokenizer, tmp_path / "cache")[0]
    ids = np.concatenate([corpus.document(i) for i in range(len(corpus.lengths))])
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert not special & set(ids.tolist())
    assert corpus.unknown == (ids == tokenizer.unk_token_id).sum() > 0


def test_kept_pieces_are_read_back_and_changed_files_are_cut_anew(
    folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from fastdistil.data import text

    monkeypatch.setattr(text, "PART", 7)
    path, tokenizer, calls = tmp_path / "fr.txt", wordpiece(), []
    path.write_text("\n".join(SENTENCES[:30]), encoding="utf-8")
    cutter = text._cutter

    def counted(*args: Any) -> Any:
        cut = cutter(*args)

        def watched(batch: Any) -> Any:
            calls.append(len(batch["text"]))
            if len(calls) == 3 and not (tmp_path / "went_on").exists():
                raise KeyboardInterrupt
            return cut(batch)

        return watched

    monkeypatch.setattr(text, "_cutter", counted)
    with pytest.raises(KeyboardInterrupt):
        tokenise([path], tokenizer, tmp_path / "cache")
    (tmp_path / "went_on").touch()
    calls.clear()
    first = tokenise([path], tokenizer, tmp_path / "cache")[0]
    assert calls == [7, 7, 2], "finished parts are kept"
    again = tokenise([path], tokenizer, tmp_path / "cache")[0]
    assert len(calls) == 3 and again.fingerprint() == first.fingerprint()
    for i in (0, 6, 7, 29):
        wanted = tokenizer(SENTENCES[i], add_special_tokens=False)["input_ids"]
        assert first.document(i).tolist() == again.document(i).tolist() == wanted
        assert first.document(i, "ids", 1, 3).tolist() == wanted[1:3]
    assert first.counts(len(tokenizer)).sum() == first.pieces
    path.write_text("\n".join(SENTENCES[1:30]), encoding="utf-8")
    changed = tokenise([path], tokenizer, tmp_path / "cache")[0]
    assert len(changed.lengths) == 29 and changed.fingerprint() != first.fingerprint()


def test_held_out_documents_are_apart_and_drawn_by_the_seed(folder: Path) -> None:
    corpora = _corpora(folder)
    layout = Layout.of(wordpiece(), 16)
    train, held, sizes = split(corpora, layout, 0.1, seed=3)
    for a, b, corpus in zip(train, held, corpora, strict=True):
        kept, out = set(corpus.keys[a.documents].tolist()), set(corpus.keys[b.documents].tolist())
        assert not kept & out and len(a.documents) + len(b.documents) == len(corpus.keys)
        assert 0.05 < len(b.documents) / len(corpus.keys) < 0.2
    assert sizes["fr"]["held_out_documents"] == len(held[0].documents) and sizes["sw"]["blocks"] == len(train[1])
    assert held[0].documents.tolist() == split(corpora, layout, 0.1, seed=3)[1][0].documents.tolist()
    assert held[0].documents.tolist() != split(corpora, layout, 0.1, seed=4)[1][0].documents.tolist()
    assert split(corpora, layout, 0.0, seed=3)[1] == []
    one = HeldOut(held, Corruption.of(wordpiece()), 4, most=5)
    assert len(one) == sum(min(5, len(b)) for b in held)
    assert all(len({language for language, _ in one.rows(k)}) == 1 for k in range(one.steps))


def test_batches_are_functions_of_seed_and_number(folder: Path) -> None:
    corpora, tokenizer = _corpora(folder), wordpiece()
    blocks = [Blocks(x, Layout.of(tokenizer, 16)) for x in corpora]
    corruption = Corruption.of(tokenizer)
    for kind in (Mixture, Alternating):
        one, other = kind(blocks, corruption, 4, seed=1), kind(blocks, corruption, 4, seed=1)
        last = [other.batch(k) for k in (40, 3, 0)]  # whatever was asked before
        for k, theirs in zip((40, 3, 0), last, strict=True):
            ours = one.batch(k)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert one.fingerprint() == other.fingerprint() != kind(blocks, corruption, 4, seed=2).fingerprint()
        json.dumps(one.fingerprint())
        assert one.rows(0) != kind(blocks, corruption, 4, seed=2).rows(0)
    mixture = Mixture(blocks, corruption, 1, seed=1)
    epochs = [[mixture.rows(k)[0] for k in range(e * len(mixture), (e + 1) * len(mixture))] for e in range(2)]
    every = {(language, i) for language, x in enumerate(blocks) for i in range(len(x))}
    assert set(epochs[0]) == set(epochs[1]) == every and epochs[0] != epochs[1] and len(mixture) == len(every)
    position = epochs[1].index(epochs[0][0]) + len(mixture)
    first, again = mixture.batch(0), mixture.batch(position)
    assert not torch.equal(first["labels"], again["labels"]), "another epoch, other masks"


def test_smoothing_gives_small_languages_more(folder: Path) -> None:
    tokenizer = wordpiece()
    blocks = [Blocks(x, Layout.of(tokenizer, 16)) for x in _corpora(folder)]
    flat = Mixture(blocks, Corruption.of(tokenizer), 1, smoothing=0.0)
    assert abs(flat.quotas[0] - flat.quotas[1]) <= 1
    rows = [flat.rows(k)[0] for k in range(2 * len(flat))]
    seen = [[i for language, i in rows if language == number] for number in range(2)]
    for number, blocks_seen in enumerate(seen):
        times = np.bincount(blocks_seen, minlength=len(blocks[number]))
        assert times.max() - times.min() <= 1, "rounds through all of its blocks"


def test_alternating_batches_are_monolingual_and_cut_to_the_smaller(folder: Path) -> None:
    tokenizer = wordpiece()
    blocks = [Blocks(x, Layout.of(tokenizer, 16)) for x in _corpora(folder)]
    batches = Alternating(blocks, Corruption.of(tokenizer), 3, seed=5)
    small = len(blocks[1])
    assert len(batches) == 2 * small < len(blocks[0]) + small
    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for k in range(4 * small):
        rows = batches.rows(k)
        assert {language for language, _ in rows} == {k % 2}
        seen[k % 2] |= {i for _, i in rows}
    assert len(seen[0]) == len(seen[1]) == small and max(seen[0]) >= small, "drawn, not the first ones"
    assert batches.batch(1)["languages"].tolist() == [1, 1, 1] and batches.languages == ("fr", "sw")


def test_corruption_has_its_shares_and_spares_special_tokens() -> None:
    tokenizer = wordpiece()
    corrupt = Corruption.of(tokenizer, 0.3)
    ids = corrupt.ordinary[torch.randint(len(corrupt.ordinary), (64, 128), generator=torch.Generator().manual_seed(0))]
    ids[:, ::7] = tokenizer.unk_token_id
    ids[:, ::11] = tokenizer.sep_token_id
    found, labels = corrupt(ids, torch.Generator().manual_seed(1))
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    chosen = labels != -100
    assert not (chosen & special).any() and torch.equal(found[~chosen], ids[~chosen])
    assert torch.equal(labels[chosen], ids[chosen])
    assert abs(chosen[~special].float().mean() - 0.3) < 0.02
    masked = found[chosen] == tokenizer.mask_token_id
    same = found[chosen] == ids[chosen]
    assert abs(masked.float().mean() - 0.8) < 0.03 and abs(same.float().mean() - 0.1) < 0.03
    assert torch.isin(found[chosen & (found != tokenizer.mask_token_id)], corrupt.ordinary).all()
    same_again, _ = corrupt(ids, torch.Generator().manual_seed(1))
    assert torch.equal(found, same_again)


def test_whole_words_are_chosen_together_and_sentences_without_spaces_are_not(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    (tmp_path / "fr.txt").write_text("\n".join([*SENTENCES[:60], "x" * 40]), encoding="utf-8")
    corpus = tokenise([tmp_path / "fr.txt"], tokenizer, tmp_path / "cache", words=True)[0]
    whole = corpus.document(60, "inside")
    assert not whole[0] and whole[1:].all() and len(whole) > 8
    batches = Mixture([Blocks(corpus, Layout.of(tokenizer, 64))], Corruption.of(tokenizer, 0.3, True), 8)
    partly = joined = 0
    for k in range(6):
        for row, (_, block) in enumerate(batches.rows(k)):
            ids, inside = batches.blocks[0].text(block)
            labels = batches.batch(k)["labels"][row][1 : 1 + len(ids)]
            assert inside is not None
            starts = [*np.flatnonzero(~inside).tolist(), len(ids)]
            for a, b in pairwise(starts):
                some = {bool(x) for x in labels[a:b] != -100}
                ordinary = np.isin(ids[a:b], batches.corruption.ordinary).all()
                if b - a > 1 and ordinary:
                    joined += b - a <= 8 and some == {True}
                    assert b - a > 8 or len(some) == 1
                    partly += b - a > 8 and len(some) == 2
    assert joined and partly
    with pytest.raises(ValueError, match="cut without words"):
        plain = tokenise([tmp_path / "fr.txt"], tokenizer, tmp_path / "cache")[0]
        Mixture([Blocks(plain, Layout.of(tokenizer, 64))], Corruption.of(tokenizer, 0.3, True), 8)
    uncut = sentencepiece(split=False)
    with pytest.raises(ValueError, match="does not cut a text into words"):
        tokenise([tmp_path / "fr.txt"], uncut, tmp_path / "cache", words=True)


def test_bad_calls(folder: Path, tmp_path: Path) -> None:
    tokenizer = wordpiece()
    corpora = _corpora(folder)
    (tmp_path / "fr.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match="fr has no text"):
        tokenise([tmp_path / "fr.txt"], tokenizer, tmp_path / "cache")
    with pytest.raises(ValueError, match="max_length is 2, expected more than 2"):
        Layout.of(tokenizer, 2)
    with pytest.raises(ValueError, match="held_out is 1.5"):
        corpora[0].held_out(1.5, 0)
    (tmp_path / "sw.txt").write_text("abc\n", encoding="utf-8")
    with pytest.raises(ValueError, match="sw has 1 documents that differ, of which 0.1 are held out"):
        tokenise([tmp_path / "sw.txt"], tokenizer, tmp_path / "cache")[0].held_out(0.1, 0)
    with pytest.raises(ValueError, match="no mask token"):
        Corruption(torch.arange(3), None)
    with pytest.raises(ValueError, match="blocks is empty"):
        Mixture([], Corruption.of(tokenizer), 1)
