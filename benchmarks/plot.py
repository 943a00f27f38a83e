"""Records -> a Markdown page with tables and figures; a record whose kernels have changed since is marked stale."""

from __future__ import annotations

import math
from pathlib import Path

from fastdistil.benchmarks import figures
from fastdistil.benchmarks.cases import OPS
from fastdistil.benchmarks.record import Record, is_stale, read_records, source_root

DISTURBED = 0.1  # cores that other processes kept busy, above which a time is void
Table = list[list[str]]


def report(folder: Path) -> list[Path]:
    """Writes report.md and figures beside the records, or, for the committed ones, docs/benchmarks.md's section of
    the device and docs/images/; returns what was written."""
    records = read_records(folder) if folder.is_dir() else []
    if not records:
        raise ValueError(f"bench: {folder} has no records (*.jsonl), expected those of `fastdistil bench`")
    root = source_root()
    committed = root is not None and folder.resolve().parent == root / "benchmarks/results"
    device = "cpu" if records[0]["device"] == "cpu" else "gpu"
    images = root / "docs/images" if root is not None and committed else folder / "images"
    drawn = draw(records, images, prefix="" if device == "cpu" else "gpu-")
    text = page(records, [f"images/{path.name}" for path in drawn])
    if root is not None and committed:
        target = root / "docs/benchmarks.md"
        target.write_text(replace_section(target.read_text(), device, text))
    else:
        target = folder / "report.md"
        target.write_text(text)
    return [target, *drawn]


def replace_section(document: str, name: str, text: str) -> str:
    """The document with what stands between `<!-- records:name -->` and `<!-- end:name -->` replaced."""
    begin, end = f"<!-- records:{name} -->", f"<!-- end:{name} -->"
    if begin not in document or end not in document:
        raise ValueError(f"docs/benchmarks.md has no section {begin} ... {end}, expected one to fill")
    head, rest = document.split(begin, 1)
    return f"{head}{begin}\n\n{text.strip()}\n\n{end}{rest.split(end, 1)[1]}"


def draw(records: list[Record], images: Path, prefix: str = "") -> list[Path]:
    drawn = []
    timed = [r for r in records if "ratios" in r and r["op"] in OPS]
    exact = [r for r in records if r["op"] == "exactness"]
    if exact:
        drawn.append(figures.exactness(exact, images / f"{prefix}exactness.png"))
    for op in OPS:
        own = [r for r in timed if r["op"] == op]
        if own:
            drawn += figures.times(own, images / f"{prefix}{op}-time.png")
        axis = {"logits": "V", "attention": "S"}.get(op)
        line = _comparable(own, axis) if axis else []
        if axis and line:
            drawn.append(figures.scaling(line, axis, images / f"{prefix}{op}-scaling.png"))
    if timed:
        drawn.append(figures.roofline(timed, images / f"{prefix}roofline.png"))
    return drawn


