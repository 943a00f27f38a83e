"""The pages of the documentation site: their Python runs, their tables of backends hold, and the site builds."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ["index.md", "quick-start.md", "choosing.md", "trainers.md", "memory.md", "backends.md"]
PAGES += [f"migrate/{path.name}" for path in sorted((DOCS / "migrate").glob("*.md"))]


class Block(NamedTuple):
    """A block of Python on a page: its first line, its text, and the module it needs (None: it always runs)."""

    line: int
    code: str
    needs: str | None


def blocks(page: Path) -> list[Block]:
    """Every block of Python. `<!-- needs: module -->` before one names a package that CI may lack."""
    text = page.read_text()
    fences = re.finditer(r"^(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(text.count("\n", 0, x.start(2)) + 1, x[2], x[1]) for x in fences]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's blocks run in order, in one namespace. Those of a missing package are left out."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = blocks(DOCS / page)
    assert found, "a page without Python is not in this list"
    space: dict[str, object] = {"__name__": "docs"}
    for line, code, needs in found:
        if needs is None or importlib.util.find_spec(needs) is not None:
            exec(compile("\n" * (line - 1) + code, str(DOCS / page), "exec"), space)


def test_needs_are_said() -> None:
    """What a block needs beyond this package is named in the text."""
    for page in PAGES:
        text = (DOCS / page).read_text()
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        for block in blocks(DOCS / page):
            if block.needs is not None:
                assert f"`{block.needs}`" in prose, f"{page} does not say that its block needs {block.needs}"


STEMS = {
    "`logit_loss`": "logit", "`linear_logit_loss`": "logit", "`topk_logit_loss`": "topk",
    "`linear_topk_logit_loss`": "topk", "`hidden_loss`": "hidden", "`attention_loss`": "attention",
    "`fastdistil.sparse`": "sparse",
}  # fmt: skip


def test_backends_table() -> None:
    """docs/backends.md says of each loss which backends have a module for it."""
    places = {
        "reference": "fastdistil/reference/{}.py", "cpu": "fastdistil/backends/cpu/{}.py",
        "triton": "kernels/triton/{}.py", "cuda": "fastdistil/backends/cuda/{}.py",
    }  # fmt: skip
    lines = [line for line in (DOCS / "backends.md").read_text().splitlines() if line.startswith("| `")]
    for name, stem in STEMS.items():
        cells = next(line for line in lines if line.startswith(f"| {name}")).split("|")[2:6]
        for cell, place in zip(cells, places.values(), strict=True):
            assert (cell.strip() != "–") == (ROOT / place.format(stem)).exists(), f"{name}: {place}"


def test_site_builds(tmp_path: Path) -> None:
    """Without a warning, and with nothing that is fetched from elsewhere. Needs the docs extra (make docs)."""
    for module in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(module)
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        call, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?https?:[^\s>]*", page.read_text())
        assert not fetched, f"{page.name} fetches {fetched}"
        assert "arithmatex" not in page.read_text(), f"{page.name} has a formula that is no MathML"
