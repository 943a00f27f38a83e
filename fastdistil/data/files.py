"""Labelled text from files: column files of words and tags, and whatever `datasets` loads, with what was repaired."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets

from fastdistil.data import tags as columns_of
from fastdistil.data.tables import LOADERS, load_file, load_folder, load_hub, quiet

Task = Literal["tokens", "text"]
"""A tag for every word, or a label for every text or pair of texts."""

COLUMN_SUFFIXES = (".tsv", ".iob2", ".iob", ".bio", ".conll", ".col", ".txt")
# Names under which published data sets keep these columns.
_NAMES = {
    "words": ("words", "tokens"),
    "tags": ("tags", "ner_tags", "labels", "upos", "pos_tags"),
    "text": ("text", "sentence", "sentence1", "premise"),
    "text_pair": ("text_pair", "sentence2", "hypothesis"),
    "label": ("label", "labels"),
}
_WORDS = datasets.Features(
    {
        "words": datasets.List(datasets.Value("string")),
        "tags": datasets.List(datasets.Value("string")),
    }
)
_ORIGIN = datasets.Features(
    {
        "language": datasets.Value("string"),
        "file": datasets.Value("string"),
        "repaired": datasets.Value("int32"),
    }
)


@dataclass
class Report:
    """What was read from one file: `repaired` invalid starts of entities, `odd` words that are empty or hold blanks or
    control characters, `outside` entity words read as O because of `ignore_types`, `unknown` rows or words without a
    label, and how often each label stands there."""

    file: str
    language: str
    rows: int = 0
    words: int = 0
    repaired: int = 0
    odd: int = 0
    outside: int = 0
    unknown: int = 0
    labels: Counter[str] = field(default_factory=Counter)

    def types(self) -> set[str]:
        """Types of entities, where the labels are IOB2 tags."""
        return {tag[2:] for tag in self.labels if columns_of.is_entity_tag(tag)}

    def line(self) -> str:
        """The report in one line of text."""
        parts = [f"{self.rows:,} sentences, {self.words:,} words" if self.words else f"{self.rows:,} texts"]
        if self.repaired:
            parts.append(f"{self.repaired} invalid I- read as B-")
        if self.odd:
            parts.append(f"{self.odd} words are empty or hold blanks or control characters")
        if self.outside:
            parts.append(f"{self.outside} words of ignored types read as O")
        if self.unknown:
            parts.append(f"{self.unknown} without a label")
        return f"{self.file} ({self.language}): {'; '.join(parts)}"


@dataclass(frozen=True)
class Labelled:
    """What `read` returns. `dataset` has the columns words, tags (lists of text) or text, label and, of pairs,
    text_pair; beside them language and file. A tag or label that is not known is None. `labels` is what a model of
    these data predicts, in its order."""

    dataset: datasets.Dataset
    reports: tuple[Report, ...]
    labels: list[str]
    task: Task

    @property
    def iob2(self) -> bool:
        """Whether the tags are IOB2, so that entities are scored."""
        return self.task == "tokens" and all(map(columns_of.is_iob2, self.labels)) and bool(self.labels)

    def notes(self) -> list[str]:
        """What a user should know: a line for each file, and types of entities that not all languages have."""
        found = [report.line() for report in self.reports]
        types = dict[str, set[str]]()
        for report in self.reports:
            types[report.language] = types.get(report.language, set()) | report.types()
        for kind in sorted(set.union(*types.values())) if self.iob2 else []:
            having = [language for language, own in types.items() if kind in own]
            if len(having) < len(types):
                found.append(f"entities of type {kind} are in {', '.join(having)} alone")
        return found


def named(path: str | Path) -> tuple[str | None, str]:
    """(language or None, path) of `da=FILE`, or of a path alone."""
    match = re.fullmatch(r"([A-Za-z][\w-]{0,30})=(.+)", str(path))
    if match is None or Path(path).exists():
        return None, str(path)
    return match[1], match[2]


def language_of(path: str | Path) -> str:
    """The language that a file's name begins with, as in da_ddt-ud-test.tsv or fr.txt; else the name itself."""
    name = Path(path).name
    match = re.match(r"(?!dev\b|dev_)([a-z]{2,3})(?=[-_.]|$)", name)
    return match[1] if match else name.split(".")[0]


