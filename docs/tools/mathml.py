"""mkdocs hook: formulas become MathML while the site is built, so that no script and no font is needed to read them.

`$...$` and `$$...$$` are found by pymdownx.arithmatex (generic), which leaves the formula in a marked element.
The specification's formulas are plain text: of those, what Markdown would take for a link or for a cell is escaped.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\(\(|\[)(.*?)\\[)\]]</\1>', re.DOTALL)
_MATRICES = re.compile(r"\]\[(?=[XYW]_)")  # [X_s,-X_t][Y_s,Y_t], no link
_ABSOLUTE = re.compile(r"(?<= )\|(\S[^|\n]*\S)\|(?= )")  # |p - q| in a cell of a table


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The specification with its brackets and bars escaped; every other page as it is."""
    if page.file.src_uri != "losses.md":
        return markdown
    return _ABSOLUTE.sub(r"\\|\1\\|", _MATRICES.sub(r"]\\[", markdown))


def on_page_content(content: str, **_: Any) -> str:
    """The page's HTML, its formulas as MathML."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    element, bracket, formula = found.groups()
    block = bracket == "["
    math = convert(html.unescape(formula).strip(), display="block" if block else "inline")
    return f'<{element} class="formula">{math}</{element}>' if block else math
