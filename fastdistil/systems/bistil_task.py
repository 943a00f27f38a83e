"""BiStil's second phase (Ansell et al. 2023), whole: a bilingual student learns a task from the source language alone.

    bistil_task.run(BistilTaskConfig(student="runs/en-da", teacher="runs/teacher", train=("en.iob2",),
                                     test=("en=en_test.iob2", "da=da_test.iob2"), out=Path("runs/en-da-ner")))

The teacher is the first phase's teacher, tuned for the task; its vocabulary is cut to the student's, so that both read
the same pieces, for the attention maps and states, and the logits at T = 2 on labelled words. Everything trains; the
8% of the encoder's entries that moved most are kept, the rest goes back to where it was, and those train anew, with a
dense head both times. With `head_steps` the new head alone learns before, and both trainings begin with that one.
`out`/student is the result as transformers opens it, `out`/delta.safetensors what it took: `fd.sparse.load_into` puts
it on phase 1's student with a head of the same labels.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fastdistil.configs.bistil_task import BistilTaskConfig
from fastdistil.data import files
from fastdistil.data.encode import collate, encode_text, encode_words, length_limit
from fastdistil.models.student import without_dropout
from fastdistil.models.trim import trim_model_
from fastdistil.recipes import bistil as recipe
from fastdistil.recipes.terms import Distillation, labels
from fastdistil.sparse import SparseAdamW, SparseDelta, SparseMask, lottery_ticket
from fastdistil.systems import card, measure, report
from fastdistil.systems import plan as plans
from fastdistil.systems.bistil import teacher_ids
from fastdistil.systems.encoders import inputs_by_size, processes, remove_checkpoints, save_student
from fastdistil.systems.evaluate import Scorer
from fastdistil.systems.folder import RunFolder, is_main_process, write_json
from fastdistil.systems.models import (
    folder_of,
    head_alone,
    head_parameters,
    labels_of,
    load_classifier,
    load_tokenizer,
    new_classifier,
)
from fastdistil.systems.texts import held_out_figures, losses_of
from fastdistil.train import OptimizerFactory, Options, adamw, train

NAME, PAPER = "BiStil, phase 2", "Ansell et al. 2023, arXiv 2306.01709"
DELTA = "delta.safetensors"
HEAD, EVERYTHING, CHOSEN = "head", "everything", "chosen entries"  # the trainings


@dataclass(frozen=True)
class Material:
    """Models and data of a run, read alike by `run` and `plan`."""

    teacher: Any
    teacher_sizes: Mapping[str, float]
    student: Any
    tokenizer: Any
    rows: Any
    length: int
    notes: Sequence[str]

    @property
    def head(self) -> list[str]:
        """Parts of the names of the parameters that are the student's head: what phase 1 does not train."""
        names = head_parameters(self.student)
        return sorted({"pooler" if "pooler" in name else name.split(".")[0] for name in names})


def load(config: BistilTaskConfig) -> Material:
    """Raises ValueError where the teacher's labels are not the data's, or student and teacher are no pair."""
    teacher, _ = load_classifier(config.teacher, config.task)
    found = _read(config, config.train, "train")
    own = labels_of(teacher.config)
    if not set(found.labels) <= set(own):
        raise ValueError(
            f"{NAME}: the teacher's labels are {', '.join(own)}, the data's are {', '.join(found.labels)}: expected a "
            "teacher that knows all of the data's"
        )
    tokenizer = load_tokenizer(config.student)
    sizes = measure.sizes(teacher, Path(folder_of(config.teacher)) if Path(config.teacher).is_dir() else None)
    _cut_teacher(config, teacher, tokenizer)
    student, _ = new_classifier(config.student, config.task, own, config.seed)
    without_dropout(student)  # a classifier's own, too
    _check_pair(student, teacher)
    if config.head == "teacher":
        _copy_head(student, teacher)
    if config.freeze_embeddings:
        student.get_input_embeddings().requires_grad_(False)
    length = length_limit(tokenizer, student.config, config.max_length)
    rows = (encode_words if config.task == "tokens" else encode_text)(found.dataset, tokenizer, own, length)
    lost = sum(rows["lost"])
    what = "words" if config.task == "tokens" else "pieces"
    notes = [*found.notes(), *([f"{lost:,} {what} of the training data are beyond max_length"] if lost else [])]
    rows = rows.remove_columns([name for name in ("lost", "empty", "word") if name in rows.column_names])
    return Material(teacher, sizes, student, tokenizer, rows, length, notes)


def _read(config: BistilTaskConfig, paths: Sequence[str], split: str) -> files.Labelled:
    return files.read(paths, config.task, split=split, ignore_types=config.ignore_types, columns=config.columns())


