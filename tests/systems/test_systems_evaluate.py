"""Scores by file and language against plain loops; label sets that do not fit."""

import json

import datasets
import pytest
import torch
from rich.console import Console
from seqeval.metrics import f1_score
from seqeval.scheme import IOB2
from task_cases import labelled_texts, tiny_encoder, wordpiece
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, BertConfig

from fastdistil.configs.evaluate import EvaluateConfig
from fastdistil.data import files
from fastdistil.data.encode import collate, encode_words
from fastdistil.systems.evaluate import Scorer, run, score, table
from fastdistil.systems.models import folder_of, load_classifier, load_tokenizer, new_classifier

LABELS = ["B-LOC", "O", "I-LOC", "B-PER", "I-PER"]  # in no order that we would make


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def classifier(task="tokens", labels=LABELS):
    auto = AutoModelForTokenClassification if task == "tokens" else AutoModelForSequenceClassification
    config = BertConfig(
        vocab_size=len(wordpiece()),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        id2label=dict(enumerate(labels)),
    )
    model = auto.from_config(config)
    with torch.no_grad():
        model.classifier.weight.mul_(40)  # random, but of many minds
    return model.eval()


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def sentences(tmp_path):
    words = ["the", "Paris", "\x01", "København", "mat", "a", "b", "Danmark", "on", "in"]
    tags = ["O", "B-LOC", "O", "B-PER", "I-PER", "O", "B-LOC", "I-LOC", "B-LOC", "O"]
    for name, count in (("da", 12), ("sv", 7)):
        lines = []
        for i in range(count):
            lines += [f"{w}\t{t}" for w, t in zip(words[i % 3 :], tags[i % 3 :], strict=True)] * (1 + i % 2) + [""]
        write(tmp_path / f"{name}_test.tsv", "\n".join(lines))
    return [tmp_path / "da_test.tsv", tmp_path / "sv_test.tsv"]


def test_scores_are_those_of_a_plain_loop(tmp_path):
    paths, model, tokenizer = sentences(tmp_path), classifier(), wordpiece()
    data = files.read(paths, "tokens")
    found = score(model, tokenizer, data, max_length=14, batch_size=4)
    rows = list(encode_words(data.dataset.remove_columns("tags"), tokenizer, [], 14))
    predicted = []
    for row, words in zip(rows, data.dataset["words"], strict=True):
        batch = collate(0)([row])
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]
        tags = ["O"] * len(words)
        for place, first in zip(row["word"], row["first"], strict=True):
            tags[place] = LABELS[int(logits[first].argmax())]
        predicted.append(tags)
    assert sum(row["lost"] for row in rows) > 0
    for language, own in found["languages"].items():
        pick = [i for i, name in enumerate(data.dataset["language"]) if name == language]
        true, got = [data.dataset["tags"][i] for i in pick], [predicted[i] for i in pick]
        assert own["f1"] == pytest.approx(100 * f1_score(true, got, mode="strict", scheme=IOB2))
        flat = [a == b for s, t in zip(true, got, strict=True) for a, b in zip(s, t, strict=True)]
        assert own["accuracy"] == pytest.approx(100 * sum(flat) / len(flat))
        assert own["words"] == len(flat)
        assert own["lost"] == sum(rows[i]["lost"] for i in pick)
    assert found["languages"]["da"]["f1"] > 0
    assert found["mean"]["f1"] == pytest.approx(sum(x["f1"] for x in found["languages"].values()) / 2)
    assert any("words beyond the maximum length count as O" in note for note in found["notes"])
    assert not model.training


def test_a_file_without_an_entity_has_no_figure(tmp_path):
    paths = [*sentences(tmp_path), write(tmp_path / "fo_test.tsv", "the\tO\nmat\tO\n")]
    data = files.read(paths, "tokens")
    found = score(classifier(), wordpiece(), data)
    assert found["languages"]["fo"]["f1"] is None
    assert found["languages"]["fo"]["accuracy"] is not None
    assert found["mean"]["f1"] == pytest.approx(sum(found["languages"][x]["f1"] for x in ("da", "sv")) / 2)
    assert f"{paths[2]} has no entity: F1 has no figure and is left out of the mean" in found["notes"]
    json.dumps(found, allow_nan=False)
    rows = table(found, {report.file: report.language for report in data.reports})
    assert rows[3][2] == "no figure"
    assert rows[-1][0] == "mean"


