"""Of the command line and its configurations."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

from fastdistil.configs.bistil import BistilConfig
from fastdistil.configs.lightmbert import LightmbertConfig
from fastdistil.configs.xtremedistil import XtremeDistilConfig
from mistakes import Mistake, command
from mistakes.sparse import _saved, _text


def _yaml(folder: Path, text: str) -> Path:
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


def _lines(folder: Path, name: str = "en.txt") -> Path:
    (folder / name).write_text("one\ntwo\n")
    return folder / name


def _light(folder: Path, *more: object) -> None:
    teacher, text, out = folder / "none", _lines(folder), folder / "out"
    command("distil", "lightmbert", "--teacher", teacher, "--text", text, "--out", out, *more)


def _without_hub(folder: Path) -> None:
    with patch("transformers.AutoConfig.from_pretrained", side_effect=OSError("We couldn't connect to the hub\nmore")):
        _light(folder, "--teacher", "no/such-model")


def _config(folder: Path, text: str) -> None:
    command("distil", "lightmbert", "--config", _yaml(folder, text))


def _finetune(folder: Path, *more: object) -> None:
    command("finetune", "--model", folder / "none", "--out", folder / "out", *more)


GIVEN = {"out": "runs/x", "teacher": "t", "text": ["en.txt"]}
TASK = {"out": "runs/x", "teacher": "t", "train": ["en.tsv"]}

MISTAKES = [
    Mistake("a-command-with-a-typo", lambda _: command("distill"), "distill", "No such command", "distil", theirs=True),
    Mistake("a-system-with-a-typo", lambda _: command("distil", "lightbert"), "lightbert", "No such command", "lightmbert", theirs=True),
    Mistake("an-option-of-commands-with-a-typo", lambda x: _light(x, "--max-lenght", 64), "--max-lenght", "No such option", "--max-length", theirs=True),
    Mistake("a-command-without-its-options", lambda _: command("distil", "lightmbert"), "LightmbertConfig", "needs", "teacher"),
    Mistake("an-option-in-words", lambda x: _light(x, "--steps", "many"), "--steps", "", "integer", theirs=True),
    Mistake("a-share-above-1", lambda x: _light(x, "--corruption", 15), "corruption", "15", "0 to 0.9"),
    Mistake("a-choice-with-a-typo", lambda x: _light(x, "--maps", "prob_kl"), "--maps", "prob_kl", "prob_mse", theirs=True),
    Mistake("a-teacher-that-is-not-there", lambda x: _light(x), "--teacher", "FOLDER/none", "folder"),
    Mistake("a-teacher-of-the-hub-that-is-not-there", lambda x: _without_hub(x), "--teacher", "no/such-model", "no such folder", "hub"),
    Mistake("a-file-for-the-run", lambda x: command("distil", "lightmbert", "--teacher", "t", "--text", "t", "--out", _lines(x)), "out", "a file", "folder"),
    Mistake("a-config-that-is-not-there", lambda x: command("distil", "lightmbert", "--config", x / "none.yaml"), "config", "none.yaml", "lightmbert-mbert"),
    Mistake("yaml-with-a-typo", lambda x: _config(x, "teacher: t\ntext: [a]\nout: o\nmax_lenght: 64\n"), "max_lenght", "no option", "LightmbertConfig", "'max_length'?"),
    Mistake("yaml-with-a-tab", lambda x: _config(x, "teacher: t\ntext:\n\t- a\n"), "run.yaml", "'\\t'", "YAML", "line 3"),
    Mistake("yaml-of-a-list", lambda x: _config(x, "- teacher: t\n"), "run.yaml", "list", "options by name"),
    Mistake("yaml-with-text-for-a-number", lambda x: _config(x, "teacher: t\ntext: [a]\nout: o\nsteps: many\n"), "steps", "'many'", "whole number"),
    Mistake("yaml-with-one-text-for-a-list", lambda x: _config(x, "teacher: t\ntext: a.txt\nout: o\n"), "text", "'a.txt'", "list", "[a.txt]"),
    Mistake("yaml-with-an-option-twice", lambda x: _config(x, "teacher: t\nteacher: u\ntext: [a]\nout: o\n"), "teacher", "twice", "once"),
    Mistake("finetuning-on-nothing", lambda x: _finetune(x), "train", "needs", "FinetuneConfig"),
    Mistake("finetuning-on-a-file-that-is-not-there", lambda x: _finetune(x, "--train", x / "none.tsv"), "--train", "none.tsv", "no such file"),
    Mistake("evaluating-nothing", lambda x: command("evaluate", "--model", x), "test", "needs", "EvaluateConfig"),
    Mistake("evaluating-a-folder-without-a-model", lambda x: command("evaluate", "--model", x, "--test", _lines(x, "en.tsv")), "--model", "FOLDER", "config.json"),
    Mistake("a-column-without-a-name", lambda x: _finetune(x, "--train", "a.tsv", "--column", "token"), "column", "'token'", "NAME=COLUMN"),
    Mistake("measuring-what-is-not-there", lambda _: command("bench", "speed"), "speed", "is not one of", "'logits'", theirs=True),
    Mistake("records-of-another-ending", lambda _: command("bench", "--out", "x.json"), "--out", "'x.json'", ".jsonl"),
    Mistake("a-delta-of-commands-that-is-not-there", lambda x: command("sparse", "info", x / "none.safetensors"), "none.safetensors", "No such file", "file"),
    Mistake("a-readme-for-a-delta-of-commands", lambda x: command("sparse", "info", _text(x)), "delta.safetensors", "safetensors", "no"),
    Mistake("a-checkpoint-that-is-not-there", lambda x: command("sparse", "apply", x / "none", _saved(x), "--out", x / "out"), "none", "no", "file"),
    Mistake("scales-of-another-number", lambda x: command("sparse", "compose", _saved(x), "--out", x / "out.safetensors", "--scale", 1, "--scale", 2), "scale", "2", "1"),
    Mistake("no-seeds-for-the-demo", lambda _: command("demo", "--seeds", 0), "--seeds", "", "1", theirs=True),
    # the same in Python
    Mistake("a-config-with-a-typo", lambda _: LightmbertConfig(**GIVEN, lerning_rate=1), "lerning_rate", "unexpected keyword", "", theirs=True),
    Mistake("a-batch-size-of-0", lambda _: LightmbertConfig(**GIVEN, batch_size=0), "batch_size", "0", "at least 1"),
    Mistake("a-delta-without-a-language", lambda _: BistilConfig(**GIVEN, language_delta=["fr.safetensors"]), "language_delta", "'fr.safetensors'", "LANGUAGE=FILE"),
    Mistake("shares-that-do-not-sum-to-1", lambda _: XtremeDistilConfig(**TASK, shares=[0.5, 0.5, 0.5]), "shares", "0.5", "sum to 1"),
    Mistake("a-width-that-heads-do-not-divide", lambda _: XtremeDistilConfig(**TASK, hidden_size=100, heads=3), "hidden_size", "100", "multiple of heads"),
]  # fmt: skip
