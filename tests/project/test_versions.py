"""The lower bounds of pyproject.toml are the oldest versions of tests/versions.py, and its table says what a record says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import versions

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    "package", ["torch", "triton", "transformers", "trl", "sentence-transformers", "peft", "lightning"]
)
def test_lower_bounds_were_run(package: str) -> None:
    accepted = [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["triton"],
        *PROJECT["optional-dependencies"]["train"],
        *PROJECT["optional-dependencies"]["integrations"],
    ]
    (lowest,) = re.findall(rf"^{package}>=([\d.]+)$", "\n".join(accepted), re.MULTILINE)
    run = re.findall(
        rf"^{package}==([\d.]+)$",
        "\n".join(p for e in versions.ENVIRONMENTS.values() for p in e.packages),
        re.MULTILINE,
    )
    oldest = min(tuple(map(int, version.split("."))) for version in run)
    assert oldest[:2] == tuple(map(int, lowest.split(".")))


def test_every_environment_gets_what_the_tests_import() -> None:
    assert {"pytest", "mpmath", "trl", "sentence-transformers", "peft", "lightning", "rich"} <= {*versions.TOOLS}
    assert not {"fastdistil", *versions.SHOWN[:6]} & {*versions.TOOLS}


def test_table_names_what_failed() -> None:
    green = versions.Record("a", "2026-11-29", {"torch": "2.13.0"}, "every test", "9 passed", {"sm_80": "1 passed"})
    bad = versions.Record(
        "b", "2026-11-29", {}, "some", "1 failed, 2 passed", {"sm_80": "1 failed", "gfx942": "1 passed"}
    )
    _, _, first, second = versions.table([green, bad]).splitlines()
    assert first == "| a | 2.13.0 |" + 9 * " – |" + " every test | 9 passed | sm_80 | 2026-11-29 |"
    assert second.endswith("| some | 1 failed, 2 passed | gfx942, **not sm_80** | 2026-11-29 |")


def test_unknown_environment_is_named() -> None:
    with pytest.raises(SystemExit, match="versions: no environment 'latest', expected some of newest, "):
        versions.main(["latest"])
