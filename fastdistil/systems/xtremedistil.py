"""XtremeDistil (Mukherjee & Awadallah 2020), whole: a task teacher and data to a small student and its report.

    xtremedistil.run(XtremeDistilConfig(teacher="tagger/", train=("en.iob2",), unlabelled=("da.iob2",), out="runs/x"))

The teacher reads every row once; its states of one layer and its logits go to disk (`out`/outputs) and are read from
there, batch by batch, by every stage and by a run that continues. The student, a BiLSTM or a small transformer, is
saved in `out`/student with a tokenizer that knows the pieces of the data alone, unless `trim` is off.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fastdistil.batches import InOrder, Shuffled
from fastdistil.configs.xtremedistil import XtremeDistilConfig
from fastdistil.data import files
from fastdistil.models.bilstm import bilstm_student
from fastdistil.models.student import compact_student
from fastdistil.recipes import terms
from fastdistil.recipes import xtremedistil as recipe
from fastdistil.recipes.stages import Stage, run_stages
from fastdistil.systems import card, measure, outputs, report, task_data
from fastdistil.systems import plan as plans
from fastdistil.systems.encoders import process_state, processes, remove_checkpoints, save_student
from fastdistil.systems.evaluate import Scorer
from fastdistil.systems.folder import RunFolder, is_main_process
from fastdistil.systems.memory import PeakMemory
from fastdistil.systems.models import load_classifier, load_tokenizer
from fastdistil.train import Options

NAME, PAPER = "XtremeDistil", "Mukherjee & Awadallah 2020, arXiv 2004.05686"
METRICS = {"tokens": ("f1", "accuracy"), "text": ("macro_f1",)}
PIPELINES = {"tokens": "token-classification", "text": "text-classification"}


@dataclass(frozen=True)
class Student:
    """A student, its parts from the head down (names of parameters by group), and the projection of its states."""

    model: Any
    groups: Mapping[str, Sequence[str]]
    projection: nn.Module


def student_of(config: XtremeDistilConfig, teacher: Any, pieces: Tensor, pad_id: int, labels: Sequence[str]) -> Student:
    """The configuration's student over the teacher's pieces `pieces` (V_s,), drawn by its seed."""
    torch.manual_seed(config.seed)
    task = "sequence" if type(teacher).__name__.endswith("ForSequenceClassification") else "token"
    common: dict[str, Any] = {"pad_token_id": pad_id, "labels": list(labels), "task": task, "dropout": config.drop}
    if config.student == "bilstm":
        model = bilstm_student(
            teacher, pieces, embedding_size=config.embedding_size, lstm_size=config.lstm_size, **common
        )
        return Student(model, model.groups(), model.bilstm.projection)
    model = compact_student(
        teacher,
        pieces,
        hidden_size=config.hidden_size,
        layers=config.layers,
        heads=config.heads,
        ffn_size=config.ffn_size,
        **common,
    )
    names: list[str] = [name for name, _ in model.named_parameters()]
    groups = {"head": tuple(part for part in ("classifier.", "pooler.") if any(part in name for name in names))}
    groups |= {f"block-{i + 1}": (f"layer.{i}.",) for i in reversed(range(config.layers))}
    groups["embeddings"] = ("embeddings.",)
    return Student(model, groups, nn.Linear(config.hidden_size, teacher.config.hidden_size))


@dataclass(frozen=True)
class Streams:
    """What the stages read: batches to train on, and held-out ones, with the teacher's outputs and without."""

    transfer: Any
    labelled: Any
    held_transfer: Any
    held_labelled: Any


def layer_of(config: XtremeDistilConfig, teacher: Any) -> int:
    """The teacher's layer that the student learns, counted from 0; the middle one where none is named."""
    count = int(teacher.config.num_hidden_layers)
    layer = count // 2 if config.teacher_layer is None else config.teacher_layer
    if not -count - 1 <= layer <= count:
        raise ValueError(f"{NAME}: teacher_layer is {layer}, expected {-count - 1} to {count}, as the teacher has them")
    return layer % (count + 1)