def read(
    paths: Iterable[str | Path],
    task: Task,
    *,
    split: str = "train",
    labelled: bool = True,
    ignore_types: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
) -> Labelled:
    """Read files, folders and data sets into one, in their order.

    Each of `paths` is a file (column file; text, JSON Lines, CSV, Parquet), a folder that `datasets` saved, or the name
    of a data set on the hub; `da=PATH` names its language. Of what has splits `split` is read; NAME:SPLIT and
    NAME:CONFIGURATION:SPLIT choose in a hub's data set. `columns` maps words, tags, text, text_pair or label to the
    name of that column where it has another one. `ignore_types` are types of entities to read as O. With
    `labelled=False` labels are left out, files may have words or text alone, and for tokens the words of a text (of
    each line of a .txt file) are what blanks separate.

    Every entity begins with B-: an I- that continues none of its type is read as B- and counted. Raises
    FileNotFoundError or ValueError, naming the file and the line or row.
    """
    if task not in ("tokens", "text"):
        raise ValueError(f"read: task is {task!r}, expected 'tokens' or 'text'")
    if isinstance(paths, (str, Path)):
        raise TypeError(f"read: paths is {type(paths).__name__}, expected a list of files ([{str(paths)!r}] for one)")
    parts, reports = [], list[Report]()
    for given in paths:
        language, path = named(given)
        report = Report(path, language or language_of(path))
        with quiet():
            part = _read_one(path, task, split, labelled, columns or {}, report)
            parts.append(_finished(part, report, set(ignore_types), task))
        reports.append(report)
    if not parts:
        raise ValueError("read: paths is empty, expected at least one file")
    seen = {label for report in reports for label in report.labels}
    labels = columns_of.label_names(seen) if task == "tokens" else sorted(seen, key=_natural)
    if task == "tokens":
        _check_one_kind(reports)
    common = set.intersection(*(set(part.column_names) for part in parts))
    missing = sorted({name for part in parts for name in part.column_names} - common)
    if missing:
        without = next(r.file for r, part in zip(reports, parts, strict=True) if missing[0] not in part.column_names)
        raise ValueError(f"{without}: has no column {missing[0]!r}, which other files have")
    return Labelled(datasets.concatenate_datasets(parts), tuple(reports), labels, task)


def _natural(label: str) -> tuple[int, int | str]:
    """Numbers by their value, before words."""
    return (0, int(label)) if label.isdecimal() else (1, label)


def _check_one_kind(reports: Sequence[Report]) -> None:
    """Refuse parts of speech beside entities: a model has one set of labels."""
    entities = [r for r in reports if r.types()]
    others = [r for r in reports if any(not columns_of.is_iob2(label) for label in r.labels)]
    if entities and others:
        label = next(label for label in others[0].labels if not columns_of.is_iob2(label))
        raise ValueError(f"{others[0].file}: has the tag {label!r}, which is not IOB2, as {entities[0].file} is")


def _read_one(
    path: str, task: Task, split: str, labelled: bool, columns: Mapping[str, str], report: Report
) -> datasets.Dataset:
    file = Path(path)
    suffix = file.suffix.lower()
    tables = (".jsonl", ".json", ".csv", ".parquet", *(() if labelled else (".txt",)))
    if file.is_file() and task == "tokens" and suffix not in tables:
        if suffix == ".conllu":
            raise ValueError(f"{path}: is CoNLL-U, expected a file of words and one tag each")
        return _column_file(file, labelled, report)
    if file.is_file():
        loaded = load_file(file)
    elif file.is_dir():
        loaded = load_folder(file, split)
    elif suffix in LOADERS or suffix in COLUMN_SUFFIXES or path.startswith(("/", "./", "../", "~")):
        raise FileNotFoundError(f"{path}: no such file")
    else:
        loaded = load_hub(path, split)
    return _uniform(loaded, path, task, labelled, columns, report)


def _column_file(file: Path, labelled: bool, report: Report) -> datasets.Dataset:
    """A data set on disk, in the cache of `datasets`, under a name made of the file's path, size and time of change."""
    how = columns_of.layout(file, labelled=labelled)
    if not how.columns:
        raise ValueError(f"{file}: is empty, expected words and tags")
    if not labelled:
        how = columns_of.Layout(how.separator, how.columns, how.word, None, False)
    stat = file.stat()
    given = {"path": str(file.resolve()), "how": how, "stamp": (stat.st_size, stat.st_mtime_ns)}
    features = datasets.Features({**_WORDS, **_ORIGIN})
    if not labelled:
        del features["tags"]
    origin = {"language": report.language, "file": report.file}
    return datasets.Dataset.from_generator(_column_rows, gen_kwargs=given | {"origin": origin}, features=features)


def _column_rows(path: str, how: columns_of.Layout, stamp: Any, origin: dict[str, str]) -> Iterator[dict[str, Any]]:
    for sentence in columns_of.sentences(Path(path), how):
        row: dict[str, Any] = {"words": sentence.words, **origin, "repaired": 0}
        if sentence.tags is not None:
            row["tags"], row["repaired"] = columns_of.repair(sentence.tags) if how.iob else (sentence.tags, 0)
        yield row


