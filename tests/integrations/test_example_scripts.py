"""The scripts in examples/ run as they stand, without a network, and end with a student that has learnt something."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(name: str, folder: Path, *more: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    call = [sys.executable, str(ROOT / "examples" / name), *more]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_transformers_trainer(tmp_path: Path) -> None:
    short, long = (
        ast.literal_eval(run("transformers_trainer.py", tmp_path, "--steps", steps)) for steps in ("1", "40")
    )
    assert short.keys() >= {"eval_loss", "eval_loss_logits", "eval_loss_labels", "eval_accuracy"}
    assert long["eval_loss"] < 0.9 * short["eval_loss"]


@pytest.mark.parametrize(("name", "share"), [("plain_torch", 0.95), ("accelerate_loop", 0.8), ("peft_student", 0.3)])
def test_losses_fall(name: str, share: float, tmp_path: Path) -> None:
    found = ast.literal_eval(run(f"{name}.py", tmp_path, "--steps", "30"))
    assert 0 < found["last"] < share * found["first"]
