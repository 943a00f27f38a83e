"""The demo: one teacher, four students that differ only in what they learn from, one report."""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForTokenClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import fastdistil
from fastdistil.demo import folders, measure, report
from fastdistil.demo.material import Material, Settings, Source, draw, evaluate, load_source
from fastdistil.recipes import terms, xtremedistil
from fastdistil.recipes.stages import Stage, run_stages
from fastdistil.systems.folder import write_json
from fastdistil.systems.report import print_table
from fastdistil.train import Options

SAVED_ARM = "whole schedule"


def arms(material: Material, settings: Settings, seed: int) -> dict[str, list[Stage]]:
    """The students' schedules by name, the same number of steps each; each name adds one cause to the one before."""
    options = Options(settings.steps, lr=settings.lr, batch_size=settings.batch_size, seed=3 * seed)
    torch.manual_seed(seed)
    projection = torch.nn.Linear(settings.hidden_size, material.examples[0].hidden.shape[1])
    states = xtremedistil.representation("teacher_hidden", projection)
    whole = xtremedistil.short_stages(
        states, material.examples, steps=settings.steps, lr=settings.lr, batch_size=settings.batch_size, seed=seed
    )
    return {
        "labels only": [Stage("labels", [terms.labels()], material.labelled, options)],
        "logits, labelled text": [Stage("logits", [terms.logits()], material.labelled, options)],
        "logits, all text": [Stage("logits", [terms.logits()], material.examples, options)],
        SAVED_ARM: whole,
    }


def _losses(history: Mapping[str, list[dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """{stage: {term: one value a step}} from the training records."""
    return {
        stage: {term: [r[term] for r in records] for term in records[0] if term not in ("step", "lr")}
        for stage, records in history.items()
    }


def folder_name(arm: str) -> str:
    """The arm's folder in the report folder."""
    return arm.replace(",", "").replace(" ", "-")


def _run_seed(out: Path, source: Source, settings: Settings, seed: int, material: Material) -> dict[str, Any]:
    """Train and test every arm; finished arms are read back from `out`, the one in progress from its checkpoint."""
    found: dict[str, Any] = {}
    for arm, stages in arms(material, settings, seed).items():
        folder = out / folder_name(arm)
        done = folder / "result.json"
        if not done.exists():
            student = source.new_student(seed, settings.hidden_size)
            start = time.perf_counter()
            history = run_stages(student, stages, material.collate, out=folder, name=f"seed {seed}, {arm}")
            seconds = time.perf_counter() - start
            accuracy = evaluate(student, material)
            student.save_pretrained(folder / "student")
            source.student_tokenizer.save_pretrained(folder / "student")
            write_json(done, {"accuracy": accuracy, "loss": _losses(history), "seconds": seconds})
        for path in folder.glob("[0-9]-*"):
            shutil.rmtree(path)  # the stages' checkpoints
        found[arm] = json.loads(done.read_text(encoding="utf-8"))
    return {"seed": seed, "teacher": material.teacher_accuracy, "arms": found}


def check_folder(out: Path, settings: Settings) -> None:
    """Refuse a folder that another configuration of the demo has begun."""
    path = out / "settings.json"
    wanted = asdict(settings)
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != wanted:
            raise ValueError(f"run_demo: out holds a demo of other settings ({path}: {before}), wanted {wanted}")
    write_json(path, wanted)


def run_demo(
    out: Path,
    seed: int = 0,
    seeds: int = 1,
    cache: Path | None = None,
    settings: Settings | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run the whole demo for `seeds` seeds from `seed` on and write the report into `out`; returns metrics.json's
    content.

    Accuracies in percent, times in milliseconds or seconds, sizes in MiB, as the keys say. The same seed gives the same
    accuracies and losses on the same machine. Interrupted, it keeps finished students and the checkpoint of the one in
    training: the same call continues. `cache` is the archives' folder (default: see `fetch.cache_dir`).

    Raises ValueError where `seeds` < 1 or `out` holds a demo of other settings, KeyboardInterrupt after Ctrl-C once the
    step is saved, and what `fetch.fetch` raises.
    """
    if seeds < 1:
        raise ValueError(f"run_demo: seeds is {seeds}, expected at least 1")
    settings, console = settings or Settings(), console or Console()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    check_folder(out, settings)
    disable_progress_bar()  # transformers draws one for each of the small files of a student
    threads = torch.get_num_threads()
    # 40 steps on two cores: 3.3 s with one thread, 2.5 s with two; where another program runs, 3.7 s and 22 s.
    torch.set_num_threads(1)
    try:
        return _run(out, range(seed, seed + seeds), cache, settings, console)
    except KeyboardInterrupt as interrupt:
        console.print(f"{interrupt or 'interrupted'}; the same command continues from {out}")
        raise
    finally:
        torch.set_num_threads(threads)


def _run(out: Path, seeds: range, cache: Path | None, settings: Settings, console: Console) -> dict[str, Any]:
    started = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - started:6.1f} s[/dim]  {text}")

    source = load_source(cache, say)
    folders.write(source, out / "files", say)
    results = []
    for seed in seeds:
        say(f"seed {seed}: the teacher reads {len(source.corpora)} languages")
        material = draw(source, settings, seed)
        if seed == seeds[0]:
            first = material
        say(f"seed {seed}: four students learn")
        results.append(_run_seed(out / f"seed-{seed}", source, settings, seed, material))
    say("measuring sizes, latency and losses")
    saved = out / f"seed-{seeds[0]}" / folder_name(SAVED_ARM) / "student"
    shutil.copytree(saved, out / "student", dirs_exist_ok=True)
    metrics = _measure(out / "student", source, first, settings, results)
    metrics["seconds"] = time.perf_counter() - started
    report.write(out, metrics)
    several = len(seeds) > 1
    print_table(report.accuracy_table(metrics["summary"], several), "Held-out words", console)
    print_table(report.cost_table(metrics), "Teacher and student", console)
    print_table(report.loss_table(metrics), "Losses in this run", console)
    say(f"report: {out / 'report.md'}")
    return metrics


def _measure(
    folder: Path, source: Source, material: Material, settings: Settings, results: list[dict[str, Any]]
) -> dict[str, Any]:
    """Everything of metrics.json but the run's length, with the student as transformers loads it from `folder`."""
    student = AutoModelForTokenClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if evaluate(student, material) != results[0]["arms"][SAVED_ARM]["accuracy"]:
        raise RuntimeError(f"{folder}: the saved student, loaded again, does not repeat its accuracy")
    seconds = [arm["seconds"] for result in results for arm in result["arms"].values()]
    return {
        "settings": asdict(settings),
        "vocabulary": len(tokenizer),
        "saved_arm": SAVED_ARM,
        "seeds": results,
        "summary": report.summarise(results),
        "sizes": measure.sizes(source, student, folder),
        "latency_ms": measure.latency(source, student, material),
        "loss_ms": measure.loss_cost(material, settings.batch_size),
        "step_ms": 1e3 * statistics.fmean(seconds) / settings.steps,
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "fastdistil": fastdistil.__version__,
        },
    }