def _uniform(
    loaded: datasets.Dataset, path: str, task: Task, labelled: bool, columns: Mapping[str, str], report: Report
) -> datasets.Dataset:
    """Columns under our names, labels as text. Rows are checked one by one, so that an error can name its row."""
    wanted = ("words", "tags") if task == "tokens" else ("text", "text_pair", "label")
    found = dict[str, str]()
    for name in wanted:
        options = (columns[name],) if name in columns else _NAMES[name]
        known = [x for x in options if x in loaded.column_names and x not in found.values()]
        if name == "words" and not labelled and not known and name not in columns:
            known = [x for x in _NAMES["text"] if x in loaded.column_names]
        if known and (labelled or name not in ("tags", "label")):
            found[name] = known[0]
        elif name in columns or not (name == "text_pair" or (name in ("tags", "label") and not labelled)):
            raise ValueError(
                f"{path}: has the columns {', '.join(loaded.column_names)}, expected {' or '.join(options)} for {name}"
            )
    target = found.get("tags" if task == "tokens" else "label")
    names = None if target is None else _class_names(loaded.features[target])
    own = {name: _WORDS[name] if name in _WORDS else datasets.Value("string") for name in found}
    features = datasets.Features({**own, **_ORIGIN})
    rows = loaded.select_columns(list(found.values())).with_format(None)
    origin = {"language": report.language, "file": report.file}
    given = {"found": found, "names": names, "task": task, "origin": origin}
    return rows.map(
        _uniform_row, with_indices=True, fn_kwargs=given, features=features, remove_columns=rows.column_names
    )


def _class_names(feature: Any) -> list[str] | None:
    while hasattr(feature, "feature"):  # a list of classes
        feature = feature.feature
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _label(value: Any, names: list[str] | None) -> str | None:
    """A label's name; None of one that is not known, as -1 in test data."""
    if value is None or value == "" or (not isinstance(value, str) and value < 0):
        return None
    return names[value] if names is not None and isinstance(value, int) else str(value)


def _uniform_row(
    row: dict[str, Any],
    index: int,
    found: Mapping[str, str],
    names: list[str] | None,
    task: Task,
    origin: dict[str, str],
) -> dict[str, Any]:
    new = {name: row[column] for name, column in found.items()} | origin | {"repaired": 0}
    where = f"{origin['file']}: row {index + 1}"
    if task == "text":
        for name in ("text", "text_pair"):
            if name in new and not isinstance(new[name], str):
                raise ValueError(f"{where}: {name} is {new[name]!r}, expected text")
        if "label" in new:
            new["label"] = _label(new["label"], names)
        return new
    if "tags" not in new and isinstance(new["words"], str):
        new["words"] = new["words"].split()
    words = new["words"]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{where}: words is {str(words)[:80]!r}, expected a list of texts")
    if "tags" in new:
        if not isinstance(new["tags"], list) or len(new["tags"]) != len(words):
            have = f"{len(new['tags'])} tags" if isinstance(new["tags"], list) else f"tags {new['tags']!r}"
            raise ValueError(f"{where}: has {len(words)} words and {have}, expected a tag for every word")
        tags = [_label(tag, names) for tag in new["tags"]]
        known = [tag for tag in tags if tag is not None]
        if any(map(columns_of.is_entity_tag, known)) and all(map(columns_of.is_iob2, known)):
            begun, new["repaired"] = columns_of.repair([tag or columns_of.OUTSIDE for tag in tags])
            tags = [one if tag is not None else None for tag, one in zip(tags, begun, strict=True)]
        new["tags"] = tags
    return new


def counts(part: datasets.Dataset, column: str) -> Counter[Any]:
    """How often each value stands in a column of texts or of lists of texts."""
    found = Counter[Any]()
    for chunk in part.with_format("arrow").iter(10_000):
        values = chunk[column].combine_chunks()
        if part.features[column] == _WORDS["words"]:
            values = values.flatten()
        for pair in values.value_counts():
            found[pair["values"].as_py()] += pair["counts"].as_py()
    return found


def _finished(part: datasets.Dataset, report: Report, ignored: set[str], task: Task) -> datasets.Dataset:
    """Without what was for the report alone; entities of ignored types as O."""
    report.rows = len(part)
    report.repaired = sum(part["repaired"])
    part = part.remove_columns("repaired")
    if task == "tokens":
        words = counts(part, "words")
        report.words = words.total()
        report.odd = sum(n for word, n in words.items() if columns_of.is_odd(word))
    target = "tags" if task == "tokens" else "label"
    if target not in part.column_names:
        return part
    counted = counts(part, target)
    report.outside = sum(n for tag, n in counted.items() if task == "tokens" and _is_ignored(tag, ignored))
    if report.outside:
        part = part.map(_without, fn_kwargs={"ignored": sorted(ignored)})
        counted = counts(part, target)
    report.unknown = counted.pop(None, 0)
    report.labels = counted
    return part


def _is_ignored(tag: str | None, ignored: Iterable[str]) -> bool:
    return tag is not None and columns_of.is_entity_tag(tag) and tag[2:] in ignored


def _without(row: dict[str, Any], ignored: Sequence[str]) -> dict[str, Any]:
    return {"tags": [columns_of.OUTSIDE if _is_ignored(tag, ignored) else tag for tag in row["tags"]]}
