"""The README's two matrices, loss × backend × dtype and loss × option, as the code has them.

    python tests/matrices.py     writes them between the README's markers

A cell of the first is a call: the public function on tensors of a few rows, forward and backward, with that backend and
dtype. Triton runs in its interpreter where there is no GPU. For CUDA it is the modules of fastdistil/backends/cuda and the
dtypes of their kernels' sources. The second reads the functions' signatures.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent / "support"))

from torch import Tensor

import fastdistil as fd
from fastdistil.backends import interpreting

if interpreting():
    import triton_interpreter_fast  # noqa: F401

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
START, END = "<!-- matrices: python tests/matrices.py -->", "<!-- end of matrices -->"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
ON_CPU = ("reference", "cpu")


def _draw(*shape: int, dtype: torch.dtype, device: str, grad: bool = False) -> Tensor:
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype).requires_grad_(grad)
    )


def _logit(dtype: torch.dtype, device: str, backend: str) -> tuple[Tensor, Tensor]:
    student = _draw(2, 9, dtype=dtype, device=device, grad=True)
    return fd.logit_loss(student, _draw(2, 9, dtype=dtype, device=device), backend=backend), student


def _linear_logit(dtype: torch.dtype, device: str, backend: str) -> tuple[Tensor, Tensor]:
    student = _draw(2, 4, dtype=dtype, device=device, grad=True)
    rest = (_draw(*shape, dtype=dtype, device=device) for shape in ((9, 4), (2, 6), (9, 6)))
    return fd.linear_logit_loss(student, *rest, backend=backend), student


def _top(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    found = _draw(2, 9, dtype=torch.float32, device=device).log_softmax(-1).topk(3)
    return found.values.to(dtype), found.indices


def _topk(dtype: torch.dtype, device: str, backend: str) -> tuple[Tensor, Tensor]:
    student = _draw(2, 9, dtype=dtype, device=device, grad=True)
    return fd.topk_logit_loss(student, *_top(dtype, device), backend=backend), student


def _linear_topk(dtype: torch.dtype, device: str, backend: str) -> tuple[Tensor, Tensor]:
    student = _draw(2, 4, dtype=dtype, device=device, grad=True)
    head = _draw(9, 4, dtype=dtype, device=device)
    return fd.linear_topk_logit_loss(student, head, *_top(dtype, device), backend=backend), student


def _student_topk(dtype: torch.dtype, device: str, backend: str) -> tuple[Tensor, Tensor]:
    student = _draw(2, 9, dtype=dtype, device=device, grad=True)
    return fd.student_topk_logit_loss(student, _draw(2, 9, dtype=dtype, device=device), k=3, backend=backend), student


def _heads(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of 9 and 11 columns."""
    student = _draw(2, 4, dtype=dtype, device=device, grad=True)
    rest = [_draw(*shape, dtype=dtype, device=device) for shape in ((9, 4), (2, 6), (11, 6))]
    return student, rest[0], rest[1], rest[2]


def _projection(device: str) -> fd.VocabProjection:
    return fd.VocabProjection.of(torch.eye(9, 11).to_sparse()).to(device)


def _projected(dtype: torch.dtype, device: str, backend: str) -> tuple[Tensor, Tensor]:
    student, teacher = _draw(2, 9, dtype=dtype, device=device, grad=True), _draw(2, 11, dtype=dtype, device=device)
    return fd.projected_logit_loss(student, teacher, _projection(device), backend=backend), student


def _linear_projected(dtype: torch.dtype, device: str, backend: str) -> tuple[Tensor, Tensor]:
    heads = _heads(dtype, device)
    return fd.linear_projected_logit_loss(*heads, _projection(device), backend=backend), heads[0]


def _uld(dtype: torch.dtype, device: str, backend: str) -> tuple[Tensor, Tensor]:
    student = _draw(2, 9, dtype=dtype, device=device, grad=True)
    return fd.uld_loss(student, _draw(2, 11, dtype=dtype, device=device), backend=backend), student


def _linear_uld(dtype: torch.dtype, device: str, backend: str) -> tuple[Tensor, Tensor]:
    heads = _heads(dtype, device)
    return fd.linear_uld_loss(*heads, backend=backend), heads[0]


def _hidden(dtype: torch.dtype, device: str, backend: str) -> tuple[Tensor, Tensor]:
    student = _draw(2, 4, dtype=dtype, device=device, grad=True)
    return fd.hidden_loss(student, _draw(2, 4, dtype=dtype, device=device), backend=backend), student


def _attention(dtype: torch.dtype, device: str, backend: str) -> tuple[Tensor, Tensor]:
    student = _draw(1, 1, 3, 4, dtype=dtype, device=device, grad=True)
    rest = (_draw(1, 1, 3, 4, dtype=dtype, device=device) for _ in range(3))
    return fd.attention_loss(student, *rest, backend=backend), student


def _relation(dtype: torch.dtype, device: str, backend: str) -> tuple[Tensor, Tensor]:
    student = _draw(1, 3, 4, dtype=dtype, device=device, grad=True)
    teacher = _draw(1, 3, 4, dtype=dtype, device=device)
    return fd.relation_loss(student, teacher, relation_heads=1, backend=backend), student


