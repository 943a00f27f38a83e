"""The demo's report folder: metrics.json, report.md, loss.png, accuracy.png, and the table on the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdistil.systems.folder import write_json
from fastdistil.systems.report import markdown_table

TEACHER = "teacher"
MEAN = "mean"


def summarise(seeds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy by row (teacher, arms) and column (languages, their mean): {"mean", "low", "high"} over the seeds.

    A seed has "teacher": {language: percent} and "arms": {arm: {"accuracy": {language: percent}}}.
    """
    rows: dict[str, list[Mapping[str, float]]] = {TEACHER: [seed["teacher"] for seed in seeds]}
    for arm in seeds[0]["arms"]:
        rows[arm] = [seed["arms"][arm]["accuracy"] for seed in seeds]
    result: dict[str, dict[str, dict[str, float]]] = {}
    for name, found in rows.items():
        columns = {language: [one[language] for one in found] for language in found[0]}
        columns[MEAN] = [statistics.fmean(one.values()) for one in found]
        result[name] = {
            column: {"mean": statistics.fmean(values), "low": min(values), "high": max(values)}
            for column, values in columns.items()
        }
    return result


def _cell(value: Mapping[str, float], several: bool) -> str:
    return f"{value['mean']:.1f}" + (f" ({value['low']:.1f} to {value['high']:.1f})" if several else "")


def accuracy_table(summary: Mapping[str, Mapping[str, Mapping[str, float]]], several: bool) -> list[list[str]]:
    """Header and rows of the accuracy table; the last column is the gain over the first student."""
    columns = list(next(iter(summary.values())))
    table = [["accuracy %", *columns, "gain"]]
    students = [name for name in summary if name != TEACHER]
    for name, row in summary.items():
        gain = row[MEAN]["mean"] - summary[students[0]][MEAN]["mean"]
        cells = [_cell(row[column], several) for column in columns]
        table.append([name, *cells, "" if name in (TEACHER, students[0]) else f"{gain:+.1f}"])
    return table


