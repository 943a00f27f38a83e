"""kernels/cuda/*.cu without a GPU: compiled by the host's C++ compiler against tests/support/cuda_host/, run on CPU tensors.

The sources are the GPU's own. A few words of CUDA that no macro can stand for are rewritten on the way (`translate`),
and hopper.h, which holds the instructions that C++ has no words for, is replaced by tests/support/cuda_host/hopper.h.
`Emulator` has the functions of fastdistil._C that end in _cuda, so the package's own backend modules can call it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistil.contracts.sparse import DTYPES

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "kernels/cuda"
SHIM = ROOT / "tests/support/cuda_host"
COMPILER = shutil.which("g++") or shutil.which("clang++")
# -O0: compiling takes longer than running.
FLAGS = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-pthread", "-ffp-contract=off"]
FLAGS += ["-w", "-D__CUDACC__", "-D__CUDA_ARCH__=900", "-DFD_EXP2=cuda_host::exp2_approx"]
if os.environ.get("FASTDISTIL_HOST_SANITIZER") == "address":  # tests/sanitize.py
    FLAGS += ["-fsanitize=address", "-g1"]
ORDERS = ("forward", "reversed", "random")


def translate(source: str) -> str:
    """CUDA C++ -> C++: built-in variables, shared memory, and kernel launches."""
    source = re.sub(r"(?<![.>\w])(threadIdx|blockIdx|blockDim|gridDim)\.", r"cuda_host::\1().", source)
    source = re.sub(r"extern __shared__ (?:alignas\(\d+\) )?([\w ]+) (\w+)\[\];", r"auto* \2 = cuda_host::dynamic_shared<\1>();", source)  # fmt: skip
    source = re.sub(r"__shared__ (?:alignas\(\d+\) )?([\w:<>, ]+?) (\w+)((?:\[[^\]]+\])*);", r"auto& \2 = cuda_host::shared<\1\3>([] {});", source)  # fmt: skip
    wrapped = r"cuda_host::Launch{\2}.run([](auto... args) { \1(args...); }, "
    return re.sub(r"(\w+(?:<[\w, ]+>)?)<<<(.+?)>>>\(", wrapped, source)


def launching_less(source: str, types: tuple[str, ...], rule: str) -> str:
    """A file of kernels for rows of logits that has, for each of these element types, the rules alone of which the
    C++ condition holds: compiling the others takes most of the time."""
    for name in types:
        source, count = re.subn(rf"((?:return|done =) launch<Rule, {name}>\(.*?\);)", rf"{{ if constexpr ({rule}) \1 }}", source)  # fmt: skip
        assert count == 1, f"{name} is launched in {count} places, expected one"
    return source


def included(name: str, texts: dict[str, str]) -> dict[str, str]:
    """Those of the texts that one includes, directly or not."""
    found, names = dict[str, str](), [name]
    while names:
        new = set(re.findall(r'#include "([\w.]+)"', texts[names.pop()])) & texts.keys() - found.keys()
        found |= {header: texts[header] for header in new}
        names += new
    return dict(sorted(found.items()))


def build(folder: Path, change: Callable[[str, str], str] = lambda name, source: source) -> Path:
    """The kernels, after `change(file name, source)`, as a library in `folder`. Objects and libraries are kept by a
    hash of all that went into them."""
    texts = {path.name: change(path.name, path.read_text()) for path in sorted(SOURCES.iterdir())}
    texts = {name: (SHIM / name).read_text() if (SHIM / name).exists() else translate(t) for name, t in texts.items()}
    texts["library.cu"] = (SHIM / "library.cpp").read_text()
    around = [path.read_text() for path in sorted([*SHIM.iterdir(), *(ROOT / "csrc/rules").iterdir()])]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        tree = Path(scratch) / "kernels/cuda"  # ../../csrc is where the sources expect it
        tree.mkdir(parents=True)
        (Path(scratch) / "csrc").symlink_to(ROOT / "csrc")
        objects, running = list[Path](), list[tuple[subprocess.Popen[str], Path, Path]]()
        for name, text in texts.items():
            source = tree / name.replace(".cu", ".cpp")
            source.write_text(text)
            if not name.endswith(".cu"):
                continue
            key = hashlib.sha256(repr((FLAGS, COMPILER, text, included(name, texts), around)).encode()).hexdigest()[:16]
            objects.append(folder / f"{source.stem}-{key}.o")
            if not objects[-1].exists():
                made = source.with_suffix(".o")
                command = [COMPILER, *FLAGS, f"-I{SHIM}", "-c", source, "-o", made]
                running.append((subprocess.Popen(command, stderr=subprocess.PIPE, text=True), made, objects[-1]))
        for process, made, kept in running:
            message = process.communicate()[1]
            assert process.returncode == 0, message[-4000:]
            made.replace(kept)
        library = folder / f"cuda_host-{hashlib.sha256(repr(objects).encode()).hexdigest()[:16]}.so"
        if not library.exists():
            subprocess.run([COMPILER, *FLAGS, "-shared", *objects, "-o", tree / "library.so"], check=True)
            (tree / "library.so").replace(library)
    return library


class _LogitArgs(ctypes.Structure):
    """LogitArgs of csrc/rules/logit_args.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("student", "teacher", "row_scale", "dloss")),
        ("keep_unit", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("loss", "stats", "gradient")),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "columns", "student_stride", "teacher_stride", "gradient_stride")
        ),
        ("dtype", ctypes.c_int),
        ("difference", ctypes.c_bool),
        *((name, ctypes.c_int) for name in ("phase", "divergence")),
        *((name, ctypes.c_double) for name in ("beta", "student_temperature", "teacher_temperature", "value_factor")),
    )


