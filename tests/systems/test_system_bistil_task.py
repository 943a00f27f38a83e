"""BiStil's second phase whole, on tiny models: a bilingual student learns tags and labels from a tuned teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from text_cases import SENTENCES, bert, columns, wordpiece

import fastdistil as fd
from fastdistil.configs.bistil_task import BistilTaskConfig
from fastdistil.models.student import with_blocks, without_dropout
from fastdistil.models.trim import trim_model_
from fastdistil.models.vocab import trim_vocabulary
from fastdistil.systems import bistil_task, measure, report
from fastdistil.systems.bistil import IDS

TAGS = ["O", "B-X", "I-X"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of words and of texts, teachers of both tasks, and a student of every second block with fewer pieces."""
    out = tmp_path_factory.mktemp("task")
    tokenizer = wordpiece()
    for name, part in (("train", SENTENCES[:60]), ("dev", SENTENCES[60:80]), ("test", SENTENCES[80:100])):
        (out / f"en_{name}.tsv").write_text(columns(part), encoding="utf-8")
        rows = [json.dumps({"text": text, "label": "yes" if "abc" in text.split() else "no"}) for text in part]
        (out / f"en_{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    base = bert(tokenizer)
    for name, kind, labels in (
        ("tagger", "BertForTokenClassification", TAGS), ("classifier", "BertForSequenceClassification", ["no", "yes"]),
    ):  # fmt: skip
        names = {"id2label": dict(enumerate(labels)), "label2id": {x: i for i, x in enumerate(labels)}}
        teacher = bert(tokenizer, kind, **names)
        teacher.bert.load_state_dict(base.bert.state_dict(), strict=False)
        teacher.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    used = {i for text in SENTENCES for i in tokenizer(text)["input_ids"]}
    new, rows = trim_vocabulary(tokenizer, sorted(used)[:-2])
    trim_model_(base, rows)
    student = with_blocks(base, [1, 3])
    without_dropout(student)
    student.save_pretrained(out / "phase1" / "student")
    new.save_pretrained(out / "phase1" / "student")
    (out / "phase1" / "student" / IDS).write_text(json.dumps(rows.tolist()), encoding="utf-8")
    return out


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without figures and latencies: tests/systems/test_system_texts.py has them."""
    for name in ("_plot_curves", "_plot_scores"):
        monkeypatch.setattr(report, name, lambda *_: None)
    monkeypatch.setattr(measure, "latency", lambda models: {})


def _config(folder: Path, out: Path, **changed: Any) -> BistilTaskConfig:
    ending = "tsv" if changed.get("task", "tokens") == "tokens" else "jsonl"
    given: dict[str, Any] = {
        "student": str(folder / "phase1"), "teacher": str(folder / ("tagger" if ending == "tsv" else "classifier")),
        "train": (str(folder / f"en_train.{ending}"),), "test": (f"da={folder / f'en_test.{ending}'}",),
        "out": out, "lr": 2e-2, "steps": 6, "save_every": 4, "batch_size": 8,
    }  # fmt: skip
    return BistilTaskConfig(**{**given, **changed})


def test_the_saved_difference_makes_phase_1_s_student_the_tuned_one(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = bistil_task.run(_config(folder, out, dev=(str(folder / "en_dev.tsv"),), evaluate_every=3))
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8")) == json.loads(json.dumps(found))
    assert found["steps"] == {"everything": 6, "chosen entries": 6} and found["head"] == ["classifier"]
    assert [x["step"] for x in found["validation"]["chosen entries"]] == [3, 6]
    assert set(found["scores"]) == {"teacher", "student"} and set(found["scores"]["student"]) == {"da"}
    tuned = transformers.AutoModelForTokenClassification.from_pretrained(out / "student")
    body = sum(p.numel() for name, p in tuned.named_parameters() if name.startswith("bert."))
    assert found["entries"] == round(0.08 * body)
    start = transformers.AutoModelForTokenClassification.from_pretrained(
        folder / "phase1" / "student", id2label=dict(enumerate(TAGS)), label2id={x: i for i, x in enumerate(TAGS)}
    )
    before = {name: p.clone() for name, p in start.named_parameters()}
    fd.sparse.load_into(start, out / "delta.safetensors")
    changed = 0
    for (name, ours), theirs in zip(start.named_parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        changed += int((before[name] != theirs).sum()) if name.startswith("bert.") else 0
    assert 0.9 * found["entries"] < changed <= found["entries"], "nothing else has moved"
    tagger = transformers.pipeline("token-classification", str(out / "student"))
    assert {x["entity"] for x in tagger("abc dexy abc xyz")} <= set(TAGS)
    assert tuned.config.hidden_dropout_prob == 0
    assert not (out / "checkpoints").exists() and (out / "student" / "README.md").is_file()


@pytest.mark.parametrize("changed", [{"full": True}, {"full": True, "labels_only": True}, {"head": "teacher"}])
def test_what_it_is_compared_with(folder: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    found = bistil_task.run(_config(folder, tmp_path / "run", **changed))
    terms = set(found["curves"]["everything"])
    assert terms == ({"labels"} if "labels_only" in changed else _terms())
    assert (found["entries"] is None) is ("full" in changed)
    first, *_, last = found["curves"]["everything"]["labels" if "labels_only" in changed else "logits"]
    assert first < 1e-3 if "head" in changed else last < first
    assert ("teacher" in found["scores"]) is ("labels_only" not in changed)


def _terms() -> set[str]:
    return {"logits", "prob_mse_1_2", "prob_mse_2_4", "hidden_0_0", "hidden_1_2", "hidden_2_4"}


def test_texts_with_labels_and_a_pooler_that_is_a_part_of_the_head(folder: Path, tmp_path: Path) -> None:
    found = bistil_task.run(_config(folder, tmp_path / "run", task="text"))
    assert found["head"] == ["classifier", "pooler"]
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student")
    body = sum(p.numel() for name, p in tuned.named_parameters() if name.startswith("bert.") and "pooler" not in name)
    assert found["entries"] == round(0.08 * body)
    assert found["metric"] == "macro_f1" and found["scores"]["student"]["da"]["texts"] == 20
    answers = transformers.pipeline("text-classification", str(tmp_path / "run" / "student"))("abc dexy")
    assert answers[0]["label"] in ("no", "yes")


def test_the_head_alone_learns_before_and_embeddings_stay(folder: Path, tmp_path: Path) -> None:
    more = {"head_steps": 5, "warmup_share": 0.5, "freeze_embeddings": True}
    found = bistil_task.run(_config(folder, tmp_path / "run", **more))
    assert found["steps"] == {"head": 5, "everything": 6, "chosen entries": 6}
    assert set(found["curves"]["head"]) == {"logits"}
    tuned = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "run" / "student")
    start = transformers.AutoModel.from_pretrained(folder / "phase1" / "student")
    words = "embeddings.word_embeddings.weight"
    assert torch.equal(tuned.bert.get_parameter(words), start.get_parameter(words))
    body = sum(p.numel() for name, p in tuned.bert.named_parameters() if name != words)
    assert found["entries"] == round(0.08 * body)
    plan = bistil_task.run(_config(folder, tmp_path / "plan", dry_run=True, **more))
    assert [x["stage"] for x in plan["stages"]] == ["head", "everything", "chosen entries"]


def test_an_interrupted_run_continues_to_the_same_student(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    steps = {"head_steps": 4}
    bistil_task.run(_config(folder, tmp_path / "whole", **steps))
    place = bistil_task.train.__globals__
    send = place["send_to_device"]
    for at in (3, 7, 9):  # of the head, of everything (from where the head ended), and of the chosen entries
        calls: list[int] = []

        def stop(x: Any, device: Any, at: int = at, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == at:
                raise RuntimeError("killed")
            return send(x, device)

        monkeypatch.setitem(place, "send_to_device", stop)
        with pytest.raises(RuntimeError, match="killed"):
            bistil_task.run(_config(folder, tmp_path / "parts", resume=at != 3, **steps))
    monkeypatch.setitem(place, "send_to_device", send)
    found = bistil_task.run(_config(folder, tmp_path / "parts", resume=True, **steps))
    assert found["steps"] == {"head": 4, "everything": 6, "chosen entries": 6}
    for name in ("student/model.safetensors", "delta.safetensors"):
        one, two = ((tmp_path / x / name).read_bytes() for x in ("whole", "parts"))
        assert one == two, name


def test_a_dry_run_plans_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    found = bistil_task.run(_config(folder, tmp_path / "run", dry_run=True, steps=None))
    assert [(x["stage"], x["steps"]) for x in found["stages"]] == [("everything", 23), ("chosen entries", 75)]
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "en.tsv").write_text("abc\tB-Y\n", encoding="utf-8")
    with pytest.raises(ValueError, match="teacher's labels are O, B-X, I-X, the data's are O, B-Y, I-Y"):
        bistil_task.run(_config(folder, tmp_path / "a", train=(str(tmp_path / "en.tsv"),)))
    with pytest.raises(ValueError, match="ForTokenClassification"):
        bistil_task.run(_config(folder, tmp_path / "b", teacher=str(folder / "classifier")))
    other = bert(wordpiece(), "BertForTokenClassification", id2label=dict(enumerate(TAGS)), num_hidden_layers=3)
    other.save_pretrained(tmp_path / "other")
    wordpiece().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="student is a bert of 2 blocks of width 16, the teacher a bert of 3 blocks"):
        bistil_task.run(_config(folder, tmp_path / "c", teacher=str(tmp_path / "other")))
    fewer, rows = trim_vocabulary(wordpiece(), range(20))
    trim_model_(other, rows)
    other.save_pretrained(tmp_path / "fewer")
    fewer.save_pretrained(tmp_path / "fewer")
    with pytest.raises(ValueError, match="has other pieces than the teacher"):
        bistil_task.run(_config(folder, tmp_path / "d", teacher=str(tmp_path / "fewer"), test=()))
    with pytest.raises(ValueError, match="density is 0"):
        _config(folder, tmp_path / "e", density=0)
