"""Scores of a classifier by file and language: strict entity F1, accuracy, macro F1.

metrics = run(EvaluateConfig(model="runs/student", test=("da=test.tsv", "sv_test.tsv")))
metrics["languages"]["da"]["f1"]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from torch import nn

from fastdistil.configs.evaluate import EvaluateConfig
from fastdistil.data import files
from fastdistil.data.encode import collate, encode_text, encode_words, length_limit
from fastdistil.data.scores import accuracy, entity_f1, macro_f1
from fastdistil.data.tags import OUTSIDE, is_entity_tag, is_iob2
from fastdistil.recipes.outputs import inputs_of
from fastdistil.systems.models import labels_of, load_classifier, load_tokenizer
from fastdistil.systems.report import mean, print_table

Figures = dict[str, Any]
METRICS = ("f1", "accuracy", "macro_f1", "precision", "recall")


class Scorer:
    """Data made ready to score models on, any number of times, as in validation.

    `data` is what `files.read` returns, or its dataset alone; `labels` are the models' in the order of their logits.
    Raises ValueError, with both sets, where the data have a label that is not among them.
    """

    def __init__(
        self,
        data: files.Labelled | datasets.Dataset,
        tokenizer: Any,
        labels: Sequence[str],
        *,
        max_length: int | None = None,
        batch_size: int = 32,
    ) -> None:
        dataset: datasets.Dataset = data.dataset if isinstance(data, files.Labelled) else data
        self.labels, self.batch_size = list(labels), batch_size
        self.words = "words" in dataset.column_names
        target = "tags" if self.words else "label"
        if target not in dataset.column_names:
            raise ValueError(f"score: the data have no {target}, expected labelled data")
        found = set(files.counts(dataset, target)) - {None}
        self.iob2 = self.words and all(map(is_iob2, found)) and any(map(is_entity_tag, self.labels))
        _check_labels(self.labels, found, self.iob2)
        self.true: list[Any] = dataset[target][:]
        count = len(dataset)
        origin = {
            name: dataset[name][:] if name in dataset.column_names else [""] * count for name in ("file", "language")
        }
        self.files, self.languages = origin["file"], origin["language"]
        encode = encode_words if self.words else encode_text
        known = dataset if self.words else dataset.remove_columns("label")
        self.rows: list[Any] = list(
            encode(known.remove_columns("tags") if self.words else known, tokenizer, [], max_length)
        )
        self.collate = collate(int(tokenizer.pad_token_id))
        self.unseen = sorted(
            {tag[2:] for tag in set(self.labels) - found if is_entity_tag(tag)} - {t[2:] for t in found}
        )

    @property
    def metric(self) -> str:
        """The figure that validation goes by: f1 of entities, accuracy of other tags and where the data have no entity,
        macro_f1 of texts."""
        if not self.words:
            return "macro_f1"
        entities = self.iob2 and any(tag and is_entity_tag(tag) for tags in self.true for tag in tags)
        return "f1" if entities else "accuracy"

    def means(self, model: nn.Module) -> dict[str, float]:
        """The means over languages alone, nan where there is no figure: what `train` wants of `evaluate`."""
        return {name: math.nan if value is None else value for name, value in self(model)["mean"].items()}

    def predict(self, model: nn.Module) -> list[Any]:
        """A label for every text, or a tag for every word of every sentence, OUTSIDE for what the model did not see."""
        order = sorted(range(len(self.rows)), key=lambda i: -len(self.rows[i]["input_ids"]))
        found: list[Any] = [None] * len(order)
        device = next(model.parameters()).device
        with _evaluating(model):
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                batch = self.collate([self.rows[i] for i in chosen])
                inputs = {name: x.to(device) for name, x in inputs_of(model, batch).items()}
                best = model(**inputs).logits.argmax(-1).tolist()
                for i, picked in zip(chosen, best, strict=True):
                    found[i] = self._tags(i, picked) if self.words else self.labels[picked]
        return found

    def _tags(self, i: int, picked: Sequence[int]) -> list[str]:
        row = self.rows[i]
        tags = [OUTSIDE] * len(self.true[i])
        for place, first in zip(row["word"], row["first"], strict=True):
            tags[place] = self.labels[picked[first]]
        return tags

    def __call__(self, model: nn.Module) -> Figures:
        """{"files": {file: figures}, "languages": {language: figures}, "mean": over languages, "notes": [text]}.

        In percent: of IOB2 tags f1, precision, recall (entities, strict) and accuracy, of other tags accuracy, of texts
        accuracy and macro_f1; None where there is no figure, as the F1 of data without an entity, which the mean leaves
        out. Beside them counts: sentences, words, entities, predicted (entities), lost (words, or pieces of texts,
        beyond the maximum length; words count as O), and types, the figures of each type.
        """
        predicted = self.predict(model)
        by_file = {name: self._figures(rows, predicted) for name, rows in _groups(self.files).items()}
        by_language = {name: self._figures(rows, predicted) for name, rows in _groups(self.languages).items()}
        names = [name for name in METRICS if any(name in figures for figures in by_language.values())]
        means = {name: mean([figures[name] for figures in by_language.values()]) for name in names}
        return {"files": by_file, "languages": by_language, "mean": means, "notes": self._notes(by_file)}

    def _figures(self, rows: Sequence[int], predicted: Sequence[Any]) -> Figures:
        lost = sum(self.rows[i]["lost"] for i in rows)
        if not self.words:
            known = [i for i in rows if self.true[i] is not None]
            true, got = [self.true[i] for i in known], [predicted[i] for i in known]
            return {"accuracy": accuracy(true, got), "macro_f1": macro_f1(true, got), "texts": len(rows), "lost": lost}
        pairs = [[(a, b) for a, b in zip(self.true[i], predicted[i], strict=True) if a is not None] for i in rows]
        flat = [pair for sentence in pairs for pair in sentence]
        figures: Figures = {"accuracy": accuracy([a for a, _ in flat], [b for _, b in flat])}
        if self.iob2:
            figures = entity_f1([[a for a, _ in s] for s in pairs], [[b for _, b in s] for s in pairs]) | figures
        return {**figures, "sentences": len(rows), "words": len(flat), "lost": lost}

    def _notes(self, by_file: Mapping[str, Figures]) -> list[str]:
        found = []
        for name, figures in by_file.items():
            if self.iob2 and not figures["entities"]:
                found.append(f"{name} has no entity: F1 has no figure and is left out of the mean")
            if figures["lost"]:
                what = (
                    "words beyond the maximum length count as O" if self.words else "pieces beyond the maximum length"
                )
                found.append(f"{name}: {figures['lost']:,} {what}")
        if self.iob2 and self.unseen:
            found.append(f"the data have no {', '.join(self.unseen)}: where the model says so, it is counted as wrong")
        return found


def _groups(names: Sequence[str]) -> dict[str, list[int]]:
    found = dict[str, list[int]]()
    for i, name in enumerate(names):
        found.setdefault(name, []).append(i)
    return found


def _check_labels(labels: Sequence[str], found: set[str], iob2: bool) -> None:
    foreign = sorted(found - set(labels))
    if foreign:
        hint = "; types can be left out with ignore_types" if iob2 else ""
        raise ValueError(
            f"score: the model's labels are {', '.join(labels)}, the data's are {', '.join(sorted(found))}: the model "
            f"has no {', '.join(foreign)}{hint}"
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def score(
    model: Any,
    tokenizer: Any,
    data: files.Labelled | datasets.Dataset,
    *,
    max_length: int | None = None,
    batch_size: int = 32,
) -> Figures:
    """Figures of a transformers classifier, as `Scorer` gives them. `max_length`: pieces per example, by default what
    tokenizer and model can take, at most 512."""
    length = length_limit(tokenizer, model.config, max_length)
    return Scorer(data, tokenizer, labels_of(model.config), max_length=length, batch_size=batch_size)(model)


def table(metrics: Figures, files_languages: Mapping[str, str]) -> list[list[str]]:
    """Header and rows: every file with its language, and the mean over languages."""
    names = [name for name in METRICS if name in metrics["mean"]]
    count = "entities" if "f1" in names else "words" if "words" in next(iter(metrics["files"].values())) else "texts"
    rows = [["file", "language", *names, count]]
    short = {file: Path(file).name for file in metrics["files"]}
    unique = len(set(short.values())) == len(short)
    for file, figures in metrics["files"].items():
        shown = [short[file] if unique else file, files_languages[file]]
        rows.append([*shown, *(cell(figures[name]) for name in names), f"{figures[count]:,}"])
    if len(metrics["languages"]) > 1:
        rows.append(["mean", "", *(cell(metrics["mean"][name]) for name in names), ""])
    return rows


def cell(value: float | None) -> str:
    return "no figure" if value is None else f"{value:.1f}"


def run(config: EvaluateConfig, *, console: Console | None = None) -> Figures:
    """Score `config.model` on the test files; returns `Scorer`'s figures with "model", "task" and "labels".

    Raises FileNotFoundError or ValueError where a file cannot be read, the model has no head for the task, or its
    labels are not the data's.
    """
    console = console or Console()
    model, task = load_classifier(config.model, config.task)
    tokenizer = load_tokenizer(config.model)
    data = files.read(config.test, task, split="test", ignore_types=config.ignore_types, columns=config.columns())
    for line in data.notes():
        console.print(line, style="dim", highlight=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures = score(model.to(device), tokenizer, data, max_length=config.max_length, batch_size=config.batch_size)
    metrics = {"model": config.model, "task": task, "labels": labels_of(model.config), **figures}
    languages = {report.file: report.language for report in data.reports}
    print_table(table(metrics, languages), f"{config.model}, in percent", console)
    for line in figures["notes"]:
        console.print(line, highlight=False)
    if config.out is not None:
        from fastdistil.systems.folder import write_json

        config.out.mkdir(parents=True, exist_ok=True)
        write_json(Path(config.out) / "metrics.json", metrics)
    return metrics