class _Work(ctypes.Structure):
    _fields_ = (("table", ctypes.c_void_p), ("chunks", ctypes.c_void_p), ("count", ctypes.c_int64))


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Emulator:
    """What fastdistil._C offers to the cuda backend, on CPU tensors."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        for name in ("logit", "sparse_histogram", "sparse_count", "sparse_write", "sparse_update"):
            getattr(self.library, name).restype = ctypes.c_char_p
        self.library.use_cluster.argtypes = (ctypes.c_int,)
        for name in ("clusters_seen", "select_chunk", "update_chunk"):
            getattr(self.library, name).restype = ctypes.c_int64
        self.library.from_f16.restype = ctypes.c_float
        for name in ("to_bf16", "to_f16"):
            getattr(self.library, name).restype = ctypes.c_uint16
            getattr(self.library, name).argtypes = (ctypes.c_float,)
        self.sparse_select_chunk, self.sparse_update_chunk = self.library.select_chunk(), self.library.update_chunk()

    def settings(
        self, order: str = "forward", seed: int = 0, capability: int = 9, active_clusters: int = 3, cluster: int = -1
    ) -> None:
        """In which order threads run, the GPU that is played, and the blocks of a row's cluster (-1: its choice)."""
        self.library.settings(ORDERS.index(order), seed, capability, active_clusters)
        self.library.use_cluster(cluster)

    def _call(self, name: str, *arguments: Any) -> None:
        error = getattr(self.library, name)(*arguments)
        if error is not None:
            raise RuntimeError(error.decode())

    def _logit(
        self, student: Tensor, teacher: Tensor, gradient: Tensor | None, rest: dict[str, Any], **more: Any
    ) -> None:
        rule = {k: v for k, v in rest.items() if k != "stream"}
        args = _LogitArgs(
            student=_address(student), teacher=_address(teacher), gradient=_address(gradient), rows=student.shape[0],
            columns=student.shape[1], student_stride=student.stride(0), teacher_stride=teacher.stride(0),
            gradient_stride=0 if gradient is None else gradient.stride(0), dtype=DTYPES[student.dtype], **more, **rule,
        )  # fmt: skip
        self._call("logit", ctypes.byref(args))

    def logit_fwd_cuda(
        self, student: Tensor, teacher: Tensor, row_scale: Tensor, loss: Tensor, stats: Tensor,
        gradient: Tensor | None, phase: int, **rest: Any,
    ) -> None:  # fmt: skip
        places = {"row_scale": _address(row_scale), "loss": _address(loss), "stats": _address(stats)}
        self._logit(student, teacher, gradient, rest, phase=phase, **places)

    def logit_bwd_cuda(
        self, student: Tensor, teacher: Tensor, row_scale: Tensor, stats: Tensor, gradient: Tensor, dloss: Tensor,
        keep_unit: bool, **rest: Any,
    ) -> None:  # fmt: skip
        places = {"row_scale": _address(row_scale), "stats": _address(stats), "dloss": _address(dloss)}
        self._logit(student, teacher, gradient, rest, keep_unit=keep_unit, **places)

    @staticmethod
    def _work(table: Tensor, chunks: Tensor) -> Any:
        return ctypes.byref(_Work(table.data_ptr(), chunks.data_ptr(), len(chunks)))

    def sparse_histogram_cuda(self, table: Tensor, chunks: Tensor, counts: Tensor, nan: Tensor, bucket: int, _: int) -> None:  # fmt: skip
        self._call("sparse_histogram", self._work(table, chunks), _pointer(counts), _pointer(nan), ctypes.c_int64(bucket))  # fmt: skip

    def sparse_count_cuda(self, table: Tensor, chunks: Tensor, counts: Tensor, threshold: int, _: int) -> None:
        self._call("sparse_count", self._work(table, chunks), _pointer(counts), ctypes.c_uint32(threshold))

    def sparse_write_cuda(
        self, table: Tensor, chunks: Tensor, offsets: Tensor, keep: Tensor, out: Tensor, threshold: int, _: int
    ) -> None:
        places = (_pointer(offsets), _pointer(keep), _pointer(out), ctypes.c_bool(out.dtype == torch.int64))
        self._call("sparse_write", self._work(table, chunks), *places, ctypes.c_uint32(threshold))

    def sparse_update_cuda(self, table: Tensor, constants: Tensor, chunks: Tensor, _: int) -> None:
        self._call("sparse_update", self._work(table, chunks), _pointer(constants))
