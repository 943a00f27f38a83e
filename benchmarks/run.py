"""`fastdistil bench`: check every contender against float64, time those that are right, write one JSON line each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fastdistil.benchmarks import exactness, sharing, sparse, steps
from fastdistil.benchmarks.cases import OPS, Case, operations, select, traffic_bytes
from fastdistil.benchmarks.contenders import Contender, build
from fastdistil.benchmarks.measure import (
    OtherLoad,
    floor_of,
    machine_rates,
    peak_here_mib,
    peak_mib,
    quantiles,
    time_interleaved,
)
from fastdistil.benchmarks.peers import Unavailable
from fastdistil.benchmarks.problems import errors, make, truth
from fastdistil.benchmarks.record import (
    Record,
    clock_mhz,
    device_folder,
    environment,
    is_stale,
    read_records,
    source_root,
    write_records,
)

NOISE, NEAR = 1.0, 1e-3  # student = teacher + noise: what is timed, and what near convergence means

# As in the tests: at most twice the error of the eager formula in the same dtype, plus a little.
VALUE_SLACK = 5e-6  # float32 sums of 25 million terms, in whatever order
GRADIENT_SLACK = {"float64": 1e-11, "float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3}

Say = Callable[[str], None]


def device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_out(op: str, device: str, tiny: bool) -> Path:
    """In a checkout the committed records, elsewhere (and for a dry run) runs/bench."""
    root = source_root()
    if root is None or tiny:
        return Path("runs/bench-small" if tiny else "runs/bench") / f"{op}.jsonl"
    return root / "benchmarks/results" / device_folder(device) / f"{op}.jsonl"


def run(
    what: str, *, tiny: bool = False, out: Path | None = None, resume: bool = False, say: Say = print
) -> list[Path]:
    """Measures an op, "steps", "exactness", "sparse" or "all" on the best device here; returns the files written. With
    `resume` a file's records are kept, and only the cases that it lacks are measured."""
    known = (*OPS, "steps", "exactness", "sparse")
    wanted = known if what == "all" else (what,)
    if what not in (*known, "all"):
        raise ValueError(f"bench: what is {what!r}, expected one of {', '.join((*known, 'all'))}")
    device, files = device_here(), dict[Path, list[Record]]()
    rates = machine_rates(device)
    for op in wanted:
        path = default_out(op, device, tiny) if out is None else out
        records = files.setdefault(path, _kept(path) if resume else [])
        done = {r["case"] for r in records}
        for more in _measurements(op, device, rates, tiny, done, say):
            records += more
            write_records(path, records)
    return list(files)


def _kept(path: Path) -> list[Record]:
    """The file's records, but for those of kernels that have changed since."""
    return [r for r in read_records(path.parent, path.name) if not is_stale(r)] if path.exists() else []


def _measurements(
    op: str, device: str, rates: dict[str, float], tiny: bool, done: set[str], say: Say
) -> Iterator[list[Record]]:
    if op == "exactness":
        if not done:
            yield exactness.run(device, tiny, say)
    elif op == "sparse":
        yield from sparse.run(device, tiny, rates, done, say)
    elif op == "steps":
        yield from (steps.run(r, device, tiny, rates, say) for r in ("lightmbert", "bistil") if r not in done)
    else:
        for case in select(device, (op,), tiny):
            if case.name in done:
                continue
            try:
                yield run_case(case, device, rates, say, tiny)
            except torch.OutOfMemoryError as error:  # of the truth or of eager, without which there is no record
                say(f"  not measured: {str(error).splitlines()[0]}")
            if device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        if op == "logits" and device == "cpu" and sharing.CASE not in done:
            yield [sharing.run(tiny, say)]


def wrong(paths: list[Path]) -> list[str]:
    """What of fastdistil itself was refused or failed, one line each."""
    records = [r for path in paths for r in read_records(path.parent, path.name)]
    return [
        f"{r['op']} {r['case']}: {r['contender']} {r['status']}, {r['reason']}"
        for r in records
        if r["contender"].startswith("fastdistil") and r.get("status") in ("refused", "failed")
    ]