def cost_table(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows: parameters, disk, latency of teacher and student, and the ratio."""
    teacher, student = metrics["sizes"]["teacher"], metrics["sizes"]["student"]
    pairs = [
        ("parameters, million", teacher["parameters"] / 1e6, student["parameters"] / 1e6),
        ("float32 on disk, MiB", teacher["disk_mib"], student["disk_mib"]),
    ]
    pairs += [(f"batch of {size}, ms", row["teacher"], row["student"]) for size, row in metrics["latency_ms"].items()]
    return [
        ["", "teacher", "student", "ratio"],
        *[[what, f"{a:.4g}", f"{b:.4g}", f"{a / b:.1f}"] for what, a, b in pairs],
    ]


def loss_table(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Header and rows: milliseconds of each fused loss and of plain PyTorch, forward and backward, and what the
    difference is of a training step."""
    rows = [["loss, forward + backward", "fused, ms", "plain, ms", "plain / fused", "difference, % of a step"]]
    for name, row in metrics["loss_ms"].items():
        ratio = row["plain_ms"] / row["fused_ms"]
        share = 100 * (row["fused_ms"] - row["plain_ms"]) / metrics["step_ms"]
        rows.append([name, f"{row['fused_ms']:.3f}", f"{row['plain_ms']:.3f}", f"{ratio:.2f}", f"{share:+.1f}"])
    return rows


def _plots(out: Path, metrics: Mapping[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    history = metrics["seeds"][0]["arms"]
    figure, axes = pyplot.subplots(1, len(history), figsize=(4 * len(history), 3.2), squeeze=False)
    for axis, (arm, found) in zip(axes[0], history.items(), strict=True):
        start = 0
        for stage, records in found["loss"].items():
            for term, values in records.items():
                axis.plot(range(start, start + len(values)), values, linewidth=0.8, label=f"{stage}: {term}")
            start += max(len(values) for values in records.values())
        axis.set_title(arm, fontsize=9)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("loss a word or piece")
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=120)
    pyplot.close(figure)

    summary = metrics["summary"]
    columns = list(summary[TEACHER])
    figure, axis = pyplot.subplots(figsize=(9, 4))
    width = 0.8 / len(summary)
    for i, (name, row) in enumerate(summary.items()):
        heights = [row[column]["mean"] for column in columns]
        spread = [[row[c]["mean"] - row[c]["low"] for c in columns], [row[c]["high"] - row[c]["mean"] for c in columns]]
        places = [j + (i - (len(summary) - 1) / 2) * width for j in range(len(columns))]
        axis.bar(places, heights, width, yerr=spread if len(metrics["seeds"]) > 1 else None, capsize=2, label=name)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_ylabel("accuracy on held-out words, %")
    axis.set_ylim(bottom=max(0.0, 10 * (min(c["low"] for row in summary.values() for c in row.values()) // 10 - 1)))
    axis.legend(fontsize=8, ncols=len(summary), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.tight_layout()
    figure.savefig(out / "accuracy.png", dpi=120)
    pyplot.close(figure)


def _apart(metrics: Mapping[str, Any]) -> str:
    """Mean accuracy of the last arm minus that of the one before it, for every seed."""
    last, before = list(metrics["summary"])[-1], list(metrics["summary"])[-2]
    found = [seed["arms"] for seed in metrics["seeds"]]
    means = [[statistics.fmean(arms[arm]["accuracy"].values()) for arm in (last, before)] for arms in found]
    return ", ".join(f"{a - b:+.1f}" for a, b in means)


def write(out: Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json, both figures and report.md into the folder `out`."""
    write_json(out / "metrics.json", metrics)
    _plots(out, metrics)
    machine = metrics["machine"]
    s, several = metrics["settings"], len(metrics["seeds"]) > 1
    spread = " Mean over the seeds, lowest and highest in brackets." if several else ""
    slower = [name for name, row in metrics["loss_ms"].items() if row["fused_ms"] > row["plain_ms"]]
    verdict = (
        f"Slower than plain PyTorch here: {', '.join(slower)}." if slower else "None is slower than plain PyTorch."
    )
    text = f"""# Distillation of a multilingual encoder

Teacher: multilingual-e5-small, frozen, with a linear tagging head fitted on {s["labelled"]} labelled sentences a
language. Students: two layers of width {s["hidden_size"]}, {metrics["vocabulary"]:,} word pieces, {s["steps"]} steps of
{s["batch_size"]} sentences each, {s["labelled"]} labelled and {s["unlabelled"]} unlabelled sentences a language of at
most {s["max_pieces"]} pieces. Tested on {s["test"]} sentences a language from documents that no student saw; 13 tags,
words as the corpora cut them. Seeds: {", ".join(str(seed["seed"]) for seed in metrics["seeds"])}.{spread}

{markdown_table(accuracy_table(metrics["summary"], several))}

`gain` is in points over the student that learned from labels only. The whole schedule is {_apart(metrics)} points from
the logits alone on the same text, seed by seed.

![accuracy](accuracy.png)

![loss](loss.png)

## What the student costs

{markdown_table(cost_table(metrics))}

The teacher's own file, in blocks of four bits, takes {metrics["sizes"]["teacher"]["disk_4bit_mib"]:.1f} MiB. Latency:
median, {machine["threads"]} thread, the same sentences.

## What the fused losses cost

{markdown_table(loss_table(metrics))}

On this run's own shapes, medians of interleaved calls, values and gradients compared first. {verdict} A step
of a student took {metrics["step_ms"]:.0f} ms on average. With 13 classes the losses are a small part of it; what fusing
saves comes with vocabularies, not with tag sets.

`student/` opens with transformers: `AutoModelForTokenClassification.from_pretrained("student")`,
`AutoTokenizer.from_pretrained("student")`. It is the student of "{metrics["saved_arm"]}", seed
{metrics["seeds"][0]["seed"]}. Run on {machine["platform"]}, torch {machine["torch"]}, fastdistil
{machine["fastdistil"]}, {metrics["seconds"]:.0f} s.
"""
    (out / "report.md").write_text(text, encoding="utf-8")
