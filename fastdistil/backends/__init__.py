"""Which kernels can run here, and which one a call gets.

A backend of an op is a module with functions of the op's names (``logit_fwd``, ``logit_bwd``); all backends of one op
share their signatures, so that choosing one is a table look-up. ``backend="auto"`` chooses by device:
the C++ kernels for CPU tensors, Triton for GPU tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # imported by those that ask for it: naming what is in fastdistil takes none

NAMES = ("reference", "cpu", "triton", "cuda")

_MODULES = {
    "reference": "fastdistil.reference.{stem}",
    "cpu": "fastdistil.backends.cpu.{stem}",
    "triton": "fastdistil.kernels.triton.{stem}",
    "cuda": "fastdistil.backends.cuda.{stem}",
}


@cache
def backends() -> dict[str, bool | str]:
    """Which backends can run on this machine.

    Returns:
        The backends by name, "reference", "cpu", "triton" and "cuda": True, or a sentence that says why not.

    Example:
        >>> import fastdistil
        >>> found = fastdistil.backends()
        >>> list(found), found["reference"]
        (['reference', 'cpu', 'triton', 'cuda'], True)
    """
    return {"reference": True, "cpu": _cpu(), "triton": _triton(), "cuda": _cuda()}


def _cpu() -> bool | str:
    import torch  # noqa: F401 - before the extension, which then takes torch's libgomp: a system may have none, or another

    try:
        importlib.import_module("fastdistil._C")
    except ImportError as error:
        return f"the C++ extension fastdistil._C cannot be imported ({error}); install with `pip install .`"
    return True


def interpreting() -> bool:
    """True where Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1 before the first import)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _triton() -> bool | str:
    import torch

    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fastdistil[triton]')"
    if interpreting() or torch.cuda.is_available():
        return True
    return "there is no GPU that torch can use, and TRITON_INTERPRET=1 is not set"


def _cuda() -> bool | str:
    import torch

    if _cpu() is not True:
        return "the C++ extension fastdistil._C cannot be imported"
    if not importlib.import_module("fastdistil._C").cuda_arches:
        return "fastdistil was built without nvcc"
    if not torch.cuda.is_available():
        return "there is no NVIDIA GPU that torch can use"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return True


def choose(backend: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The backend's name for tensors on `device`; raises where the one that was asked for cannot run.

    dtype: what its kernels would compute in. Triton's have no float64: the reference serves it on a GPU, unless Triton
    was asked for by name."""
    wide = dtype is not None and dtype.itemsize > 4
    if backend == "auto":
        return "cpu" if device.type == "cpu" else "reference" if wide else "triton"
    if backend not in NAMES:
        raise ValueError(f"backend is {backend!r}, expected 'auto' or one of {', '.join(map(repr, NAMES))}")
    status = backends()[backend]
    if status is not True:
        raise ValueError(f"backend {backend!r} is not available: {status}")
    on_cpu = device.type == "cpu"
    if (backend == "cpu" and not on_cpu) or (backend == "cuda" and device.type != "cuda"):
        raise ValueError(f"backend {backend!r} cannot read tensors on {device}")
    if backend == "triton" and on_cpu != interpreting():
        raise ValueError(f"backend 'triton' cannot read tensors on {device}: the interpreter is for the CPU alone")
    if backend == "triton" and wide:
        raise ValueError("backend is 'triton', which has no float64 kernel, expected 'auto' or 'reference'")
    return backend


@cache
def _load(stem: str, backend: str) -> ModuleType:
    try:
        return importlib.import_module(_MODULES[backend].format(stem=stem))
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("fastdistil."):
            raise ValueError(f"backend {backend!r} has no {stem} kernels") from error
        raise


def module(stem: str, backend: str) -> ModuleType:
    """The module that holds `stem`'s functions, of the backend that `choose` has named."""
    return _load(stem, backend)


def get(stem: str, backend: str, device: torch.device, dtype: torch.dtype | None = None) -> ModuleType:
    """The module that holds `stem`'s functions for tensors on `device`; the arguments are those of `choose`."""
    return module(stem, choose(backend, device, dtype))
