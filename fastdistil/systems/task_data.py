"""A task's data for a distillation: labelled, unlabelled and held-out rows in the teacher's pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch

from fastdistil.configs.xtremedistil import XtremeDistilConfig
from fastdistil.data import files
from fastdistil.data.encode import encode_text, encode_words, length_limit
from fastdistil.systems.models import labels_of
from fastdistil.systems.outputs import by_length, lengths


@dataclass(frozen=True)
class TaskData:
    """Rows as `data.encode` makes them, in the teacher's ids: `labelled`, `transfer` (these and the unlabelled ones)
    and `held_out`, which no stage trains on. `dev` are the held-out texts themselves, all of them; `facts` a line for
    each part, `notes` what was repaired or cut."""

    task: files.Task
    labels: list[str]
    max_length: int
    labelled: datasets.Dataset
    transfer: datasets.Dataset
    held_out: datasets.Dataset
    dev: datasets.Dataset
    facts: dict[str, str]
    notes: list[str]

    @property
    def parts(self) -> list[datasets.Dataset]:
        return [self.transfer, self.held_out]


def read(config: XtremeDistilConfig, task: files.Task, model: Any, tokenizer: Any) -> TaskData:
    """The data of a run. Raises ValueError where the data have a label that the teacher does not have, naming both
    sets, where nothing is left to train on, and as `files.read`."""
    labels = labels_of(model.config)
    limit = length_limit(tokenizer, model.config, config.max_length)
    labelled = files.read(config.train, task, ignore_types=config.ignore_types, columns=config.columns())
    check_labels(labels, labelled)
    notes = labelled.notes()
    train, dev = labelled.dataset, labelled.dataset
    if config.dev:
        given = files.read(
            config.dev, task, split="validation", ignore_types=config.ignore_types, columns=config.columns()
        )
        check_labels(labels, given)
        notes += given.notes()
        dev = given.dataset
    else:
        kept, held = split(len(train), config.dev_share)
        train, dev = train.select(kept), train.select(held)

    def encoded(dataset: datasets.Dataset) -> datasets.Dataset:
        return (encode_words if task == "tokens" else encode_text)(dataset, tokenizer, labels, limit)

    rows = encoded(train)
    parts = [rows]
    if config.unlabelled:
        columns = {name: column for name, column in config.columns().items() if name not in ("tags", "label")}
        unlabelled = files.read(config.unlabelled, task, labelled=False, columns=columns)
        notes += unlabelled.notes()
        parts.append(encoded(unlabelled.dataset))
    some = dev.select(spread(len(dev), config.dev_rows))
    held_out = encoded(some)
    held_out = held_out.select(by_length(lengths(held_out)))
    notes += _cut(parts, held_out, task)
    facts = {
        "labelled": f"{len(train):,} from {_count(config.train)}",
        "unlabelled": f"{sum(map(len, parts[1:])):,} from {_count(config.unlabelled)}",
        "held out": f"{len(dev):,} " + (f"from {_count(config.dev)}" if config.dev else "of the labelled ones")
        + (f", of which evaluations in training read {len(held_out):,}" if len(held_out) < len(dev) else ""),
    }  # fmt: skip
    return TaskData(task, labels, limit, rows, datasets.concatenate_datasets(parts), held_out, dev, facts, notes)


def split(count: int, share: float) -> tuple[list[int], list[int]]:
    """(rows to train on, rows to stop by), drawn, each in order; at least one of each. The same whatever a run's seed:
    runs that differ in it alone share the teacher's outputs. ValueError for fewer than two rows."""
    if count < 2:
        raise ValueError(f"train: has {count} rows, expected at least 2: one to train on, one to stop by; or give dev")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held = min(count - 1, max(1, round(share * count)))
    return sorted(order[held:]), sorted(order[:held])


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` rows, from the first to the last, so that every file has its share."""
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, most)).round())]


def check_labels(labels: Sequence[str], data: files.Labelled) -> None:
    """Raises ValueError, with both sets, where the data have a label that is not the teacher's."""
    seen = {label for report in data.reports for label in report.labels}
    if foreign := sorted(seen - set(labels)):
        raise ValueError(
            f"teacher: its labels are {', '.join(labels)}, the data's are {', '.join(data.labels)}: it has no "
            f"{', '.join(foreign)}" + ("; types can be left out with ignore_types" if data.iob2 else "")
        )


def _count(paths: Sequence[str]) -> str:
    return f"{len(paths)} file{'' if len(paths) == 1 else 's'}"


def _cut(parts: Sequence[datasets.Dataset], held_out: datasets.Dataset, task: files.Task) -> list[str]:
    what = "words" if task == "tokens" else "pieces"
    lost = {"training": sum(sum(rows["lost"]) for rows in parts), "held-out": sum(held_out["lost"])}
    return [f"{n:,} {what} of the {name} data are beyond max_length" for name, n in lost.items() if n]
