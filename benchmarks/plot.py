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
    timed = [r for r in records if "this_over_floor" in r.get("ratios", {}).get("both", {})]
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
    computing = [r for r in timed if r["flops"]["both"] > 0]
    if computing:
        drawn.append(figures.roofline(computing, images / f"{prefix}roofline.png"))
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
    stale = [is_stale(r) for r in records]
    if all(stale):
        lines.append("All of these records are **stale**: the kernel sources have changed since they were taken.")
    elif any(stale):
        lines.append("**Stale** marks a record taken before the kernel sources last changed.")
    passed = [_threshold(r, x, not all(stale)) for r in records for x in r.get("thresholds", ())]
    if passed:
        header = ["case", "implementation", "baseline", "quantity", "threshold", "measured", ""]
        lines += ["### Thresholds", _markdown(header, passed)]
    measured = [r for op in OPS for r in records if r["op"] == op]
    if measured:
        lines += ["### Time, error and memory", _table(measured, not all(stale))]
    lines += [_threads(r, not all(stale)) for r in records if r["op"] == "threads"]
    exact = [r for r in records if r["op"] == "exactness"]
    if exact:
        lines += ["### Exactness", _exactness(exact, not all(stale))]
    lines += [f"![{Path(image).stem}]({image})" for image in images]
    return "\n\n".join(lines) + "\n"


def _markdown(header: list[str], rows: Table) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def marks(record: Record, stale: bool = True) -> str:
    """Why a number must not be trusted, if so; staleness only where `stale`."""
    found: list[str] = [record["reason"]] if record.get("reason") else []
    if stale and is_stale(record):
        found.append("**stale**")
    if record["device"] == "cpu" and record.get("other_load_cores", 0) > DISTURBED:
        found.append(f"**void**: {record['other_load_cores']} cores busy elsewhere")
    return "; ".join(found)


def _named(record: Record) -> list[str]:
    return [f"{record['op']} {record['case']}", figures.label(record["implementation"])]


def _threshold(record: Record, threshold: Record, stale: bool) -> list[str]:
    verdict = "pass" if threshold["reached"] else "**FAIL**"
    quantity = str(threshold["quantity"])
    quantity = {"both": "time", "memory": "extra memory"}.get(quantity, quantity)
    if "at_most" in threshold:
        numbers = [f"≤ {threshold['at_most']:.0f} MiB", f"{threshold['found']:.0f} MiB"]
    else:
        numbers = [f"≥ {threshold['at_least']:.3g}×", f"{threshold['found']:.1f}×"]
    baseline = figures.label(threshold["baseline"]) if threshold["baseline"] else "–"
    return [*_named(record), baseline, quantity, *numbers, " ".join(filter(None, (verdict, marks(record, stale))))]


def _number(value: float | None, pattern: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, pattern)


def _table(records: list[Record], stale: bool) -> str:
    """Speeds are times the case's baseline's, each with an error beside it; milliseconds on a GPU alone, because on a
    CPU only ratios carry over."""
    header = [
        "case", "implementation", "forward: speed, error of the value",
        "whole: speed, error of the gradient (none: of the value)", "whole / compile", "whole / floor",
        "extra MiB", "gradient error near convergence", "",
    ]  # fmt: skip
    rows = []
    for r in records:
        both = r.get("ratios", {}).get("both", {})
        whole = "gradient_error" if "gradient_error" in r else "value_error"
        memory = _number(r.get("peak_mem_mib"), ",.0f")
        if "state_mib" in r:
            memory = f"{memory}, state {r['state_mib']:,.0f}".removeprefix("–, ")
        rows.append([
            *_named(r), _speed(r, "forward", "value_error"), _speed(r, "both", whole),
            _number(both.get("compile_over_this"), ".2f"), _number(both.get("this_over_floor"), ".2f"), memory,
            _number(r.get("near_gradient_error"), ".1e"), marks(r, stale),
        ])  # fmt: skip
    return _markdown(header, rows)


def _speed(record: Record, what: str, error: str) -> str:
    if what not in record.get("time_us", {}):
        return "–"
    words = []
    if record["device"] != "cpu":
        p20, p50, p80 = (record["time_us"][what][p] / 1e3 for p in ("p20", "p50", "p80"))
        words.append(f"{p50:.3f} ms ({p20:.3f} to {p80:.3f})")
    speed = record["ratios"][what].get(f"{record['baseline']}_over_this")
    words += [] if speed is None else [f"{speed:.2f}×"]
    return ", ".join([*words, _number(record.get(error), ".1e")])


def _threads(record: Record, stale: bool) -> str:
    s, ratio = record["shape"], record["turns_over_sum"]
    return (
        f"Threads: torch.mm ({s['side']}²) and logit_loss ([{s['N']}, {s['V']:,}]) in turns take {ratio:.2f}× the sum "
        f"of each alone (1 = the two share their threads). {marks(record, stale)}"
    ).strip()


def _exactness(records: list[Record], stale: bool) -> str:
    noises = sorted({r["noise"] for r in records}, reverse=True)
    names = dict.fromkeys((r["implementation"], r["dtype"]) for r in records)
    cell = {(r["implementation"], r["dtype"], r["noise"]): r for r in records}
    rows = []
    for name, dtype in names:
        own = [cell[name, dtype, noise] for noise in noises if (name, dtype, noise) in cell]
        errors = [f"{r['value_error']:.0e} / {r['gradient_error']:.0e}" for r in own]
        rows.append([figures.label(name), dtype, *errors, marks(own[0], stale)])
    header = ["value / gradient error at noise", "logits", *(f"{noise:g}" for noise in noises), ""]
    return _markdown(header, rows)
