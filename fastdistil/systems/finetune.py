"""Fine-tuning of an encoder for tags of words or labels of texts: a teacher for the recipes, or a baseline.

run(FinetuneConfig(model="xlm-roberta-base", train=("en.tsv",), dev=("en_dev.tsv",), out=Path("runs/teacher")))
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
from rich.console import Console
from torch import Tensor, nn

from fastdistil.configs.finetune import FinetuneConfig
from fastdistil.data import files
from fastdistil.data.encode import collate, encode_text, encode_words, length_limit
from fastdistil.recipes.outputs import inputs_of
from fastdistil.systems import measure, report
from fastdistil.systems.encoders import save_student
from fastdistil.systems.evaluate import METRICS, Scorer, cell
from fastdistil.systems.folder import RunFolder, is_main_process
from fastdistil.systems.models import blank_classifier, head_alone, labels_of, load_tokenizer, new_classifier
from fastdistil.systems.plan import Plan, StagePlan, cost, show
from fastdistil.train import Batch, Options, train

MODEL = "model"  # the folder of the tuned model within the run's


class LabelObjective(nn.Module):
    """Cross entropy of a classifier's logits with the labels that are known, summed over words or texts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = self.model(**inputs_of(self.model, batch)).logits
        keep = batch["labelled_words"].bool()
        loss = nn.functional.cross_entropy(logits[keep].float(), batch["labels"][keep], reduction="sum")
        return {"labels": loss / items["labels"]}

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"labels": batch["labelled_words"].sum()}

    def fingerprint(self) -> dict[str, Any]:
        return {"terms": ["labels"]}


@dataclass(frozen=True)
class _Data:
    """Training and validation data, and what was said of them."""

    train: datasets.Dataset
    dev: datasets.Dataset
    labels: list[str]
    iob2: bool
    notes: list[str]


def _read(config: FinetuneConfig) -> _Data:
    given: dict[str, Any] = {"ignore_types": config.ignore_types, "columns": config.columns()}
    found = files.read(config.train, config.task, split="train", **given)
    if not found.labels:
        raise ValueError(f"FinetuneConfig: train is {', '.join(config.train)}, which hold no label")
    if config.dev:
        dev = files.read(config.dev, config.task, split="validation", **given)
        return _Data(found.dataset, dev.dataset, found.labels, found.iob2, found.notes() + dev.notes())
    if len(found.dataset) < 2:
        raise ValueError(f"FinetuneConfig: train has {len(found.dataset)} example, expected 2 or more without dev")
    parts = found.dataset.train_test_split(test_size=config.dev_share, seed=config.seed)
    note = f"{len(parts['test']):,} of these examples are kept for validation"
    return _Data(parts["train"], parts["test"], found.labels, found.iob2, [*found.notes(), note])


def _steps(config: FinetuneConfig, examples: int) -> tuple[int, int]:
    """(steps of the run, steps of an epoch)."""
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    epoch = math.ceil(examples / (config.batch_size * config.accumulate * processes))
    return config.steps or max(1, round(config.epochs * epoch)), epoch


def _freeze(config: FinetuneConfig, model: Any) -> None:
    """Raises ValueError where a part of a name is no parameter's, or nothing is left to train."""
    if config.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    for part in config.freeze:
        named = [parameter for name, parameter in model.named_parameters() if part in name]
        if not named:
            raise ValueError(f"FinetuneConfig: freeze holds {part!r}, which is part of no parameter's name")
        for parameter in named:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("FinetuneConfig: freeze leaves no parameter to train")


def _encode(
    config: FinetuneConfig, dataset: datasets.Dataset, tokenizer: Any, labels: Sequence[str], length: int
) -> Any:
    encode = encode_words if config.task == "tokens" else encode_text
    rows = encode(dataset, tokenizer, labels, length)
    return rows.remove_columns([name for name in ("lost", "empty") if name in rows.column_names])


def plan(config: FinetuneConfig) -> Plan:
    """What the run would do; reads the data, trains nothing."""
    data, tokenizer = _read(config), load_tokenizer(config.model)
    model = blank_classifier(config.model, config.task, len(data.labels))
    _freeze(config, model)
    rows = _encode(config, data.train, tokenizer, data.labels, length_limit(tokenizer, model.config, config.max_length))
    steps, epoch = _steps(config, len(rows))
    length = sum(map(len, rows["input_ids"])) / len(rows)
    micro = config.batch_size * length
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    tokens = micro * config.accumulate * processes
    stages = [StagePlan("labels", steps, tokens, micro, length, cost(model))]
    if config.head_steps:
        with head_alone(model):
            stages.insert(0, StagePlan("head", config.head_steps, tokens, micro, length, cost(model)))
    facts = {
        "training": f"{len(rows):,} examples of {length:.0f} pieces on average, {steps / epoch:.1f} epochs",
        "validation": f"{len(data.dev):,} examples",
        "labels": ", ".join(data.labels),
    }
    return Plan("finetune", facts, stages, processes, data.notes)


