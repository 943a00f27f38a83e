"""The README: its Python runs as pasted, its matrices are what the code does, its links lead somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import matrices
import pytest

ROOT = Path(__file__).parents[2]
PAGE = matrices.README.read_text(encoding="utf-8")
NOT_RUN = "# Not run by the tests: "  # the first line of a block that says why
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_runs_as_pasted(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    block = BLOCKS[number]
    if block.startswith(NOT_RUN):
        pytest.skip(block.splitlines()[0].removeprefix(NOT_RUN))
    exec(compile(block, f"README.md, block {number}", "exec"), {"__name__": "__main__"})
    assert ("print" in block) == bool(capsys.readouterr().out)


def test_matrices_are_what_the_code_does() -> None:
    assert matrices.with_matrices(PAGE) == PAGE, "run python tests/matrices.py"


def test_it_is_short() -> None:
    """Under 100 lines; paragraphs and bullets under 400 characters, but for the addresses of links."""
    assert len(PAGE.splitlines()) < 100
    text = re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    for line in text.splitlines():
        if not line.startswith("|"):
            shown = re.sub(r"<!--.*?-->", "", re.sub(r"\]\([^)]*\)", "]", line))
            assert len(shown) < 400, (len(shown), shown)


def anchors(page: str) -> set[str]:
    """Of a Markdown page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert len(targets) > 10
    for target in targets:
        path, _, anchor = target.partition("#")
        assert "://" not in path, f"{target}: nothing is loaded from elsewhere"
        assert (ROOT / path).is_file(), target
        if anchor:
            assert anchor in anchors((ROOT / path).read_text(encoding="utf-8")), target


def test_badges_and_commands_are_the_projects() -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch = next(x for x in project["dependencies"] if x.startswith("torch"))
    wanted = {"licence": project["license"]["text"], "python": project["requires-python"], "torch": torch}
    for name, value in wanted.items():
        shown = value.removeprefix("torch").replace(">=", "≥ ")
        assert f": {shown}</title>" in (ROOT / f"docs/images/badge-{name}.svg").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", PAGE, flags=re.MULTILINE)
    assert targets == ["demo", "test"] and all(f"\n{x}: " in makefile for x in targets)
    extras = re.findall(r"'\.\[(\w+)\]'", PAGE)
    assert extras and set(extras) <= project["optional-dependencies"].keys()


def test_gpus_come_with_their_scope() -> None:
    """The first paragraph that speaks of GPUs says that none has run the code."""
    first = next(x for x in PAGE.split("\n\n") if "GPU" in x)
    assert "not yet run" in first
    assert "no GPU has run this code yet" in PAGE


def cells(page: str, start: str) -> list[list[str]]:
    """Of the table rows that begin with `start`."""
    return [
        [x.strip() for x in line.strip("|").split("|")] for line in page.splitlines() if line.startswith(f"| {start}")
    ]


# README's rows, and the case and implementation in docs/benchmarks.md, which is generated from the records.
MEASURED = {
    "logits, forward KL": "logits mbert-kl-fp32 | fastdistil cpu |",
    "two heads of 768": "linear mbert-kl-768-768-fp32 | fastdistil cpu |",
    "64 cached columns": "topk mbert-bucket-float32 | fastdistil cpu |",
    "attention maps": "attention bert-prob_kl-512 | fastdistil cpu |",
}
EXACT = {
    "PyTorch eager": "PyTorch eager | float32",
    "Liger-Kernel": "Liger KL | float32",
    "fastdistil, CPU": "fastdistil cpu | float32",
    "fastdistil, Triton": "fastdistil triton | float32",
}


def test_figures_are_those_of_the_records() -> None:
    records = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for row, case in MEASURED.items():
        (shown,), recorded = cells(PAGE, row), next(x for x in cells(records, case) if len(x) > 8)
        for here, there in ((1, 3), (2, 4)):
            speed = recorded[there].split("×")[0]  # its error follows
            assert float(shown[here].rstrip("×")) == pytest.approx(float(speed), rel=0.02), row
        assert shown[3].split()[0] == recorded[6], row
        assert float(shown[5].split()[0]) == pytest.approx(float(recorded[7]), rel=0.1), row
    for row, case in EXACT.items():
        (shown,), (recorded,) = cells(PAGE, row), cells(records, case)
        assert shown[1:] == recorded[3:7], row  # noise 1e-1 to 1e-4
