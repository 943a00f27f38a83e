"""What LightMBERT and BiStil share: raw text in, a student and its report out."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fastdistil.configs.text import TextRun
from fastdistil.data.blocks import Blocks, HeldOut, Layout, split
from fastdistil.data.corruption import Corruption
from fastdistil.data.encode import length_limit
from fastdistil.data.text import Corpus, read, sources, tokenise
from fastdistil.systems import card, measure, report
from fastdistil.systems import plan as plans
from fastdistil.systems.encoders import inputs_by_size, process_state, processes, remove_checkpoints, save_student
from fastdistil.systems.folder import RunFolder, is_main_process
from fastdistil.systems.models import folder_of
from fastdistil.train import Options
from fastdistil.validation import mean_losses


def cut(config: TextRun, tokenizer: Any, folder: Path) -> list[Corpus]:
    """The run's text in pieces; one process cuts it, the others wait."""
    Corruption.of(tokenizer, config.corruption, config.whole_words)  # before any text is read
    cache = folder / "text" if config.cache is None else config.cache
    with process_state().main_process_first():
        return tokenise(
            config.text, tokenizer, cache, documents=config.documents, column=config.column, words=config.whole_words
        )


@dataclass(frozen=True)
class TextData:
    """Blocks to train on and held-out ones of every language, and what corrupts them."""

    train: list[Blocks]
    held: list[Blocks]
    sizes: Mapping[str, Any]
    corruption: Corruption

    @classmethod
    def of(cls, config: TextRun, corpora: Sequence[Corpus], tokenizer: Any, model: Any) -> TextData:
        """Raises ValueError where max_length is more than the model has positions for, or a language has no text left
        to train on."""
        length_limit(tokenizer, model.config, config.max_length)
        layout = Layout.of(tokenizer, config.max_length)
        corruption = Corruption.of(tokenizer, config.corruption, config.whole_words)
        return cls(*split(corpora, layout, config.held_out, config.seed), corruption)

    def validation(self, config: TextRun) -> HeldOut | None:
        """Held-out batches, corrupted alike each time; None without any."""
        if not self.held:
            return None
        return HeldOut(self.held, self.corruption, config.batch_size, config.seed, config.held_out_blocks)


def steps_of(config: TextRun, blocks: int) -> int:
    """Updates of the run over `blocks` blocks an epoch."""
    if config.steps is not None:
        return config.steps
    return max(1, math.ceil(config.epochs * blocks / (config.batch_size * config.accumulate * processes())))


