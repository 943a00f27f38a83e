"""XtremeDistil from files to a saved student, on a tiny random teacher."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from task_cases import wordpiece
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    pipeline,
)

import fastdistil as fd
import fastdistil.models
from fastdistil.configs.xtremedistil import XtremeDistilConfig
from fastdistil.data import encode
from fastdistil.recipes.stages import run_stages
from fastdistil.systems import measure, outputs, report, task_data, xtremedistil
from fastdistil.systems import plan as plans
from fastdistil.systems.memory import PeakMemory, anonymous_mib

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
WORDS = {"O": ["the", "cat", "sat", "on", "mat", "in"], "LOC": ["Paris", "Danmark"], "PER": ["København", "ligger"]}


def sentences(count: int, seed: int) -> list[list[tuple[str, str]]]:
    """Words whose tag is theirs alone, so that a few steps teach them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(items: list[Any]) -> Any:
        return items[int(torch.randint(len(items), (1,), generator=generator))]

    return [[(draw(WORDS[kind]), "O" if kind == "O" else f"B-{kind}") for kind in (draw(["O", "LOC", "PER"]) for _ in range(3 + i % 5))] for i in range(count)]  # fmt: skip


def column_file(path: Path, count: int, seed: int) -> str:
    blocks = ["".join(f"{word}\t{tag}\n" for word, tag in sentence) for sentence in sentences(count, seed)]
    path.write_text("\n".join(blocks), encoding="utf-8")
    return str(path)


