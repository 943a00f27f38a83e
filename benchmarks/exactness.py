"""Relative error of value and gradient against float64 as the student becomes the teacher."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from fastdistil.benchmarks.cases import Case
from fastdistil.benchmarks.losses import build
from fastdistil.benchmarks.measure import child
from fastdistil.benchmarks.problems import make, truth
from fastdistil.benchmarks.record import Record, environment, source_root
from fastdistil.benchmarks.work import Unavailable, errors

from fastdistil.backends import interpreting

NOISES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # student = teacher + noise, logits of std 4
DTYPES = ("float32", "bfloat16")
NATIVE = (
    "eager",
    "eager_common",
    "eager_upcast",
    "fastdistil:reference",
    "fastdistil:cpu",
    "fastdistil:triton",
    "fastdistil:cuda",
)
TRITON = ("fastdistil:triton", "liger_kl", "liger_jsd")
SHAPE = {"N": 4, "V": 119_547}  # mBERT's vocabulary


def measure(names: tuple[str, ...], dtypes: tuple[str, ...], shape: dict[str, int], device: str) -> list[Record]:
    """One record per implementation, dtype and noise; those that cannot run here are left out."""
    found = []
    for dtype in dtypes:
        case = Case("logits", "exactness", shape, names, dtype, {"divergence": "forward_kl", "temperature": 1.0})
        for noise in NOISES:
            problem = make(case, device, noise)
            true = truth(case, problem)
            for name in names:
                if name == "eager_upcast" and dtype == "float32":
                    continue
                try:
                    outcome = build(name, case, problem).outcome()
                except Unavailable:
                    continue
                found.append({
                    "op": "exactness", "case": "mbert-kl", "shape": shape, "dtype": dtype, "implementation": name,
                    "noise": noise, "kl": true.value, "interpreted": interpreting(), **errors(outcome, true),
                })  # fmt: skip
            gc.collect()
    return found


def from_child(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those that run on a CPU in Triton's interpreter only, whose 16-bit arithmetic is wrong: float32 alone.

    fastdistil's kernels need the tests' repair of the interpreter; where there is no checkout they are left out.
    """
    root = source_root()
    names = TRITON if root is not None else TRITON[1:]
    if root is not None:
        sys.path.insert(0, str(root / "tests/support"))
        importlib.import_module("triton_interpreter_fix")
    return {"records": measure(names, ("float32",), arguments["shape"], "cpu")}


def run(device: str, tiny: bool, say: Callable[[str], None]) -> list[Record]:
    shape = {"N": 2, "V": 515} if tiny else SHAPE
    names = NATIVE if device == "cpu" else (*NATIVE, "liger_kl", "liger_jsd")
    say(f"exactness: {shape['N']} rows of {shape['V']:,}, noise {NOISES[0]:g} to {NOISES[-1]:g}")
    records = measure(names, DTYPES, shape, device)
    if importlib.util.find_spec("triton") is None:
        say("exactness: triton is not installed, its kernels are left out (pip install 'fastdistil[triton]')")
    elif device == "cpu" and not interpreting():
        say("exactness: Triton's kernels and Liger-Kernel in the interpreter, in float32")
        records += child("exactness", {"shape": shape}, interpret=True)["records"]
    shared = environment("exactness", device)
    small = {"small": tiny}
    return [{**record, **small, **shared} for record in records]
