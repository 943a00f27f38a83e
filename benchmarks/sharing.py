"""Do the CPU kernels share their threads with torch.mm, or do the two pools fight for the cores?"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from fastdistil.benchmarks.measure import OtherLoad, quantiles
from fastdistil.benchmarks.record import Record, environment

import fastdistil

CASE = "mm-and-loss"


def run(tiny: bool, say: Callable[[str], None]) -> Record:
    """The time of torch.mm and logit_loss in turns, over the sum of each alone: 1 where nothing is lost."""
    rows, columns, side, repetitions = (8, 515, 64, 5) if tiny else (64, 32_000, 768, 60)
    student = torch.randn(rows, columns)
    teacher, matrix = torch.randn(rows, columns), torch.randn(side, side)
    say(f"threads: torch.mm {side}x{side} and logit_loss [{rows}, {columns}] alone and in turns")

    def once(*works: Callable[[], object]) -> float:
        start = time.perf_counter()
        for work in works:
            work()
        return (time.perf_counter() - start) * 1e6

    def product() -> object:
        return matrix @ matrix

    def loss() -> object:
        return fastdistil.logit_loss(student, teacher, backend="cpu")

    once(product, loss)
    samples: dict[str, list[float]] = {"mm": [], "loss": [], "turns": []}
    with OtherLoad() as other:
        for _ in range(repetitions):
            samples["mm"].append(once(*[product] * 4) / 4)
            samples["loss"].append(once(*[loss] * 4) / 4)
            samples["turns"].append(once(*[product, loss] * 4) / 4)
    found = {name: quantiles(times) for name, times in samples.items()}
    ratio = found["turns"]["p50"] / (found["mm"]["p50"] + found["loss"]["p50"])
    return {
        "op": "threads", "case": CASE, "shape": {"N": rows, "V": columns, "side": side}, "dtype": "float32",
        "implementation": "fastdistil:cpu", "status": "ok", "time_us": found, "turns_over_sum": ratio, "small": tiny,
        "other_load_cores": other.cores, **environment("threads", "cpu"),
    }  # fmt: skip
