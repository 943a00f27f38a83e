"""Time of the passes, peak extra memory, and what the machine itself can do (the floor)."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fastdistil.benchmarks.cases import Case
from fastdistil.benchmarks.work import MIB, Clock, Implementation

import fastdistil

BUDGET_US, FEWEST = 1e6, 5  # a GPU's time is short: an implementation that needs more than a second has few repetitions


def quantiles(samples: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    if len(samples) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {"p20": fifths[0], "p50": statistics.median(samples), "p80": fifths[3]}


def time_interleaved(
    implementations: list[Implementation], repetitions: int, device: str
) -> dict[str, dict[str, list[float]]]:
    """Name -> pass -> microseconds; each repetition runs every one once. On a GPU a slow one stops early."""
    clock, budget_us = Clock(device), BUDGET_US if device == "cuda" else math.inf
    samples: dict[str, dict[str, list[float]]] = {}
    for implementation in implementations:  # warm-up
        samples[implementation.name] = {what: [] for what in implementation.time_us(clock)}
    for _ in range(repetitions):
        for implementation in implementations:
            own = samples[implementation.name]
            if len(own["both"]) >= FEWEST and sum(own.get("forward", ())) + sum(own["both"]) > budget_us:
                continue
            for what, duration in implementation.time_us(clock).items():
                own[what].append(duration)
    return samples


class OtherLoad:
    """CPU cores that other processes kept busy meanwhile: a timing taken beside another job is no record."""

    def __enter__(self) -> OtherLoad:
        self.start = self._read()
        return self

    def __exit__(self, *unused: object) -> None:
        wall, busy, own = (b - a for a, b in zip(self.start, self._read(), strict=True))
        self.cores = round(max(0.0, (busy - own) / max(wall, 1e-3)), 2)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        own = sum(os.times()[:4])  # user and system, children included
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return time.monotonic(), own, own
        idle = fields[3] + fields[4]
        return time.monotonic(), (sum(fields) - idle) / os.sysconf("SC_CLK_TCK"), own


def _resident_mib(line: str) -> float:
    status = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
    return int(status[line].split()[0]) / 1024


def peak_here_mib(implementation: Implementation, device: str) -> float:
    """Memory at the peak of a run, what it returns included, beyond the inputs; MiB."""
    implementation.before_peak()
    implementation.prepare()
    return (peak_of_cuda_mib if device == "cuda" else peak_of_mib)(implementation.run)


def peak_of_mib(work: Callable[[], object]) -> float:
    """Resident memory at the peak of `work`, beyond what is resident before; MiB, on Linux."""
    gc.collect()
    fastdistil.empty_cache()  # what it keeps counts as its own
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before_mib = _resident_mib("VmRSS")
    kept = work()
    peak = _resident_mib("VmHWM") - before_mib
    del kept
    return peak


def peak_mib(case: Case, name: str, device: str, here: Callable[[], float]) -> float | None:
    """On a GPU by `here`; on a CPU in a child process of its own, None where the system does not tell."""
    if device == "cuda":
        return here()
    if not Path("/proc/self/clear_refs").exists():
        return None
    return float(child("memory", {"case": asdict(case), "implementation": name})["peak_mib"])


def child(task: str, arguments: dict[str, Any], interpret: bool = False) -> dict[str, Any]:
    """Runs fastdistil.benchmarks.child; with `interpret` under Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "fastdistil.benchmarks.child", task]
    with tempfile.TemporaryDirectory() as empty:  # not the checkout, whose folders would hide an installed package
        run = subprocess.run(
            command, input=json.dumps(arguments), capture_output=True, text=True, env=environment, cwd=empty
        )
    if run.returncode != 0:
        raise RuntimeError(f"benchmark child {task!r} failed with exit code {run.returncode}:\n{run.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def peak_of_cuda_mib(work: Callable[[], object]) -> float:
    """torch.cuda.max_memory_allocated during `work`, beyond what is allocated before; MiB."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = work()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / MIB


def machine_rates(device: str) -> dict[str, float]:
    """What the floors are computed from: copy bandwidth (bytes read and written) and matrix rate."""
    # A shared CPU has slow moments of a second and more; a floor is what it can do at its best.
    size, side, seconds = (1 << 28, 8192, 0.0) if device == "cuda" else (1 << 25, 1536, 2.0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    source = torch.randn(size, device=device)  # ones and zeros would be multiplied faster
    target, matrix = torch.empty_like(source), torch.randn(side, side, device=device).to(dtype)
    clock = Clock(device)

    def best_us(work: Callable[[], object]) -> float:
        work()
        times: list[float] = []
        end = time.monotonic() + seconds
        while len(times) < 7 or time.monotonic() < end:
            start = clock.mark()
            work()
            times.append(clock.between_us(start, clock.mark()))
        return min(times)

    copy_us, product_us = best_us(lambda: target.copy_(source)), best_us(lambda: matrix @ matrix)
    return {
        "copy_gb_s": round(2 * size * 4 / copy_us / 1e3, 1),
        "matrix_gflop_s": round(2 * side**3 / product_us / 1e3, 1),
    }
