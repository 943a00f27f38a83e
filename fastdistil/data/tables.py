"""Tables that `datasets` loads: files, saved folders, names on the hub; errors name the file and the line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars of `datasets`, which it draws for every small file."""
    drawn = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if drawn:
            datasets.enable_progress_bars()


def load_file(file: Path) -> datasets.Dataset:
    """The rows of a file of text, JSON Lines, CSV or Parquet; CSV as text, in all columns. Raises ValueError, with the
    file and, of JSON Lines, the line."""
    suffix = file.suffix.lower()
    if suffix not in LOADERS:
        raise ValueError(f"{file}: ends in {suffix!r}, expected one of {', '.join(LOADERS)}")
    options: dict[str, Any] = {}
    if LOADERS[suffix] == "csv":
        separator = "\t" if suffix == ".tsv" else ","
        with file.open(encoding="utf-8-sig", newline="") as lines:
            names = next(csv.reader(lines, delimiter=separator), [])
        # Everything is text: pandas would read the label "NA" as none and "01" as 1.
        options = {"sep": separator, "keep_default_na": False}
        options["features"] = datasets.Features({name: datasets.Value("string") for name in names})
        if suffix == ".tsv":
            options["quoting"] = csv.QUOTE_NONE
    try:
        return datasets.load_dataset(LOADERS[suffix], data_files=str(file), split="train", **options)
    except Exception as error:  # pyarrow's, pandas' or json's, inside of one of datasets' own
        if suffix == ".jsonl":
            _name_wrong_line(file)
        reason = error.__cause__ or error
        raise ValueError(f"{file}: cannot be read: {reason}") from error


def _name_wrong_line(file: Path) -> None:
    """Raise for the first line that is no JSON object."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                good = not line.strip() or isinstance(json.loads(line.rstrip("\r\n")), dict)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{file}:{number}: is no JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
                ) from error
            if not good:
                raise ValueError(f"{file}:{number}: is no JSON object, expected names and values")


def load_folder(folder: Path, split: str) -> datasets.Dataset:
    """`split` of a folder that `datasets` saved, or of one with files that it finds its way in."""
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    found = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
    return _one_split(found, str(folder), split)


def load_hub(name: str, split: str) -> datasets.Dataset:
    """NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT of the hub. Raises FileNotFoundError where it is not there."""
    parts = name.split(":")
    if len(parts) > 3 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", parts[0]):
        raise FileNotFoundError(f"{name}: no such file or folder, and no name of a data set")
    if len(parts) > 1:
        split = parts[-1]
    try:
        found = datasets.load_dataset(parts[0], parts[1] if len(parts) == 3 else None)
    except (OSError, ConnectionError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{name}: no such file or folder here, and the hub gives no data set: {error}"
        ) from error
    return _one_split(found, name, split)


def _one_split(found: Any, name: str, split: str) -> datasets.Dataset:
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        if len(found) > 1:
            raise ValueError(f"{name}: has the splits {', '.join(found)}, expected {split}")
        split = next(iter(found))
    return found[split]
