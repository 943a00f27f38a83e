"""Of cached teacher outputs and of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import fastdistil as fd
from fastdistil.data import files, text
from fastdistil.teacher import Cached, Writer
from mistakes import Mistake
from mistakes.models import encoder, masked

IDS = torch.arange(5, dtype=torch.int32)
ROWS = [{"input_ids": [0, 1, 2, 3, 4]}]
HEAD = {"vocabulary": 7, "head_weight": torch.ones(7, 3)}


def _collate(rows: list[Any]) -> Any:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _hidden(folder: Path, **options: Any) -> Writer:
    return Writer(folder / "store", kind="hidden", **{"width": 3, **HEAD, **options})


def _topk(folder: Path, **options: Any) -> Writer:
    return Writer(folder / "store", **{"kind": "topk", "width": 2, "vocabulary": 7, **options})


def _layers(folder: Path) -> Any:
    with Writer(folder / "store", kind="layers", width=4, vocabulary=0, layers=[2]) as writer:
        writer.add(input_ids=IDS, hidden_2=torch.ones(5, 4))
    return fd.teacher.open(folder / "store")


def _stored(folder: Path) -> Any:
    with _hidden(folder) as writer:
        writer.add(hidden=torch.zeros(4, 3))
    return fd.teacher.open(folder / "store")


def _cut(folder: Path) -> Path:
    store = _stored(folder)
    shard = store.path / store.index.shards[0].file
    shard.write_bytes(shard.read_bytes()[:-8])
    return store.path


def _unfinished(folder: Path) -> Path:
    writer = _hidden(folder)
    writer.add(hidden=torch.zeros(4, 3))
    writer.flush()
    return folder / "store"


def _file(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content, encoding="utf-8")
    return str(folder / name)


def _full(folder: Path) -> Path:
    (folder / "store").mkdir()
    (folder / "store" / "thesis.tex").touch()
    return folder


def _other_pieces(folder: Path) -> None:
    Cached(_layers(folder), [{"input_ids": [9, 1, 2, 3, 4]}], _collate).read([0])


def _without_mask(rows: list[Any]) -> Any:
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


BATCH = {"input_ids": torch.arange(5)[None], "attention_mask": torch.ones(1, 5).long()}
VALUES, INDICES = torch.full((4, 2), -1.0), torch.zeros(4, 2, dtype=torch.long)

MISTAKES = [
    # cached teacher outputs
    Mistake("a-store-that-is-not-there", lambda x: fd.teacher.open(x / "none"), "none", "missing", "index", "store"),
    Mistake("a-file-for-a-store", lambda x: fd.teacher.open(_file(x, "store.txt", "")), "store.txt", "a file", "folder"),
    Mistake("a-store-that-was-cut-off", lambda x: fd.teacher.open(_cut(x)), "shard-00000.safetensors", "bytes", "bytes"),
    Mistake("a-store-that-is-incomplete", lambda x: fd.teacher.open(_unfinished(x)), "store", "incomplete", "go on writing", "incomplete=True"),
    Mistake("an-example-that-is-none", lambda x: _stored(x)[1], "example", "1", "less than 1"),
    Mistake("a-slice-of-a-store", lambda x: _stored(x)[0:1], "example", "slice", "integer"),
    Mistake("a-kind-of-store", lambda x: Writer(x, kind="logits", width=3, vocabulary=7), "kind", "'logits'", "'hidden'"),
    Mistake("a-store-without-a-head", lambda x: Writer(x, kind="hidden", width=3, vocabulary=7), "head_weight", "None", "(7, 3)"),
    Mistake("a-store-in-a-full-folder", lambda x: _hidden(_full(x)), "store", "not empty", "another folder"),
    Mistake("a-store-written-again", lambda x: (_stored(x), _hidden(x)), "store", "complete store", "another folder"),
    Mistake("a-store-continued-otherwise", lambda x: (_unfinished(x), _hidden(x, dtype=torch.float16)), "dtype", "'float32'", "'float16'"),
    Mistake("a-store-of-numpys-dtype", lambda x: _hidden(x, dtype="float16"), "dtype", "float16", "torch.float16"),
    Mistake("a-batch-for-an-example", lambda x: _hidden(x).add(hidden=torch.zeros(2, 4, 3)), "hidden", "(2, 4, 3)", "(tokens, 3)", "one example"),
    Mistake("an-example-of-another-kind", lambda x: _topk(x).add(hidden=torch.zeros(4, 3)), "add", "hidden", "values"),
    Mistake("columns-that-are-none", lambda x: _topk(x).add(values=VALUES, indices=INDICES + 7), "indices", "7", "0 to 6"),
    Mistake("an-example-of-numpy", lambda x: _hidden(x).add(hidden=torch.zeros(4, 3).numpy()), "hidden", "ndarray", "torch.Tensor"),
    Mistake("more-columns-than-the-vocabulary", lambda x: _topk(x, width=9), "width", "9", "7"),
    Mistake("a-teacher-without-a-head", lambda x: fd.teacher.write(encoder(), [BATCH], x / "store", progress=False), "model", "BertModel", "linear classifier", "kind='layers'"),
    Mistake("a-teacher-by-name", lambda x: fd.teacher.write("bert-base-cased", [BATCH], x / "store", progress=False), "model", "str", "model", "from_pretrained"),
    Mistake("a-loader-of-tuples", lambda x: fd.teacher.write(masked(), [(BATCH["input_ids"],)], x / "store", progress=False), "loader", "tuple", "input_ids"),
    Mistake("a-loader-without-input-ids", lambda x: fd.teacher.write(masked(), [{"ids": BATCH["input_ids"]}], x / "store", progress=False), "loader", "ids", "input_ids"),
    Mistake("layers-of-another-kind-of-store", lambda x: fd.teacher.write(masked(), [BATCH], x / "store", layers=[1], progress=False), "layers", "'hidden'", "'layers'"),
    Mistake("a-store-of-another-kind", lambda x: Cached(_stored(x), ROWS, _collate), "store", "'hidden'", "'layers'"),
    Mistake("fewer-rows-than-examples", lambda x: Cached(_layers(x), ROWS * 2, _collate), "rows", "2", "1"),
    Mistake("a-layer-that-is-not-stored", lambda x: Cached(_layers(x), ROWS, _collate, layers=[6]), "layers", "6", "[2]"),
    Mistake("another-tokenizers-pieces", lambda x: _other_pieces(x), "row", "[9, 1, 2, 3, 4]", "expected the same"),
    Mistake("a-collate-without-a-mask", lambda x: Cached(_layers(x), ROWS, _without_mask).read([0]), "collate", "input_ids", "attention_mask"),
    Mistake("a-path-for-a-store", lambda x: Cached(x, ROWS, _collate), "store", "Path", "Store", "teacher.open"),
    Mistake("padding-nothing", lambda _: fd.teacher.pad([]), "examples", "empty", "at least one"),
    # data
    Mistake("a-file-that-is-not-there", lambda x: files.read([x / "none.tsv"], "tokens"), "none.tsv", "no such file", "file"),
    Mistake("a-string-for-files", lambda x: files.read(_file(x, "a.tsv", "a\tO\n"), "tokens"), "paths", "str", "list"),
    Mistake("an-empty-file", lambda x: files.read([_file(x, "a.tsv", "")], "tokens"), "a.tsv", "empty", "words and tags"),
    Mistake("a-line-without-a-tag", lambda x: files.read([_file(x, "a.tsv", "a\tO\nb\n")], "tokens"), "a.tsv:2", "1 column", "2"),
    Mistake("a-broken-line-of-json", lambda x: files.read([_file(x, "a.jsonl", '{"text": "a", "label": "b"}\n{"text": \n')], "text"), "a.jsonl:2", "no JSON", "column"),
    Mistake("a-file-without-labels", lambda x: files.read([_file(x, "a.jsonl", '{"text": "a"}\n')], "text"), "a.jsonl", "text", "label"),
    Mistake("a-kind-of-task", lambda x: files.read([_file(x, "a.tsv", "a\tO\n")], "ner"), "task", "'ner'", "'tokens'"),
    Mistake("conllu", lambda x: files.read([_file(x, "a.conllu", "1\ta\n")], "tokens"), "a.conllu", "CoNLL-U", "words and one tag"),
    Mistake("a-text-that-is-not-there", lambda x: text.read(str(x / "none.txt")), "none.txt", "no file", "file or folder"),
    Mistake("a-language-without-a-file", lambda _: text.sources(["fr="]), "text", "'fr='", "LANGUAGE=FILE"),
    Mistake("a-column-that-is-none", lambda x: text.read(_file(x, "a.jsonl", '{"a": "x", "b": "y"}\n'), column="c"), "column", "'c'", "'a'"),
]  # fmt: skip
