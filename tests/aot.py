"""Ahead-of-time compilation of every Triton kernel, for GPUs that are not there: what `python tests/aot.py` prints.

One JSON line a kernel, configuration and target: registers, spilled bytes, shared memory, assembler warnings, loads of
16 bytes. It runs in a process of its own, because a kernel decorated under TRITON_INTERPRET cannot be compiled.
Targets are its arguments, all that the compiler knows by default; --few leaves out what `make test` does.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import fastdistil.kernels.triton as kernels
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

# Target and the shared memory that one block may use, in bytes (the vendors' documentation; triton does not check it).
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_89": (GPUTarget("cuda", 89, 32), 101_376),
    "sm_90a": (GPUTarget("cuda", 90, 32), 232_448),
    "sm_100a": (GPUTarget("cuda", 100, 32), 232_448),
    "sm_120a": (GPUTarget("cuda", 120, 32), 101_376),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65_536),
    "gfx950": (GPUTarget("hip", "gfx950", 64), 163_840),
}
# In PTX, which the assembler takes over one to one, and on AMD.
WIDE = re.compile(r"ld\.global\S*\.(?:v4\.[bfu]32|v2\.[bfu]64|v8\.[bfu]32)|(?:global|buffer)_load_dwordx4")


# Newer versions ask for it (3.9 does, 3.6 does not), and without it some kernels take other registers and spill.
ALLOCATION = [flag for flag in ["--regAllocOptLevel=2"] if flag in inspect.getsource(nvidia)]


def assembler(arch: int) -> str:
    """The one that Triton itself takes: a wheel may hold two, and the older one does not read the newer one's PTX."""
    return str(nvidia.get_ptxas(arch).path)


def cases(targets: Sequence[str], few: bool = False) -> list[tuple[str, int, str]]:
    """Module, index and target of each case that a kernel file declares in `aot_cases()` (all targets by default). Those
    that a case names stand for their vendor's others too. few: `enough` of them."""
    found = []
    for module in pkgutil.iter_modules(kernels.__path__):
        name = f"fastdistil.kernels.triton.{module.name}"
        declared = getattr(importlib.import_module(name), "aot_cases", list)()
        for arch in targets:
            here = [i for i, case in enumerate(declared) if arch[:2] in {x[:2] for x in case.get("targets", TARGETS)}]
            found += [(name, i, arch) for i in (enough(declared, here) if few else here)]
    return found


def enough(declared: list[dict[str, Any]], indices: list[int]) -> list[int]:
    """Cases, the last ones first (the widest), that meet every value of a kernel's every constant and every type of its
    arguments, but for sizes, and float16 where there is bfloat16: the same instructions but for the conversion."""
    low = {declared[i]["kernel"].__name__ for i in indices if "bf16" in declared[i]["name"].split("-")}
    met, found = dict[str, set[tuple[str, str]]](), list[int]()
    for i in reversed(indices):
        case, kernel = declared[i], declared[i]["kernel"].__name__
        if "fp16" in case["name"].split("-") and kernel in low:
            continue
        constants = [(k, str(v)) for k, v in case["constants"].items() if not k.startswith(("BLOCK", "SIZE", "PAD"))]
        values = {*constants, *case["signature"].items()}
        if not values <= met.setdefault(kernel, set()):
            met[kernel] |= values
            found.append(i)
    return found[::-1]


def compile_case(case: dict[str, Any], target: GPUTarget) -> tuple[Any, str]:
    """The kernel, and what the assembler said of it: nothing where Triton's cache had it already."""
    kernel = case["kernel"]
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: case["signature"].get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case["constants"].items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case["divisible"]},
    )
    options = dict(case.get("options", {}))
    with contextlib.redirect_stdout(io.StringIO()) as log:
        compiled = triton.compile(source, target=target, options=options)
    return compiled, log.getvalue()


def resources(compiled: Any, log: str, arch: str) -> dict[str, Any]:
    if "amdgcn" in compiled.asm:
        return _amd_resources(compiled)
    if "registers" not in log:
        log = assemble(compiled.asm["ptx"], arch)
    return {
        "shared_bytes": compiled.metadata.shared,
        "registers": max(map(int, re.findall(r"Used (\d+) registers", log))),
        "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
        "warnings": re.findall(r"\((C\d+)\)", log),
        "loads_of_16_bytes": len(WIDE.findall(compiled.asm["ptx"])),
    }


def assemble(text: str, arch: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "k.ptx")
        ptx.write_text(text)
        command = [
            assembler(TARGETS[arch][0].arch),
            "-v",
            *ALLOCATION,
            f"--gpu-name={arch}",
            ptx,
            "-o",
            Path(folder, "o"),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _amd_resources(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def first(key: str) -> int:
        return int((re.findall(rf"\.{key}:\s+(\d+)", text) or ["0"])[0])

    return {
        "shared_bytes": compiled.metadata.shared,
        "registers": first("vgpr_count"),
        # Scratch memory. Scalar registers that overflow go to lanes of vector registers, not to memory.
        "spill_bytes": max(4 * first("vgpr_spill_count"), first("private_segment_fixed_size")),
        "warnings": [],
        "loads_of_16_bytes": len(WIDE.findall(text)),
    }


def run(job: tuple[str, int, str]) -> dict[str, Any]:
    module, index, arch = job
    case = importlib.import_module(module).aot_cases()[index]
    target, limit = TARGETS[arch]
    record = {"case": f"{module.rsplit('.', 1)[1]}:{case['name']}", "target": arch, "shared_limit": limit}
    record |= {"wide_loads": case.get("wide_loads", False), "fusion": case.get("options", {}).get("enable_fp_fusion")}
    return record | resources(*compile_case(case, target), arch)


def main() -> None:
    triton.knobs.nvidia.dump_ptxas_log = True
    named = [name for name in sys.argv[1:] if name != "--few"]
    jobs = cases(named or [*TARGETS], few="--few" in sys.argv)
    with ProcessPoolExecutor(2) as pool:
        for record in pool.map(run, jobs, chunksize=4):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    sys.exit(main())
