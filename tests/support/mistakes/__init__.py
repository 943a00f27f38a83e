"""Mistakes that newcomers make, each with what its message has to say (tests/project/test_mistakes.py)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner


@dataclass(frozen=True)
class Mistake:
    """`make` gets an empty folder and makes the mistake. Its message names `argument`, says what `came` and what was
    `wanted`, and, where there is one, the way `out`; each is a part of the message, "" where it has none. `theirs`:
    Python's words, typer's or PyTorch's, or such as depend on the machine, which are not compared word by word."""

    name: str
    make: Callable[[Path], Any]
    argument: str
    came: str
    wanted: str
    out: str = ""
    theirs: bool = False


class CommandError(Exception):
    """What a command wrote when it ended with an exit code of its own; a traceback is none of these."""


def command(*words: object) -> None:
    """`fastdistil WORDS` in this process."""
    from fastdistil.cli import app

    result = CliRunner(env={"COLUMNS": "2000", "TERM": "dumb"}).invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        raise CommandError(f"exit code {result.exit_code}: {_plain(result.output)}")


def _plain(output: str) -> str:
    """One line, without the frame that typer draws and without the hint at --help."""
    text = re.sub(r"\x1b\[[0-9;]*m|[\u2500-\u257f]", " ", output)
    text = re.sub(r"^.*?Usage:.*?\n(.*Try .* for help\.)?", "", text, flags=re.DOTALL)
    return " ".join(text.split())


def message(mistake: Mistake, folder: Path) -> str:
    """The error's kind and message, with the folder's name left out."""
    try:
        mistake.make(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}".replace(str(folder), "FOLDER")
    raise AssertionError(f"{mistake.name} went unnoticed")


def mistakes() -> dict[str, Mistake]:
    """All of them by name."""
    from mistakes import commands, files, losses, models, sparse, training

    rows = [x for table in (losses, models, sparse, files, training, commands) for x in table.MISTAKES]
    found = {x.name: x for x in rows}
    assert len(found) == len(rows), sorted({x.name for x in rows if sum(y.name == x.name for y in rows) > 1})
    return found
