"""Our losses beside TRL's own in one run: `python -m fastdistil.benchmarks.trl`, a table in Markdown.

Values and gradients are checked before anything is timed, and the implementations take turns (run.py). The sizes are
small: a run takes less than a minute on two CPU cores.
"""

from __future__ import annotations

import sys

from fastdistil.benchmarks.cases import Case
from fastdistil.benchmarks.measure import machine_rates
from fastdistil.benchmarks.record import Record
from fastdistil.benchmarks.run import device_here, run_case

RULES = ("forward_kl", "jsd")
SHAPES = {
    "logits": {"N": 64, "V": 32_000},  # as GKDTrainer compares them
    "linear": {"N": 64, "V": 32_000, "D_s": 64, "D_t": 64},  # as DistillationTrainer
}


def cases(device: str) -> list[Case]:
    ours = "fastdistil:" + ("cpu" if device == "cpu" else "triton")
    return [
        Case(
            op, f"trl-{rule}", shape, ("eager", "trl", ours), repetitions=3, memory=False,
            options={"divergence": rule, "temperature": 1.0},
        )
        for op, shape in SHAPES.items()
        for rule in RULES
    ]  # fmt: skip


def row(records: list[Record]) -> str:
    """One line of the table: milliseconds of forward and backward, ours beside TRL's, and both gradients' errors."""
    _, theirs, mine = records
    for record in (theirs, mine):
        if record["status"] != "ok":
            raise SystemExit(f"trl: {record['implementation']} is {record['status']}: {record['reason']}")
    times = [record["time_us"]["both"]["p50"] / 1e3 for record in (theirs, mine)]
    errors = [record["gradient_error"] for record in (theirs, mine)]
    sizes = ", ".join(f"{name} {size:,}" for name, size in mine["shape"].items())
    if mine["other_load_cores"] > 0.1 and device_here() == "cpu":
        raise SystemExit(f"trl: other processes kept {mine['other_load_cores']} cores busy meanwhile, expected none")
    cells = [f"{mine['op']}, {mine['options']['divergence']}", sizes, *(f"{x:,.0f} ms" for x in times)]
    cells += [f"{times[0] / times[1]:.1f}×", *(f"{x:.0e}" for x in errors)]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    device = device_here()
    rates = machine_rates(device)
    print("| loss | size | TRL | fastdistil | TRL / fastdistil | TRL's gradient error | ours |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for case in cases(device):
        print(row(run_case(case, device, rates, lambda text: print(text, file=sys.stderr))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
