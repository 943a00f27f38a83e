"""Every system on two processes of torchrun: the student of one process that accumulates two micro-batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from text_cases import SENTENCES, bert, columns, wordpiece

DRIVER = Path(__file__).parents[1] / "support" / "each_system.py"
SAME = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # processes draw dropout of their own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("torchrun")
    tokenizer = wordpiece()
    for name, part in (("fr", SENTENCES[:80]), ("sw", SENTENCES[80:140])):
        (out / f"{name}.txt").write_text("\n".join(part), encoding="utf-8")
    for name, part in (("train", SENTENCES[:40]), ("dev", SENTENCES[40:60])):
        (out / f"{name}.tsv").write_text(columns(part), encoding="utf-8")
    tags = ["O", "B-X", "I-X"]
    names = {"id2label": dict(enumerate(tags)), "label2id": {x: i for i, x in enumerate(tags)}}
    for name, model in (
        ("encoder", bert(tokenizer, **SAME)), ("tagger", bert(tokenizer, "BertForTokenClassification", **SAME, **names)),
    ):  # fmt: skip
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    return out


def commands(folder: Path, runs: Path, accumulate: int) -> list[list[str]]:
    text = ["--text", f"fr={folder / 'fr.txt'}", "--text", f"sw={folder / 'sw.txt'}"]
    train = ["--train", f"fr={folder / 'train.tsv'}"]
    encoder, tagger = str(folder / "encoder"), ["--teacher", str(folder / "tagger")]
    found = {
        "lightmbert": ["distil", "lightmbert", "--teacher", encoder, *text, "--held-out", "0.1"],
        "bistil": ["distil", "bistil", "--teacher", encoder, *text, "--held-out", "0.1"],
        "bistil-task": ["distil", "bistil-task", "--student", str(runs / "bistil"), *tagger, *train],
        "xtremedistil": ["distil", "xtremedistil", *tagger, *train, "--unlabelled", f"sw={folder / 'dev.tsv'}",
                         "--student", "transformer", "--schedule", "joint", "--hidden-size", "16", "--heads", "2",
                         "--dropout", "0"],
        "finetune": ["finetune", "--model", encoder, *train, "--dev", f"fr={folder / 'dev.tsv'}"],
    }  # fmt: skip
    common = [
        "--steps",
        "4",
        "--batch-size",
        "4",
        "--accumulate",
        str(accumulate),
        "--lr",
        "1e-3",
        "--max-length",
        "16",
    ]
    return [[*command, *common, "--out", str(runs / name)] for name, command in found.items()]


@pytest.mark.soak
def test_two_processes_train_the_student_of_one(folder: Path, tmp_path: Path) -> None:
    runs = {}
    for processes in (1, 2):
        runs[processes] = tmp_path / str(processes)
        given = tmp_path / f"{processes}.json"
        given.write_text(json.dumps(commands(folder, runs[processes], 2 // processes)), encoding="utf-8")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        found = subprocess.run(
            [sys.executable, *launch, str(DRIVER), str(given)], env=environment, capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip
        assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    for name in ("lightmbert", "bistil", "bistil-task", "xtremedistil", "finetune"):
        model = "model" if name == "finetune" else "student"
        one, two = (load_file(runs[n] / name / model / "model.safetensors") for n in (1, 2))
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert (runs[2] / name / "report.md").is_file()
