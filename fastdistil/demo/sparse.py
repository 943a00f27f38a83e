"""The demo's sparse part, BiStil's second phase: the same student tuned whole, and tuned on 8% of its entries."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import BertForTokenClassification

import fastdistil
from fastdistil.demo import report
from fastdistil.demo.material import Material, Settings, Source, draw, evaluate, load_source
from fastdistil.demo.run import check_folder, folder_name
from fastdistil.recipes import terms, xtremedistil
from fastdistil.recipes.stages import Stage, run_stages
from fastdistil.sparse import SparseAdamW, SparseMask, lottery_ticket, random_mask
from fastdistil.systems.folder import write_json
from fastdistil.systems.report import markdown_table, print_table
from fastdistil.train import OptimizerFactory, Options, adamw

DENSITY = 0.08
HEAD = "classifier"
ALONE, RANDOM, TICKET, WHOLE = "head alone", "8% at random", "8% that moved most", "everything"


class Tuning:
    """The task's training, a `train_fn`: the teacher's logits on all text. What training everything reaches goes to the
    file `everything`."""

    def __init__(self, material: Material, settings: Settings, seed: int, name: str, everything: Path) -> None:
        options = Options(settings.steps, lr=settings.lr, batch_size=settings.batch_size, seed=3 * seed + 1)
        self.stages = [Stage("logits", [terms.logits()], material.examples, options)]
        self.material, self.name, self.everything = material, name, everything

    def __call__(self, student: nn.Module, mask: SparseMask | None, out: Path | None) -> None:
        def sparse(objective: nn.Module, options: Options) -> torch.optim.Optimizer:
            assert mask is not None
            return SparseAdamW(student.named_parameters(), mask, lr=options.lr)

        optimizer: OptimizerFactory = adamw if mask is None else sparse
        name = f"{self.name}: {'everything' if mask is None else f'{mask.nnz:,} entries and the head'}"
        run_stages(student, self.stages, self.material.collate, optimizer=optimizer, out=out, name=name)
        if mask is None:
            assert isinstance(student, BertForTokenClassification)
            write_json(self.everything, {"accuracy": evaluate(student, self.material)})


def _distilled(source: Source, material: Material, settings: Settings, seed: int, folder: Path) -> Any:
    """The student that has met the teacher's states and no task yet."""
    student = source.new_student(seed, settings.hidden_size)
    projection = nn.Linear(settings.hidden_size, material.examples[0].hidden.shape[1])
    options = Options(settings.steps, lr=settings.lr, batch_size=settings.batch_size, seed=3 * seed)
    states = xtremedistil.representation("teacher_hidden", projection)
    stage = Stage("representation", [states], material.examples, options)
    run_stages(student, [stage], material.collate, out=folder / "distilled", name=f"seed {seed}: representation")
    return student


def _run_seed(out: Path, source: Source, settings: Settings, seed: int, material: Material) -> dict[str, Any]:
    """Accuracy by arm; finished arms are read back from `out`, the one in progress continues."""
    found: dict[str, Any] = {}
    body = dict(source.new_student(seed, settings.hidden_size).named_parameters())
    masks = {
        ALONE: random_mask(body, k=0, exclude=HEAD),
        RANDOM: random_mask(body, density=DENSITY, exclude=HEAD, seed=seed),
        TICKET: None,
    }
    for arm, mask in masks.items():
        folder = out / folder_name(arm)
        done = folder / "result.json"
        if not done.exists():
            student = _distilled(source, material, settings, seed, out)
            tuning = Tuning(material, settings, seed, f"seed {seed}, {arm}", out / "everything.json")
            density = DENSITY if mask is None else None
            delta = lottery_ticket(student, tuning, density, exclude=HEAD, mask=mask, out=folder)
            result = {"accuracy": evaluate(student, material), "entries": delta.nnz}
            write_json(done, result | {"mib": (folder / "delta.safetensors").stat().st_size / 2**20})
        for name in ("full", "sparse"):
            shutil.rmtree(folder / name, ignore_errors=True)  # checkpoints
        found[arm] = json.loads(done.read_text(encoding="utf-8"))
    found[WHOLE] = json.loads((out / "everything.json").read_text(encoding="utf-8"))
    shutil.rmtree(out / "distilled", ignore_errors=True)
    return {"seed": seed, "teacher": material.teacher_accuracy, "arms": found}


def run_sparse(
    out: Path,
    seed: int = 0,
    seeds: int = 1,
    cache: Path | None = None,
    settings: Settings | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Tune the distilled student whole, on the 8% that moved most, on 8% at random, and its head alone; write
    metrics.json and report.md into `out` and return the former's content.

    Accuracies in percent on held-out words. Arguments, interruption and errors as `run.run_demo`.
    """
    if seeds < 1:
        raise ValueError(f"run_sparse: seeds is {seeds}, expected at least 1")
    settings, console, started = settings or Settings(), console or Console(), time.perf_counter()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    check_folder(out, settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in run_demo

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - started:6.1f} s[/dim]  {text}")

    try:
        source = load_source(cache, say)
        results = []
        for number in range(seed, seed + seeds):
            say(f"seed {number}: the teacher reads {len(source.corpora)} languages")
            material = draw(source, settings, number)
            say(f"seed {number}: one student is distilled, and tuned four times")
            results.append(_run_seed(out / f"seed-{number}", source, settings, number, material))
    except KeyboardInterrupt as interrupt:
        console.print(f"{interrupt or 'interrupted'}; the same command continues from {out}")
        raise
    finally:
        torch.set_num_threads(threads)
    parameters = sum(p.numel() for p in source.new_student(seed, settings.hidden_size).parameters())
    metrics = {
        "settings": asdict(settings), "density": DENSITY, "parameters": parameters, "seeds": results,
        "summary": report.summarise(results), "torch": torch.__version__, "fastdistil": fastdistil.__version__,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    _write(out, metrics)
    print_table(report.accuracy_table(metrics["summary"], seeds > 1), "Held-out words", console)
    say(f"report: {out / 'report.md'}")
    return metrics


def _write(out: Path, metrics: dict[str, Any]) -> None:
    write_json(out / "metrics.json", metrics)
    s, several = metrics["settings"], len(metrics["seeds"]) > 1
    spread = " Mean over the seeds, lowest and highest in brackets." if several else ""
    ticket = metrics["seeds"][0]["arms"][TICKET]
    table = markdown_table(report.accuracy_table(metrics["summary"], several))
    text = f"""# Tuning a distilled student on 8% of its entries

The student of the demo ({metrics["parameters"]:,} parameters) learns the teacher's states for {s["steps"]} steps. Then
it is tuned for the task, on the teacher's logits of all text, {s["steps"]} steps each time from the same start: its
head alone; the head and {metrics["density"]:.0%} of the body's entries, drawn at random or those that moved most when
everything was tuned (they go back to the start first); and everything. Seeds:
{", ".join(str(seed["seed"]) for seed in metrics["seeds"])}.{spread}

{table}

`gain` is in points over the head alone. The sparse difference has {ticket["entries"]:,} entries and takes
{ticket["mib"]:.1f} MiB on disk with its head; the student takes {4 * metrics["parameters"] / 2**20:.1f} MiB. torch
{metrics["torch"]}, fastdistil {metrics["fastdistil"]}.
"""
    (out / "report.md").write_text(text, encoding="utf-8")
