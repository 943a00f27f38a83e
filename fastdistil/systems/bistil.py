"""BiStil's first phase (Ansell et al. 2023), whole: raw text of two languages and a teacher to a bilingual student.

    bistil.run(BistilConfig(teacher="mbert/", text=("en.txt", "da.txt"), out=Path("runs/en-da")))

The student is saved in `out`/student with its trimmed tokenizer and teacher_ids.json, each of its ids' place in the
teacher's vocabulary, which the second phase (systems/bistil_task.py) needs. What trimming changes in how words are cut
is in the report.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fastdistil.configs.bistil import BistilConfig
from fastdistil.data.blocks import Alternating
from fastdistil.data.shares import kept_pieces, segmentation
from fastdistil.data.text import Corpus
from fastdistil.fingerprint import bare_names
from fastdistil.models.trim import trim_delta, trim_model_
from fastdistil.models.vocab import trim_vocabulary
from fastdistil.recipes import bistil as recipe
from fastdistil.recipes.terms import Distillation, Term, labels
from fastdistil.sparse import SparseDelta
from fastdistil.systems import plan as plans
from fastdistil.systems.encoders import check_tokenizer, empty_encoder, load_encoder
from fastdistil.systems.folder import RunFolder
from fastdistil.systems.models import load_tokenizer
from fastdistil.systems.texts import (
    Ended,
    TextData,
    cut,
    estimate,
    evaluation,
    finish,
    has_head,
    held_out_figures,
    options_of,
    planned,
    sizes_of,
    steps_of,
)
from fastdistil.train import Batch, train

NAME, PAPER = "BiStil, phase 1", "Ansell et al. 2023, arXiv 2306.01709"
IDS = "teacher_ids.json"


class LanguageDistillation(Distillation):
    """A distillation whose teacher has, while it reads a batch of language l, the difference `deltas[l]`: applied
    before and taken back bit for bit behind it. A batch names its language in `languages` (B,), all alike."""

    def __init__(
        self, student: nn.Module, terms: Sequence[Term], teacher: nn.Module, deltas: Mapping[int, SparseDelta]
    ) -> None:
        super().__init__(student, terms, teacher)
        self.deltas, self._adapted = dict(deltas), (teacher,)

    def forward(self, batch: Batch, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self._adapting(int(batch["languages"][0]), batch["input_ids"].device):
            found: dict[str, Tensor] = super().forward(batch, items)
            return found

    @contextmanager
    def _adapting(self, language: int, device: torch.device) -> Iterator[None]:
        delta = self.deltas.get(language)
        if delta is None:
            yield
            return
        teacher = self._adapted[0].to(device)  # before: what is kept lies beside what it overwrote
        delta.apply_(teacher)
        try:
            yield
        finally:
            delta.revert_(teacher)

    def fingerprint(self) -> dict[str, Any]:
        """The teacher's differences, too."""
        own: dict[str, Any] = super().fingerprint()
        return own | {"deltas": {str(number): _digest(delta) for number, delta in sorted(self.deltas.items())}}


def _digest(delta: SparseDelta) -> list[Any]:
    sums = {name: float(x.double().abs().sum()) for name, x in delta.values.items()}
    return [delta.mask.digest(), sums]


def load_deltas(config: BistilConfig, languages: Sequence[str], model: Any) -> dict[int, SparseDelta]:
    """{language's number: its difference}, without tensors stored whole: those are the head of another task.

    Raises ValueError for a language of which there is no text and a file that does not fit the model.
    """
    found = dict[int, SparseDelta]()
    tensors = {bare_names([name])[name]: p for name, p in model.named_parameters(remove_duplicate=False)}
    for entry in config.language_delta:
        language, _, path = entry.partition("=")
        if language not in languages:
            raise ValueError(f"{NAME}: language_delta names {language!r}, text has {', '.join(languages)}")
        delta = SparseDelta.load(path)
        delta = SparseDelta(delta.positions, delta.values, delta.shapes, base_model=delta.base_model)
        delta.check(tensors, f"{NAME}: {path}", "the teacher")
        found[languages.index(language)] = delta
    return found


def trimmed(config: BistilConfig, corpora: Sequence[Corpus], tokenizer: Any) -> tuple[Any, Tensor]:
    """The tokenizer of the pieces that the languages' shares keep, and each new id's old one, (V_s,) int64."""
    size = max(tokenizer.get_vocab().values()) + 1
    return trim_vocabulary(tokenizer, kept_pieces(corpora, size, config.threshold))


