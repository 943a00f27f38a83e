"""`fastdistil doctor`: what a bug report needs, every kernel that can run here against its formula in float64, and what
is missing with the way to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastdistil import doctor_checks

PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "accelerate", "safetensors", "datasets", "peft")
NEEDED = ("fastdistil", "torch")

# Environment variables that choose kernels, threads, devices or where files are looked for.
VARIABLES = (
    "TRITON_", "FASTDISTIL_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "ATEN_CPU_CAPABILITY", "DNNL_", "ONEDNN_",
    "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "HSA_", "LD_PRELOAD",
    "LD_LIBRARY_PATH", "MALLOC_", "ACCELERATE_", "HF_HUB_OFFLINE", "HF_HOME", "CXX", "CXXFLAGS", "CMAKE_ARGS",
)  # fmt: skip
INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")

LIMIT = 1e-5  # of a relative error: the promise of docs/numerics.md


class Finding(NamedTuple):
    name: str
    value: str
    good: bool | None = None  # None: nothing that could be broken
    missing: str = ""  # what is not there, what it is for and how to get it, in one sentence


def diagnosis() -> Iterator[Finding]:
    """Line by line. torch is imported on the way: what a broken installation raises is a line, not a traceback."""
    yield from _packages()
    yield Finding(
        "python", f"{platform.python_version()} ({platform.python_implementation()}, {platform.python_compiler()})"
    )
    yield Finding("system", platform.platform())
    yield _processor()
    for name, value in sorted(os.environ.items()):
        if name.startswith(VARIABLES):
            yield Finding("environment", f"{name}={value}")
    try:
        import torch
    except Exception as error:  # whatever a broken torch raises at its import is what the user must see
        yield Finding(
            "import torch", f"failed: {error}", False, "torch cannot be imported: reinstall it (pip install torch)."
        )
        return
    yield Finding(
        "torch", f"built for {_built_for(torch.version.cuda, torch.version.hip)}, {torch.get_num_threads()} threads"
    )
    yield from _gpus()
    yield from _extension()
    yield openmp()
    yield from backend_checks()


def _packages() -> Iterator[Finding]:
    for package in ("fastdistil", *PACKAGES):
        found = next(iter(importlib.metadata.distributions(name=package)), None)
        if found is None:
            yield Finding(package, "not installed", False if package in NEEDED else None, _how_to_install(package))
        elif package == "fastdistil":
            yield Finding(package, f"{found.version}, {_installed_how(found)}")
        else:
            yield Finding(package, found.version)
    if importlib.util.find_spec("matplotlib") is None:
        yield Finding(
            "matplotlib", "not installed", None, "`fastdistil bench` needs matplotlib: pip install 'fastdistil[bench]'."
        )


def _how_to_install(package: str) -> str:
    if package == "fastdistil":
        return (
            "fastdistil is imported from a folder and not installed: pip install . in the checkout builds its kernels"
        )
    if package == "torch":
        return "torch is not installed: pip install torch."
    if package == "triton":
        return "Triton kernels (GPUs) need triton: pip install 'fastdistil[triton]'."
    if package == "peft":
        return ""  # nothing here needs it; a capture may be of its models
    return f"capture, recipes, training and the commands need {package}: pip install 'fastdistil[train]'."


def _installed_how(found: importlib.metadata.Distribution) -> str:
    """From pip's own notes: an editable checkout, a folder, an archive or an index."""
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return f"editable, from a checkout{_commit(Path(__file__).parent)}"
    if "dir_info" in origin:
        return "built from a folder"
    commit = origin.get("vcs_info", {}).get("commit_id")
    if commit:
        return f"built from commit {commit}"
    return "from an archive" if origin else "from a package index"


def _commit(folder: Path) -> str:
    """The checkout's, "" where git cannot tell."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f" at {run.stdout.strip()}" if run.returncode == 0 else ""


def _built_for(cuda: str | None, hip: str | None) -> str:
    return f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPUs"


def _processor() -> Finding:
    """Its name, and those of its instruction sets that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    lines: dict[str, str] = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, flags=re.MULTILINE))
    flags = lines.get("flags", lines.get("Features", "")).split()
    known = " ".join(x for x in INSTRUCTIONS if x in flags) or "instruction sets unknown"
    name = lines.get("model name") or platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Finding("processor", f"{name}, {usable} of {os.cpu_count()} cores, {known}")