def sizes(labels: list[str]) -> BertConfig:
    return BertConfig(
        vocab_size=len(wordpiece()), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, id2label=dict(enumerate(labels)), label2id={x: i for i, x in enumerate(labels)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A teacher that was taught the tags by some steps, and data."""
    folder = tmp_path_factory.mktemp("xtreme")
    tokenizer = wordpiece()
    torch.manual_seed(0)
    model = BertForTokenClassification(sizes(LABELS))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    words, tags = zip(*[zip(*sentence, strict=True) for sentence in sentences(60, 9)], strict=True)
    batch = tokenizer([list(x) for x in words], is_split_into_words=True, padding=True, return_tensors="pt")
    labels = torch.full_like(batch["input_ids"], -100)
    for i, own in enumerate(tags):
        for j, word in enumerate(batch.word_ids(i)):
            if word is not None and (j == 0 or batch.word_ids(i)[j - 1] != word):
                labels[i, j] = LABELS.index(own[word])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for _ in range(40):
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return {
        "teacher": str(folder / "teacher"),
        "train": (column_file(folder / "en_train.tsv", 24, 1),),
        "unlabelled": (column_file(folder / "da_train.tsv", 40, 2),),
        "test": (column_file(folder / "en_test.tsv", 20, 3), column_file(folder / "da_test.tsv", 20, 4)),
    }


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures and latencies take longer than these students."""
    monkeypatch.setattr(measure, "LATENCY_ROUNDS", {1: 1})
    if request.node.callspec.params.get("student") != "transformer" if hasattr(request.node, "callspec") else True:
        monkeypatch.setattr(report, "_plot_curves", lambda *_: None)
        monkeypatch.setattr(report, "_plot_scores", lambda *_: None)


def config(files: dict[str, Any], out: Path, **changes: Any) -> XtremeDistilConfig:
    small = {
        "embedding_size": 12, "lstm_size": 12, "hidden_size": 16, "layers": 2, "heads": 2, "ffn_size": 24,
        "batch_size": 8, "steps": 90, "lr": 1e-2, "save_every": 20, "max_length": 32, "out": out,
    }  # fmt: skip
    return XtremeDistilConfig(**{**small, **files, **changes})


@pytest.mark.parametrize("student", ["bilstm", "transformer"])
def test_unfreezing_from_files_to_a_student_that_others_load(
    files: dict[str, Any], tmp_path: Path, student: str
) -> None:
    metrics = xtremedistil.run(config(files, tmp_path / "run", student=student))
    groups = ["head", "projection", "lstm"] if student == "bilstm" else ["head", "block-2", "block-1"]
    parts = [f"{kind}-{group}" for kind in ("logits", "labels") for group in (*groups, "embeddings")]
    assert list(metrics["steps"]) == ["states", *parts]
    assert metrics["metric"] == "f1" and metrics["teacher_layer"] == 1 and metrics["peak_memory_mib"] > 10
    assert metrics["scores"]["teacher"]["da"]["f1"] > 95 and metrics["scores"]["student"]["da"]["f1"] > 50
    assert set(metrics["scores"]["student"]) == {"en", "da"}
    folder = tmp_path / "run" / "student"
    model, tokenizer = AutoModelForTokenClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == metrics["vocabulary"] < len(wordpiece())
    assert model.config.id2label == dict(enumerate(LABELS))
    found = pipeline("token-classification", model=str(folder), aggregation_strategy="first")("the cat sat in Paris")
    assert [x["word"] for x in found if x["entity_group"] == "LOC"] == ["Paris"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["scores"] == metrics["scores"]
    assert not (tmp_path / "run" / "outputs").exists() and (folder / "README.md").is_file()
    assert all(entries for entries in metrics["held_out"].values()), "a stage without an evaluation"
    assert xtremedistil.run(config(files, tmp_path / "run", student=student, resume=True)) == metrics
    with pytest.raises(ValueError, match="holds this run already"):
        xtremedistil.run(config(files, tmp_path / "run", student=student))


@pytest.mark.parametrize("schedule", ["stage-wise", "joint", "logits", "labels"])
def test_the_other_schedules_share_the_teachers_outputs(files: dict[str, Any], tmp_path: Path, schedule: str) -> None:
    cache = tmp_path.parent / "shared-outputs"
    options = {
        "schedule": schedule,
        "cache": cache / str(schedule in ("stage-wise", "joint")),
        "student": "transformer",
    }
    metrics = xtremedistil.run(config(files, tmp_path / "run", trim=False, **options))
    names = {"stage-wise": ["states", "logits", "labels"]}.get(schedule, [schedule])
    assert list(metrics["steps"]) == names and metrics["vocabulary"] == len(wordpiece())
    assert metrics["scores"]["student"]["en"]["f1"] > 50
    if schedule != "labels":
        store = fd.teacher.open(options["cache"] / "transfer")
        assert len(store) == 24 - 2 + 40 and store.index.layers == ([1] if options["cache"].name == "True" else [])
    if schedule == "joint":  # what stage-wise has written, with its states
        assert sorted(x.name for x in (cache / "True").iterdir()) == ["held-out", "transfer"]


class Killed(Exception):
    pass


def dying(monkeypatch: pytest.MonkeyPatch, kind: type, method: str, at: int, error: type[BaseException]) -> None:
    """The `at`-th call of a method is the last one."""
    own, calls = getattr(kind, method), []

    def call(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise error
        return own(self, *args, **options)

    monkeypatch.setattr(kind, method, call)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForTokenClassification.from_pretrained(folder / "student").state_dict()


def test_killed_anywhere_and_continued_it_is_the_same_student_bit_for_bit(
    files: dict[str, Any], tmp_path: Path
) -> None:
    options = {"steps": 45, "save_every": 2, "test": ()}
    whole = xtremedistil.run(config(files, tmp_path / "whole", **options))
    # While the teacher runs, in the first stage, between checkpoints of a later one, and when all is trained.
    for kind, method, at, error in (
        (BertForTokenClassification, "forward", 4, KeyboardInterrupt),
        (torch.optim.AdamW, "step", 6, Killed),
        (torch.optim.AdamW, "step", 20, Killed),
        (xtremedistil.Scorer, "__call__", 1, Killed),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(error):
            dying(patch, kind, method, at, error)
            xtremedistil.run(config(files, tmp_path / "cut", resume=True, **options))
    metrics = xtremedistil.run(config(files, tmp_path / "cut", resume=True, **options))
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert metrics["dev"] == whole["dev"] and metrics["curves"] == whole["curves"]


def test_a_teacher_of_texts(files: dict[str, Any], tmp_path: Path) -> None:
    """Labels of texts: places or persons."""
    torch.manual_seed(0)
    BertForSequenceClassification(sizes(["LOC", "PER"])).save_pretrained(tmp_path / "teacher")
    wordpiece().save_pretrained(tmp_path / "teacher")
    for name, count, seed in (("train", 30, 1), ("more", 20, 2), ("test", 20, 3)):
        generator, lines = torch.Generator().manual_seed(seed), []
        for i in range(count):
            drawn = torch.randint(2, (3 + i % 4,), generator=generator).tolist()
            kind = ("LOC", "PER")[i % 2]
            lines.append(json.dumps({"text": " ".join(WORDS[kind][j] for j in drawn), "label": kind}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    texts = {name: (str(tmp_path / f"{name}.jsonl"),) for name in ("train", "test")}
    more = {"unlabelled": (str(tmp_path / "more.jsonl"),), "teacher": str(tmp_path / "teacher")}
    for student in ("bilstm", "transformer"):
        metrics = xtremedistil.run(
            config(
                {**texts, **more}, tmp_path / student, schedule="stage-wise", student=student, shares=(0.1, 0.1, 0.8)
            )
        )
        assert metrics["metric"] == "macro_f1" and metrics["scores"]["student"]["test"]["macro_f1"] > 60
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / student / "student")
        assert model.config.id2label == {0: "LOC", 1: "PER"}


def test_a_student_that_learned_nothing_is_told_of(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = xtremedistil.student_of

    def outside(*args: Any) -> xtremedistil.Student:
        """Says "O" to every word, as students do whose learning rate is too high."""
        student = own(*args)
        student.model.classifier.bias.data[0] = 30
        return student

    monkeypatch.setattr(xtremedistil, "student_of", outside)
    with pytest.warns(UserWarning, match="student's F1 on the development data is 0: it finds no entity"):
        metrics = xtremedistil.run(config(files, tmp_path / "run", schedule="labels", steps=2, lr=1e-6, test=()))
    assert metrics["scores"]["student"]["development data"]["f1"] == 0


def test_the_development_data_are_a_share_of_the_training_data_or_given(files: dict[str, Any], tmp_path: Path) -> None:
    kept, held = task_data.split(20, 0.1)
    assert len(held) == 2 and sorted(kept + held) == list(range(20))
    assert all(map(len, task_data.split(2, 0.1))) and task_data.spread(10, 4) == [0, 3, 6, 9]
    teacher, tokenizer = AutoModelForTokenClassification.from_pretrained(files["teacher"]), wordpiece()
    data = task_data.read(config(files, tmp_path, dev=files["test"], dev_rows=6), "tokens", teacher, tokenizer)
    assert (len(data.labelled), len(data.transfer), len(data.dev), len(data.held_out)) == (24, 64, 40, 6)
    assert set(data.transfer[30]["labels"]) == {-100} != set(data.labelled[0]["labels"])
    with pytest.raises(ValueError, match="train: has 1 rows, expected at least 2"):
        task_data.split(1, 0.1)


def test_a_teacher_of_other_labels_is_refused_with_both_sets(files: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(files["teacher"], tmp_path / "teacher")
    path = tmp_path / "teacher" / "config.json"
    path.write_text(path.read_text().replace("-PER", "-ORG"))
    wrong = {**files, "teacher": str(tmp_path / "teacher")}
    with pytest.raises(ValueError, match="its labels are O, B-LOC, .*-ORG, the data's are O, .*: it has no B-PER"):
        xtremedistil.run(config(wrong, tmp_path / "run"))


def test_a_cache_of_another_teacher_or_other_data_is_refused(files: dict[str, Any], tmp_path: Path) -> None:
    options = {"schedule": "logits", "cache": tmp_path / "cache", "steps": 1, "test": ()}
    xtremedistil.run(config(files, tmp_path / "a", **options))
    with pytest.raises(ValueError, match="holds the outputs of 62 rows, expected 22"):
        xtremedistil.run(config(files, tmp_path / "b", **{**options, "unlabelled": ()}))
    other = BertForTokenClassification.from_pretrained(files["teacher"])
    torch.nn.init.normal_(other.classifier.weight)
    other.save_pretrained(tmp_path / "other")
    wordpiece().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="holds another teacher's outputs"):
        xtremedistil.run(config({**files, "teacher": str(tmp_path / "other")}, tmp_path / "c", **options))
    with pytest.raises(ValueError, match=r"has layers \[\], expected 1 among them"):
        xtremedistil.run(config(files, tmp_path / "d", **{**options, "schedule": "joint"}))


def test_a_dry_run_writes_nothing(files: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "da.txt").write_text("the cat sat in Paris\n" * 20, encoding="utf-8")
    files = {**files, "unlabelled": (*files["unlabelled"], str(tmp_path / "da.txt"))}
    found = xtremedistil.run(config(files, tmp_path / "run", dry_run=True, steps=None, epochs=2))
    assert not (tmp_path / "run").exists()
    stages = {x["stage"]: x["steps"] for x in found["stages"]}
    assert stages["teacher's outputs"] == 11 and stages["states"] == 21 and stages["labels-head"] == 6
    assert len(stages) == 10 and found["data"]["unlabelled"] == "60 from 2 files"


def test_processes_that_accelerate_does_not_know_write_nothing(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 in the environment, accelerate runs 1 process: on CPUs set"):
        xtremedistil.run(config(files, tmp_path / "run"))
    assert not (tmp_path / "run" / "outputs").exists()


BAD = [
    ({"train": ()}, "train is empty, expected at least one file"),
    ({"shares": (0.5, 0.5)}, r"shares is \(0.5, 0.5\), expected three numbers"),
    ({"steps": 5}, "XtremeDistil: steps is 5, which leaves one of 9 stages without a step"),
    ({"teacher_layer": 3}, "teacher_layer is 3, expected -3 to 2"),
    ({"hidden_size": 15}, "hidden_size is 15, expected a multiple of heads = 2"),
    ({"hidden_size": 18, "student": "transformer"}, "hidden_size is 18, expected 1 to 16, the width of the"),
    ({"lr": 0.0}, "lr 0.0, expected more than 0"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_options(files: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        xtremedistil.run(config(files, tmp_path / "run", **changes))


@pytest.mark.skipif(anonymous_mib() is None, reason="the system does not tell a process' own memory")
def test_peak_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """The outputs of 200 and of 800 rows, 26 and 103 MiB, written and then read in shuffled batches."""
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
    model = BertForTokenClassification(BertConfig(vocab_size=100, max_position_embeddings=64, **shape)).eval()
    ids = torch.randint(5, 100, (800, 64)).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": ids, "first": [[1]] * 800, "labels": [[-100]] * 800})
    rows.save_to_disk(tmp_path / "rows")

    def peak(count: int) -> float:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what an earlier test has freed is not there to be filled again
        before = anonymous_mib()
        some = datasets.load_from_disk(tmp_path / "rows").select(range(count))
        options = {"layers": [0, 1], "dtype": "float32", "pad_id": 0, "batch_size": 16, "shard_bytes": 2 << 20}
        with PeakMemory(0.002) as memory:
            made = outputs.cached(model, some, tmp_path / str(count), collate=encode.collate(0), pieces=None, **options)
            batches = made.batches(16, seed=0)
            for k in range(count // 16):
                batches.batch(k)
        size = sum(x.stat().st_size for x in (tmp_path / str(count)).iterdir()) / 2**20
        assert size > 0.12 * count
        return memory.mib - before

    peak(64)  # what torch and datasets take when they are first used
    few, many = peak(200), peak(800)
    assert many < few + 35, (few, many)  # more than the allocator's own ups and downs, less than half of the outputs


def test_a_full_size_teacher_and_student_run_some_steps(tmp_path: Path) -> None:
    """mBERT's size and the paper's BiLSTM, from random weights; nothing is loaded or saved."""
    with torch.device("meta"):
        big = BertForTokenClassification(BertConfig(vocab_size=119_547, num_labels=len(LABELS)))
    big.to_empty(device="cpu")
    for parameter in big.parameters():
        parameter.data.fill_(0.01)
    teacher = big.eval()
    teacher.bert.embeddings.register_buffer("position_ids", torch.arange(512)[None], persistent=False)
    teacher.bert.embeddings.register_buffer("token_type_ids", torch.zeros(1, 512, dtype=torch.long), persistent=False)
    pieces = torch.arange(0, 119_547, 300)
    teacher.get_input_embeddings().weight.data[pieces] = torch.randn(len(pieces), 768)
    ids = [[int(pieces[(7 * i + j) % len(pieces)]) for j in range(4 + i)] for i in range(4)]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "first": [[1]] * 4, "labels": [[i] for i in range(4)]})
    setup = XtremeDistilConfig(teacher="none", train=("none",), out=tmp_path, steps=20, batch_size=2, evaluate_every=5)
    student = xtremedistil.student_of(setup, teacher, pieces, 0, LABELS)
    sizes = {name: tuple(p.shape) for name, p in student.model.named_parameters()}
    assert sizes["bilstm.layers.0.lstm.weight_hh_l0"] == (2400, 600)
    assert sizes["bilstm.projection.0.weight"] == (768, 1200)
    collate = outputs.Renumbered(encode.collate(0), pieces, 119_547)
    made = outputs.cached(
        teacher, rows, tmp_path / "outputs", layers=[6], dtype="float16", pad_id=0, batch_size=2, collate=collate,
        pieces=pieces,
    )  # fmt: skip
    held = made.in_order(2)
    streams = xtremedistil.Streams(made.batches(2, 0), made.batches(2, 0), held, held)
    stages = xtremedistil.stages_of(setup, student, streams, 6, {"transfer": 4, "labelled": 4})
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    history = run_stages(student.model, stages)
    assert len(history) == 9 and all(math.isfinite(x) for records in history.values() for x in records[-1].values())
    assert all(not torch.equal(p, before[name]) for name, p in student.model.named_parameters())
    plan = plans.StagePlan("states", 100_000, 32 * 50, 32 * 50, 50, plans.cost(student.model))
    assert 0.1 < plan.operations / 2e10 / 3600 < 100 and 2**24 < plan.bytes < 2**31, "hours at 20 GFLOP/s, and bytes"
