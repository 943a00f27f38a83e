"""Column files of words and tags (IOB2, CoNLL): which lines are words, which column is the tag, what IOB2 allows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

OUTSIDE = "O"
_ODD = re.compile(r"[\s\x00-\x1f\x7f-\x9f]")
_DOCUMENT = "-DOCSTART-"  # CoNLL's mark between documents


@dataclass(frozen=True)
class Layout:
    """How one file is written: `separator` a tab or None for any blanks, the columns of word and tag (None: the file
    has words alone), and whether the tags are IOB2 (else each word's tag stands for itself, as parts of speech)."""

    separator: str | None
    columns: int
    word: int
    tag: int | None
    iob: bool


@dataclass(frozen=True)
class Sentence:
    """One sentence as it stands in the file; `line` is the number of its first word's line, from 1."""

    line: int
    words: list[str]
    tags: list[str] | None


def is_iob2(tag: str) -> bool:
    """Whether `tag` is O, B-TYPE or I-TYPE."""
    return tag == OUTSIDE or (tag.startswith(("B-", "I-")) and len(tag) > 2)


def is_entity_tag(tag: str) -> bool:
    return tag != OUTSIDE and is_iob2(tag)


def is_odd(word: str) -> bool:
    """Whether a word is empty or holds blanks or control characters, as "10 000"."""
    return not word or _ODD.search(word) is not None


def repair(tags: Sequence[str]) -> tuple[list[str], int]:
    """IOB2 tags with B-X in place of every I-X that continues no entity of type X, and how many those were."""
    found, repaired, before = list[str](), 0, OUTSIDE
    for tag in tags:
        if tag.startswith("I-") and before[2:] != tag[2:]:
            tag = "B-" + tag[2:]
            repaired += 1
        found.append(tag)
        before = tag
    return found, repaired


def label_names(tags: Iterable[str]) -> list[str]:
    """The labels of a model for these tags, in one order whatever the data's: of IOB2 O, then B- and I- of every type;
    of other tags themselves."""
    seen = set(tags)
    if not all(is_iob2(tag) for tag in seen) or seen == set():
        return sorted(seen)
    types = sorted({tag[2:] for tag in seen if tag != OUTSIDE})
    return [OUTSIDE, *(f"{begin}-{kind}" for kind in types for begin in "BI")]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end). Only \\n ends a line: words may hold other separators of Unicode."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: is not UTF-8: {error.reason} at byte {error.start}") from error
            yield number, line.rstrip("\r\n")


def _split(line: str, separator: str | None) -> list[str]:
    return line.split(separator) if separator else [part for part in line.split(" ") if part]


def _is_comment(columns: list[str], separator: str | None) -> bool:
    """A line without the separator that begins with #. Where blanks separate, a comment has columns, too: it is one
    unless a tag stands at its end."""
    if not columns or not columns[0].startswith("#"):
        return False
    return len(columns) == 1 or (separator is None and not is_iob2(columns[-1]))


def layout(path: Path, *, labelled: bool = True) -> Layout:
    """How the column file is written.

    A file with a tab anywhere is separated by tabs. The tag is the last column that holds IOB2 tags, else the last one;
    the word is the first one that does not merely number the words. With `labelled=False` a file of one column has
    words alone. Raises ValueError, with file and line, where rows differ in their number of columns, have no tag, or a
    tag that IOB2 does not have among others that it has.
    """
    with path.open("rb") as file:
        separator = "\t" if any(b"\t" in line for line in file) else None
    rows, count, place, numbers = 0, 0, 0, True
    tags = list[int]()  # by column: how many IOB2 tags it holds
    for number, line in _lines(path):
        columns = _split(line, separator)
        if not line.strip():
            place = 0
            continue
        if _is_comment(columns, separator) or columns[0] == _DOCUMENT:
            continue
        if not count:
            count = len(columns)
            tags = [0] * count
        if len(columns) != count or (count == 1 and labelled):
            wanted = f"{count}, as before" if count > 1 else "a word and a tag, with a tab between them"
            raise ValueError(f"{path}:{number}: has {len(columns)} column{'s'[: len(columns) > 1]}, expected {wanted}")
        rows, place = rows + 1, place + 1
        numbers = numbers and columns[0] == str(place)
        for i, value in enumerate(columns):
            tags[i] += is_iob2(value)
    word = 1 if numbers and count > 2 else 0
    likely = [i for i in range(word + 1, count) if tags[i] > rows / 2]
    tag = likely[-1] if likely else count - 1
    found = Layout(separator, count, word, tag if count > 1 else None, bool(likely))
    if labelled and likely and tags[tag] < rows:
        for number, columns in _rows(path, found):
            if columns and not is_iob2(columns[tag]):
                raise ValueError(f"{path}:{number}: tag is {columns[tag]!r}, expected O, B-TYPE or I-TYPE")
    return found


def _rows(path: Path, how: Layout) -> Iterator[tuple[int, list[str]]]:
    """(line's number, columns); none between sentences."""
    for number, line in _lines(path):
        columns = _split(line, how.separator)
        if not line.strip() or columns[0] == _DOCUMENT:
            yield number, []
        elif not _is_comment(columns, how.separator):
            yield number, columns


def sentences(path: Path, how: Layout) -> Iterator[Sentence]:
    """Every sentence of a column file, read as it goes."""
    for has_words, rows in groupby(_rows(path, how), key=lambda row: bool(row[1])):
        if has_words:
            listed = list(rows)
            words = [columns[how.word] for _, columns in listed]
            tags = None if how.tag is None else [columns[how.tag] for _, columns in listed]
            yield Sentence(listed[0][0], words, tags)