def _cut_teacher(config: BistilTaskConfig, teacher: Any, tokenizer: Any) -> None:
    """The teacher with the student's vocabulary. Raises ValueError where the pieces are not the same."""
    ids = teacher_ids(Path(folder_of(config.student)), len(tokenizer))
    theirs = load_tokenizer(config.teacher)
    most = max(theirs.get_vocab().values())
    ours = tokenizer.convert_ids_to_tokens(list(range(len(ids))))
    if int(ids.max()) > most or theirs.convert_ids_to_tokens(ids.tolist()) != ours:
        raise ValueError(
            f"{NAME}: the student in {config.student} has other pieces than the teacher in {config.teacher}, expected "
            "phase 1's teacher, tuned for the task, with the same tokenizer"
        )
    trim_model_(teacher, ids)


def _check_pair(student: Any, teacher: Any) -> None:
    a, b = student.config, teacher.config
    if b.num_hidden_layers % a.num_hidden_layers or b.hidden_size != a.hidden_size or b.model_type != a.model_type:
        raise ValueError(
            f"{NAME}: the student is a {a.model_type} of {a.num_hidden_layers} blocks of width {a.hidden_size}, the "
            f"teacher a {b.model_type} of {b.num_hidden_layers} blocks of width {b.hidden_size}; expected the same "
            "kind and width, and a multiple of the blocks"
        )


@torch.no_grad()
def _copy_head(student: Any, teacher: Any) -> None:
    for name in head_parameters(student):  # the labels have the teacher's order
        student.get_parameter(name).copy_(teacher.get_parameter(name))


