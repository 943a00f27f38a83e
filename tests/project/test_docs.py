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

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Pages whose blocks stand on their own.
PAGES = ["index.md", "quick-start.md", "choosing.md", "trainers.md", "memory.md", "backends.md"]
PAGES += [
    f"{folder}/{path.name}" for folder in ("migrate", "trainers") for path in sorted((DOCS / folder).glob("*.md"))
]

# Pages whose blocks speak of the reader's own models and data: what is there before each of them.
SMALL = """
import dataclasses, itertools, sys
from pathlib import Path
import torch
import fastdistil as fd
from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification
def bert(blocks, kind=BertForMaskedLM, **more):
    return kind(BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=blocks, num_attention_heads=2,
                           intermediate_size=16, max_position_embeddings=16, **more))
ids = torch.randint(5, 60, (4, 8))
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
"""
STORE = """
model, student, batch["example"] = bert(2), bert(1), range(4)
loader = [{name: x for name, x in batch.items() if name != "example"}]
"""
TICKET = """
model = torch.nn.ModuleDict({"body": torch.nn.Linear(4, 8), "classifier": torch.nn.Linear(8, 2)})
another_model = torch.nn.ModuleDict({"body": torch.nn.Linear(4, 8), "classifier": torch.nn.Linear(8, 2)})
def nudge(model, mask, out):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if mask is None: p.add_(torch.randn_like(p))
            elif name in mask: p.view(-1)[mask[name]] += 1
            else: p.add_(1)
train_fn = nudge
fd.lottery_ticket(model, nudge, density=0.2, exclude="classifier").save("language.safetensors")
"""
PRELUDES: dict[str, list[str]] = {
    "training.md": [SMALL + """
student, teacher = bert(6), bert(12)
examples = [{"input_ids": row} for row in ids]
def collate(rows):
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
import fastdistil.train as loop
whole = loop.train
def one_step(objective, examples, collate, options, **more):
    return whole(objective, examples, collate, dataclasses.replace(options, steps=1, warmup=0), **more)
patch(loop, "train", one_step)
""", SMALL + "teacher, student = bert(12), bert(6)"],
    "teacher.md": [
        SMALL + STORE,
        """
tagger = bert(12, BertForTokenClassification, num_labels=3)
ids = torch.randint(5, 60, (40, 8))
loader = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
rows = [{"input_ids": row} for row in ids]
def collate(chosen):
    ids = torch.stack([row["input_ids"] for row in chosen])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
from fastdistil.recipes import terms
from fastdistil.train import Options, train
objective = terms.Distillation(bert(2), [terms.hidden(1, 6), terms.hidden(2, 12)])
options = Options(1, batch_size=2, warmup=0)
""",
        """
batch = {**loader[0], "example": range(40)}
store = fd.teacher.write(model, loader, "runs/topk", kind="topk", k=8, temperature=2.0)
logits = student(batch["input_ids"]).logits
""",
    ],
    "sparse.md": [SMALL + TICKET],
}  # fmt: skip


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


@pytest.mark.parametrize("page", PRELUDES)
def test_blocks_run_on_small_models(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of the other pages, each after what it takes for granted."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict[str, object] = {"__name__": "docs", "patch": monkeypatch.setattr}
    for prelude, (line, code, _) in zip(PRELUDES[page], blocks(DOCS / page), strict=True):
        exec(prelude, space)
        exec(compile("\n" * (line - 1) + code, str(DOCS / page), "exec"), space)


def test_no_page_is_forgotten() -> None:
    """Every page with Python is in one of the lists above."""
    pages = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if blocks(path)}
    assert pages <= {*PAGES, *PRELUDES}


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
