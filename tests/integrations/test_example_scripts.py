"""The scripts in examples/ run as they stand, without a network, and end with a student that has learnt something."""

from __future__ import annotations

import ast
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

# How much of the first loss is left after 30 steps, at most.
SHARES = [("plain_torch", 0.95), ("accelerate_loop", 0.8), ("peft_student", 0.3), ("fsdp2_loop", 0.5)]
SHARES += [("teacher_rank", 0.5)]
FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name, value in {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    AcceleratorState._reset_state(True)  # of the tests before
    yield
    AcceleratorState._reset_state(True)


def last_line(name: str, steps: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """As its own process would print it."""
    monkeypatch.setattr(sys, "argv", [name, "--steps", str(steps)])
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    return ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])


def test_transformers_trainer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    short, long = (last_line("transformers_trainer.py", steps, monkeypatch, capsys) for steps in (1, 40))
    assert short.keys() >= {"eval_loss", "eval_loss_logits", "eval_loss_labels", "eval_accuracy"}
    assert long["eval_loss"] < 0.9 * short["eval_loss"]


@pytest.mark.parametrize(("name", "share"), SHARES)
def test_losses_fall(
    name: str, share: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = last_line(f"{name}.py", 30, monkeypatch, capsys)
    assert 0 < found["last"] < share * found["first"]


@pytest.mark.soak
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", ["fsdp2_loop", "teacher_rank"])
def test_processes_agree_with_one(
    name: str, processes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = last_line(f"{name}.py", 10, monkeypatch, capsys)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*launch, str(FOLDER / f"{name}.py"), "--steps", "10"], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert ast.literal_eval(done.stdout.strip().splitlines()[-1]) == pytest.approx(alone, rel=1e-5)


@pytest.mark.soak
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(
    victim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two students and a teacher (2), without a launcher that would look after them: within a minute, with an error."""
    out, steps = tmp_path / "run.pt", 200

    def start() -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        more = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        call = [sys.executable, str(FOLDER / "teacher_rank.py"), "--steps", str(steps), "--out", str(out)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return [subprocess.Popen(call, env=os.environ | more | {"RANK": str(rank)}, **pipes) for rank in range(3)]

    started = start()
    try:
        while not out.exists():
            assert all(process.poll() is None for process in started)
            time.sleep(0.02)
        started[victim].kill()
        others = [process for process in started if process is not started[victim]]
        for process, (_, told) in [(x, x.communicate(timeout=60)) for x in others]:
            assert process.returncode == 1 and "RuntimeError" in told and "onnection" in told, told[-2000:]
        assert 0 < len(torch.load(out)[2]) < steps
        continued = start()
        started += continued
        shown = [process.communicate(timeout=300) for process in continued]
        assert not any(process.returncode for process in continued), shown
    finally:
        for process in started:
            process.kill()
    alone = last_line("teacher_rank.py", steps, monkeypatch, capsys)
    assert ast.literal_eval(shown[0][0].strip().splitlines()[-1]) == pytest.approx(alone, rel=1e-4)
