"""The pictures of docs/choosing.md and docs/memory.md: python docs/tools/figures.py [NAME ...]

Each is computed with the losses themselves, or drawn from the records of benchmarks/results. One scale a picture, bars
begin at 0.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import fastdistil as fd

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
TEACHER, STUDENT, OTHER = "#9aa3ad", "#0b5fa5", "#b3413a"

WIDTH = 7.2  # inches: the width of the page's text

plt.rcParams.update({"svg.hashsalt": "fastdistil", "font.size": 9, "axes.titlesize": 9.5, "axes.titlelocation": "left"})


def save(figure: Any, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def two_modes(columns: int = 24) -> Tensor:
    """Logits of a teacher with two separate groups of likely columns."""
    x = torch.arange(columns, dtype=torch.float64)
    q = 0.62 * torch.exp(-((x - 6) ** 2) / 4.5) / 3.76 + 0.36 * torch.exp(-((x - 17) ** 2) / 3) / 3.07 + 0.02 / columns
    return (q / q.sum()).log()[None]


def bump(centre: Tensor, width: Tensor, columns: int) -> Tensor:
    """Logits of a student that can only make one group of columns likely."""
    x = torch.arange(columns, dtype=torch.float64)
    return (-((x - centre) ** 2) / (2 * width**2))[None]


def best_bump(teacher: Tensor, **rule: Any) -> Tensor:
    """The probabilities of the student with the smallest divergence, from many starts."""
    found: tuple[float, Tensor] | None = None
    for centre in (4.0, 8.0, 12.0, 17.0):
        for width in (1.2, 3.0, 7.0):
            at = torch.tensor([centre, width], dtype=torch.float64).log().requires_grad_()
            updates = torch.optim.LBFGS([at], max_iter=200, line_search_fn="strong_wolfe")

            def closure(at: Tensor = at, updates: Any = updates) -> Tensor:
                updates.zero_grad()
                loss = fd.logit_loss(bump(*at.exp(), teacher.shape[-1]), teacher, **rule)
                loss.backward()
                return loss

            updates.step(closure)
            loss = float(closure().detach())
            if found is None or loss < found[0]:
                found = loss, bump(*at.detach().exp(), teacher.shape[-1]).softmax(-1)[0]
    assert found is not None
    return found[1]


RULES: list[tuple[str, dict[str, Any], str]] = [
    ("forward_kl", {}, "spreads over both groups"),
    ("skew_kl, beta 0.1", {"divergence": "skew_kl", "beta": 0.1}, "spreads over both groups"),
    ("jsd, beta 0.5", {"divergence": "jsd"}, "keeps to one group"),
    ("reverse_kl", {"divergence": "reverse_kl"}, "keeps to one group"),
    ("skew_reverse_kl, beta 0.1", {"divergence": "skew_reverse_kl", "beta": 0.1}, "keeps to one group"),
    ("tvd", {"divergence": "tvd"}, "keeps to one group"),
]


def divergences() -> None:
    """What a student that is too small for its teacher becomes under each divergence."""
    teacher = two_modes()
    q, x = teacher.exp()[0], torch.arange(teacher.shape[-1])
    figure, grid = plt.subplots(2, 3, figsize=(WIDTH, 4.6), sharex=True, sharey=True)
    for axes, (name, rule, words) in zip(grid.flat, RULES, strict=True):
        p = best_bump(teacher, **rule)
        axes.bar(x, q, color=TEACHER, width=0.85, label="teacher q")
        axes.plot(x, p, "-o", color=STUDENT, markersize=3, linewidth=1.6, label="best student p")
        axes.set_title(name, fontweight="bold")
        axes.text(0.99, 0.97, words, transform=axes.transAxes, ha="right", va="top", fontsize=8, color="#444444")
        axes.set_ylim(0, 0.3)
        plain(axes)
    grid[0][0].legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1.02, 0.9))
    for axes in grid[:, 0]:
        axes.set_ylabel("probability")
    for axes in grid[1]:
        axes.set_xlabel("column")
    figure.tight_layout()
    save(figure, "choosing-divergences")


def gradients() -> None:
    """Where each divergence pushes the logits of a student that has missed a group."""
    teacher = two_modes()
    start = bump(torch.tensor(6.0), torch.tensor(2.6), teacher.shape[-1])
    x = torch.arange(teacher.shape[-1])
    figure, grid = plt.subplots(2, 3, figsize=(WIDTH, 4.4), sharex=True, sharey=True)
    for axes, (name, rule, _) in zip(grid.flat, RULES, strict=True):
        z = start.clone().requires_grad_()
        fd.logit_loss(z, teacher, **rule).backward()
        assert z.grad is not None
        push = -z.grad[0]
        axes.bar(x, push, color=[STUDENT if v > 0 else OTHER for v in push], width=0.85)
        axes.axhline(0, color="#444444", linewidth=0.8)
        axes.set_title(name, fontweight="bold")
        plain(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel("- d loss / d logit")
    for axes in grid[1]:
        axes.set_xlabel("column")
    grid[0][0].text(13, 0.1, "the missed\ngroup", ha="right", va="center", fontsize=8, color="#444444")
    grid[0][2].text(23, 0.13, "blue: the logit rises\nred: it falls", ha="right", va="top", fontsize=8, color="#444444")
    figure.tight_layout()
    save(figure, "choosing-gradients")


def temperature() -> None:
    """What a temperature makes of one teacher row."""
    logits = torch.tensor([9.0, 6.2, 5.6, 4.4, 3.9, 3.1, 2.5, 2.0, 1.2, 0.6, 0.1, -0.8])
    figure, grid = plt.subplots(1, 3, figsize=(WIDTH, 2.2), sharey=True)
    for axes, t in zip(grid, (1, 2, 4), strict=True):
        axes.bar(range(len(logits)), (logits / t).softmax(-1), color=TEACHER, width=0.85)
        axes.set_title(f"temperature {t}", fontweight="bold")
        axes.set_xlabel("column, by logit")
        axes.set_xticks(range(0, 12, 4))
        axes.set_ylim(0, 1)
        plain(axes)
    grid[0].set_ylabel("teacher q")
    figure.tight_layout()
    save(figure, "choosing-temperature")


def tails() -> None:
    """What the three tails make of a teacher of which four columns are known."""
    torch.manual_seed(3)
    q = (torch.randn(14) * 1.5).softmax(-1)
    known = q.topk(4).indices.sort().values
    mass, x = float(1 - q[known].sum()), range(14)
    figure, grid = plt.subplots(1, 4, figsize=(WIDTH, 2.7), sharey=True)
    chosen = torch.zeros(14).index_put((known,), q[known])
    panels = [
        ("the whole teacher", q, None, ""),
        ("bucket", chosen, mass, ""),
        ("renormalize", chosen / chosen.sum(), None, "elsewhere q = 0"),
        ("zero", chosen, None, "elsewhere no term"),
    ]
    for axes, (name, values, rest, words) in zip(grid, panels, strict=True):
        axes.bar(x, values, color=STUDENT if name != "the whole teacher" else TEACHER, width=0.85)
        axes.set_title(name, fontweight="bold")
        axes.set_xlabel("column")
        axes.set_xlim(-0.8, 17)
        axes.set_ylim(0, 0.45)
        axes.text(16.8, 0.44, words, fontsize=8, ha="right", va="top", color="#444444")
        if rest is not None:
            axes.bar([15.5], [rest], color="#6fa8d6", width=1.6, hatch="//", edgecolor="white")
            axes.text(16.8, rest + 0.01, "all others", ha="right", va="bottom", fontsize=8, color="#444444")
        plain(axes)
    grid[0].set_ylabel("teacher's probability")
    figure.tight_layout()
    save(figure, "choosing-tails")


def hidden() -> None:
    """Students of equal loss around one teacher state of two entries."""
    teacher = torch.tensor([1.5, 0.8])
    axis = torch.linspace(-1, 3, 161)
    states = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    figure, grid = plt.subplots(1, 3, figsize=(WIDTH, 2.9), sharey=True, sharex=True)
    words = {"mse": "all of it", "cosine": "the direction", "kl": "differences of entries"}
    for axes, kind in zip(grid, ("mse", "cosine", "kl"), strict=True):
        loss = fd.hidden_loss(states, teacher.expand_as(states), kind=kind, reduction="none")
        lines = axes.contour(axis, axis, loss, levels=[0.001, 0.01, 0.05, 0.1, 0.3, 0.8], colors=STUDENT, linewidths=1)
        axes.clabel(lines, fontsize=6.5)
        axes.plot(*teacher, "o", color=OTHER)
        axes.annotate("teacher", teacher.tolist(), (6, -11), textcoords="offset points", fontsize=8, color=OTHER)
        axes.set_title(f"{kind}: {words[kind]}", fontweight="bold")
        axes.set_xlabel("entry 0 of the student")
        axes.set_aspect("equal")
        plain(axes)
    grid[0].set_ylabel("entry 1")
    figure.tight_layout()
    save(figure, "choosing-hidden")


def maps() -> None:
    """A teacher's and a student's map, their difference's place, and the relation of the values."""
    torch.manual_seed(1)
    tokens = 8
    q, k, v = (torch.randn(1, 1, tokens, 16) for _ in range(3))
    q_s, k_s, v_s = (x + 0.55 * torch.randn_like(x) for x in (q, k, v))
    visible = torch.ones(tokens, dtype=torch.bool)
    visible[6:] = False

    def softmax(scores: Tensor) -> Tensor:
        scores = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return scores.masked_fill(~(visible & visible[:, None]), torch.nan)[0, 0]

    panels = [
        ("map, teacher", softmax(q @ k.mT / 4)),
        ("map, student", softmax(q_s @ k_s.mT / 4)),
        ("values, teacher", softmax(v @ v.mT / 4)),
        ("values, student", softmax(v_s @ v_s.mT / 4)),
    ]
    figure, grid = plt.subplots(1, 4, figsize=(WIDTH, 2.3), sharey=True, layout="constrained")
    for axes, (name, values) in zip(grid, panels, strict=True):
        axes.set_facecolor("#eeeeee")
        shown = axes.imshow(values, vmin=0, vmax=1, cmap="Blues")
        axes.set_title(name, fontweight="bold")
        axes.set_xlabel("key")
        axes.set_xticks(range(tokens))
        axes.set_yticks(range(tokens))
        axes.tick_params(labelsize=7)
    grid[0].set_ylabel("query")
    grid[0].text(3.5, 6.6, "padding: not compared", ha="center", va="center", fontsize=7.5, color="#555555")
    figure.colorbar(shown, ax=grid, label="probability", shrink=0.8)
    save(figure, "choosing-maps")