def run(config: FinetuneConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Tune the model and save it with its tokenizer in `out`/model, with the report beside it; returns its figures.

    The head is the checkpoint's own where its labels are the data's, else a new one. Validation is on `dev`, or on a
    part of the training data, never on test data; the weights of its best figure (F1 of entities, accuracy of other
    tags, macro F1 of texts) are kept. Raises ValueError or FileNotFoundError where data cannot be read or options do
    not fit them, and KeyboardInterrupt after Ctrl-C once the step is saved; the same call with resume continues.
    """
    console = console or Console()
    if config.dry_run:
        return show(plan(config), console)
    started = time.perf_counter()
    folder = RunFolder(config)
    if folder.finished is not None:
        return folder.finished
    data, tokenizer = _read(config), load_tokenizer(config.model)
    model, own_head = new_classifier(config.model, config.task, data.labels, config.seed)
    labels = labels_of(model.config)
    _freeze(config, model)
    length = length_limit(tokenizer, model.config, config.max_length)
    head = "the model's own head" if own_head else "a new head"
    for line in (*data.notes, f"{len(labels)} labels ({', '.join(labels)}), {head}") if is_main_process() else ():
        console.print(line, style="dim", highlight=False)
    rows = _encode(config, data.train, tokenizer, labels, length)
    scorer = Scorer(data.dev, tokenizer, labels, max_length=length, batch_size=config.batch_size)
    metric = scorer.metric
    steps, epoch = _steps(config, len(rows))
    options = Options(
        steps,
        lr=config.lr,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        warmup=round(config.warmup_share * steps),
        schedule="linear",
        weight_decay=config.weight_decay,
        seed=config.seed,
        save_every=config.save_every,
        precision=config.precision,
        evaluate_every=config.evaluate_every or min(epoch, steps),
        metric=metric,
        patience=config.patience,
        log=config.log,
    )
    checkpoints = config.out / "checkpoints"
    objective = LabelObjective(model)
    batches = collate(int(tokenizer.pad_token_id))
    stages = dict[str, list[dict[str, float]]]()
    if config.head_steps and not own_head:
        with head_alone(model):
            first = replace(
                options,
                steps=config.head_steps,
                lr=config.head_lr,
                warmup=round(config.warmup_share * config.head_steps),
                evaluate_every=None,
                metric=None,
                patience=None,
            )
            stages["head"] = train(objective, rows, batches, first, out=checkpoints / "head", name="finetune: head")
    history = stages["labels"] = train(
        objective,
        rows,
        batches,
        options,
        out=checkpoints / "labels",
        name="finetune",
        evaluate=lambda _: scorer.means(model),
    )
    if not is_main_process():
        return {}
    figures = scorer(model)
    save_student(model, tokenizer, config.out / MODEL, "finetune", check=False)
    metrics = {
        "system": "finetune",
        "configuration": config.plain(),
        "labels": labels,
        "own_head": own_head,
        "steps": len(history),
        "metric": metric,
        "validation": figures,
        "scores": {"validation": figures["languages"]},
        "curves": report.curves({name: [_shown(record) for record in records] for name, records in stages.items()}),
        "sizes": {MODEL: measure.sizes(model, config.out / MODEL)},
        "student": MODEL,
        "machine": measure.machine(),
        "seconds": time.perf_counter() - started,
    }
    notes = [*data.notes, *figures["notes"], _validated(config)]
    report.write(config.out, metrics, notes=notes)
    shutil.rmtree(checkpoints)
    report.print_table(_table(figures), "Validation, in percent", console)
    return metrics


def _validated(config: FinetuneConfig) -> str:
    where = ", ".join(config.dev) if config.dev else "a part of the training data, which was not trained on"
    return f"Scores are of the validation data ({where}), which chose the weights: test data score lower."


def _shown(record: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if not name.startswith("eval_")}


def _table(figures: Mapping[str, Any]) -> list[list[str]]:
    names = [name for name in METRICS if name in figures["mean"]]
    rows = [[language, *(cell(one[name]) for name in names)] for language, one in figures["languages"].items()]
    return [["language", *names], *rows]
