"""Stores of kind "layers": hidden states of any layers and logits from one pass, and batches that read them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastdistil as fd
from fastdistil import teacher
from fastdistil.batches import Batches

transformers = pytest.importorskip("transformers")

V, C = 53, 5
LENGTHS = (4, 7, 1, 3, 6, 2, 5)


def model(kind: str = "TokenClassification", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12, num_labels=C,
        max_position_embeddings=16, initializer_range=0.5,
    )  # fmt: skip
    return getattr(transformers, f"BertFor{kind}")(config)


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, V, (n,), generator=generator).tolist()} for n in LENGTHS]


def collate(picked: list[dict[str, list[int]]], left: bool = False) -> dict[str, Tensor]:
    size = max(len(row["input_ids"]) for row in picked)
    ids, mask = torch.zeros(len(picked), size, dtype=torch.long), torch.zeros(len(picked), size, dtype=torch.long)
    for i, row in enumerate(picked):
        n = len(row["input_ids"])
        places = slice(size - n, size) if left else slice(n)
        ids[i, places], mask[i, places] = torch.tensor(row["input_ids"]), 1
    return {"input_ids": ids, "attention_mask": mask}


def loader(size: int = 3) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(LENGTHS), size):
        yield collate(rows()[start : start + size])


def write(path: Path, tagger: nn.Module | None = None, **options: object) -> teacher.Store:
    settings = {"kind": "layers", "layers": [-1, 0, 1], "progress": False, "shard_bytes": 600, **options}
    return teacher.write(model() if tagger is None else tagger, loader(), path, **settings)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["TokenClassification", "SequenceClassification"])
def test_layers_and_logits_are_those_of_the_model(tmp_path: Path, kind: str, dtype: torch.dtype | None) -> None:
    tagger = model(kind)
    store = write(tmp_path / "s", tagger, dtype=dtype)
    assert tagger.training and len(store.index.shards) > 1
    index = store.index
    assert (index.layers, index.width, index.vocabulary, index.version) == ([0, 1, 3], 8, C, 3)
    assert index.logits == ("tokens" if kind == "TokenClassification" else "examples")
    store.verify()
    tagger.eval()
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype is None else {"atol": 2e-2, "rtol": 2e-2}
    for i, row in enumerate(rows()):
        with torch.no_grad(), fd.capture(tagger, hidden_states=[0, 1, 3]) as captured:
            out = tagger(torch.tensor([row["input_ids"]]))
        found = store[i]
        assert found["input_ids"].tolist() == row["input_ids"] and found["input_ids"].dtype == torch.int32
        for layer in (0, 1, 3):
            states = found[f"hidden_{layer}"]
            assert states.dtype == (torch.float32 if dtype is None else dtype)
            torch.testing.assert_close(states.float(), captured.hidden_states[layer][0], **close)
        assert found["logits"].dtype == torch.float32
        torch.testing.assert_close(found["logits"], out.logits[0], atol=1e-5, rtol=1e-5)
    assert store.read(2, ["logits"]).keys() == {"logits"}
    batch = teacher.pad([store[1], store[2]])
    assert batch["hidden_3"].shape == (2, 7, 8) and batch["logits"].shape == (
        (2, 7, C) if index.logits == "tokens" else (2, C)
    )
    assert torch.equal(store.to_datasets()[3]["logits"], store[3]["logits"])


def test_without_logits_or_without_layers(tmp_path: Path) -> None:
    base = model().bert
    store = write(tmp_path / "s", base, layers=[2], logits=False)
    assert store[0].keys() == {"input_ids", "hidden_2"} and store.index.vocabulary == 0
    store = write(tmp_path / "t", layers=[])
    assert store[0].keys() == {"input_ids", "logits"} and store.index.width == 0
    with pytest.raises(ValueError, match="model is BertModel, which gives no logits, expected a classifier"):
        write(tmp_path / "u", base)
    with pytest.raises(ValueError, match="layers is empty and logits is '', expected something to write"):
        write(tmp_path / "v", base, layers=[], logits=False)


def test_it_continues_where_it_was_cut_off(tmp_path: Path) -> None:
    def stops() -> Iterator[dict[str, Tensor]]:
        batches = loader()
        yield next(batches)
        yield next(batches)
        raise KeyboardInterrupt

    options = {"kind": "layers", "layers": [1], "progress": False}
    with pytest.raises(KeyboardInterrupt):
        teacher.write(model(), stops(), tmp_path / "s", **options)
    assert len(teacher.open(tmp_path / "s", incomplete=True)) == 6, "Ctrl-C lost what was computed"
    for change, message in (
        ({"layers": [2]}, r"was begun with layers = \[1\], this writer has \[2\]"),
        ({"logits": False}, "was begun with vocabulary = 5, this writer has 0"),
        ({"dtype": torch.bfloat16}, "was begun with dtype = 'float32', this writer has 'bfloat16'"),
    ):
        with pytest.raises(ValueError, match=message):
            teacher.write(model(), loader(), tmp_path / "s", **{**options, **change})
    with pytest.raises(ValueError, match="was begun with teacher = "):
        teacher.write(model(seed=1), loader(), tmp_path / "s", **options)
    with pytest.raises(ValueError, match="loader gave another example 0 than .* holds, expected the same examples"):
        teacher.write(model(), reversed(list(loader(1))), tmp_path / "s", **options)
    seen = []
    tagger = model()
    tagger.register_forward_pre_hook(lambda _, __, batch: seen.append(len(batch["input_ids"])), with_kwargs=True)
    store = teacher.write(tagger, loader(), tmp_path / "s", **options)
    assert seen == [1, 1], "an example was computed twice"  # the first is the look at its shapes
    whole = teacher.write(model(), loader(), tmp_path / "whole", **options)
    for x, y in zip(store, whole, strict=True):
        for name in y:
            torch.testing.assert_close(x[name], y[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("left", [False, True])
def test_cached_batches_are_what_the_teacher_says_live(tmp_path: Path, left: bool) -> None:
    tagger = model()
    cached = teacher.Cached(write(tmp_path / "s", tagger), rows(), lambda picked: collate(picked, left), layers=[1])
    batch = cached.read([5, 1, 2])
    with torch.no_grad(), fd.capture(tagger.eval(), hidden_states=[1]) as captured:
        out = tagger(
            **{name: batch[name] for name in ("input_ids", "attention_mask")},
            position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0),
        )
    keep = batch["attention_mask"].bool()
    assert batch.keys() == {"input_ids", "attention_mask", "teacher_hidden_1", "teacher_logits"}
    torch.testing.assert_close(batch["teacher_hidden_1"][keep], captured.hidden_states[1][keep], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch["teacher_logits"][keep], out.logits[keep], atol=1e-5, rtol=1e-5)
    assert (batch["teacher_logits"][~keep] == 0).all() and (batch["teacher_hidden_1"][~keep] == 0).all()
    again = pickle.loads(pickle.dumps(cached.store))
    assert torch.equal(again[4]["logits"], cached.store[4]["logits"])


def test_batches_for_the_loop(tmp_path: Path) -> None:
    cached = teacher.Cached(write(tmp_path / "s"), rows(), collate)
    batches = cached.batches(batch_size=3, seed=1)
    assert isinstance(batches, Batches) and len(batches) == 7 and batches.fingerprint() == cached.fingerprint()
    seen = [tuple(row[row > 0].tolist()) for k in range(7) for row in batches.batch(k)["input_ids"]]
    assert sorted(seen) == sorted(3 * [tuple(row["input_ids"]) for row in rows()]), "three epochs"
    first, again = batches.batch(2), cached.batches(batch_size=3, seed=1).batch(2)
    assert all(torch.equal(first[name], again[name]) for name in first) and "teacher_hidden_1" in first
    held_out = cached.in_order(2)
    for _ in range(2):
        lengths = torch.cat([batch["attention_mask"].sum(1) for batch in held_out])
        assert lengths.tolist() == list(LENGTHS)


def test_cached_batches_of_whole_sequences_and_other_orders(tmp_path: Path) -> None:
    store = write(tmp_path / "s", model("SequenceClassification"))
    picked = [rows()[i] for i in (6, 0, 3)]
    cached = teacher.Cached(store, picked, collate, numbers=[6, 0, 3])
    batch = cached.read([2, 0])
    assert torch.equal(batch["teacher_logits"], torch.stack([store[3]["logits"], store[6]["logits"]]))
    assert torch.equal(batch["teacher_hidden_3"][1], store[6]["hidden_3"])
    assert len(cached) == 3 and cached[-1]["input_ids"] == rows()[3]["input_ids"]
    with pytest.raises(IndexError, match="row 3, expected less than 3"):
        cached[3]


def test_rows_in_the_students_own_ids(tmp_path: Path) -> None:
    pieces = torch.tensor(sorted({0, *(i for row in rows() for i in row["input_ids"])}))
    renumbered = {old: new for new, old in enumerate(pieces.tolist())}
    own = [{"input_ids": [renumbered[i] for i in row["input_ids"]]} for row in rows()]
    store = write(tmp_path / "s")
    batch = teacher.Cached(store, own, collate, pieces=pieces).read([0, 4])
    assert torch.equal(batch["teacher_hidden_0"][1], store[4]["hidden_0"])
    with pytest.raises(
        ValueError, match=r"teacher.Cached: example 0 of .* has 4 pieces, .* its row has 4, .* the same"
    ):
        teacher.Cached(store, own, collate).read([0, 4])


def test_rows_that_the_teacher_did_not_see_are_refused(tmp_path: Path) -> None:
    store = write(tmp_path / "s")
    shorter = [{"input_ids": row["input_ids"][:-1] or [3]} for row in rows()]
    for wrong in (shorter, rows()[1:] + rows()[:1]):
        with pytest.raises(ValueError, match=r"has 4 pieces, .* expected the same"):
            teacher.Cached(store, wrong, collate).read([0])
    with pytest.raises(ValueError, match="rows has 6 entries, expected 7"):
        teacher.Cached(store, rows()[1:], collate)
    with pytest.raises(ValueError, match="numbers has 6 entries, expected 7"):
        teacher.Cached(store, rows(), collate, numbers=range(6))
    with pytest.raises(ValueError, match=r"layers holds 2, .* has \[0, 1, 3\]"):
        teacher.Cached(store, rows(), collate, layers=[1, 2])
    hidden = teacher.write(model(), loader(), tmp_path / "hidden", progress=False)
    with pytest.raises(ValueError, match="is of kind 'hidden', expected 'layers'"):
        teacher.Cached(hidden, rows(), collate)


def test_other_outputs_have_another_fingerprint(tmp_path: Path) -> None:
    prints = [
        teacher.Cached(write(tmp_path / name, model(seed=seed)), rows()[:7], collate).fingerprint()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert prints[0] == prints[1] != prints[2] and json.loads(json.dumps(prints[0])) == prints[0]


WRITERS = [
    ({"layers": [1, 0]}, ValueError, r"layers is \[1, 0\], expected ascending numbers"),
    ({"layers": [1], "logits": "rows"}, ValueError, "logits is 'rows', expected 'tokens', 'examples' or ''"),
    ({"layers": [1], "width": 0}, ValueError, "width is 0, expected an integer of at least 1"),
    ({"kind": "topk", "layers": [1], "width": 1}, ValueError, "layers came with kind='topk', expected kind='layers'"),
]


@pytest.mark.parametrize(("options", "kind", "message"), WRITERS)
def test_bad_writers(tmp_path: Path, options: dict[str, object], kind: type[Exception], message: str) -> None:
    settings = {"kind": "layers", "width": 2, "vocabulary": 3, **options}
    with pytest.raises(kind, match=f"teacher.Writer: {message}"):
        teacher.Writer(tmp_path / "s", **settings)


def test_bad_examples(tmp_path: Path) -> None:
    options = {"kind": "layers", "width": 2, "vocabulary": 3, "layers": [1], "logits": "examples"}
    writer = teacher.Writer(tmp_path / "s", dtype=torch.float16, **options)
    good = {"input_ids": torch.arange(4), "hidden_1": torch.ones(4, 2), "logits": torch.ones(3)}
    for change, kind, message in (
        ({"logits": torch.ones(4, 3)}, ValueError, r"logits has shape \(4, 3\), expected \(3,\)"),
        ({"hidden_1": torch.ones(3, 2)}, ValueError, r"hidden_1 has shape \(3, 2\), expected \(tokens, 2\)"),
        ({"input_ids": torch.ones(4)}, TypeError, "input_ids has dtype torch.float32, expected one like torch.int32"),
        (
            {"hidden_1": torch.full((4, 2), 1e5)},
            ValueError,
            "hidden_1 holds 1e.05, too large for float16; use bfloat16",
        ),
    ):
        with pytest.raises(kind, match=message):
            writer.add(**{**good, **change})
    for layers, kind, message in (
        ([4], ValueError, "layers holds 4, expected -4 to 3, BertForTokenClassification has 3 blocks"),
        ([1.0], TypeError, "layers holds 1.0, expected whole numbers"),
    ):
        with pytest.raises(kind, match=message):
            write(tmp_path / "t", layers=layers)
    with pytest.raises(ValueError, match="layers came with kind='topk', expected kind='layers'"):
        write(tmp_path / "t", kind="topk", layers=[1])