class Tuning:
    """The task's training, a `train_fn` of `lottery_ticket`: everything where the mask is None, else its entries and
    the head."""

    def __init__(self, config: BistilTaskConfig, material: Material) -> None:
        self.config, self.material = config, material
        self.folder = config.out / "checkpoints"
        student, teacher = material.student, material.teacher
        terms = [labels()] if config.labels_only else recipe.task_terms(student, teacher)
        guide = None if config.labels_only else teacher
        self.objective = Distillation(student, terms, guide)
        self.of_head = Distillation(student, terms[-1:], guide)  # the term of the logits
        self.scorer = None
        if config.dev:
            dev = _read(config, config.dev, "validation")
            self.scorer = Scorer(dev, material.tokenizer, labels_of(student.config), max_length=material.length)

    def options(self, name: str) -> Options:
        """AdamW, falling linearly to 0, for one of the trainings."""
        config, head = self.config, name == HEAD
        epoch = len(self.material.rows) / (config.batch_size * config.accumulate * processes())
        epochs = config.sparse_epochs if name == CHOSEN else config.epochs
        steps = config.head_steps if head else config.steps or max(1, math.ceil(epochs * epoch))
        return Options(
            steps,
            lr=config.head_lr if head else config.lr,
            batch_size=config.batch_size,
            accumulate=config.accumulate,
            warmup=round(config.warmup_share * steps),
            schedule="linear",
            seed=config.seed,
            save_every=config.save_every,
            precision=config.precision,
            evaluate_every=None if head or self.scorer is None else config.evaluate_every,
            log=config.log,
        )

    def __call__(self, student: nn.Module, mask: SparseMask | None, out: Path | None) -> None:
        def chosen(objective: nn.Module, options: Options) -> torch.optim.Optimizer:
            assert mask is not None
            trained = [(name, p) for name, p in student.named_parameters(remove_duplicate=False) if p.requires_grad]
            return SparseAdamW(trained, mask, lr=options.lr)

        name = EVERYTHING if mask is None else CHOSEN
        self._train(name, self.objective, adamw if mask is None else chosen, out)

    def head(self) -> None:
        """The new head alone, before."""
        if self.config.head_steps:
            with head_alone(self.material.student, head_parameters(self.material.student)):
                self._train(HEAD, self.of_head, adamw, self.folder / HEAD)

    def _train(self, name: str, objective: Distillation, optimizer: OptimizerFactory, out: Path | None) -> None:
        scorer, student = None if name == HEAD else self.scorer, self.material.student
        history = train(
            objective,
            self.material.rows,
            collate(int(self.material.tokenizer.pad_token_id)),
            self.options(name),
            optimizer=optimizer,
            out=out,
            name=f"{NAME}: {name}",
            evaluate=None if scorer is None else (lambda _: scorer.means(student)),
        )
        if is_main_process():
            write_json(self.folder / f"{name}.json", history)

    def history(self) -> dict[str, list[dict[str, float]]]:
        """The records of each training that has ended, also in a run that this one continues."""
        paths = {name: self.folder / f"{name}.json" for name in (HEAD, EVERYTHING, CHOSEN)}
        return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def run(config: BistilTaskConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Tune the student for the task and write it, its difference and the report into `config.out`; returns what
    metrics.json holds there.

    Raises ValueError where student, teacher, data and folder do not fit each other, KeyboardInterrupt after Ctrl-C,
    once the step is saved.
    """
    console, started = console or Console(), time.perf_counter()
    if config.dry_run:
        return plans.show(plan(config), console)
    folder = RunFolder(config)
    if folder.finished is not None:
        return folder.finished
    material = load(config)
    for line in material.notes if is_main_process() else ():
        console.print(line, style="dim", highlight=False)
    before = _teacher_scores(config, folder.path)
    tuning, checkpoints = Tuning(config, material), folder.path / "checkpoints"
    delta: SparseDelta | None = None
    tuning.head()
    if config.full:
        tuning(material.student, None, checkpoints)
    else:
        delta = lottery_ticket(
            material.student, tuning, config.density, exclude=material.head, out=checkpoints, base_model=config.student
        )
    if not is_main_process():
        return {}
    return _finish(config, folder.path, material, tuning, delta, before, console, started)


def _teacher_scores(config: BistilTaskConfig, out: Path) -> dict[str, Any]:
    """The teacher on the test files with its whole vocabulary; once, as a run that continues need not repeat it."""
    path = out / "teacher.json"
    if not config.test or config.labels_only or not is_main_process():
        return {}
    if not path.is_file():
        teacher, _ = load_classifier(config.teacher, config.task)
        write_json(path, _score(config, teacher.to(_device()), load_tokenizer(config.teacher)))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _score(config: BistilTaskConfig, model: Any, tokenizer: Any) -> dict[str, Any]:
    length = length_limit(tokenizer, model.config, config.max_length)
    scorer = Scorer(_read(config, config.test, "test"), tokenizer, labels_of(model.config), max_length=length)
    return {**scorer(model), "metric": scorer.metric}


def _finish(
    config: BistilTaskConfig,
    out: Path,
    material: Material,
    tuning: Tuning,
    delta: SparseDelta | None,
    before: Mapping[str, Any],
    console: Console,
    started: float,
) -> dict[str, Any]:
    student, tokenizer, history = material.student, material.tokenizer, tuning.history()
    save_student(student, tokenizer, out / "student", NAME)
    if delta is not None:
        delta.save(out / DELTA)
    scores, notes, metric = dict[str, Any](), list(material.notes), None
    if config.test:
        after = _score(config, student.to(_device()), tokenizer)
        scores = {"teacher": before["languages"]} if before else {}
        scores |= {"student": after["languages"]}
        notes += after["notes"]
        metric = after["metric"]
    sentence: Tensor = torch.tensor(max(material.rows["input_ids"][:64], key=len))[None]
    inputs = inputs_by_size(sentence, torch.ones_like(sentence))
    models = {"teacher": material.teacher, "student": student}
    metrics: dict[str, Any] = {
        "system": NAME,
        "configuration": config.plain(),
        "labels": labels_of(student.config),
        "head": material.head,
        "entries": None if delta is None else delta.nnz,
        "delta_mib": None if delta is None else (out / DELTA).stat().st_size / 2**20,
        "steps": {name: len(records) for name, records in history.items()},
        "curves": report.curves({name: losses_of(x) for name, x in history.items()}),
        "validation": {name: held_out_figures({}, x) for name, x in history.items()},
        "scores": scores,
        "metric": metric,
        "sizes": {"teacher": material.teacher_sizes, "student": measure.sizes(student, out / "student")},
        "latency_ms": measure.latency({name: (x, inputs) for name, x in models.items()}),
        "machine": measure.machine(),
        "student": "student",
        "seconds": time.perf_counter() - started,
    }
    if delta is not None:
        notes.append(
            f"{DELTA}: {delta.nnz:,} entries, {metrics['delta_mib']:.1f} MiB with the head, to add to the student of "
            f"{config.student} with a head of these labels."
        )
    table = report.score_table(scores, str(metric)) if scores else []
    card.write(
        out / "student", system=NAME, teacher=config.teacher, data_licence=config.data_licence, paper=PAPER,
        languages=list(scores.get("student", {})), scores=table, configuration=config.plain(),
        pipeline="token-classification" if config.task == "tokens" else "text-classification",
    )  # fmt: skip
    if table:
        report.print_table(table, "Test data, in percent", console)
    report.print_table(report.cost_table(metrics), "Teacher and student", console)
    report.write(out, metrics, notes=notes)
    (out / "teacher.json").unlink(missing_ok=True)
    remove_checkpoints(out)
    console.print(f"report: {out / 'report.md'}")
    return metrics


def plan(config: BistilTaskConfig) -> plans.Plan:
    """What the run would take; reads models and data, trains and writes nothing."""
    material = load(config)
    tuning = Tuning(config, material)
    length = sum(map(len, material.rows["input_ids"])) / len(material.rows)
    micro = config.batch_size * length
    tokens = micro * config.accumulate * processes()
    costs = plans.cost(material.student), None if config.labels_only else plans.cost(material.teacher)
    names = [*([HEAD] if config.head_steps else []), EVERYTHING, *([] if config.full else [CHOSEN])]
    stages = [plans.StagePlan(name, tuning.options(name).steps, tokens, micro, length, *costs) for name in names]
    facts = {
        "training": f"{len(material.rows):,} examples of {length:.0f} pieces on average",
        "labels": ", ".join(labels_of(material.student.config)),
        "head": ", ".join(material.head),
    }
    return plans.Plan(NAME, facts, stages, processes(), material.notes)