LOSSES: dict[str, Callable[[torch.dtype, str, str], tuple[Tensor, Tensor]]] = {
    "logit_loss": _logit,
    "linear_logit_loss": _linear_logit,
    "topk_logit_loss": _topk,
    "linear_topk_logit_loss": _linear_topk,
    "student_topk_logit_loss": _student_topk,
    "projected_logit_loss": _projected,
    "linear_projected_logit_loss": _linear_projected,
    "uld_loss": _uld,
    "linear_uld_loss": _linear_uld,
    "hidden_loss": _hidden,
    "attention_loss": _attention,
    "relation_loss": _relation,
}


def works(loss: str, backend: str, dtype: torch.dtype) -> bool:
    """Whether the call returns a finite value and gradient; False where it is refused by its ValueError."""
    device = "cpu" if backend in ON_CPU or interpreting() else "cuda"
    try:
        value, student = LOSSES[loss](dtype, device, backend)
    except ValueError as error:
        assert f"{backend!r}" in str(error), error  # the backend has no such kernel, and says so
        return False
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite() and gradient.isfinite().all() and gradient.dtype == dtype, (loss, backend, dtype)
    return True


def stems(loss: str) -> set[str]:
    """The ops whose kernels a loss asks for."""
    backends = importlib.import_module("fastdistil.backends")  # fastdistil.backends is the function of that name
    with mock.patch.object(backends, "_load", wraps=backends._load) as loaded:
        LOSSES[loss](torch.float32, "cpu", "reference")
    return {call.args[0] for call in loaded.call_args_list}


def cuda_dtypes(loss: str) -> list[str]:
    """Those that the CUDA sources of its kernels have a case for; none where a kernel has no CUDA module."""
    found = set(DTYPES)
    names = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "f64": "fp64"}
    for stem in stems(loss):
        if importlib.util.find_spec(f"fastdistil.backends.cuda.{stem}") is None:
            return []
        source = (ROOT / f"kernels/cuda/{stem}.cu").read_text(encoding="utf-8")
        found &= {names[x] for x in re.findall(r"DType::(\w+)", source)}
    return [x for x in DTYPES if x in found]


def backend_table() -> list[str]:
    rows = [
        "| loss | reference (PyTorch) | cpu (C++) | triton: interpreted | cuda (C++, rows of logits): emulated |",
        "| --- " * 5 + "|",
    ]
    same: dict[str, list[str]] = {}  # losses by their cells
    for loss in LOSSES:
        ran = [
            [x for x, dtype in DTYPES.items() if works(loss, name, dtype)] for name in ("reference", "cpu", "triton")
        ]
        cells = [", ".join(x) or "–" for x in (*ran, cuda_dtypes(loss))]
        same.setdefault(" | ".join(cells), []).append(f"`{loss}`")
    return rows + [f"| {', '.join(losses)} | {cells} |" for cells, losses in same.items()]


# Parameters by the column that shows them, "" being those that every loss has. A column whose name is a parameter's says
# yes or no, the others say which.
OPTIONS = {
    "": ("reduction", "num_items", "backend"),
    "distance": ("divergence", "beta", "eta", "kind", "tail"),
    "rows": ("weight", "shift", "mask", "mask_queries"),
    "`temperature`": ("temperature", "teacher_temperature", "scale_by_t2"),
    "`labels`": ("labels", "label_weight", "label_num_items", "ignore_index"),
    "`vocab_map`": ("vocab_map",),
    "`group`": ("group",),
    "`return_stats`": ("return_stats",),
    "`softcap`": ("student_logit_scale", "student_softcap", "teacher_logit_scale", "teacher_softcap"),
    "its own": (
        "k", "renormalize", "student_factor", "teacher_factor", "inplace_backward", "chunk_bytes", "student_bias", "teacher_bias", "teacher_tail", "projection", "bias",
        "activation", "layer_weights", "causal", "student_scale", "teacher_scale", "cu_seqlens", "heads", "relation_heads",
    ),
}  # fmt: skip


def option_table() -> list[str]:
    known = {name: column for column, names in OPTIONS.items() for name in names}
    columns = [x for x in OPTIONS if x]
    everywhere = ", ".join(f"`{x}`" for x in OPTIONS[""])
    rows = [f"| loss (all: {everywhere}) | {' | '.join(columns)} |", "| --- " * (1 + len(columns)) + "|"]
    for loss in LOSSES:
        signature = inspect.signature(getattr(fd, loss)).parameters.values()
        names = [x.name for x in signature if x.kind is inspect.Parameter.KEYWORD_ONLY]
        unknown = set(names) - known.keys()
        assert not unknown, f"tests/matrices.py: {loss} has options without a column: {unknown}"
        assert set(OPTIONS[""]) <= set(names), loss
        cells = []
        for column in columns:
            found = [x for x in names if known[x] == column]
            said = "yes" if column.startswith("`") else ", ".join(f"`{x}`" for x in found)
            cells.append(said if found else "–")
        rows.append(f"| `{loss}` | {' | '.join(cells)} |")
    return rows


def matrices() -> str:
    """What stands between the README's markers."""
    return "\n".join([*backend_table(), "", *option_table()])


def with_matrices(page: str) -> str:
    before, rest = page.split(START)
    return f"{before}{START}\n\n{matrices()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(with_matrices(README.read_text(encoding="utf-8")), encoding="utf-8")