def test_label_sets_that_do_not_fit(tmp_path):
    data = files.read([write(tmp_path / "hr.tsv", "the\tB-OTH\nmat\tB-LOC\n")], "tokens")
    message = r"the model's labels are B-LOC, O, .*, the data's are B-LOC, B-OTH: the model has no B-OTH"
    with pytest.raises(ValueError, match=message):
        score(classifier(), wordpiece(), data)
    without = files.read([tmp_path / "hr.tsv"], "tokens", ignore_types=["OTH"])
    found = score(classifier(), wordpiece(), without)
    assert found["files"][str(tmp_path / "hr.tsv")]["entities"] == 1
    assert "the data have no PER: where the model says so, it is counted as wrong" in found["notes"]


def test_parts_of_speech(tmp_path):
    data = files.read([write(tmp_path / "x.tsv", "the\tDET\nmat\tNOUN\n")], "tokens")
    model = classifier(labels=["NOUN", "DET", "VERB"])
    scorer = Scorer(data, wordpiece(), ["NOUN", "DET", "VERB"])
    assert scorer.metric == "accuracy"
    assert set(scorer(model)["languages"]["x"]) == {"accuracy", "sentences", "words", "lost"}


def test_texts(tmp_path):
    data = files.read([labelled_texts(tmp_path / "en.jsonl")], "text")
    model, tokenizer = classifier("text", ["out", "in"]), wordpiece()
    found = score(model, tokenizer, data)
    got = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in data.dataset["text"]]
    right = [["out", "in"][i] == label for i, label in zip(got, data.dataset["label"], strict=True)]
    assert found["mean"]["accuracy"] == pytest.approx(100 * sum(right) / 24)
    assert found["languages"]["en"]["texts"] == 24
    numbers = classifier("text", ["LABEL_0", "LABEL_1"])
    zero = files.read([write(tmp_path / "n.csv", "text,label\nthe cat,0\nthe mat,1\n")], "text")
    assert score(numbers, tokenizer, zero)["languages"]["n"]["texts"] == 2


def test_the_command(tmp_path):
    model, tokenizer, paths = classifier(), wordpiece(), sentences(tmp_path)
    model.save_pretrained(tmp_path / "run" / "model")
    tokenizer.save_pretrained(tmp_path / "run" / "model")
    console = Console(width=200, record=True)
    config = EvaluateConfig(
        model=str(tmp_path / "run"), test=(str(paths[0]), f"se={paths[1]}"), out=tmp_path / "scores"
    )
    found = run(config, console=console)
    assert list(found["languages"]) == ["da", "se"]
    assert found == json.loads((tmp_path / "scores" / "metrics.json").read_text())
    text = console.export_text()
    assert f"{found['mean']['f1']:.1f}" in text
    assert "7 sentences" in text
    assert found["languages"]["da"] == score(model, tokenizer, files.read([paths[0]], "tokens"))["languages"]["da"]


def test_models_by_folder(tmp_path):
    encoder = tiny_encoder(tmp_path / "encoder")
    with pytest.raises(ValueError, match="encoder: is BertModel, expected a model ForTokenClassification or"):
        load_classifier(encoder)
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        folder_of(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds no model: config.json is not there, nor in student or model"):
        folder_of(str(tmp_path / "empty"))
    assert load_tokenizer(encoder).pad_token_id == 0
    assert new_classifier(encoder, "tokens", LABELS, 0)[0].config.id2label == dict(enumerate(LABELS))


def test_a_head_is_kept_where_the_labels_are_its_own(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path / "m")
    wordpiece().save_pretrained(tmp_path / "m")
    kept, own = new_classifier(str(tmp_path / "m"), "tokens", sorted(LABELS), 0)
    assert own
    assert kept.config.id2label == model.config.id2label
    assert torch.equal(kept.classifier.weight, model.classifier.weight)
    # As many labels, but others: transformers would load the old head without a word.
    other, own = new_classifier(str(tmp_path / "m"), "tokens", ["O", "B-A", "I-A", "B-B", "I-B"], 0)
    assert not own
    assert other.classifier.weight.abs().max() < 0.2 < model.classifier.weight.abs().max()
    assert torch.equal(other.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)
    again, _ = new_classifier(str(tmp_path / "m"), "tokens", ["O", "B-A", "I-A", "B-B", "I-B"], 0)
    assert torch.equal(other.classifier.weight, again.classifier.weight)
    fewer, _ = new_classifier(str(tmp_path / "m"), "tokens", ["A", "B"], 0)
    assert fewer.classifier.weight.shape == (2, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": ()}, "EvaluateConfig: test is empty, expected at least one file"),
        ({"column": ("word=x",)}, "EvaluateConfig: column is 'word=x', expected NAME=COLUMN with one of words"),
        ({"max_length": 2}, "EvaluateConfig: max_length is 2, expected at least 3"),
        ({"task": "ner"}, "EvaluateConfig: task is 'ner', expected 'auto' or 'tokens' or 'text'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig(**{"model": "x", "test": ("a.tsv",), **options})
