"""The PNGs of a report; each says where its numbers were measured. matplotlib places every label and legend."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from fastdistil.benchmarks.record import Record

LABELS = {
    "eager": "PyTorch eager",
    "eager_common": "eager, target not log",
    "eager_upcast": "eager after .float()",
    "compile": "torch.compile",
    "products": "the products alone",
    "liger_kl": "Liger KL",
    "liger_jsd": "Liger JSD",
    "orda": "orda-kernel",
    "fla_kl": "flash-linear-attention",
    "linear_cross_entropy": "F.linear_cross_entropy",
    "topk": "torch.topk",
    "composable": "composable-sft",
    "fused": "fused AdamW",
    "fused:bool": "fused AdamW, bool mask",
    "fused:float": "fused AdamW, float mask",
}
COLORS = {
    "eager": "#b3413a", "eager_common": "#d98a5b", "eager_upcast": "#8c6d46", "compile": "#7a5ca8",
    "liger_kl": "#4d8a4a", "liger_jsd": "#86a83c", "fastdistil:cpu": "#0b5fa5", "fastdistil:triton": "#2c9bd6",
    "fastdistil:cuda": "#10395e", "fastdistil:reference": "#8fb8d8", "orda": "#c29a2b", "fla_kl": "#c06a9b",
    "linear_cross_entropy": "#5a5f66", "products": "#bbbbbb", "fastdistil:cuda:two_reads": "#4a6f94",
}  # fmt: skip
DASHES = {"eager_common": "--", "liger_kl": "-.", "liger_jsd": ":", "fastdistil:reference": "--"}


def label(name: str) -> str:
    words = name.replace("fastdistil:", "fastdistil ").replace(":inplace", ", in place")
    return LABELS.get(name) or words.replace(":two_reads", ", two reads").replace(":backward", ", step in backward")


def color(name: str) -> str:
    return COLORS.get(name.removesuffix(":inplace").removesuffix(":backward"), "#777777")


def where(record: Record) -> str:
    return (
        f"{record['device_name']}, {record['threads']} threads" if record["device"] == "cpu" else record["device_name"]
    )


def _save(figure: Any, path: Path, records: list[Record], more: str = "") -> Path:
    """With a footer, and every legend entry once, below all panels."""
    first = records[0]
    small = "  DRY RUN WITH TINY SHAPES" if any(r.get("small") for r in records) else ""
    text = f"{where(first)}; torch {first['versions']['torch']}; {first['date'][:10]}, commit {first['commit']}{small}"
    figure.supxlabel("\n".join(filter(None, (more, text))), x=0.01, ha="left", fontsize=8, color="#666666")
    entries = [axes.get_legend_handles_labels() for axes in figure.axes]
    unique = {text: handle for handles, texts in entries for handle, text in zip(handles, texts, strict=True)}
    if unique:
        figure.legend(unique.values(), unique.keys(), loc="outside right center", frameon=False, fontsize=8.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)
    return path


def _lines(axes: Any, records: list[Record], x: str, y: str) -> None:
    """A line per implementation, on log axes; dashes show those below that lie on each other."""
    names = dict.fromkeys(r["implementation"] for r in records)
    for name in names:
        points = sorted((r[x], max(r[y], 1e-12)) for r in records if r["implementation"] == name)
        axes.plot(
            *zip(*points, strict=True), color=color(name), label=label(name), marker="o", markersize=4, linewidth=2,
            linestyle="--" if name.endswith(":inplace") else DASHES.get(name, "-"),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def exactness(records: list[Record], path: Path) -> Path:
    """Relative error of value and gradient against the distance of student and teacher."""
    dtypes = [d for d in ("float32", "bfloat16") if any(r["dtype"] == d for r in records)]
    size = (2.2 + 4 * len(dtypes), 6.8)
    figure, grid = plt.subplots(2, len(dtypes), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for column, dtype in enumerate(dtypes):
        for axes, what in zip(grid[:, column], ("value", "gradient"), strict=True):
            _lines(axes, [r for r in records if r["dtype"] == dtype], "kl", f"{what}_error")
            axes.axhline(1, color="#999999", linewidth=0.9, label="100%: nothing is right")
            axes.invert_xaxis()
            axes.set_title(f"{what.capitalize()}, {dtype} logits", loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("KL, nats per row → as training ends")
    for axes in grid[:, 0]:
        axes.set_ylabel("relative error against float64")
    shape = records[0]["shape"]
    figure.suptitle("Error of the KL loss as the student becomes the teacher", x=0.012, ha="left", fontsize=13)
    note = f"student = teacher + noise of 1 to 1e-4, logits of std 4, {shape['N']} rows of V = {shape['V']:,}"
    if any(r["interpreted"] for r in records):
        note += "; Triton kernels (fastdistil's and Liger's) in Triton's interpreter, fp32 only"
    return _save(figure, path, records, note)


CASES_A_PICTURE = 10


def times(records: list[Record], path: Path) -> list[Path]:
    """The whole work of every case, as multiples of the floor, and by whom; many cases fill several pictures."""
    cases = list(dict.fromkeys(r["case"] for r in records))
    pictures = math.ceil(len(cases) / CASES_A_PICTURE)
    size = math.ceil(len(cases) / pictures)
    drawn = []
    for number in range(pictures):
        chosen = cases[number * size : (number + 1) * size]
        name = path if number == 0 else path.with_stem(f"{path.stem}-{number + 1}")
        drawn.append(_times([r for r in records if r["case"] in chosen], chosen, name))
    return drawn


# The slowest of all by far where it is measured: its bar is cut, its number is not.
_CUT = "fastdistil:reference"
_FLOOR = (
    "dashed: the floor, the time to read each input once and write the gradient once at the measured copy rate,\n"
    "or for the matrix products at the measured rate, whichever is longer; one scale for all cases"
)


def _times(records: list[Record], cases: list[str], path: Path) -> Path:
    heights = [1.4 + sum(r["case"] == case for r in records) for case in cases]
    size = (8, 1.2 + 0.24 * sum(heights))
    figure, grid = plt.subplots(
        len(cases), 1, figsize=size, squeeze=False, height_ratios=heights, sharex=True, layout="constrained"
    )
    others = [r["ratios"]["both"]["this_over_floor"] for r in records if r["implementation"] != _CUT]
    end = 1.04 * max(others, default=1.0)
    for axes, case in zip(grid.flat, cases, strict=True):
        _bars(axes, [r for r in records if r["case"] == case], end)
    axes.tick_params(axis="x", labelbottom=True, length=3, labelsize=8)
    axes.spines["bottom"].set_visible(True)
    axes.set_xlabel("median time as a multiple of the floor (shorter is better)", fontsize=9)
    return _save(figure, path, records, _FLOOR)


def _bars(axes: Any, records: list[Record], end: float) -> None:
    floors = [r["ratios"]["both"]["this_over_floor"] for r in records]
    names = [r["implementation"] for r in records]
    bars = axes.barh(range(len(records)), np.minimum(floors, end), color=[color(name) for name in names], height=0.72)
    axes.bar_label(bars, [_note(r, end) for r in records], padding=4, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.9, linestyle=(0, (3, 2)))
    axes.set_yticks(range(len(records)), [label(name) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.42 * end)
    axes.tick_params(length=0, labelbottom=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    shape = ", ".join(f"{axis} {size:,}" for axis, size in records[0]["shape"].items())
    axes.set_title(f"{records[0]['case']}  ({shape})", loc="left", fontsize=9, fontweight="bold")


def _note(record: Record, end: float) -> str:
    ratios = record["ratios"]["both"]
    floors, speed = ratios["this_over_floor"], ratios.get(f"{record['baseline']}_over_this")
    notes = [] if record["device"] == "cpu" else [f"{record['time_us']['both']['p50'] / 1e3:.3g} ms"]
    notes.append(f"{floors:.1f}× floor")
    if speed is not None and record["implementation"] != record["baseline"]:
        notes.append(f"{speed:{'.2g' if speed < 100 else '.0f'}}× {record['baseline']}'s speed")
    return ("… " if floors > end else "") + ", ".join(notes)


def scaling(records: list[Record], axis: str, path: Path) -> Path:
    """Time and extra memory against V or S."""
    quantities: dict[str, Callable[[Record], Any]] = {
        "median time, ms": lambda r: r["time_us"]["both"]["p50"] / 1e3,
        "peak extra memory, MiB": lambda r: r.get("peak_mem_mib"),
    }
    figure, grid = plt.subplots(1, 2, figsize=(12.5, 5), layout="constrained")
    for axes, (title, read) in zip(grid, quantities.items(), strict=True):
        found = [{"implementation": r["implementation"], "x": r["shape"][axis], "y": read(r)} for r in records]
        _lines(axes, [r for r in found if r["y"]], "x", "y")
        axes.set_xlabel({"V": "vocabulary V", "S": "sequence length S"}[axis])
        axes.set_title(title, loc="left", fontsize=11)
    first = records[0]
    kind = first["options"].get("divergence") or first["options"].get("kind")
    rest = ", ".join(f"{a} {n:,}" for a, n in first["shape"].items() if a != axis)
    title = f"Forward + backward against {axis}: {kind}, {first['dtype']}, {rest}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=13)
    return _save(figure, path, records)


def roofline(records: list[Record], path: Path) -> Path:
    """Rate of useful operations against operations per byte, under what the machine was measured to reach."""
    rates = records[0]["rates"]
    figure, axes = plt.subplots(figsize=(9, 5.6), layout="constrained")
    unit, scale = ("T", 1e3) if rates["matrix_gflop_s"] > 1e4 else ("G", 1.0)
    intensity = np.logspace(-0.3, 4.5, 200)
    roof = np.minimum(intensity * rates["copy_gb_s"], rates["matrix_gflop_s"]) / scale
    axes.plot(intensity, roof, color="#333333", linewidth=1.5)
    for name in dict.fromkeys(r["implementation"] for r in records):
        chosen = [r for r in records if r["implementation"] == name]
        x = [r["flops"]["both"] / r["bytes"]["both"] for r in chosen]
        y = [r["flops"]["both"] / r["time_us"]["both"]["p50"] / 1e3 / scale for r in chosen]
        fill = "none" if name.endswith("inplace") else color(name)
        axes.scatter(x, y, s=32, facecolors=fill, edgecolors=color(name), label=label(name))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("useful operations per byte moved (by formula)")
    axes.set_ylabel(f"useful {unit}op/s, forward + backward")
    peak = f"{rates['matrix_gflop_s'] / scale:,.0f} {unit}FLOP/s"
    axes.set_title(f"Roof: {rates['copy_gb_s']:,.0f} GB/s copy, {peak} matrix product", loc="left", fontsize=11)
    _plain(axes)
    return _save(figure, path, records)