def _comparable(records: list[Record], axis: str) -> list[Record]:
    """The largest set of records that differ in `axis` alone, where it has three sizes or more; of equals the first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        rest = {a: n for a, n in record["shape"].items() if a != axis}
        groups.setdefault(f"{rest} {record['dtype']} {record['options']}", []).append(record)
    best = max(groups.values(), key=lambda group: len({r["shape"][axis] for r in group}), default=[])
    return best if len({r["shape"][axis] for r in best}) >= 3 else []


def page(records: list[Record], images: list[str]) -> str:
    first = records[0]
    lines = [
        f"Measured on: {figures.where(first)}"
        + (f" ({first['cpu_isa']})" if first["device"] == "cpu" else f", driver {first['driver']}")
        + f"; torch {first['versions']['torch']}, triton {first['versions']['triton']}; "
        + f"commits {', '.join(sorted({r['commit'] for r in records}))}; {first['date'][:10]}.",
    ]
    if any(r.get("small") for r in records):
        lines.append("**A dry run with tiny shapes: its times mean nothing.**")
    if any(is_stale(r) for r in records):
        lines.append("**Stale** marks a record taken before the kernel sources last changed.")
    bars = _bars(records)
    if bars:
        lines += ["### Bars", _markdown(["case", "contender", "against", "quantity", "bar", "measured", ""], bars)]
    for op in OPS:
        own = [r for r in records if r["op"] == op]
        if own:
            lines += [f"### {op.capitalize()}", _times(own)]
    sparse = [r for r in records if r["op"] == "sparse"]
    if sparse:
        lines += ["### Sparse fine-tuning", _sparse(sparse)]
    lines += [_threads(r) for r in records if r["op"] == "threads"]
    steps = [r for r in records if r["op"] == "steps"]
    if steps:
        lines += ["### Training steps", _steps(steps)]
    exact = [r for r in records if r["op"] == "exactness"]
    if exact:
        lines += ["### Exactness", _exactness(exact)]
    lines += [f"![{Path(image).stem}]({image})" for image in images]
    return "\n\n".join(lines) + "\n"


def _markdown(header: list[str], rows: Table) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def marks(record: Record) -> str:
    """Why a number must not be trusted, if so."""
    found = [record["reason"]] if record.get("reason") else []
    if is_stale(record):
        found.append("**stale**")
    if record["device"] == "cpu" and record.get("other_load_cores", 0) > DISTURBED:
        found.append(f"**void**: {record['other_load_cores']} cores busy elsewhere")
    return "; ".join(found)


def _bars(records: list[Record]) -> Table:
    def row(record: Record, bar: Record) -> list[str]:
        verdict = "pass" if bar["reached"] else "**FAIL**"
        noted = " ".join(filter(None, (verdict, marks(record))))
        quantity = {"both": "forward + backward", "memory": "extra memory"}.get(bar["quantity"], bar["quantity"])
        return [
            record["case"], figures.label(record["contender"]), figures.label(bar["against"]), quantity,
            *_bar_numbers(bar), noted,
        ]  # fmt: skip

    return [row(record, bar) for record in records for bar in record.get("bars", ())]


def _bar_numbers(bar: Record) -> tuple[str, str]:
    if bar["quantity"].startswith("MiB"):
        return f"≤ {bar['at_least']:g}", f"{bar['found']:.0f}"
    return f"≥ {bar['at_least']:g}×", f"{bar['found']:.1f}×"


def _number(value: float | None, pattern: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, pattern)


def _times(records: list[Record]) -> str:
    """On a GPU with milliseconds, on a CPU with ratios alone."""
    header = [
        "case",
        "contender",
        "speed / eager: forward",
        "forward + backward",
        "/ compile",
        "time / best",
        "time / floor",
    ]
    header += _milliseconds_header(records)
    header += ["extra MiB", "gradient error", "near convergence", ""]
    rows = []
    for record in records:
        forward, both = ({}, {}) if "ratios" not in record else (record["ratios"]["forward"], record["ratios"]["both"])
        row = [f"{record['case']}", figures.label(record["contender"])]
        row += [_number(forward.get("eager_over_this"), ".2f"), _number(both.get("eager_over_this"), ".2f")]
        row += [_number(both.get(key), ".2f") for key in ("compile_over_this", "this_over_best", "this_over_floor")]
        row += _milliseconds(record)
        row.append(_number(record.get("peak_mem_mib"), ",.0f"))
        row += [_number(record.get(key), ".1e") for key in ("gradient_error", "near_gradient_error")]
        rows.append([*row, marks(record)])
    return _markdown(header, rows)


def _threads(record: Record) -> str:
    s = record["shape"]
    return (
        f"Threads: torch.mm ({s['side']}²) and logit_loss ([{s['N']}, {s['V']:,}]) in turns take "
        f"{record['turns_over_sum']:.2f}× the sum of each alone (1 = the two share their threads). {marks(record)}"
    ).strip()


def _milliseconds(record: Record) -> list[str]:
    """Medians of a GPU alone: on a CPU only ratios carry over."""
    if record["device"] == "cpu":
        return []
    times = record.get("time_us", {}).get("both", {})
    return [_number(times[p] / 1e3 if times else None, ".3f") for p in ("p20", "p50", "p80")]


def _milliseconds_header(records: list[Record]) -> list[str]:
    return [] if records[0]["device"] == "cpu" else ["ms p20", "p50", "p80"]


def _sparse(records: list[Record]) -> str:
    """Each case's times over ours, which is its first record."""
    rows = []
    for record in records:
        own = next(r for r in records if r["case"] == record["case"])
        ratio = record["time_us"]["both"]["p50"] / own["time_us"]["both"]["p50"] if "time_us" in record else None
        memory = [_number(record.get(key), ",.0f") for key in ("peak_mem_mib", "state_mib")]
        floor = _number(record.get("ratios", {}).get("both", {}).get("this_over_floor"), ".2f")
        name = figures.label(record["contender"])
        times = [_number(ratio, ".2f"), floor, *_milliseconds(record)]
        rows.append([record["case"], name, *times, *memory, marks(record)])
    times = ["time / fastdistil", "time / floor", *_milliseconds_header(records)]
    return _markdown(["case", "contender", *times, "extra MiB", "state MiB", ""], rows)


def _steps(records: list[Record]) -> str:
    """Whole steps of a recipe, as ratios to the one that keeps the maps."""
    eager = {r["case"]: r for r in records if r["contender"] == "eager"}
    rows = []
    for r in records:
        speed = eager[r["case"]]["time_us"]["both"]["p50"] / r["time_us"]["both"]["p50"]
        shape = ", ".join(f"{axis} {size}" for axis, size in r["shape"].items())
        rows.append([
            r["case"], f"{shape}, {r['dtype']}", figures.label(r["contender"]), f"{speed:.2f}", *_milliseconds(r),
            _number(r.get("peak_mem_mib"), ",.0f"), f"{r['gradient_error']:.1e}", marks(r),
        ])  # fmt: skip
    times = ["speed / eager", *_milliseconds_header(records)]
    return _markdown(["recipe", "shape", "contender", *times, "MiB beyond the models", "gradient error", ""], rows)


def _exactness(records: list[Record]) -> str:
    noises = sorted({r["noise"] for r in records}, reverse=True)
    names = dict.fromkeys((r["contender"], r["dtype"]) for r in records)
    cell = {(r["contender"], r["dtype"], r["noise"]): r for r in records}
    rows = []
    for name, dtype in names:
        own = [cell[name, dtype, noise] for noise in noises if (name, dtype, noise) in cell]
        rows.append([
            figures.label(name), dtype, *(f"{r['value_error']:.0e} / {r['gradient_error']:.0e}" for r in own),
            marks(own[0]),
        ])  # fmt: skip
    header = ["value / gradient error at noise", "logits", *(f"{noise:g}" for noise in noises), ""]
    return _markdown(header, rows)
