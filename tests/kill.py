"""SIGKILL at random moments of each system, and a resume: the student must be the same bit for bit.

    python tests/kill.py [SYSTEM ...] --kills 20 --seed 0

A tiny teacher, a few hundred steps and a checkpoint every few of them. One run is left alone; others are killed and
continued until there were so many kills, and every finished one is compared. Prints a line per system with where the
kills fell; exit code 1 where a student differs or a run does not continue. Too long for `make test`: `make soak`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent / "support"))

import task_cases
import torch
from rich.console import Console

from fastdistil.configs.bistil import BistilConfig
from fastdistil.configs.bistil_task import BistilTaskConfig
from fastdistil.configs.common import build
from fastdistil.configs.finetune import FinetuneConfig
from fastdistil.configs.lightmbert import LightmbertConfig
from fastdistil.configs.xtremedistil import XtremeDistilConfig
from fastdistil.systems import bistil, bistil_task, finetune, lightmbert, measure, xtremedistil

SYSTEMS: dict[str, tuple[Any, Any]] = {
    "lightmbert": (LightmbertConfig, lightmbert.run),
    "bistil": (BistilConfig, bistil.run),
    "bistil-task": (BistilTaskConfig, bistil_task.run),
    "xtremedistil": (XtremeDistilConfig, xtremedistil.run),
    "finetune": (FinetuneConfig, finetune.run),
}
WEIGHTS = "model.safetensors"


def options(system: str, folder: Path) -> dict[str, Any]:
    text = {"text": [f"a={folder / 'a.txt'}", f"b={folder / 'b.txt'}"], "max_length": 24, "batch_size": 4}
    text |= {"teacher": str(folder / "encoder"), "steps": 150, "save_every": 2, "evaluate_every": 30, "held_out": 0.1}
    labelled = {"train": [str(folder / "train.tsv")], "save_every": 2, "batch_size": 8}
    return {
        "lightmbert": text,
        "bistil": text,
        "bistil-task": labelled
        | {"student": str(folder / "bistil"), "teacher": str(folder / "tagger"), "steps": 75, "lr": 1e-3}
        | {"head_steps": 20, "freeze_embeddings": True},
        "xtremedistil": labelled
        | {"teacher": str(folder / "tagger"), "unlabelled": [str(folder / "more.tsv")], "embedding_size": 8}
        | {"lstm_size": 8, "steps": 180, "max_length": 32, "patience": 50},
        "finetune": labelled | {"model": str(folder / "encoder"), "steps": 150, "head_steps": 20, "evaluate_every": 50},
    }[system]


def in_child(work: Callable[[], object], log: Path) -> int:
    """Start `work` in a process of its own; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with log.open("a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finished(work: Callable[[], object], log: Path) -> None:
    """Run `work` in a process of its own. Raises RuntimeError where it fails."""
    _, status = os.waitpid(in_child(work, log), 0)
    if status:
        raise RuntimeError(f"status {status}:\n{log.read_text()[-3000:]}")


def prepare(folder: Path) -> None:
    """The tiny encoder, texts, labels, a tagger and phase 1's student."""
    task_cases.tiny_encoder(folder / "encoder")
    draw = random.Random(0)
    words = " ".join(task_cases.TEXT[:2]).split()
    for name in "ab":
        lines = [" ".join(draw.choices(words, k=draw.randint(4, 12))) for _ in range(150)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    for name, count in (("train", 48), ("more", 96)):
        task_cases.tagged(folder / f"{name}.tsv", count)
    quiet = Console(quiet=True)
    first = options("finetune", folder) | {"out": folder / "tagger", "steps": 10}
    finetune.run(build(FinetuneConfig, first), console=quiet)
    bistil.run(build(BistilConfig, options("bistil", folder) | {"out": folder / "bistil", "steps": 4}), console=quiet)


def student(out: Path) -> str:
    """A hash of what was saved."""
    found = hashlib.sha256()
    for path in sorted(x for x in out.rglob(WEIGHTS) if "checkpoints" not in x.parts):
        found.update(path.read_bytes())
    for path in sorted(out.glob("delta.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def where(out: Path) -> str:
    """The newest checkpoint's stage, or what there is before the first and after the last."""
    if (out / "metrics.json").exists():
        return "finished"
    steps = [x for x in (out / "checkpoints").rglob("step-*") if x.is_dir()] if out.exists() else []
    if not steps:
        return "before the first checkpoint"
    newest = max(steps, key=lambda x: x.stat().st_mtime)
    stage = newest.parent.relative_to(out / "checkpoints").as_posix()
    return "training" if stage == "." else stage


def kill(system: str, folder: Path, kills: int, draw: random.Random) -> tuple[Counter[str], bool]:
    """({stage: kills}, whether every finished run has the same student)."""
    config, run = SYSTEMS[system]
    quiet = Console(quiet=True)

    def work(out: Path) -> Callable[[], object]:
        made = build(config, options(system, folder) | {"out": out, "resume": True})
        return lambda: run(made, console=quiet)

    log = folder / f"{system}.log"
    alone = folder / f"{system}-alone"
    start = time.perf_counter()
    finished(work(alone), log)
    whole, wanted = time.perf_counter() - start, student(alone)
    fell, same, number = Counter[str](), True, 0
    while sum(fell.values()) < kills:
        out = folder / f"{system}-{number}"
        while True:
            pid = in_child(work(out), log)
            time.sleep(draw.uniform(0.02, 0.35) * whole if sum(fell.values()) < kills else 0)
            done, status = os.waitpid(pid, os.WNOHANG if sum(fell.values()) < kills else 0)
            if done:
                if status:
                    raise RuntimeError(f"{system}: status {status}:\n{log.read_text()[-3000:]}")
                break
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            fell[where(out)] += 1
        same &= student(out) == wanted
        shutil.rmtree(out)
        number += 1
    return fell, same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", nargs="*", choices=[*SYSTEMS, []], default=[])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    measure.LATENCY_ROUNDS.clear()  # takes longer than the training here
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        finished(lambda: prepare(folder), folder / "prepare.log")
        for system in given.system or SYSTEMS:
            fell, same = kill(system, folder, given.kills, random.Random(f"{given.seed} {system}"))
            places = ", ".join(f"{stage} {count}" for stage, count in sorted(fell.items()))
            verdict = "the same student bit for bit" if same else "ANOTHER STUDENT"
            print(f"{system}: {sum(fell.values())} kills ({places}): {verdict}", flush=True)
            wrong += not same
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
