"""The tables of docs/reliability.md: each command writes its own, between two comments."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """What was tried, how often, and how often something was lost."""

    tried: str
    times: str
    lost: str


HEAD = ("Tried", "Times", "Lost")


def write_rows(page: Path, name: str, rows: list[Row], head: tuple[str, str, str] = HEAD, keep: bool = False) -> None:
    """Put a table of `rows` between <!-- `name`: begin --> and <!-- `name`: end --> of the page; `keep`: beside the rows
    of other parts that are there."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{page}: has no {begin} and {end}")
    before, _, rest = text.partition(begin)
    block, _, after = rest.partition(end)
    found = [Row(*(cell.strip() for cell in line.strip("| ").split(" | "))) for line in block.strip().splitlines()[2:]]
    others = [row for row in found if row.tried not in {new.tried for new in rows}] if keep else []
    lines = [f"| {' | '.join(head)} |", "| --- | ---: | ---: |", *(f"| {' | '.join(row)} |" for row in others + rows)]
    page.write_text(before + "\n".join([begin, *lines, end]) + after, encoding="utf-8")
