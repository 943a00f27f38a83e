"""Records: where and from what a number comes, JSON lines written whole or not at all, and when one is stale."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

STEMS = {  # parts of the names of an op's own files
    "logits": ("logit",), "linear": ("logit", "linear", "products"), "hidden": ("hidden",), "attention": ("attention",),
    "topk": ("logit", "topk"), "exactness": ("logit",), "threads": ("logit",), "sparse": ("sparse",),
    "steps": ("attention", "hidden"),
    "terms": ("cross_entropy", "row_moments", "row_statistics", "vocab_parallel"),  # of no case yet
}  # fmt: skip
FORWARDING = ("csrc/bindings/", "csrc/cpu/dispatch", "csrc/cpu/sparse_dispatch")  # files that only hand calls on
SOURCE_FOLDERS = ("csrc", "kernels", *(f"fastdistil/{x}" for x in ("contracts", "backends", "ops", "sparse")))
SOURCE_SUFFIXES = {".cpp", ".h", ".cu", ".cuh", ".py"}
PACKAGES = (
    "fastdistil", "torch", "triton", "numpy", "transformers", "liger-kernel", "orda-kernel", "flash-linear-attention",
)  # fmt: skip

Record = dict[str, Any]


def source_root() -> Path | None:
    """The checkout that this code runs from, or the working directory where that is one."""
    for folder in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (folder / "csrc").is_dir() and (folder / "kernels").is_dir():
            return folder
    return None


def kernel_sources(op: str, root: Path) -> list[Path]:
    """The files whose change makes a record of `op` stale: its own stem's and those that all ops share."""
    others = {stem for stems in STEMS.values() for stem in stems} - set(STEMS[op])
    return sorted(
        path
        for folder in SOURCE_FOLDERS
        for path in (root / folder).rglob("*")
        if path.suffix in SOURCE_SUFFIXES
        and not path.relative_to(root).as_posix().startswith(FORWARDING)
        and not any(stem in path.relative_to(root).as_posix() for stem in others)
    )


def kernel_hash(op: str, root: Path | None = None) -> str:
    """Of the kernel sources' contents, which a file keeps when it is moved; "unknown" outside of a checkout."""
    root = source_root() if root is None else root
    if root is None:
        return "unknown"
    each = sorted(hashlib.sha256(path.read_bytes()).digest() for path in kernel_sources(op, root))
    return hashlib.sha256(b"".join(each)).hexdigest()[:16]


def is_stale(record: Record, root: Path | None = None) -> bool:
    """The kernels have changed since; outside of a checkout nobody can tell."""
    now = kernel_hash(record["op"], root)
    return now != "unknown" and record["kernel_hash"] != now


def _output(*command: str, cwd: Path | None = None) -> str:
    if shutil.which(command[0]) is None:
        return "unknown"
    run = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    return run.stdout.strip() if run.returncode == 0 and run.stdout.strip() else "unknown"


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_model()


def device_folder(device: str) -> str:
    """benchmarks/results/<this>: cpu, or the GPU's name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") if device == "cuda" else "cpu"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        distribution = next(iter(importlib.metadata.distributions(name=name)), None)
        found[name] = "not installed" if distribution is None else distribution.version
    return found


def _nvidia_smi(query: str) -> str:
    return _output("nvidia-smi", "--format=csv,noheader", "--id=0", f"--query-gpu={query}")


@cache
def driver(device: str) -> str:
    return _nvidia_smi("driver_version") if device == "cuda" else ""


def clock_mhz(device: str) -> str:
    """Of the multiprocessors and of the memory, at this moment."""
    return _nvidia_smi("clocks.sm,clocks.mem") if device == "cuda" else ""


@cache
def commit() -> str:
    """Of the checkout; where git does not know it, what FASTDISTIL_COMMIT says (a copy without .git)."""
    root = source_root()
    found = _output("git", "rev-parse", "--short=12", "HEAD", cwd=root) if root else "unknown"
    return os.environ.get("FASTDISTIL_COMMIT", found) if found == "unknown" else found


def environment(op: str, device: str) -> Record:
    """The fields that every record of a run shares."""
    from fastdistil import _C

    return {
        "device": device,
        "device_name": device_name(device),
        "cpu_model": cpu_model(),
        "cpu_isa": _C.isa(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "driver": driver(device),
        "clock_mhz": clock_mhz(device),
        "versions": versions(),
        "commit": commit(),
        "kernel_hash": kernel_hash(op),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
    }


def write_records(path: Path, records: Iterable[Record]) -> None:
    """To a temporary name, then renamed: a run that is cut off leaves what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(temporary, path)


def read_records(folder: Path, pattern: str = "*.jsonl") -> list[Record]:
    """Every record of a folder's files."""
    lines = [(p, i, x) for p in sorted(folder.glob(pattern)) for i, x in enumerate(p.read_text().splitlines(), 1)]
    return [_parse(*line) for line in lines]


def _parse(path: Path, number: int, line: str) -> Record:
    try:
        found: Record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}:{number}: is not a record, expected one JSON object a line") from error
    return found
