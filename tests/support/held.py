"""Bytes of every tensor that is allocated, counted by torch's profiler."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


def held_mib(work: Callable[[], object], path: Path) -> float:
    """At the peak of `work`, beyond what was there before. The losses' pool, which the profiler does not see, is out of
    use in tests (torch.are_deterministic_algorithms_enabled)."""
    assert torch.are_deterministic_algorithms_enabled()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    seen.export_chrome_trace(str(path))
    events = [x for x in json.loads(path.read_text())["traceEvents"] if x.get("name") == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda x: float(x["ts"])):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak / MIB
