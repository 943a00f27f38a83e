"""griffe extension: docstrings as Markdown, and the help texts of command-line options as documentation.

Tables between lines of ===, which a terminal shows well, become Markdown tables; a list of arguments that goes on in
the next line is joined.
"""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

_LIST = re.compile(r"^( {4}\w+,[^:\n]*,)\n {8}(?=[\w, ]*:)", re.MULTILINE)  # of arguments, over two lines
_RULE = re.compile(r"^ *=+(  +=+)+ *$")


def table(lines: list[str]) -> list[str]:
    """A table of two columns between two rules; a line that begins further right goes on with the one above."""
    second = re.search(r"=  +", lines[0])
    assert second is not None
    start = second.end()
    rows: list[list[str]] = []
    for line in lines[1:-1]:
        name, what = line[:start].strip(), line[start:].strip()
        if name:
            rows.append([name, what])
        else:
            rows[-1][1] += " " + what
    return [
        "| | |",
        "|---|---|",
        *(f"| `{name}` | {what.replace('||', '‖').replace('|', chr(92) + '|')} |" for name, what in rows),
    ]


def markdown(text: str) -> str:
    """The docstring with its tables in Markdown."""
    lines, found = _LIST.sub(r"\1 ", text).split("\n"), list[str]()
    at = 0
    while at < len(lines):
        if _RULE.match(lines[at]):
            end = next((i for i in range(at + 1, len(lines)) if _RULE.match(lines[i])), None)
            if end is not None:
                found += table(lines[at : end + 1])
                at = end + 1
                continue
        is_table = lines[at].startswith("|")
        found.append(lines[at].replace("<", "&lt;") if is_table else lines[at])
        at += 1
    return "\n".join(found)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before mkdocstrings reads it; `option(default, help)` documents its field."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        call = attr.value
        if isinstance(call, griffe.ExprCall) and str(call.function) == "option":
            given = [x for x in call.arguments if not isinstance(x, griffe.ExprKeyword)]
            named = {x.name: x.value for x in call.arguments if isinstance(x, griffe.ExprKeyword)}
            text = given[1] if len(given) > 1 else named.get("help", "''")
            attr.docstring = griffe.Docstring(" ".join(ast.literal_eval(str(text)).split()), parent=attr)
            attr.value = given[0] if given else named.get("default")

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
