"""What the runner asks of a case: its implementations, one run of each, and how far that run is from the truth."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdistil.backends import choose

MIB = 1 << 20
FLUSHED_BYTES = 256 * MIB  # several times the cache of any GPU

Tensors = dict[str, Tensor]
Errors = dict[str, float]


class Unavailable(Exception):
    """Why an implementation cannot run here."""


class Clock:
    """Marks in time: CUDA events on a GPU, the wall clock on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.scratch = torch.empty(FLUSHED_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def flush(self) -> None:
        """Inputs that fit in a GPU's cache are read from memory in every run, as in training."""
        self.scratch.zero_()

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_us(self, start: Any, end: Any) -> float:
        if not self.cuda:
            return float((end - start) * 1e6)
        end.synchronize()
        return float(start.elapsed_time(end) * 1e3)


@dataclass
class Outcome:
    """What one run computed; gradients by name, none where the work has none."""

    value: float | Tensor
    gradients: Tensors = field(default_factory=dict)


def error(found: Tensor | float, true: Tensor | float) -> float:
    """Relative, in the Euclidean norm; NaN counts as infinite."""
    f, t = (torch.as_tensor(x, dtype=torch.float64) for x in (found, true))
    distance = (f - t).norm().item() / max(t.norm().item(), 1e-300)
    return distance if math.isfinite(distance) else math.inf


def errors(found: Outcome, true: Outcome) -> Errors:
    """Relative error of the value, and the largest of the gradients'."""
    result = {"value_error": error(found.value, true.value)}
    if true.gradients:
        result["gradient_error"] = max(error(found.gradients[n], true.gradients[n]) for n in true.gradients)
    return result


class Implementation(ABC):
    """One way to do a case's work: fastdistil's, or a baseline."""

    name: str
    scale = 1.0  # multiplies its times: above 1 where it works on a part of the inputs

    def prepare(self) -> None:  # noqa: B027
        """Fresh inputs for one run, where the last run used them up; never timed."""

    @abstractmethod
    def run(self) -> object:
        """The whole work once; what it returns is freed after the clock has stopped."""

    @abstractmethod
    def outcome(self) -> Outcome:
        """What a run computes, from the same inputs every time."""

    def time_us(self, clock: Clock) -> dict[str, float]:
        """Microseconds of each pass of one run; "both" is the whole work."""
        self.prepare()
        clock.flush()
        start = clock.mark()
        result = self.run()
        taken = clock.between_us(start, clock.mark()) * self.scale
        del result
        return {"both": taken}

    def before_peak(self) -> None:
        """Brings about what does not count as extra memory: whatever is compiled or cached."""
        self.prepare()
        self.run()

    def fields(self) -> dict[str, float]:
        """What its record says besides."""
        return {}


class Work(ABC):
    """A case on a device."""

    slack: Errors  # by error: how much more than twice the baseline's is allowed

    @abstractmethod
    def build(self, name: str) -> Implementation:
        """Raises Unavailable where `name` cannot run here, ValueError where nothing has this name."""

    @abstractmethod
    def truth(self) -> Outcome: ...

    def checker(self) -> Callable[[Implementation], Errors]:
        """The errors of an implementation; the truth lives as long as the function that is returned."""
        true = self.truth()
        return lambda implementation: errors(implementation.outcome(), true)


def backend_of(name: str, device: str) -> str:
    """Of fastdistil:<backend>[:option ...]. Raises Unavailable where it cannot run, ValueError for another name."""
    ours, _, backend = name.partition(":")
    if ours != "fastdistil":
        raise ValueError(f"implementation is {name!r}, expected fastdistil:<backend> or a baseline of this op")
    backend = backend.split(":")[0]
    try:
        choose(backend, torch.device(device))
    except ValueError as reason:
        raise Unavailable(str(reason)) from reason
    return backend