def _gpus() -> Iterator[Finding]:
    import torch

    driver = _driver()
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            kind = getattr(p, "gcnArchName", "") if torch.version.hip else f"sm_{p.major}{p.minor}"
            yield Finding("GPU", f"{p.name}, {kind}, {p.total_memory / 2**30:.0f} GiB, driver {driver or 'unknown'}")
        return
    if not driver:
        missing = "GPU kernels need a GPU, and neither torch nor nvidia-smi finds one here."
    elif torch.version.cuda is None and torch.version.hip is None:
        missing = "There is a GPU, and this torch is built for CPUs: install torch's CUDA build (pytorch.org says how)."
    else:
        missing = f"torch cannot use the GPU: compare its CUDA {torch.version.cuda} with the driver {driver}."
    yield Finding("GPU", f"none that torch can use{f', driver {driver}' if driver else ''}", None, missing)


def _driver() -> str:
    """NVIDIA's, "" where there is none to ask."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        run = subprocess.run(
            [command, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.splitlines()[0].strip() if run.returncode == 0 and run.stdout.strip() else ""


def _extension() -> Iterator[Finding]:
    try:
        from fastdistil import _C
    except ImportError as error:
        how = "The C++ extension cannot be imported: reinstall with `pip install .`, which needs a C++ compiler."
        yield Finding("C++ extension", str(error), False, how)
        return
    slow = (
        "this processor has no AVX2: the CPU kernels run code without vector instructions of its own, which is slower"
    )
    yield Finding("CPU kernels", f"use {_C.isa()}, of {', '.join(_C.isas())}", None, "" if len(_C.isas()) > 1 else slow)
    if _C.cuda_arches:
        yield Finding("CUDA kernels", f"built for {_C.cuda_arches}")
    else:
        nvcc = shutil.which("nvcc")
        toolkit = "" if nvcc else "install the CUDA toolkit (nvcc) and "
        how = f"CUDA C++ kernels are not built: {toolkit}reinstall with `pip install .`."
        yield Finding("CUDA kernels", f"not built; nvcc: {nvcc or 'not on PATH'}", None, how)


def openmp() -> Finding:
    """Two OpenMP runtimes in one process have two pools of threads, which fight for the cores."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return Finding("OpenMP runtimes", "unknown (no /proc/self/maps)")
    paths = {line.split(maxsplit=5)[-1] for line in lines if re.search(r"/lib(gomp|iomp5|omp)[-.\w]*\.so", line)}
    found = ", ".join(sorted(paths)) or "none"
    if len(paths) > 1:
        how = "Two OpenMP runtimes are loaded: remove the package that brings the second one, or preload torch's."
        return Finding("OpenMP runtimes", f"{len(paths)}, whose threads will fight for the cores: {found}", False, how)
    return Finding("OpenMP runtime", f"one, shared with torch: {found}" if paths else found)


def backend_checks() -> Iterator[Finding]:
    """Each backend: available or why not; where it is, its worst error against the formulas in float64."""
    try:
        import fastdistil
        from fastdistil.backends import interpreting
    except ImportError as error:
        yield Finding("import fastdistil", str(error), False)
        return
    for name, status in fastdistil.backends().items():
        label = f"backend {name}"
        if status is not True:
            how = "" if name in ("triton", "cuda") else f"Backend {name}: {status}."  # what those need is said above
            yield Finding(label, f"not available: {status}", False if name == "cpu" else None, how)
            continue
        interpreted = name == "triton" and interpreting()
        device = "cpu" if interpreted or name in ("reference", "cpu") else "cuda"
        for isa in _isas() if name == "cpu" else [""]:
            yield _checked(f"{label}, {isa}" if isa else label, name, device, isa, interpreted)


def _isas() -> list[str]:
    from fastdistil import _C

    return _C.isas()


def _checked(label: str, backend: str, device: str, isa: str, interpreted: bool) -> Finding:
    try:
        errors = doctor_checks.errors(backend, device, isa)
    except Exception as error:  # a doctor reports what any other command would die of
        where = " in Triton's interpreter, which is for tests alone" if interpreted else ""
        return Finding(label, f"failed{where}: {type(error).__name__}: {error}", None if interpreted else False)
    wrong = {name: error for name, error in errors.items() if not error <= LIMIT}
    if wrong:
        said = ", ".join(f"{name} is {error:.0e} off" for name, error in wrong.items())
        how = f"The {label} gives wrong numbers here: report it with this output, and use another backend meanwhile."
        return Finding(label, f"{said} ({LIMIT:.0e} allowed)", False, how)
    worst = max(errors, key=lambda name: errors[name])
    value = f"{len(errors)} checks within {errors[worst]:.0e} of float64 ({worst}; {LIMIT:.0e} allowed)"
    return Finding(label, value + (", in Triton's interpreter" if interpreted else ""), True)
