"""The tables of docs/reliability.md: each command writes its own, between two comments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """What was tried, how often, and how often something was lost."""

    tried: str
    times: str
    lost: str


def write_rows(page: Path, name: str, rows: list[Row], head: tuple[str, str, str] = ("Tried", "Times", "Lost")) -> None:
    """Put a table of `rows` between <!-- `name`: begin --> and <!-- `name`: end --> of the page."""
    lines = [f"| {' | '.join(head)} |", "| --- | ---: | ---: |", *(f"| {' | '.join(row)} |" for row in rows)]
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{page}: has no {begin} and {end}")
    block = begin + "\n" + "\n".join(lines) + "\n" + end
    made = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: block, text, flags=re.DOTALL)
    page.write_text(made, encoding="utf-8")
