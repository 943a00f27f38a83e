"""`fastdistil bench`: check implementations against the truth, time those that are right, write one JSON line each."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from fastdistil.benchmarks import exactness, sharing, sparse
from fastdistil.benchmarks.cases import LOSSES, OPS, Case, Threshold, select
from fastdistil.benchmarks.floors import floor_us, operations, traffic_bytes
from fastdistil.benchmarks.losses import LossWork
from fastdistil.benchmarks.measure import (
    OtherLoad,
    machine_rates,
    peak_here_mib,
    peak_mib,
    quantiles,
    time_interleaved,
)
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
from fastdistil.benchmarks.steps import StepWork
from fastdistil.benchmarks.work import Implementation, Unavailable, Work

Say = Callable[[str], None]


def work_of(case: Case, device: str) -> Work:
    if case.op in LOSSES:
        return LossWork(case, device)
    return sparse.work(case, device) if case.op == "sparse" else StepWork(case, device)


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
    """Measures an op, "exactness" or "all" on the best device here; returns the files written. With
    `resume` a file's records are kept, and only the cases that it lacks are measured."""
    known = (*OPS, "exactness")
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
        f"{r['op']} {r['case']}: {r['implementation']} {r['status']}, {r['reason']}"
        for r in records
        if r["implementation"].startswith("fastdistil") and r.get("status") in ("refused", "failed")
    ]


def run_case(case: Case, device: str, rates: dict[str, float], say: Say = print, tiny: bool = False) -> list[Record]:
    """A record per implementation: "ok" with times, or "refused", "failed" or "unavailable" with the reason."""
    axes = ", ".join(f"{axis} {size:,}" for axis, size in case.shape.items())
    say(f"{case.op} {case.name}: {axes}, {case.dtype}")
    shared = {
        "op": case.op, "case": case.name, "shape": case.shape, "dtype": case.dtype, "options": case.options,
        "baseline": case.baseline, "small": tiny, "rates": rates,
        "bytes": {p: traffic_bytes(case, p) for p in ("forward", "both")},
        "flops": {p: operations(case, p) for p in ("forward", "both")}, **environment(case.op, device),
    }  # fmt: skip
    work = work_of(case, device)
    implementations, records = _checked(case, work, say)
    right = [x for x in implementations if records[x.name]["status"] == "ok"]
    if not right:
        return [{**shared, **record} for record in records.values()]
    with OtherLoad() as other:
        times = time_interleaved(right, case.repetitions, device)
    shared["clock_mhz"] = clock_mhz(device)  # of the GPU at work
    if device == "cpu" and other.cores > 0.1:
        say(f"  other processes kept {other.cores} cores busy meanwhile: these times are void")
    for implementation in right:
        passes, record = times[implementation.name], records[implementation.name]
        record |= {"time_us": {what: quantiles(samples) for what, samples in passes.items()}}
        record |= {"repetitions": len(passes["both"]), "other_load_cores": other.cores, **implementation.fields()}
        record |= {"scaled": implementation.scale} if implementation.scale != 1 else {}
    here = {x.name: x for x in right} if device == "cuda" else {}
    measured = [x.name for x in right if case.memory and x.scale == 1]
    del implementations, implementation, right, work  # a child process needs the memory
    gc.collect()
    for name in measured:
        records[name]["peak_mem_mib"] = peak_mib(case, name, device, lambda n=name: peak_here_mib(here[n], device))  # type: ignore[misc]
    _compare(case, records, rates)
    for name in times:
        say(f"  {name}: {_summary(records[name])}")
    return [{**shared, **record} for record in records.values()]


def _checked(case: Case, work: Work, say: Say) -> tuple[list[Implementation], dict[str, Record]]:
    """Every implementation that can run, with its errors; the baseline's own are the measure of the others."""
    check, baseline = work.checker(), work.build(case.baseline)
    known = {case.baseline: (baseline, check(baseline))}
    allowed = {what: 2 * known[case.baseline][1][what] + slack for what, slack in work.slack.items()}
    implementations, records = [], dict[str, Record]()
    for name in case.implementations:
        record = records[name] = {"implementation": name, "status": "ok"}
        try:
            if name in known:
                implementation, found = known[name]
            else:
                implementation = work.build(name)
                found = check(implementation)
        except Unavailable as reason:
            record |= {"status": "unavailable", "reason": str(reason)}
        except Exception as reason:  # one that crashes ends neither the run nor the others' case
            record |= {"status": "failed", "reason": f"{type(reason).__name__}: {reason}".splitlines()[0][:300]}
        else:
            record |= found
            for what, limit in allowed.items():
                if found.get(what, 0.0) > limit:
                    off = f"its {what.split('_')[0]} is {found[what]:.1e} off, at most {limit:.1e} allowed"
                    record |= {"status": "refused", "reason": off}
            implementations.append(implementation)
        if record["status"] != "ok":
            say(f"  {name}: {record['status']}, {record['reason']}")
    return implementations, records


def _compare(case: Case, records: dict[str, Record], rates: dict[str, float]) -> None:
    """Adds the ratios of medians (above 1: faster than the baseline, compile; slower than best, floor) and what became
    of the thresholds."""
    timed = {name: r for name, r in records.items() if "time_us" in r}
    for name, record in timed.items():
        ratios: dict[str, dict[str, float]] = {}
        for what, own in record["time_us"].items():
            others = {n: r["time_us"][what]["p50"] for n, r in timed.items()}
            row = {f"{n}_over_this": others[n] / own["p50"] for n in (case.baseline, "compile") if n in others}
            row["this_over_best"] = own["p50"] / min(t for n, t in others.items() if n != "products")
            if what in ("forward", "both"):
                row["this_over_floor"] = own["p50"] / floor_us(case, what, rates)
            ratios[what] = row
        record["ratios"] = ratios
        wanted = [x for x in case.thresholds if x.implementation == name and x.baseline in ("", *timed)]
        record["thresholds"] = [_threshold(x, timed) for x in wanted]


def _threshold(wanted: Threshold, timed: dict[str, Record]) -> Record:
    def size(name: str) -> float:
        fields = {"memory": "peak_mem_mib", "state": "state_mib"}
        record = timed[name]
        if wanted.quantity in fields:
            return float(record.get(fields[wanted.quantity]) or "nan")
        return float(record["time_us"][wanted.quantity]["p50"])

    found, limit = size(wanted.implementation), {"at_least": wanted.at_least}
    if wanted.at_most is not None:
        limit, reached = {"at_most": wanted.at_most}, found <= wanted.at_most
    else:
        found = size(wanted.baseline) / max(found, 1e-9)
        reached = found >= wanted.at_least
    return {"baseline": wanted.baseline, "quantity": wanted.quantity, **limit, "found": found, "reached": reached}


def _summary(record: Record) -> str:
    times = ", ".join(
        f"{record['time_us'][p]['p50'] / 1e3:,.2f} ms {p}" for p in ("both", "forward") if p in record["time_us"]
    )
    peak, speed = record.get("peak_mem_mib"), next(iter(record["ratios"]["both"].values()))
    memory = "" if peak is None else f", {peak:,.0f} MiB extra"
    return f"{times}{memory}, {speed:.2f}x the baseline's speed"
