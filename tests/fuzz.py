"""More cases than `make test` has time for, by loss; what it finds goes to docs/numerics.md.

    python tests/fuzz.py logit --cases 20000      goes on where it stopped; at most an hour a loss
    python tests/fuzz.py --table                  writes the tables of docs/numerics.md from the state files
    python tests/fuzz.py --case '{"loss": ...}'   one case again, part by part

The state is runs/fuzz/LOSS.json, written after every 100 cases. A case that fails is added to tests/data/cases.jsonl,
which tests/losses/test_rows.py tests from then on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent / "support"))

import judge
import numpy as np
import rows
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from problems import PROBLEMS, Problem

import fastdistil
from fastdistil import _C
from fastdistil.backends import interpreting

if interpreting():
    import triton_interpreter_fast  # noqa: F401

ROOT = Path(__file__).parent.parent
KEPT = Path(os.environ.get("FUZZ_KEPT", ROOT / "tests/data/cases.jsonl"))
CHUNK = 100
TRITON_EVERY, TRITON_SIZE = 25, 300
MARKS = "<!-- from here on written by tests/fuzz.py -->", "<!-- to here -->"


def measured(problem: Problem, backend: str) -> dict[str, tuple[float, float]]:
    """By part: the largest relative error of a row, and the same in units of what is allowed."""
    leaves = [x.detach().clone().requires_grad_() for x in problem.student]
    value = problem.eager(*leaves) if backend == "eager" else problem.loss(backend, *leaves)
    gradients = torch.autograd.grad(value.sum(), leaves)
    found = {"value": (value, problem.value), "gradient": (gradients[0], problem.gradients[0])}
    for i in range(1, len(gradients)):
        found[f"gradient {i}"] = (gradients[i], problem.gradients[i])
    answer = {}
    for what, (x, part) in found.items():
        units, plain = judge.excess(x, part, backend)
        if not units <= 1 and problem.conditioning is not None and backend != "eager":
            problem.conditioning()
            problem.conditioning = None
            units, _ = judge.excess(x, part, backend)
        answer[what] = plain, units
    return answer


def keys(case: Any) -> list[str]:
    """The lines of the table that a case counts in."""
    name = getattr(case, "divergence", None) or case.form
    found = [name, f"student: {case.student}"] if hasattr(case, "student") else [name, case.kind]
    if hasattr(case, "teacher"):
        found.append(f"teacher: {case.teacher}")
    if hasattr(case, "sink"):
        found.append(f"sink of {case.sink}")
    return found


def backends_of(case: Any, count: int) -> list[str]:
    status = fastdistil.backends()
    small = count % TRITON_EVERY == 0 and rows.size(case) <= TRITON_SIZE and status["triton"] is True
    return ["eager", "reference", "cpu", *(["triton"] if small else [])]


def judged(case: Any, count: int, state: dict[str, Any]) -> None:
    problem = PROBLEMS[case.loss](case)
    # 16-bit gradients have their rounding; the table is of float32.
    line = {} if case.student_dtype != "float32" else state["worst"]
    for backend in backends_of(case, count):
        for isa in _C.isas() if backend == "cpu" else [_C.isas()[-1]]:
            _C.use_isa(isa)
            try:
                errors = measured(problem, backend)
            except Exception as error:  # a call that is refused is a failure like any other
                errors = {"call": (float("inf"), float("inf"))}
                print(f"{backend}: {error}", file=sys.stderr)
            for what, (plain, units) in errors.items():
                if units > 1 and backend != "eager":
                    state["failures"].append({"backend": backend, "isa": isa, "part": what, "units": units, "case": rows.as_line(case)})  # fmt: skip
                for key in keys(case):
                    entry = line.setdefault(key, {}).setdefault(backend, {})
                    for name, number in ((what.split()[0], plain), ("units", units)):
                        entry[name] = max(entry.get(name, 0.0), number if number == number else float("inf"))
    for key in keys(case):
        state["cases"][key] = state["cases"].get(key, 0) + 1


def chunk(loss: str, state: dict[str, Any]) -> None:
    count = iter(range(state["chunks"] * CHUNK, 2**62))

    @seed(state["chunks"])
    @settings(max_examples=CHUNK, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(rows.STRATEGIES[loss]())
    def draw(case: Any) -> None:
        judged(case, next(count), state)

    draw()


def fuzz(loss: str, cases: int, minutes: float, out: Path) -> None:
    path, start = out / f"{loss}.json", time.monotonic()
    state: dict[str, Any] = {"chunks": 0, "worst": {}, "cases": {}, "failures": [], "seconds": 0.0}
    if path.exists():
        state = json.loads(path.read_text())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    state["commit"] = commit.strip()
    while state["chunks"] * CHUNK < cases and time.monotonic() - start < 60 * minutes:
        begun, failed = time.monotonic(), len(state["failures"])
        chunk(loss, state)
        state["chunks"] += 1
        state["seconds"] += time.monotonic() - begun
        keep([f["case"] for f in state["failures"][failed:]])
        out.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(state))
        temporary.replace(path)
        print(f"{loss}: {state['chunks'] * CHUNK} cases, {len(state['failures'])} failures", flush=True)


def keep(lines: list[str]) -> None:
    known = KEPT.read_text().splitlines() if KEPT.exists() else []
    new = [x for x in dict.fromkeys(lines) if x not in known]
    if new:
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text("".join(f"{x}\n" for x in [*known, *new]))


def table(out: Path) -> str:
    """Worst errors, loss by loss."""
    found = []
    for loss in rows.CASES:
        path = out / f"{loss}.json"
        if not path.exists():
            continue
        state = json.loads(path.read_text())
        failed = len({f["case"] for f in state["failures"]})
        found += [
            "", f"### {loss}", "",
            f"{state['chunks'] * CHUNK:,} cases at {state['commit']}, of which {failed} failed.", "",
            "| | cases | value | gradient | of what is allowed | reference | eager: value | eager: gradient |",
            "|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for key in sorted(state["worst"], key=lambda k: (":" in k or " " in k, k)):
            by = state["worst"][key]
            cpu, plain, eager = by.get("cpu", {}), by.get("reference", {}), by.get("eager", {})
            numbers = [
                cpu.get("value"), cpu.get("gradient"), max(cpu.get("units", 0.0), by.get("triton", {}).get("units", 0.0)),
                plain.get("units"), eager.get("value"), eager.get("gradient"),
            ]  # fmt: skip
            cells = [
                shown(numbers[0]),
                shown(numbers[1]),
                f"{numbers[2]:.2g}",
                shown(numbers[3], ".2g"),
                *map(shown, numbers[4:]),
            ]
            found.append(f"| {key} | {state['cases'][key]:,} | " + " | ".join(cells) + " |")
    return "\n".join(found)


def shown(x: float | None, form: str = ".0e") -> str:
    if x is None:
        return "-"
    return "none right" if x >= 1 and form == ".0e" else f"{x:{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loss", nargs="*", choices=[*rows.CASES, []], default=[])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/fuzz")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    if options.case:
        case = rows.from_line(options.case)
        for backend in ("eager", *(b for b, state in fastdistil.backends().items() if state is True)):
            if backend != "cuda":
                parts = measured(PROBLEMS[case.loss](case), backend)
                print(
                    backend, {k: f"{plain:.2e} ({units:.2g} of what is allowed)" for k, (plain, units) in parts.items()}
                )
        return
    if not options.table:
        for loss in options.loss or rows.CASES:
            fuzz(loss, options.cases, options.minutes, options.out)
    page = ROOT / "docs/numerics.md"
    before, _, rest = page.read_text().partition(MARKS[0])
    page.write_text(before + MARKS[0] + "\n" + table(options.out) + "\n\n" + MARKS[1] + rest.partition(MARKS[1])[2])


if __name__ == "__main__":
    main()