def options_of(config: TextRun, steps: int, *, evaluates: bool) -> Options:
    """AdamW with linear warm-up and fall; ten evaluations unless the configuration says how many."""
    every = config.evaluate_every or max(1, steps // 10)
    return Options(
        steps,
        lr=config.lr,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        warmup=round(config.warmup_share * steps),
        schedule="linear",
        seed=config.seed,
        save_every=config.save_every,
        precision=config.precision,
        evaluate_every=every if evaluates else None,
        log=config.log,
    )


def has_head(model: Any) -> bool:
    """Whether the model answers with logits over its vocabulary."""
    head = model.get_output_embeddings()
    return head is not None and int(head.weight.shape[0]) == int(model.get_input_embeddings().weight.shape[0])


def held_out_figures(before: Mapping[str, float], history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """What each evaluation found: [{"step": 0, ...}, ..., {"step": the last, ...}]."""
    found = [{"step": 0.0, **before}] if before else []
    for record in history:
        figures = {name.removeprefix("eval_"): x for name, x in record.items() if name.startswith("eval_")}
        found += [{"step": record["step"] + 1, **figures}] if figures else []
    return found


def losses_of(history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The records without what evaluations found."""
    return [{name: x for name, x in record.items() if not name.startswith("eval_")} for record in history]


def evaluation(
    judges: Mapping[str, nn.Module], held: Iterable[Any] | None
) -> Callable[[nn.Module], dict[str, float]] | None:
    """A function for train(evaluate=) that runs objectives over the student in training on held-out batches: each
    one's sum by its name, and its terms as "name: term" where there are several."""
    if held is None:
        return None

    def evaluate(_: nn.Module) -> dict[str, float]:
        found = {}
        for name, judge in judges.items():
            judge.eval()
            losses = mean_losses(judge, held)
            found[name] = losses.pop("loss")
            found |= {f"{name}: {term}": x for term, x in losses.items()} if len(losses) > 1 else {}
        return found

    return evaluate


def estimate(config: TextRun, tokenizer: Any, most: int = 500) -> dict[str, dict[str, Any]]:
    """{language: {"documents", "pieces", "seen"}} without writing anything that stays: pieces from at most `most`
    documents a file, evenly spread; "seen" holds the ids that stand there."""
    Corruption.of(tokenizer, config.corruption, config.whole_words)  # refused here as in the run
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for language, paths in sources(config.text).items():
            documents, pieces, seen = 0, 0.0, set[int]()
            for path in paths:
                whole = read(path, documents=config.documents, column=config.column, cache=Path(folder))
                texts = [x for x in whole.select(range(0, len(whole), max(1, len(whole) // most)))["text"] if x]
                ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
                documents += len(whole)
                pieces += sum(map(len, ids)) * len(whole) / max(1, len(texts))
                seen.update(*ids)
            found[language] = {"documents": documents, "pieces": round(pieces), "seen": seen}
    return found


def planned(
    name: str,
    config: TextRun,
    found: Mapping[str, Mapping[str, Any]],
    steps: int,
    student: nn.Module,
    teacher: nn.Module | None,
    notes: Sequence[str] = (),
) -> plans.Plan:
    """The plan of one stage of `steps` steps; `found` is what `estimate` found."""
    micro = config.batch_size * config.max_length
    stage = plans.StagePlan(
        "distillation", steps, micro * config.accumulate * processes(), micro, config.max_length,
        plans.cost(student), None if teacher is None else plans.cost(teacher),
    )  # fmt: skip
    facts = {name: f"{x['documents']:,} documents, about {x['pieces']:,} pieces" for name, x in found.items()}
    return plans.Plan(name, facts, [stage], processes(), notes)


@dataclass(frozen=True)
class Ended:
    """What a run has when its training is over."""

    system: str
    paper: str
    teacher: Any
    teacher_sizes: Mapping[str, float]
    student: Any
    tokenizer: Any
    teacher_tokenizer: Any
    history: Sequence[Mapping[str, float]]
    data: TextData
    extra: Mapping[str, Any]
    notes: Sequence[str] = ()
    files: Mapping[str, str] | None = None


def sizes_of(config: TextRun, teacher: Any) -> dict[str, float]:
    """Parameters and MiB on disk of the teacher, as it was loaded."""
    return measure.sizes(teacher, Path(folder_of(config.teacher)) if Path(config.teacher).is_dir() else None)


def finish(config: TextRun, folder: RunFolder, ended: Ended, started: float, console: Console) -> dict[str, Any]:
    """Save the student and write the report; returns what metrics.json holds."""
    out = folder.path / "student"
    save_student(ended.student, ended.tokenizer, out, ended.system, ended.files)
    if not is_main_process():
        return dict(ended.extra)
    names = {"teacher": ended.teacher, "student": ended.student}
    lengths = min(128, config.max_length)
    inputs = {
        name: inputs_by_size(torch.full((1, lengths), tokenizer.unk_token_id or 0), torch.ones(1, lengths).long())
        for name, tokenizer in (("teacher", ended.teacher_tokenizer), ("student", ended.tokenizer))
    }
    metrics: dict[str, Any] = {
        "system": ended.system,
        "configuration": config.plain(),
        "data": ended.data.sizes,
        **ended.extra,
        "curves": report.curves({"training": losses_of(ended.history), "held-out text": ended.extra["held_out"]}),
        "sizes": {"teacher": ended.teacher_sizes, "student": measure.sizes(ended.student, out)},
        "latency_ms": measure.latency({name: (x, inputs[name]) for name, x in names.items()}),
        "machine": measure.machine(),
        "student": "student",
        "seconds": time.perf_counter() - started,
    }
    card.write(
        out, system=ended.system, teacher=config.teacher, data_licence=config.data_licence, paper=ended.paper,
        languages=list(ended.data.sizes), configuration=config.plain(),
    )  # fmt: skip
    report.print_table(report.cost_table(metrics), "Teacher and student", console)
    report.write(folder.path, metrics, notes=ended.notes)
    remove_checkpoints(folder.path)
    shutil.rmtree(folder.path / "text", ignore_errors=True)
    console.print(f"report: {folder.path / 'report.md'}")
    return metrics
