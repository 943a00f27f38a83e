"""What a misspelt name was mostly meant to be, for messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def meant(word: object, known: Iterable[str]) -> str:
    """ "; did you mean 'name'?" or nothing."""
    close = get_close_matches(str(word), list(known), 1, 0.7)
    return f"; did you mean {close[0]!r}?" if close else ""


def meant_part(part: object, names: Iterable[str]) -> str:
    """The same of a part of dotted names; where none is near, what names look like."""
    every = list(names)
    near = meant(part, dict.fromkeys(x for name in every for x in (*name.split("."), name)))
    return near or (f"; a name is {every[0]!r}" if every else "")
