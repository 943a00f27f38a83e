"""Every message of tests/support/mistakes, word by word (tests/data/mistakes.jsonl; `python tests/messages.py` rewrites it)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mistakes import message, mistakes

MESSAGES = Path(__file__).parents[1] / "data/mistakes.jsonl"
KNOWN = {row["mistake"]: row["message"] for row in map(json.loads, MESSAGES.read_text(encoding="utf-8").splitlines())}
ALL = mistakes()


@pytest.mark.parametrize("name", ALL)
def test_a_mistake_has_its_message(name: str, tmp_path: Path) -> None:
    """It names the argument, what came, what was wanted and the way out, and is the one that was read and accepted."""
    mistake = ALL[name]
    found = message(mistake, tmp_path)
    missing = [x for x in (mistake.argument, mistake.came, mistake.wanted, mistake.out) if x not in found]
    assert not missing, found
    assert mistake.theirs or found == KNOWN[name]


def test_the_table_is_large_and_has_no_leftovers() -> None:
    assert list(KNOWN) == list(ALL) and len(ALL) >= 120