MIB = 1 << 20
NAMES = {
    "eager": "PyTorch eager",
    "compile": "torch.compile",
    "fastdistil:cpu": "fastdistil",
    "fastdistil:cpu:inplace": "fastdistil, in place",
}
COLORS = {"eager": OTHER, "compile": "#7a5ca8", "fastdistil:cpu": STUDENT, "fastdistil:cpu:inplace": STUDENT}


def memory() -> None:
    """Memory beyond the inputs, from the CPU's records."""
    cases: list[tuple[str, str, str, Callable[[dict[str, int]], int]]] = [
        ("logits", "mbert-kl-fp32", "logits, 512 × 119,547", lambda s: 4 * s["N"] * s["V"]),
        ("topk", "mbert-bucket-float32", "top-k teacher, the same, K 64", lambda s: 4 * s["N"] * s["V"]),
        ("linear", "mbert-kl-768-768-fp32", "two heads of 768", lambda s: 4 * s["D_s"] * (s["N"] + s["V"])),
        (
            "attention",
            "bert-prob_mse-2048",
            "attention maps, 2 × 12 × 2,048 × 2,048",
            lambda s: 8 * s["B"] * s["H"] * s["S"] * s["d_s"],
        ),
    ]
    figure, axes = plt.subplots(figsize=(WIDTH, 5))
    y, ticks = 0.0, list[tuple[float, str]]()
    first: dict[str, Any] = {}
    for op, case, title, floor in cases:
        lines = (ROOT / "benchmarks/results/cpu" / f"{op}.jsonl").read_text().splitlines()
        records = {r["implementation"]: r for r in map(json.loads, lines) if r["case"] == case}
        axes.text(0, y - 0.8, title, fontweight="bold", va="center")
        least = floor(next(iter(records.values()))["shape"]) / MIB
        start = y
        for name in (n for n in NAMES if n in records):
            used = records[name]["peak_mem_mib"]
            first = first or records[name]
            bar = axes.barh(y, used, color=COLORS[name], height=0.72)
            axes.bar_label(bar, [f"{used:,.0f} MiB"], padding=3, fontsize=8)
            ticks.append((y, NAMES[name]))
            y += 1
        axes.plot([least, least], [start - 0.38, y - 0.6], color="black", linewidth=1.6)
        y += 1.3
    axes.plot([], [], color="black", linewidth=1.6, label="size of the gradients,\ncomputed from the shapes")
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    axes.set_yticks([t for t, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(y - 1.2, -1.3)
    axes.set_xlim(0, 2300)
    axes.set_xlabel("MiB beyond the inputs, forward + backward, float32")
    plain(axes)
    axes.tick_params(axis="y", length=0)
    where = f"{first['device_name']}, {first['threads']} threads; torch {first['versions']['torch']}"
    figure.text(0.01, 0.01, f"{where}; {first['date'][:10]}, commit {first['commit']}", fontsize=7, color="#666666")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    save(figure, "memory")


FIGURES = (divergences, gradients, temperature, tails, hidden, maps, memory)

if __name__ == "__main__":
    for draw in FIGURES:
        if len(sys.argv) == 1 or draw.__name__ in sys.argv[1:]:
            draw()
