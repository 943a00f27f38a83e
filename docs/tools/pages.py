"""mkdocs hook: the pages as the site needs them. They are written for GitHub, too.

Formulas become MathML while the site is built, so that no script and no font is needed to read them.
`$...$` and `$$...$$` are found by pymdownx.arithmatex (generic), which leaves the formula in a marked element.
The specification's formulas are plain text: of those, what Markdown would take for a link or for a cell is escaped.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\(\(|\[)(.*?)\\[)\]]</\1>', re.DOTALL)
_WHOLE = re.compile(r"<td>([^\s<]{2,24}|[\d.e+-]+ / [\d.e+-]+)</td>")  # a name or numbers, not to be broken at a hyphen
_MATRICES = re.compile(r"\]\[(?=[XYW]_)")  # [X_s,-X_t][Y_s,Y_t], no link
_ABSOLUTE = re.compile(r"(?<= )\|(\S[^|\n]*\S)\|(?= )")  # |p - q| in a cell of a table


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page in Python-Markdown's dialect; of the specification brackets and bars escaped."""
    if page.file.src_uri == "losses.md":
        markdown = _ABSOLUTE.sub(r"\\|\1\\|", _MATRICES.sub(r"]\\[", markdown))
    return lists(markdown)


def lists(markdown: str) -> str:
    """GitHub's lists for Python-Markdown, which wants an empty line before a list and behind an item of several
    paragraphs, and four spaces in front of what goes on inside of an item."""
    found: list[str] = []
    fenced = inside = loose = False
    for line in markdown.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        if fenced or not line.strip():
            found.append(line)
            continue
        empty = not found or not found[-1].strip()
        if line.startswith("- "):
            if not empty and (loose or not inside):
                found.append("")
            inside, loose = True, False
        elif inside and line.startswith(" "):
            loose |= empty
            line = "  " + line if not line.startswith("   ") else line
        else:
            inside = False
        found.append(line)
    return "\n".join(found)


def on_page_content(content: str, **_: Any) -> str:
    """The page's HTML, its formulas as MathML and the names and numbers of its tables unbroken."""
    return _FORMULA.sub(_mathml, _WHOLE.sub(r'<td class="whole">\1</td>', content))


def _mathml(found: re.Match[str]) -> str:
    element, bracket, formula = found.groups()
    block = bracket == "["
    math = convert(html.unescape(formula).strip(), display="block" if block else "inline")
    return f'<{element} class="formula">{math}</{element}>' if block else math
