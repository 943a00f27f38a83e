"""The PNGs of a report; each says where its numbers were measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
}
COLORS = {
    "eager": "#b3413a", "eager_common": "#d98a5b", "eager_upcast": "#8c6d46", "compile": "#7a5ca8",
    "liger_kl": "#4d8a4a", "liger_jsd": "#86a83c", "fastdistil:cpu": "#0b5fa5", "fastdistil:triton": "#2c9bd6",
    "fastdistil:cuda": "#10395e", "fastdistil:reference": "#8fb8d8", "orda": "#c29a2b", "fla_kl": "#c06a9b",
    "linear_cross_entropy": "#5a5f66", "products": "#bbbbbb", "fastdistil:cuda:two_reads": "#4a6f94",
}  # fmt: skip


def label(name: str) -> str:
    words = name.replace("fastdistil:", "fastdistil ").replace(":inplace", ", in place")
    return LABELS.get(name) or words.replace(":two_reads", ", two reads")


def color(name: str) -> str:
    return COLORS.get(name.removesuffix(":inplace"), "#555555")


def where(record: Record) -> str:
    return (
        f"{record['device_name']}, {record['threads']} threads" if record["device"] == "cpu" else record["device_name"]
    )


def _footer(figure: Any, records: list[Record], more: str = "") -> None:
    first = records[0]
    small = "  DRY RUN WITH TINY SHAPES" if any(r.get("small") for r in records) else ""
    text = f"{where(first)}; torch {first['versions']['torch']}; {first['date'][:10]}, commit {first['commit']}{small}"
    figure.text(0.012, 0.012, "\n".join(filter(None, (more, text))), fontsize=8, color="#666666", va="bottom")


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)
    return path


Series = dict[str, tuple[np.ndarray, np.ndarray]]


def _series(records: list[Record], x: str, y: str) -> Series:
    names = dict.fromkeys(r["contender"] for r in records)
    found: Series = {}
    for name in names:
        points = sorted((r[x], r[y]) for r in records if r["contender"] == name)
        found[name] = (np.array([p[0] for p in points]), np.array([max(p[1], 1e-12) for p in points]))
    return found


def _merged(series: Series) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
    """Curves that lie on each other are drawn once, under all their names: within 5% (ours), or 1.7x (others)."""
    rest = dict(series)
    while rest:
        first, (x, y) = next(iter(rest.items()))
        near = np.log(1.05 if first.startswith("fastdistil") else 1.7)
        family = first.split(":")[0] == "fastdistil"
        alike = [
            name
            for name, (u, v) in rest.items()
            if (name.split(":")[0] == "fastdistil") == family
            and len(u) == len(x)
            and np.all(np.abs(np.log(v / y)) < near)
        ]
        yield alike, x, y
        rest = {name: points for name, points in rest.items() if name not in alike}


def _spread(positions: list[float], sizes: list[float]) -> list[float]:
    """The positions (decades), moved apart so that labels of these sizes do not touch, their middle where it was."""
    order = np.argsort(positions, kind="stable")
    placed, size = np.array(positions, dtype=float)[order], np.array(sizes)[order]
    for _ in range(200):
        for i in range(len(placed) - 1):
            lack = (size[i] + size[i + 1]) / 2 - (placed[i + 1] - placed[i])
            if lack > 1e-6:
                placed[i] -= lack / 2
                placed[i + 1] += lack / 2
    result = np.empty_like(placed)
    result[order] = placed
    return [float(p) for p in result]


RANGE = (5e-10, 5e3)  # of relative errors that are shown


def exactness(records: list[Record], path: Path) -> Path:
    """Relative error of value and gradient against the distance of student and teacher."""
    dtypes = [d for d in ("float32", "bfloat16") if any(r["dtype"] == d for r in records)]
    figure, grid = plt.subplots(2, len(dtypes), figsize=(4.6 * len(dtypes), 6.8), squeeze=False, sharey="row")
    for column, dtype in enumerate(dtypes):
        chosen = [r for r in records if r["dtype"] == dtype]
        for row, what in enumerate(("value", "gradient")):
            axes = grid[row][column]
            _error_panel(axes, _series(chosen, "kl", f"{what}_error"))
            short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
            axes.set_title(f"{what.capitalize()}, {short} logits", loc="left", fontsize=10, fontweight="bold")
            if column == 0:
                axes.set_ylabel("relative error against float64")
            if row == 1:
                axes.set_xlabel("KL(teacher ‖ student), nats per row  →  as training ends")
    shape = records[0]["shape"]
    figure.suptitle("Error of the KL loss as the student becomes the teacher", x=0.012, ha="left", fontsize=13)
    note = f"student = teacher + noise of 1 to 1e-4, logits of std 4, {shape['N']} rows of V = {shape['V']:,}"
    if any(r["interpreted"] for r in records):
        note += "; Triton kernels (fastdistil's and Liger's) in Triton's interpreter, fp32 only"
    _footer(figure, records, note)
    figure.tight_layout(rect=(0, 0.045, 1, 0.985), w_pad=2.5)
    return _save(figure, path)


def _joined(names: list[str]) -> str:
    return "fastdistil " + ", ".join(name.removeprefix("fastdistil:") for name in names)


def _error_panel(axes: Any, series: Series) -> None:
    ends, texts, colors = [], [], []
    for names, x, y in _merged(series):
        ours = names[0].startswith("fastdistil")
        axes.plot(x, y, "-o", color=color(names[-1 if ours else 0]), linewidth=2.2 if ours else 1.8, markersize=5)
        ends.append(float(np.log10(np.clip(y[0], *RANGE))))  # the smallest KL
        texts.append("\n".join(label(n) for n in names) if not ours else _joined(names))
        colors.append(color(names[-1 if ours else 0]))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(*RANGE)
    left, right = min(float(x.min()) for x, _ in series.values()), max(float(x.max()) for x, _ in series.values())
    axes.set_xlim(right * 2, left / (right / left) ** 0.6)  # falls to the right; room for the labels
    _plain(axes)
    axes.plot([right * 2, left], [1, 1], color="#999999", linewidth=0.9)
    decades = range(math.ceil(math.log10(left)), math.floor(math.log10(right)) + 1)
    axes.set_xticks([10.0**d for d in decades if len(decades) < 7 or d % 2 == 0])
    axes.set_xticks([], minor=True)
    axes.spines["bottom"].set_bounds(right * 2, left / 1.3)
    axes.text(right * 1.7, 1.3, "100%: nothing is right", fontsize=8, color="#777777")
    sizes = [0.68 * (1 + text.count("\n")) for text in texts]  # decades
    for text, height, shade in zip(texts, _spread(ends, sizes), colors, strict=True):
        axes.text(left / 1.6, 10**height, text, color=shade, fontsize=8, va="center", linespacing=1.1)


CASES_A_PICTURE = 10


def times(records: list[Record], path: Path) -> list[Path]:
    """Forward + backward of every case, as multiples of the floor, and by whom; many cases fill several pictures."""
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
    height = 1.2 + 0.24 * sum(heights)
    figure, grid = plt.subplots(len(cases), 1, figsize=(8, height), squeeze=False, height_ratios=heights, sharex=True)
    others = [r["ratios"]["both"]["this_over_floor"] for r in records if r["contender"] != _CUT]
    end = 1.04 * max(others, default=1.0)
    for axes, case in zip(grid.flat, cases, strict=True):
        _bars(axes, [r for r in records if r["case"] == case], end)
    grid[-1][0].tick_params(axis="x", labelbottom=True, length=3, labelsize=8)
    grid[-1][0].spines["bottom"].set_visible(True)
    grid[-1][0].set_xlabel(
        "median time of forward + backward as a multiple of the floor (shorter is better)", fontsize=9
    )
    _footer(figure, records, _FLOOR)
    figure.tight_layout(rect=(0, 0.55 / height, 1, 1), h_pad=0.5)
    return _save(figure, path)


def _bars(axes: Any, records: list[Record], end: float) -> None:
    for i, record in enumerate(reversed(records)):
        ratios = record["ratios"]["both"]
        floors = ratios["this_over_floor"]
        axes.barh(i, min(floors, end), color=color(record["contender"]), height=0.72)
        notes = [] if record["device"] == "cpu" else [f"{record['time_us']['both']['p50'] / 1e3:.3g} ms"]
        notes.append(f"{floors:.1f}× floor")
        eager = ratios.get("eager_over_this")
        if eager is not None and record["contender"] != "eager":
            notes.append(f"{eager:.2g}× eager's speed" if eager < 100 else f"{eager:.0f}× eager's speed")
        mark = "… " if floors > end else ""
        axes.text(min(floors, end) + 0.012 * end, i, mark + ", ".join(notes), va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=0.9, linestyle=(0, (3, 2)))
    axes.set_yticks(range(len(records)), [label(r["contender"]) for r in reversed(records)], fontsize=8)
    axes.set_xlim(0, 1.42 * end)
    axes.tick_params(length=0, labelbottom=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title(_case_title(records[0]), loc="left", fontsize=9, fontweight="bold")


def _case_title(record: Record) -> str:
    return f"{record['case']}  ({', '.join(f'{a} {n:,}' for a, n in record['shape'].items())})"


def _decades(series: Series) -> tuple[float, float]:
    values = np.log10(np.concatenate([y for _, y in series.values()])) if series else np.zeros(1)
    return float(values.min()), float(values.max())


def scaling(records: list[Record], axis: str, path: Path) -> Path:
    """Time and extra memory against V or S."""
    quantities: dict[str, Callable[[Record], Any]] = {
        "median time, ms": lambda r: r["time_us"]["both"]["p50"] / 1e3,
        "peak extra memory, MiB": lambda r: r.get("peak_mem_mib"),
    }
    figure, grid = plt.subplots(1, 2, figsize=(12.5, 5))
    for axes, (title, read) in zip(grid, quantities.items(), strict=True):
        found = [{"contender": r["contender"], "x": r["shape"][axis], "y": read(r)} for r in records if read(r)]
        series = _series(found, "x", "y") if found else {}
        low, high = _decades(series)
        ends = _spread([float(np.log10(y[-1])) for _, y in series.values()], [0.045 * (high - low)] * len(series))
        for (name, (x, y)), end in zip(series.items(), ends, strict=True):
            axes.plot(x, y, marker="o", color=color(name), linestyle="--" if name.endswith("inplace") else "-")
            axes.text(x[-1] * 1.06, 10**end, label(name), color=color(name), fontsize=8.5, va="center")
        axes.set_xscale("log")
        axes.set_yscale("log")
        sizes = sorted({r["shape"][axis] for r in records})
        apart = [n for n, before in zip(sizes, (0, *sizes), strict=False) if n > 1.3 * before]  # room for their labels
        axes.set_xticks(apart, [f"{n:,}" for n in apart])
        axes.set_xticks([], minor=True)
        axes.set_xlabel({"V": "vocabulary V", "S": "sequence length S"}[axis])
        axes.set_title(title, loc="left", fontsize=11)
        _plain(axes)
        low, high = axes.get_xlim()
        axes.set_xlim(low, high * (high / low) ** 0.55)
    first = records[0]
    kind = first["options"].get("divergence") or first["options"].get("kind")
    rest = ", ".join(f"{a} {n:,}" for a, n in first["shape"].items() if a != axis)
    title = f"Forward + backward against {axis}: {kind}, {first['dtype']}, {rest}"
    figure.suptitle(title, x=0.012, ha="left", fontsize=13)
    _footer(figure, records)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return _save(figure, path)


def roofline(records: list[Record], path: Path) -> Path:
    """Rate of useful operations against operations a byte, under what the machine was measured to reach."""
    rates = records[0]["rates"]
    figure, axes = plt.subplots(figsize=(9, 5.6))
    unit, scale = ("T", 1e3) if rates["matrix_gflop_s"] > 1e4 else ("G", 1.0)
    intensity = np.logspace(-0.3, 4.5, 200)
    roof = np.minimum(intensity * rates["copy_gb_s"], rates["matrix_gflop_s"]) / scale
    axes.plot(intensity, roof, color="#333333", linewidth=1.5)
    names = dict.fromkeys(r["contender"] for r in records)
    for name in names:
        chosen = [r for r in records if r["contender"] == name]
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
    axes.legend(fontsize=8.5, frameon=False, loc="lower right")
    _plain(axes)
    _footer(figure, records)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return _save(figure, path)