def stages_of(
    config: XtremeDistilConfig, student: Student, streams: Streams, layer: int, sizes: Mapping[str, int]
) -> list[Stage]:
    """The configuration's schedule. `sizes`: rows of the data "transfer" and "labelled"."""
    states = recipe.representation(layer, student.projection)
    options = Options(1, lr=config.rate, final_lr=min(1e-8, config.rate), warmup=0, weight_decay=0.0)
    soft = [terms.logits(divergence=config.divergence)]
    if config.schedule == "joint":
        made = recipe.joint(states, streams.transfer, options, divergence=config.divergence)
        made = [replace(stage, held_out=streams.held_transfer) for stage in made]
    elif config.schedule == "logits":
        made = [Stage("logits", soft, streams.transfer, options, held_out=streams.held_transfer)]
    elif config.schedule == "labels":
        made = [Stage("labels", [terms.labels()], streams.labelled, options, held_out=streams.held_labelled)]
    else:
        made = recipe.stages(
            states,
            student.groups,
            streams.transfer,
            streams.labelled,
            steps=1,
            lr=config.rate,
            seed=config.seed,
            divergence=config.divergence,
            unfreeze=config.schedule == "unfreezing",
            held_out_unlabelled=streams.held_transfer,
            held_out_labelled=streams.held_labelled,
        )
    steps = steps_of(config, made, sizes)
    return [_finished(config, stage, n, index) for index, (stage, n) in enumerate(zip(made, steps, strict=True))]


def _kind(stage: Stage) -> str:
    """Which of the schedule's three stages it belongs to."""
    return "joint" if len(stage.terms) > 1 else stage.name.partition("-")[0]


def steps_of(config: XtremeDistilConfig, made: Sequence[Stage], sizes: Mapping[str, int]) -> list[int]:
    """Updates of each stage, at most."""
    kinds = [_kind(stage) for stage in made]
    batch = config.batch_size * config.accumulate * processes()
    if config.steps is None:
        rows = [sizes["labelled" if kind == "labels" else "transfer"] for kind in kinds]
        return [max(1, math.ceil(config.epochs * n / batch)) for n in rows]
    if len(made) == 1:
        return [config.steps]
    shares = dict(zip(("states", "logits", "labels"), config.shares, strict=True))
    found = [int(config.steps * shares[kind] / kinds.count(kind)) for kind in kinds]
    if min(found) < 1:
        raise ValueError(f"{NAME}: steps is {config.steps}, which leaves one of {len(made)} stages without a step")
    return found