def run_case(case: Case, device: str, rates: dict[str, float], say: Say = print, tiny: bool = False) -> list[Record]:
    """One record a contender: "ok" with times, or "refused" or "unavailable" with the reason."""
    axes = ", ".join(f"{axis} {size:,}" for axis, size in case.shape.items())
    say(f"{case.op} {case.name}: {axes}, {case.dtype}")
    shared = {
        "op": case.op, "case": case.name, "shape": case.shape, "dtype": case.dtype, "options": case.options,
        "small": tiny, "rates": rates, "bytes": {p: traffic_bytes(case, p) for p in ("forward", "both")},
        "flops": {p: operations(case, p) for p in ("forward", "both")}, **environment(case.op, device),
    }  # fmt: skip
    problem = make(case, device, NOISE)
    contenders, records = _checked(case, problem, device, say)
    right = [c for c in contenders if records[c.name]["status"] == "ok"]
    if not right:
        return [{**shared, **record} for record in records.values()]
    with OtherLoad() as other:
        times = time_interleaved(right, case.repetitions, device)
    shared["clock_mhz"] = clock_mhz(device)  # of the GPU at work
    if device == "cpu" and other.cores > 0.1:
        say(f"  other processes kept {other.cores} cores busy meanwhile: these times are void")
    here = {c.name: c for c in right} if device == "cuda" else {}
    del contenders, right, problem
    gc.collect()
    for name, passes in times.items():
        found = {what: quantiles(samples) for what, samples in passes.items()}
        records[name] |= {"time_us": found, "repetitions": len(passes["both"]), "other_load_cores": other.cores}
        if case.memory:
            records[name]["peak_mem_mib"] = peak_mib(case, name, device, lambda n=name: peak_here_mib(here[n], device))  # type: ignore[misc]
    _compare(case, records, rates)
    for name in times:
        say(f"  {name}: {_summary(records[name])}")
    return [{**shared, **record} for record in records.values()]


def _checked(case: Case, problem: Any, device: str, say: Say) -> tuple[list[Contender], dict[str, Record]]:
    """Every contender that can run, with its errors; eager's own are the measure of the others."""
    near = make(case, device, NEAR)
    true, near_true = truth(case, problem), truth(case, near)
    eager = errors(build("eager", case, problem).outcome(), true)
    allowed = 2 * eager[0] + VALUE_SLACK, 2 * eager[1] + GRADIENT_SLACK[case.dtype]
    contenders, records = [], {}
    for name in case.contenders:
        record: Record = {"contender": name, "status": "ok"}
        records[name] = record
        try:
            contender = build(name, case, problem)
            with torch.no_grad():
                contender.prepare()
                contender.forward()
            if name == "products":  # no loss, so nothing to be right about
                contenders.append(contender)
                continue
            found = eager if name == "eager" else errors(contender.outcome(), true)
            found_near = errors(replace(contender, problem=near).outcome(), near_true)
        except Unavailable as reason:
            record |= {"status": "unavailable", "reason": str(reason)}
        except Exception as reason:  # one that crashes ends neither the run nor the others' case
            record |= {"status": "failed", "reason": f"{type(reason).__name__}: {reason}".splitlines()[0][:300]}
        if record["status"] != "ok":
            say(f"  {name}: {record['status']}, {record['reason']}")
            continue
        record |= dict(zip(("value_error", "gradient_error"), found, strict=True))
        record |= dict(zip(("near_value_error", "near_gradient_error"), found_near, strict=True)) | {"near_noise": NEAR}
        for what, off, limit in zip(("value", "gradient"), found, allowed, strict=True):
            if off > limit:
                record |= {"status": "refused", "reason": f"its {what} is {off:.1e} off, at most {limit:.1e} allowed"}
                say(f"  {name}: not timed, {record['reason']}")
        contenders.append(contender)
    return contenders, records


def floor_us(case: Case, what: str, rates: dict[str, float]) -> float:
    return floor_of(traffic_bytes(case, what), operations(case, what), rates)


def _compare(case: Case, records: dict[str, Record], rates: dict[str, float]) -> None:
    """Adds the ratios of medians (above 1: faster than eager, compile; slower than best, floor) and the bars."""
    timed = {name: r for name, r in records.items() if "time_us" in r}
    for name, record in timed.items():
        ratios: dict[str, dict[str, float]] = {}
        for what, own in record["time_us"].items():
            others = {n: r["time_us"][what]["p50"] for n, r in timed.items()}
            row = {f"{n}_over_this": others[n] / own["p50"] for n in ("eager", "compile") if n in others}
            row["this_over_best"] = own["p50"] / min(t for n, t in others.items() if n != "products")
            if what in ("forward", "both"):
                row["this_over_floor"] = own["p50"] / floor_us(case, what, rates)
            ratios[what] = row
        record["ratios"] = ratios
        record["bars"] = [_bar(bar, timed) for bar in case.bars if bar.contender == name and bar.against in timed]


def _bar(bar: Any, timed: dict[str, Record]) -> Record:
    def size(name: str) -> float:
        record = timed[name]
        value = record.get("peak_mem_mib") if bar.quantity == "memory" else record["time_us"][bar.quantity]["p50"]
        return float("nan") if value is None else float(value)

    found = size(bar.against) / max(size(bar.contender), 1e-9)
    return {
        "against": bar.against, "quantity": bar.quantity, "at_least": bar.at_least, "found": found,
        "reached": found >= bar.at_least,
    }  # fmt: skip


def _summary(record: Record) -> str:
    both, forward = (record["time_us"][p]["p50"] / 1e3 for p in ("both", "forward"))
    peak = record.get("peak_mem_mib")
    memory = "" if peak is None else f", {peak:,.0f} MiB extra"
    eager = record["ratios"]["both"].get("eager_over_this")
    return f"{both:.2f} ms both, {forward:.2f} ms forward{memory}" + ("" if eager is None else f", {eager:.2f}x eager")
