"""The report folder of a run: metrics.json, report.md, curves.png, scores.png; and the tables on the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastdistil.configs.common import to_yaml
from fastdistil.systems.folder import RESULT, write_json, write_text

Scores = Mapping[str, Mapping[str, Mapping[str, float | None]]]
"""{model: {file or language: {metric: value}}}; None where there is no figure, as F1 without an entity."""


def curves(history: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """{stage: {term: one value per step}} from the records of `train` by stage."""
    return {
        stage: {term: [r[term] for r in records if term in r] for term in records[0] if term not in ("step", "lr")}
        for stage, records in history.items()
        if records
    }


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that there are, None where there is none."""
    there = [x for x in values if x is not None and not math.isnan(x)]
    return statistics.fmean(there) if there else None


def score_table(scores: Scores, metric: str) -> list[list[str]]:
    """Header and rows of one metric: a model per row, a file per column and their mean."""
    columns = list(dict.fromkeys(column for row in scores.values() for column in row))
    several = len(columns) > 1
    table = [[metric, *columns, *(["mean"] if several else [])]]
    for name, row in scores.items():
        values = [row.get(column, {}).get(metric) for column in columns]
        table.append([name, *(_cell(x) for x in [*values, *([mean(values)] if several else [])])])
    return table


def _cell(value: float | None) -> str:
    return "no figure" if value is None else f"{value:.1f}" if abs(value) >= 1 else f"{value:.4g}"


def cost_table(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows: parameters, disk and latency by model, and how many times the last one is smaller or faster."""
    names = list(metrics["sizes"])
    rows = [("parameters, million", [metrics["sizes"][n]["parameters"] / 1e6 for n in names])]
    rows += [("disk, MiB", [metrics["sizes"][n]["disk_mib"] for n in names])]
    for device, sizes in metrics.get("latency_ms", {}).items():
        rows += [(f"{device}, batch of {size}, ms", [by[n] for n in names]) for size, by in sizes.items()]
    ratio = len(names) == 2
    return [
        ["", *names, *(["ratio"] if ratio else [])],
        *[[what, *(f"{x:.4g}" for x in xs), *([f"{xs[0] / xs[1]:.1f}"] if ratio else [])] for what, xs in rows],
    ]


def print_table(rows: Sequence[Sequence[str]], title: str, console: Console) -> None:
    """A rich table from a header and rows of text."""
    table = Table(title=title)
    for index, head in enumerate(rows[0]):
        table.add_column(head, justify="left" if index == 0 else "right")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table from a header and rows of text."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _plot_curves(path: Path, found: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(4.2 * len(found), 3.4), squeeze=False)
    for axis, (stage, terms) in zip(axes[0], found.items(), strict=True):
        for term, values in terms.items():
            axis.plot(range(1, len(values) + 1), values, linewidth=0.8, label=term)
        axis.set_title(stage, fontsize=9)
        axis.set_xlabel("step")
        if all(x > 0 for values in terms.values() for x in values):
            axis.set_yscale("log")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("loss per item")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_scores(path: Path, scores: Scores, metric: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = list(dict.fromkeys(column for row in scores.values() for column in row))
    figure, axis = pyplot.subplots(figsize=(max(5.0, 1.2 * len(columns) + 2), 3.6))
    width = 0.8 / len(scores)
    for i, (name, row) in enumerate(scores.items()):
        places = [j + (i - (len(scores) - 1) / 2) * width for j in range(len(columns))]
        heights = [row.get(column, {}).get(metric) for column in columns]
        axis.bar(places, [math.nan if h is None else h for h in heights], width, label=name)
    axis.set_xticks(range(len(columns)), columns, rotation=0 if len(columns) < 7 else 30, fontsize=8)
    axis.set_ylabel(metric)
    axis.legend(fontsize=8, ncols=len(scores), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(out: Path, metrics: Mapping[str, Any], *, notes: Sequence[str] = ()) -> None:
    """Write the figures, report.md and at last metrics.json, whose being there says that the run has ended.

    `metrics` holds "system", "configuration", "machine" and "seconds"; and where there are such "curves" as of
    `curves`, "scores" with "metric" (its name), "sizes" and "latency_ms" as of `measure`, and "student", the folder of
    the saved model within `out`. `notes` are paragraphs of the page.
    """
    parts = [f"# {metrics['system']}", *notes]
    scores = metrics.get("scores")
    if scores:
        parts += ["## Scores", markdown_table(score_table(scores, metrics["metric"]))]
        if sum(map(len, scores.values())) > 1:  # one bar shows nothing
            _plot_scores(out / "scores.png", scores, metrics["metric"])
            parts += ["![scores](scores.png)"]
    if metrics.get("curves"):
        _plot_curves(out / "curves.png", metrics["curves"])
        parts += ["## Losses", "![losses by step](curves.png)"]
    if metrics.get("sizes"):
        several = len(metrics["sizes"]) > 1
        parts += [f"## What the {'student' if several else 'model'} costs", markdown_table(cost_table(metrics))]
        if metrics.get("latency_ms"):
            threads = metrics["machine"]["threads"]
            parts += [f"Latency: median of a forward pass, CPU threads: {threads}, the same inputs."]
    if metrics.get("student"):
        parts += [f"`{metrics['student']}/` opens with transformers' AutoModel and AutoTokenizer."]
    parts += ["## How it was made", f"```yaml\n{to_yaml(metrics['configuration'])}```"]
    versions = ", ".join(f"{name} {value}" for name, value in metrics["machine"].items() if value is not None)
    parts += [f"{versions}. The whole run took {metrics['seconds']:.0f} s."]
    write_text(out / "report.md", "\n\n".join(parts) + "\n")
    write_json(out / RESULT, metrics)