def _finished(config: XtremeDistilConfig, stage: Stage, steps: int, index: int) -> Stage:
    every = config.evaluate_every or max(1, steps // 10)
    options = replace(
        stage.options,
        steps=steps,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        precision=config.precision,
        seed=100 * config.seed + index,
        save_every=config.save_every,
        log=config.log,
        evaluate_every=every,
        metric="loss",
        greater_is_better=False,
        patience=config.patience,
    )
    return replace(stage, options=options)


def run(config: XtremeDistilConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Distil and write the student and its report into `config.out`; returns what metrics.json holds there.

    Warns where the student has learned nothing that the development data show. Raises ValueError for data, a teacher or
    a folder that do not fit the configuration, KeyboardInterrupt after Ctrl-C, once the step, or the teacher's outputs
    that were computed, are saved.
    """
    console, started = console or Console(), time.perf_counter()
    if config.dry_run:
        return plans.show(plan(config), console)
    folder = RunFolder(config)
    if folder.finished is not None:
        return folder.finished
    teacher, task = load_classifier(config.teacher, config.task)
    tokenizer = load_tokenizer(config.teacher)
    with process_state().main_process_first():  # the others find in the cache what one process has cut into pieces
        data = task_data.read(config, task, teacher, tokenizer)
    for line in data.notes if is_main_process() else ():
        console.print(line, style="dim", highlight=False)
    table = int(teacher.get_input_embeddings().weight.shape[0])
    trimmed, pieces, collate = outputs.vocabulary(tokenizer, table, data.parts, config.trim)
    student = student_of(config, teacher, pieces, int(trimmed.pad_token_id), data.labels)
    layer = layer_of(config, teacher)
    with PeakMemory() as memory:
        streams = _streams(config, teacher, tokenizer, data, layer, collate, pieces if config.trim else None)
        sizes = {"transfer": len(data.transfer), "labelled": len(data.labelled)}
        stages = stages_of(config, student, streams, layer, sizes)
        history = run_stages(student.model, stages, out=folder.path / "checkpoints", name=NAME)
    save_student(student.model, trimmed, folder.path / "student", NAME)
    if not is_main_process():
        return {}
    ended = _Ended(config, folder, teacher, tokenizer, student.model, trimmed, data, collate)
    facts = {"teacher_layer": layer, "vocabulary": len(pieces), "peak_memory_mib": memory.mib}
    return _report(ended, history, started, console, facts)


def _streams(
    config: XtremeDistilConfig,
    teacher: Any,
    tokenizer: Any,
    data: task_data.TaskData,
    layer: int,
    collate: Any,
    pieces: Tensor | None,
) -> Streams:
    """The batches of every stage; the teacher runs here, unless its outputs are on disk."""
    labelled = Shuffled(data.labelled, collate, config.batch_size, config.seed)
    held = InOrder(data.held_out, collate, config.batch_size, config.seed)
    if config.schedule == "labels":
        return Streams(None, labelled, None, held)
    cache = config.out / "outputs" if config.cache is None else config.cache
    made = [
        outputs.cached(
            teacher,
            rows,
            cache / name,
            layers=[layer] if config.reads_states else [],
            dtype=config.cache_dtype,
            pad_id=int(tokenizer.pad_token_id),
            batch_size=config.batch_size,
            collate=collate,
            pieces=pieces,
        )
        for name, rows in (("transfer", data.transfer), ("held-out", data.held_out))
    ]
    return Streams(made[0].batches(config.batch_size, config.seed), labelled, made[1].in_order(config.batch_size), held)


@dataclass(frozen=True)
class _Ended:
    """What a run has when its training is over."""

    config: XtremeDistilConfig
    folder: RunFolder
    teacher: Any
    teacher_tokenizer: Any
    student: Any
    tokenizer: Any
    data: task_data.TaskData
    collate: Any


def _report(
    ended: _Ended,
    history: Mapping[str, Sequence[Mapping[str, float]]],
    started: float,
    console: Console,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    config, data, out = ended.config, ended.data, ended.folder.path / "student"
    models = {"teacher": (ended.teacher, ended.teacher_tokenizer), "student": (ended.student.cpu(), ended.tokenizer)}
    dev = {name: _scores(data.dev, *pair, data)["mean"] for name, pair in models.items()}
    metric = next((name for name in METRICS[data.task] if dev["teacher"].get(name) is not None), "accuracy")
    _warn_where_nothing_was_learned(metric, dev["student"].get(metric))
    metrics: dict[str, Any] = {
        "system": NAME,
        "configuration": config.plain(),
        "data": data.facts,
        "notes": data.notes,
        **facts,
        "dev": dev,
        "metric": metric,
        "steps": {name: len(records) for name, records in history.items()},
        "curves": report.curves(history),
        "held_out": {name: _evaluations(records) for name, records in history.items()},
    }
    if config.test:
        test = files.read(
            config.test, data.task, split="test", ignore_types=config.ignore_types, columns=config.columns()
        )
        figures = {name: _scores(test, *pair, data) for name, pair in models.items()}
        metrics["scores"] = {name: found["languages"] for name, found in figures.items()}
        metrics["files"] = {name: found["files"] for name, found in figures.items()}
        metrics["notes"] = [*data.notes, *test.notes(), *figures["student"]["notes"]]
    else:
        metrics["scores"] = {name: {"development data": found} for name, found in dev.items()}
    at = Path(config.teacher)
    metrics |= {
        "sizes": {
            "teacher": measure.sizes(ended.teacher, at if at.is_dir() else None),
            "student": measure.sizes(ended.student, out),
        },
        "latency_ms": measure.latency({name: (pair[0], _inputs(ended, name)) for name, pair in models.items()}),
        "machine": measure.machine(),
        "student": "student",
        "seconds": time.perf_counter() - started,
    }
    score_table = report.score_table(metrics["scores"], metric)
    card.write(
        out, system=NAME, teacher=config.teacher, data_licence=config.data_licence, paper=PAPER,
        languages=list(metrics["scores"]["student"]), pipeline=PIPELINES[data.task], scores=score_table,
        configuration=config.plain(),
    )  # fmt: skip
    report.print_table(score_table, "Scores, in percent", console)
    report.print_table(report.cost_table(metrics), "Teacher and student", console)
    report.write(ended.folder.path, metrics, notes=[f"{name}: {fact}" for name, fact in data.facts.items()])
    remove_checkpoints(ended.folder.path)
    shutil.rmtree(ended.folder.path / "outputs", ignore_errors=True)
    console.print(f"report: {ended.folder.path / 'report.md'}")
    return metrics


def _scores(texts: Any, model: Any, tokenizer: Any, data: task_data.TaskData) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer = Scorer(texts, tokenizer, data.labels, max_length=data.max_length)
    return scorer(model.to(device))


def _warn_where_nothing_was_learned(metric: str, value: float | None) -> None:
    if metric == "f1" and value is not None and value <= 0:
        warnings.warn(
            f"{NAME}: the student's F1 on the development data is 0: it finds no entity and has learned nothing that "
            "these show; try more steps, another learning rate or another schedule",
            stacklevel=4,
        )


def _evaluations(records: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """What each evaluation of a stage found, by the step after which it was."""
    return [
        {"step": record["step"] + 1} | {k.removeprefix("eval_"): x for k, x in record.items() if k.startswith("eval_")}
        for record in records
        if any(k.startswith("eval_") for k in record)
    ]


def _inputs(ended: _Ended, name: str) -> dict[int, dict[str, Tensor]]:
    """One and 32 held-out rows as the model reads them, repeated where there are fewer."""
    rows = [ended.data.held_out[i % len(ended.data.held_out)] for i in range(32)]
    found = {}
    for count in (1, 32):
        batch = ended.collate(rows[:count])
        ids = batch.get("teacher_input_ids", batch["input_ids"]) if name == "teacher" else batch["input_ids"]
        found[count] = {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    return found


def plan(config: XtremeDistilConfig) -> plans.Plan:
    """What the run would take, by formula; it reads and cuts the data, and loads the teacher for its sizes."""
    teacher, task = load_classifier(config.teacher, config.task)
    tokenizer = load_tokenizer(config.teacher)
    data = task_data.read(config, task, teacher, tokenizer)
    table = int(teacher.get_input_embeddings().weight.shape[0])
    trimmed, pieces, _ = outputs.vocabulary(tokenizer, table, data.parts, config.trim)
    student = student_of(config, teacher, pieces, int(trimmed.pad_token_id), data.labels)
    sizes = {"transfer": len(data.transfer), "labelled": len(data.labelled)}
    nothing = Streams(data.transfer, data.labelled, None, None)
    stages = stages_of(config, student, nothing, layer_of(config, teacher), sizes)
    counted = outputs.lengths(data.transfer)
    length, micro = float(counted.mean()), float(counted.mean()) * config.batch_size
    costs = plans.cost(teacher), plans.cost(student.model)
    made = []
    if config.schedule != "labels":
        batches = math.ceil(len(counted) / config.batch_size)
        made.append(plans.StagePlan("teacher's outputs", batches, micro, micro, length, None, costs[0]))
    tokens = micro * config.accumulate * processes()
    made += [plans.StagePlan(x.name, x.options.steps, tokens, micro, length, costs[1]) for x in stages]
    width = int(teacher.config.hidden_size) * {"float32": 4}.get(config.cache_dtype, 2) if config.reads_states else 0
    disk = float(counted.sum()) * (4 + width + 4 * len(data.labels)) if config.schedule != "labels" else 0.0
    facts = {**data.facts, "pieces": f"{len(pieces):,} of {table:,}", "outputs on disk": plans.size(disk)}
    return plans.Plan(
        NAME, facts, made, processes(), ["Stages may stop earlier: their steps are the most.", *data.notes]
    )
