"""What all commands share: configurations, the run's folder, the plan, the report and the model card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
import typer
from rich.console import Console
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification, BertModel
from typer.testing import CliRunner

from fastdistil.configs.command_line import command
from fastdistil.configs.common import Run, build, changed, option, read_yaml, to_yaml
from fastdistil.systems import card, measure, plan, report
from fastdistil.systems.folder import RunFolder, write_json


@dataclass(frozen=True, kw_only=True)
class Some(Run):
    """Something that trains."""

    teacher: str = option(help="The teacher.")
    text: tuple[Path, ...] = option((), "Texts.")
    lr: float = option(1e-4, "Rate.")
    kind: Literal["prob_mse", "score_mse"] = option("prob_mse", "Maps.")

    def check(self) -> None:
        super().check()
        self.within(0, 1, "lr")


def some(tmp_path: Path, **values: object) -> Some:
    return build(Some, {"teacher": "t", "out": tmp_path / "run", **values})


def test_yaml_gives_the_same_configuration_back(tmp_path):
    config = some(tmp_path, text=["a.txt", Path("b.txt")], lr=1e-7, kind="score_mse", data_licence=None)
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert build(Some, read_yaml(path)) == config
    path.write_text("batch-size: 4\nlr: 1e-5\nprecision: no\n")  # YAML 1.1 reads 1e-5 as text and no as false
    read = build(Some, {"teacher": "t", "out": "o", **read_yaml(path)})
    assert (read.lr, read.precision, read.batch_size) == (1e-5, "no", 4)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lr": "fast"}, "lr is 'fast', expected a number"),
        ({"lr": 2}, "lr is 2.0, expected 0 to 1"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number"),
        ({"seed": True}, "seed is True"),
        ({"kind": "kl"}, "kind is 'kl', expected 'prob_mse' or 'score_mse'"),
        ({"text": "a.txt"}, "text is 'a.txt', expected a list"),
        ({"resume": "yes"}, "resume is 'yes', expected true or false"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"rate": 1}, "rate: no option of Some"),
    ],
)
def test_wrong_options_are_named(tmp_path, values, said):
    with pytest.raises((ValueError, TypeError), match=said):
        some(tmp_path, **values)
    with pytest.raises(ValueError, match="needs teacher"):
        build(Some, {"out": tmp_path})


def test_the_command_line_wins_over_the_file(tmp_path):
    seen = []
    app = typer.Typer()
    app.command()(command(Some, seen.append))
    path = tmp_path / "c.yaml"
    path.write_text("teacher: x\nlr: 0.5\ntext: [a]\n")
    call = ["--config", str(path), "--out", str(tmp_path / "o"), "--lr", "0.25", "--kind", "score_mse", "--resume"]
    result = CliRunner().invoke(app, [*call, "--text", "b", "--text", "c"])
    assert result.exit_code == 0, result.output
    assert seen == [
        Some(teacher="x", out=tmp_path / "o", lr=0.25, text=(Path("b"), Path("c")), kind="score_mse", resume=True)
    ]
    path.write_text("- 1")
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, call)
    assert result.exit_code == 2 and "expected options by name" in " ".join(result.output.split())
    assert len(seen) == 1


def test_a_folder_is_one_run(tmp_path):
    config = some(tmp_path)
    assert RunFolder(changed(config, lr=0.5)).finished is None
    assert RunFolder(config).finished is None  # nothing was done there: options may be mended
    (config.out / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds this run already"):
        RunFolder(config)
    again = changed(config, resume=True, save_every=7)  # what is no part of a run's identity may change
    assert RunFolder(again).finished is None
    with pytest.raises(ValueError, match=r"lr was 0.0001, is 0.5"):
        RunFolder(changed(again, lr=0.5))
    write_json(config.out / "metrics.json", {"f1": 1.0})
    made_by = (config.out / "config.yaml").read_text()
    assert RunFolder(changed(again, save_every=8)).finished == {"f1": 1.0}
    assert (config.out / "config.yaml").read_text() == made_by  # a run that has ended keeps the options that made it
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds other files"):
        RunFolder(changed(config, out=other))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a file, expected a folder"):
        changed(config, out=tmp_path / "file")


def test_operations_of_a_plan_are_those_that_a_model_runs():
    """Against torch's own counter, which counts products alone."""
    from torch.utils.flop_counter import FlopCounterMode

    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    config = BertConfig(vocab_size=50, **sizes, attn_implementation="eager")  # torch counts no fused attention on CPUs
    model = BertModel(config, add_pooling_layer=False).eval()
    ids = torch.ones(2, 24, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids)
    found = plan.cost(model)
    products = counter.get_total_flops()
    assert found.forward(48, 24) == pytest.approx(products, rel=0.02)
    assert (found.blocks, found.width, found.feed_forward) == (3, 64, 96)
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_cost_of_models_that_are_only_named():
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(vocab_size=119547))
    model.get_input_embeddings().weight.requires_grad_(False)
    found = plan.cost(model)
    assert found.parameters == 177_974_523  # mBERT with its masked-LM head, the tied table once
    assert found.trained == found.parameters - 119547 * 768
    assert found.multiplied == pytest.approx(85e6 + 119547 * 768 + 768**2, rel=0.01)  # the tied table is its decoder


