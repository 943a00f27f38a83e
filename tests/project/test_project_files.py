"""What a repository's visitors use beside the code: issue forms, the citation, the list of changes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import fastdistil

ROOT = Path(__file__).parents[2]
FORMS = ("bug", "wrong-number", "feature")


@pytest.mark.parametrize("name", FORMS)
def test_issue_forms(name: str) -> None:
    form: dict[str, Any] = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text(encoding="utf-8"))
    assert form["name"] and form["description"] and form["labels"]
    inputs = [x for x in form["body"] if x["type"] != "markdown"]
    ids = [x["id"] for x in inputs]
    assert len(set(ids)) == len(ids) and all(x["attributes"]["label"] for x in inputs)
    assert any(x.get("validations", {}).get("required") for x in inputs)
    assert ("doctor" in ids) == (name != "feature")  # what a report of a fault cannot do without


def test_issue_forms_name_every_loss() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/wrong-number.yml").read_text(encoding="utf-8"))
    (functions,) = (x["attributes"]["options"] for x in form["body"] if x.get("id") == "function")
    assert {x for x in fastdistil.__all__ if x.endswith("_loss")} <= set(functions)


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == fastdistil.__version__ == project["version"]
    assert citation["license"] == project["license"]["text"]


def test_changes_are_one_version() -> None:
    """Nothing was released yet: the list says what there is, not what was changed on the way."""
    page = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.*?)\]", page, flags=re.MULTILINE) == [fastdistil.__version__]
    for name in fastdistil.__all__:
        assert name.startswith("__") or name in page, name
