"""Measured facts of a report: parameters, bytes on disk, latency, and the versions that a run was made with.

All times are medians of models interleaved in one process, so that a busy machine slows all alike.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LATENCY_ROUNDS = {1: 20, 32: 5}  # by batch size; a teacher's batch of 32 takes a good part of a second
WARM_UP = 3  # rounds that are run and not counted
PACKAGES = ("fastdistil", "torch", "triton", "transformers", "tokenizers", "accelerate", "datasets", "seqeval")


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of each run in milliseconds; in every round each runs once, in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(WARM_UP + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if index >= WARM_UP:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def sizes(model: nn.Module, folder: Path | None = None) -> dict[str, float]:
    """Parameters, and MiB on disk: of the folder where there is one, else of the weights as they are in memory."""
    unique = {id(p): p for p in model.parameters()}.values()
    if folder is None or not folder.is_dir():
        count = sum(p.numel() * p.element_size() for p in unique)
    else:
        count = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"parameters": sum(p.numel() for p in unique), "disk_mib": count / 2**20}


@torch.inference_mode()
def latency(
    models: Mapping[str, tuple[nn.Module, Mapping[int, Mapping[str, Tensor]]]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Forward time in milliseconds by device ("cpu", and "cuda" where there is a GPU), batch size and model.

    `models` has for each name the model and its batches by batch size; sizes without a batch are left out.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    states = {name: (model.training, next(model.parameters()).device) for name, (model, _) in models.items()}
    try:
        for device in devices:
            for model, _ in models.values():
                model.eval().to(device)
            for count, rounds in LATENCY_ROUNDS.items():
                if all(count in batches for _, batches in models.values()):
                    runs = {name: partial(_forward, m, b[count], device) for name, (m, b) in models.items()}
                    found.setdefault(device, {})[str(count)] = interleaved(runs, rounds)
    finally:
        for name, (model, _) in models.items():
            training, before = states[name]
            model.train(training).to(before)
    return found


def _forward(model: nn.Module, batch: Mapping[str, Tensor], device: str) -> None:
    model(**{name: x.to(device) for name, x in batch.items()})
    if device == "cuda":
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """Platform, processor, threads and versions."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