def test_a_plan_adds_up(capsys):
    student, teacher = plan.Cost(100, 80, 50, 2, 8, 16), plan.Cost(300, 200, 0, 4, 16, 32)
    stages = [
        plan.StagePlan("cache", 10, 100, 100, 20, None, teacher, backward=False),
        plan.StagePlan("train", 5, 100, 50, 20, student),
    ]
    one = 100 * (2 * 200 + 4 * 4 * 20 * 16)
    assert stages[0].operations == 10 * one and stages[0].bytes == 1200
    assert stages[1].operations == 5 * 3 * 100 * (2 * 80 + 4 * 2 * 20 * 8)
    assert stages[1].bytes == 400 + 12 * 50 + 4 * 50 * 2 * (72 + 32)
    whole = plan.Plan("something", {"da": "3 sentences"}, stages, processes=2, notes=["a note"])
    said = plan.show(whole, Console(width=100), rate=1e3)
    assert said["seconds"] == (stages[0].operations + stages[1].operations) / 1e3 / 2
    printed = capsys.readouterr().out
    assert "3 sentences" in printed and "a note" in printed and "cache" in printed


def metrics() -> dict:
    return {
        "system": "something",
        "configuration": {"lr": 1e-4},
        "machine": {"threads": 2, "torch": "2"},
        "seconds": 3.0,
        "curves": report.curves({"one": [{"step": 0.0, "lr": 1.0, "hidden": 2.0}, {"step": 1.0, "lr": 1.0, "hidden": 1.0}]}),
        "scores": {"teacher": {"da": {"F1": 60.0}, "en": {"F1": None}}, "student": {"da": {"F1": 50.0}, "en": {"F1": None}}},
        "metric": "F1",
        "sizes": {"teacher": {"parameters": 4e6, "disk_mib": 16.0}, "student": {"parameters": 1e6, "disk_mib": 4.0}},
        "latency_ms": {"cpu": {"1": {"teacher": 10.0, "student": 2.0}}},
        "student": "student",
    }  # fmt: skip


def test_a_report_says_what_was_measured(tmp_path):
    report.write(tmp_path, metrics(), notes=["A note."])
    text = (tmp_path / "report.md").read_text()
    assert "| student | 50.0 | no figure | 50.0 |" in text  # no figure is no part of a mean
    assert "| cpu, batch of 1, ms | 10 | 2 | 5.0 |" in text and "A note." in text and "lr: 0.0001" in text
    for name in ("curves.png", "scores.png", "metrics.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert not list(tmp_path.glob("*.partial"))


def test_sizes_and_latency(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "LATENCY_ROUNDS", {1: 2, 32: 1})
    model = nn.Linear(4, 4).train()
    assert measure.sizes(model) == {"parameters": 20, "disk_mib": 80 / 2**20}
    batches = {1: {"input": torch.ones(1, 4)}}
    found = measure.latency({"student": (model, batches), "teacher": (nn.Linear(4, 4), batches)})
    assert list(found["cpu"]) == ["1"] and set(found["cpu"]["1"]) == {"student", "teacher"}
    assert model.training


def test_a_card_names_the_licences(tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    assert card.licence_of(str(teacher)) == "not stated"
    assert card.licence_of("nobody/nothing-cached") == "not stated"
    (teacher / "README.md").write_text("---\nlicense: apache-2.0\n---\n# teacher\n")
    assert card.licence_of(str(teacher)) == "apache-2.0"
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    student = tmp_path / "run" / "student"
    BertForTokenClassification(config).save_pretrained(student)
    given = {"languages": ["da", "a-file"], "pipeline": "token-classification", "scores": [["F1", "da"], ["x", "1.0"]]}
    card.write(
        student, system="xtremedistil", teacher=str(teacher), data_licence="CC BY-SA 4.0", paper="arXiv 2004.05686",
        configuration={"lr": 1}, **given,
    )  # fmt: skip
    from huggingface_hub import ModelCard

    read = ModelCard.load(student / "README.md")
    assert read.data.language == ["da"] and read.data.pipeline_tag == "token-classification"
    assert "apache-2.0" in read.text and "CC BY-SA 4.0" in read.text and str(tmp_path) not in read.text
