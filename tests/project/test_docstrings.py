"""The public names' docstrings: their examples run, and they name every argument, what comes back and what is raised."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import fastdistil

PLACES = {"fastdistil": fastdistil, "fastdistil.sparse": fastdistil.sparse, "fastdistil.teacher": fastdistil.teacher}
PUBLIC: dict[str, Callable[..., Any]] = {
    f"{place}.{name}": getattr(module, name)
    for place, module in PLACES.items()
    for name in module.__all__
    if callable(getattr(module, name))
}
NEVER_RAISE = {
    "fastdistil.VocabProjection", "fastdistil.backends", "fastdistil.empty_cache", "fastdistil.teacher.Head"
}  # fmt: skip


def sections(page: str) -> dict[str, str]:
    """Args, Returns, Raises and Example of a docstring."""
    parts = re.split(r"^(Args|Returns|Raises|Example):$", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_everything_public_is_looked_at() -> None:
    assert {x for x in fastdistil.__all__ if not x.startswith("__")} <= {x.split(".")[1] for x in PUBLIC}
    assert len(PUBLIC) > 25


@pytest.mark.parametrize("name", PUBLIC)
def test_example_runs(name: str) -> None:
    found = doctest.DocTestParser().get_doctest(inspect.getdoc(PUBLIC[name]) or "", {}, name, None, None)
    assert found.examples, f"{name} has no example"
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(found, out=said.append)
    assert result.failed == 0, "".join(said)


@pytest.mark.parametrize("name", PUBLIC)
def test_sections(name: str) -> None:
    public = PUBLIC[name]
    page = sections(inspect.getdoc(public) or "")
    said = page.get("Args", "")
    missing = [x for x in inspect.signature(public).parameters if not re.search(rf"\b{x}\b", said)]
    assert not missing, f"{name}: Args does not name {missing}"
    returns = None if inspect.isclass(public) else inspect.signature(public).return_annotation
    assert ("Returns" in page) == (returns not in (None, "None")), name
    assert ("Raises" in page) == (name not in NEVER_RAISE), name
    assert all(text.strip() for text in page.values()), name