def run(config: BistilConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Distil and write the student and its report into `config.out`; returns what metrics.json holds there.

    Raises ValueError for text, a teacher, a difference or a folder that do not fit the configuration,
    KeyboardInterrupt after Ctrl-C, once the step is saved.
    """
    console, started = console or Console(), time.perf_counter()
    if config.dry_run:
        return plans.show(plan(config), console)
    folder = RunFolder(config)
    if folder.finished is not None:
        return folder.finished
    whole, tokenizer = load_encoder(config.teacher, NAME), load_tokenizer(config.teacher)
    check_tokenizer(whole, tokenizer, NAME)
    size, sizes = int(whole.get_input_embeddings().weight.shape[0]), sizes_of(config, whole)
    corpora = cut(config, tokenizer, folder.path)
    deltas = load_deltas(config, [x.language for x in corpora], whole)
    teacher, own, checks, files = whole, tokenizer, dict[str, Any](), dict[str, str]()
    if config.trim:
        own, rows = trimmed(config, corpora, tokenizer)
        trim_model_(teacher, rows)
        deltas = {number: trim_delta(delta, rows, size) for number, delta in deltas.items()}
        corpora_before, corpora = corpora, cut(config, own, folder.path)
        cache = (folder.path / "text" if config.cache is None else config.cache) / "raw"
        checks = segmentation(
            corpora_before, tokenizer, own, documents=config.documents, column=config.column, cache=cache
        )
        files[IDS] = json.dumps(rows.tolist())
    data = TextData.of(config, corpora, own, teacher)
    student = recipe.student(teacher, config.reduction)
    judges: dict[str, nn.Module] = {
        "distance": LanguageDistillation(student, recipe.terms(student, teacher), teacher, deltas)
    }
    if config.corruption and has_head(student):
        judges["mlm"] = Distillation(student, [labels()])
    batches = Alternating(data.train, data.corruption, config.batch_size, config.seed)
    steps, evaluate = steps_of(config, len(batches)), evaluation(judges, data.validation(config))
    before = evaluate(student) if evaluate else {}
    history = train(
        judges["distance"],
        batches,
        None,
        options_of(config, steps, evaluates=evaluate is not None),
        out=folder.path / "checkpoints",
        name=NAME,
        evaluate=evaluate,
    )
    extra = {
        "steps": steps,
        "held_out": held_out_figures(before, history),
        "vocabulary": {"teacher": size, "student": len(own)},
        "segmentation": checks,
    }
    notes = [f"Vocabulary: {len(own):,} of the teacher's {size:,} pieces.", *(_said(x, y) for x, y in checks.items())]
    ended = Ended(NAME, PAPER, teacher, sizes, student, own, own, history, data, extra, notes, files)
    return finish(config, folder, ended, started, console)


def _said(language: str, check: Mapping[str, float]) -> str:
    return (
        f"Of {check['words']:,.0f} words of {language} the trimmed tokenizer cuts {check['changed']:.2%} otherwise "
        f"than the teacher's, {check['unknown']:.2%} into an unknown piece that had none; {check['pieces_before']:.2f} "
        f"pieces per word before, {check['pieces_after']:.2f} now."
    )


def plan(config: BistilConfig) -> plans.Plan:
    """What the run would take, by formula, from the teacher's configuration and a sample of the text."""
    teacher, tokenizer = empty_encoder(config.teacher), load_tokenizer(config.teacher)
    found = estimate(config, tokenizer)
    notes = []
    if config.trim:
        seen = set().union(*(x["seen"] for x in found.values()))
        _, rows = trim_vocabulary(tokenizer, seen)
        trim_model_(teacher, rows)
        notes.append(f"The vocabulary would keep {len(rows):,} pieces or more, by a sample of the text.")
    smallest = min(x["pieces"] for x in found.values()) // (config.max_length - 2)
    steps = steps_of(config, len(found) * max(1, smallest))
    student = recipe.student(teacher, config.reduction)
    return planned(NAME, config, found, steps, student, teacher, notes)


def teacher_ids(student: Path, size: int) -> Tensor:
    """Each of a saved student's ids' place in the teacher's vocabulary, (V_s,) int64; all `size` ids of one that was
    not trimmed."""
    path = student / IDS
    return torch.tensor(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else torch.arange(size)
