"""The command line: help, doctor's verdict, messages of what is missing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fastdistil
from fastdistil import cli
from fastdistil.configs.bistil import BistilConfig
from fastdistil.configs.bistil_task import BistilTaskConfig
from fastdistil.configs.common import build, hints, read_yaml, shipped
from fastdistil.configs.finetune import FinetuneConfig
from fastdistil.configs.lightmbert import LightmbertConfig
from fastdistil.configs.xtremedistil import XtremeDistilConfig

runner = CliRunner()
CONFIGURATIONS: tuple[Any, ...] = (
    LightmbertConfig, XtremeDistilConfig, BistilConfig, BistilTaskConfig, FinetuneConfig,
)  # fmt: skip


def test_help_names_the_commands() -> None:
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "distil", "finetune", "evaluate", "bench", "sparse", "doctor"):
        assert command in result.output


SYSTEMS = ("distil lightmbert", "distil bistil", "distil bistil-task", "distil xtremedistil", "finetune", "evaluate")


@pytest.mark.parametrize("system", SYSTEMS)
def test_systems_have_options_and_refuse_wrong_ones(system: str, tmp_path: Path) -> None:
    words = system.split()
    wide = CliRunner(env={"COLUMNS": "200"})
    help_ = wide.invoke(cli.app, [*words, "--help"])
    assert help_.exit_code == 0 and "(required)" in help_.output and "--config" in help_.output
    missing = wide.invoke(cli.app, words)
    assert missing.exit_code == 2 and "needs" in missing.output
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1")
    wrong = wide.invoke(cli.app, [*words, "--config", str(path)])
    assert wrong.exit_code == 2 and "learning_rate: no option of" in " ".join(wrong.output.split())


def test_what_is_wrong_with_a_teacher_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    call = ["distil", "lightmbert", "--teacher", str(tmp_path / "none"), "--text", str(tmp_path / "a.txt")]
    result = runner.invoke(cli.app, [*call, "--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and "none" in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out" / "student").exists()


def test_shipped_configurations_are_configurations() -> None:
    """Each with what its user adds."""
    data = {"out": "runs/x", "teacher": "t", "text": ["en=a"], "train": ["a"], "model": "m", "student": "s"}
    found = {}
    for name, path in shipped().items():
        command = next(
            x for x in ("bistil-task", "bistil", "lightmbert", "xtremedistil", "finetune") if name.startswith(x)
        )
        known = next(cls for cls in CONFIGURATIONS if cls.__name__.lower() == f"{command.replace('-', '')}config")
        assert read_yaml(path).keys() <= hints(known).keys()
        found[name] = build(known, {k: v for k, v in data.items() if k in hints(known)} | read_yaml(Path(name)))
    assert (
        found["bistil-mbert"].steps == 200_000 and found["lightmbert-mbert"].teacher == "bert-base-multilingual-cased"
    )
    assert len({type(x) for x in found.values()}) == 5


def test_version() -> None:
    assert runner.invoke(cli.app, ["--version"]).output.strip() == fastdistil.__version__


def test_heavy_imports_are_inside_the_commands() -> None:
    """cli.py itself needs typer alone (the package's __init__ is not its business)."""
    code = (
        "import sys, importlib.util as u\n"
        f"s = u.spec_from_file_location('cli', {cli.__file__!r}); m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        "print([x for x in ('torch', 'triton', 'matplotlib', 'transformers') if x in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.parametrize(("command", "extra"), [(["demo"], "demo"), (["bench", "logits"], "bench")])
def test_a_missing_extra_names_the_command_to_install_it(
    command: list[str], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(importlib, "import_module", missing)
    result = runner.invoke(cli.app, command)
    assert result.exit_code == 1
    assert f"matplotlib is not installed: pip install 'fastdistil[{extra}]'" in result.output


def test_demo_passes_its_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Demo:
        @staticmethod
        def run_demo(**options: Any) -> None:
            seen.update(options)

    monkeypatch.setattr(cli, "_needs", lambda extra, module: Demo)
    arguments = ["demo", "--seeds", "3", "--seed", "7", "--out", str(tmp_path), "--cache", str(tmp_path / "c")]
    assert runner.invoke(cli.app, arguments).exit_code == 0
    assert seen == {"out": tmp_path, "seed": 7, "seeds": 3, "cache": tmp_path / "c"}


@pytest.mark.parametrize(("option", "name"), [([], "run_demo"), (["--sparse"], "run_sparse")])
def test_demo_has_a_folder_for_each_kind(option: list[str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    module = type("Demo", (), {name: staticmethod(lambda **options: seen.update(options))})
    monkeypatch.setattr(cli, "_needs", lambda extra, wanted: module)
    assert runner.invoke(cli.app, ["demo", *option]).exit_code == 0
    assert seen["out"] == Path("runs/demo-sparse" if option else "runs/demo")


def test_bench_writes_records_and_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fastdistil.benchmarks import cases, run

    small = cases.Case("hidden", "one", {"N": 4, "D_s": 6, "D_t": 8, "L": 1}, ("eager", "fastdistil:reference"),
                       options={"kind": "mse", "projection": True}, repetitions=2, memory=False)  # fmt: skip
    monkeypatch.setattr(run, "select", lambda device, ops, tiny: [small])
    monkeypatch.setattr(run, "machine_rates", lambda device: {"copy_gb_s": 10.0, "matrix_gflop_s": 100.0})
    out = tmp_path / "hidden.jsonl"
    result = runner.invoke(cli.app, ["bench", "hidden", "--small", "--out", str(out), "--report"])
    assert result.exit_code == 0, result.output
    assert [json.loads(line)["status"] for line in out.read_text().splitlines()] == ["ok", "ok"]
    assert "dry run" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "images" / "hidden-time.png").exists() or (tmp_path / "images" / "gpu-hidden-time.png").exists()


def test_bench_fails_where_a_kernel_of_ours_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fastdistil.benchmarks import run

    line = "hidden one: fastdistil:cpu refused, its value is 1.0e-01 off"
    monkeypatch.setattr(run, "run", lambda what, **options: [tmp_path / "hidden.jsonl"])
    monkeypatch.setattr(run, "wrong", lambda paths: [line])
    result = runner.invoke(cli.app, ["bench", "hidden"])
    assert result.exit_code == 1
    assert line in result.output


def test_bench_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    assert runner.invoke(cli.app, ["bench", "speed"]).exit_code == 2
    assert "ends in .jsonl" in runner.invoke(cli.app, ["bench", "--out", "x.json"]).output
    result = runner.invoke(cli.app, ["bench", "--report", "--out", str(tmp_path / "nothing" / "x.jsonl")])
    assert result.exit_code == 1
    assert "has no records" in result.output
