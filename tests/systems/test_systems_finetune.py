"""Fine-tuning from a file to a saved model that transformers opens."""

import json

import datasets
import pytest
import torch
from rich.console import Console
from task_cases import labelled_texts, tagged, tiny_encoder, wordpiece
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

from fastdistil.configs.evaluate import EvaluateConfig
from fastdistil.configs.finetune import FinetuneConfig
from fastdistil.models import bilstm
from fastdistil.systems import evaluate, finetune


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def quiet():
    return Console(quiet=True)


def options(tmp_path, **more):
    given = {
        "model": tiny_encoder(tmp_path / "encoder"),
        "train": (tagged(tmp_path / "da.tsv"),),
        "out": tmp_path / "run",
    }
    return FinetuneConfig(**{**given, "steps": 40, "lr": 2e-2, "batch_size": 8, "evaluate_every": 20, **more})


def test_a_tagger_from_a_file(tmp_path):
    config = options(tmp_path, dev=(tagged(tmp_path / "dev.tsv", 10),), freeze_embeddings=True)
    found = finetune.run(config, console=quiet())
    assert found["metric"] == "f1"
    assert found["validation"]["mean"]["f1"] > 80
    assert json.loads((config.out / "metrics.json").read_text()) == found
    assert {p.name for p in config.out.iterdir()} >= {"model", "report.md", "curves.png", "config.yaml"}
    assert not (config.out / "checkpoints").exists()
    # What evaluate says of the saved folder is what validation said.
    test = EvaluateConfig(model=str(config.out), test=config.dev)
    assert evaluate.run(test, console=quiet())["languages"]["dev"] == found["validation"]["languages"]["dev"]
    tagger = pipeline("token-classification", model=str(config.out / "model"), aggregation_strategy="first")
    assert ("LOC", "Paris") in [(x["entity_group"], x["word"]) for x in tagger("the cat in Paris")]
    model = AutoModelForTokenClassification.from_pretrained(config.out / "model")
    before = AutoModelForTokenClassification.from_pretrained(tmp_path / "encoder")
    assert torch.equal(model.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert len(AutoTokenizer.from_pretrained(config.out / "model")) == model.config.vocab_size
    # Continued, it is read back; with other options it is refused.
    again = finetune.run(options(tmp_path, dev=config.dev, freeze_embeddings=True, resume=True), console=quiet())
    assert again == found
    with pytest.raises(ValueError, match="holds a run of other options: lr was 0.02, is 0.03"):
        finetune.run(options(tmp_path, dev=config.dev, freeze_embeddings=True, resume=True, lr=0.03), console=quiet())


def test_texts_in_pairs_and_a_split_of_the_training_data(tmp_path):
    path = labelled_texts(tmp_path / "en.jsonl", pairs=True)
    config = options(tmp_path, train=(path,), task="text", steps=None, epochs=6.0, dev_share=0.25, evaluate_every=None)
    found = finetune.run(config, console=quiet())
    assert found["metric"] == "macro_f1"
    assert found["validation"]["languages"]["en"]["texts"] == 6
    assert found["labels"] == ["in", "out"]
    assert found["steps"] <= 6 * 3
    assert found["validation"]["mean"]["accuracy"] > 60
    scores = evaluate.run(EvaluateConfig(model=str(config.out), test=(path,)), console=quiet())
    assert scores["task"] == "text"


def test_pairs_for_a_model_without_token_types(tmp_path):
    model = bilstm.BiLstmForSequenceClassification(
        bilstm.BiLstmConfig(vocab_size=len(wordpiece()), embedding_size=8, lstm_size=8, num_labels=2)
    )
    model.save_pretrained(tmp_path / "lstm")
    wordpiece().save_pretrained(tmp_path / "lstm")
    train = (labelled_texts(tmp_path / "en.jsonl", pairs=True),)
    more = {"model": str(tmp_path / "lstm"), "train": train, "task": "text", "steps": 2, "evaluate_every": None}
    found = finetune.run(options(tmp_path, **more), console=quiet())
    assert found["validation"]["mean"]["accuracy"] is not None


def test_the_head_first(tmp_path):
    config = options(tmp_path, steps=2, evaluate_every=None, head_steps=4, lr=1e-9)
    found = finetune.run(config, console=quiet())
    assert {name: len(x["labels"]) for name, x in found["curves"].items()} == {"head": 4, "labels": 2}
    before = AutoModelForTokenClassification.from_pretrained(tmp_path / "encoder", num_labels=5)
    torch.manual_seed(0)
    drawn = AutoModelForTokenClassification.from_pretrained(tmp_path / "encoder", num_labels=5).classifier.weight
    after = AutoModelForTokenClassification.from_pretrained(config.out / "model")
    for name, x in after.named_parameters():
        if name.startswith("bert."):
            torch.testing.assert_close(x, dict(before.named_parameters())[name], rtol=0, atol=1e-7)
    assert (after.classifier.weight - drawn).abs().max() > 1e-4
    plan = finetune.plan(config)
    assert [(stage.name, stage.student.trained > 100) for stage in plan.stages] == [("head", False), ("labels", True)]


def test_interrupted_and_continued(tmp_path, monkeypatch):
    whole = finetune.run(options(tmp_path, steps=20, evaluate_every=10, save_every=5), console=quiet())
    other = tmp_path / "other"
    calls = []
    forward = finetune.LabelObjective.forward

    def dies(self, batch, items):
        calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return forward(self, batch, items)

    monkeypatch.setattr(finetune.LabelObjective, "forward", dies)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(options(tmp_path, steps=20, evaluate_every=10, save_every=5, out=other), console=quiet())
    monkeypatch.setattr(finetune.LabelObjective, "forward", forward)
    with pytest.raises(ValueError, match="holds this run already; continue it with resume"):
        finetune.run(options(tmp_path, steps=20, evaluate_every=10, save_every=5, out=other), console=quiet())
    found = finetune.run(
        options(tmp_path, steps=20, evaluate_every=10, save_every=5, out=other, resume=True), console=quiet()
    )
    assert found["curves"] == whole["curves"]
    assert found["validation"] == whole["validation"]
    one, two = (AutoModelForTokenClassification.from_pretrained(x / "model") for x in (tmp_path / "run", other))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_dry_run_writes_nothing(tmp_path):
    found = finetune.run(options(tmp_path, dry_run=True, freeze=("encoder.layer.0",)), console=quiet())
    assert not (tmp_path / "run").exists()
    assert found["stages"][0]["steps"] == 40
    assert "24" not in found["data"]["validation"]
    assert found["data"]["labels"] == "O, B-LOC, I-LOC, B-ORG, I-ORG"


def test_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="freeze holds 'decoder', which is part of no parameter's name"):
        finetune.run(options(tmp_path, freeze=("decoder",)), console=quiet())
    with pytest.raises(ValueError, match="FinetuneConfig: lr is 0.0, expected more than 0"):
        options(tmp_path, lr=0.0)
    with pytest.raises(ValueError, match="FinetuneConfig: dev_share is 0.0 without dev"):
        options(tmp_path, dev_share=0.0)
    other = tmp_path / "hr.tsv"
    other.write_text("the\tB-OTH\n", encoding="utf-8")
    with pytest.raises(ValueError, match="the model has no B-OTH"):
        finetune.run(options(tmp_path, dev=(str(other),), out=tmp_path / "o"), console=quiet())
