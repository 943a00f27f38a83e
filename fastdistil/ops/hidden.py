"""Custom ops of the hidden-state losses: `hidden_rows`, a value per row, and `hidden_total`, their sum with gradients.

With a projection the loop below runs the matrix products of one chunk of rows at a time around the backend's row
kernel, so that the projected states exist for one chunk only. `hidden_total` keeps the gradients for its backward
pass, which then needs no product again; on a GPU without a projection `hidden_rows` is enough, its gradient costs one
more read.

Where a projection or an activation brings the student so near to its teacher that float32 loses their difference: a
product of float32 is off by 2^-24 of its own size and more, whatever it is compared with; a state that comes as it is
has no such rounding. On a CPU, where the answer costs no wait, some rows of a chunk are asked first, and a chunk that
is near is computed in float64 and rounded once.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fastdistil.backends import choose, module
from fastdistil.ops.families import Found, family
from fastdistil.ops.precision import with_exact_products
from fastdistil.ops.products import multiplied

# Elements of one chunk of projected states: 2 MiB of float32 on a CPU, 128 MiB on a GPU.
CHUNK_ELEMENTS = {"cpu": 2**19, "gpu": 2**25}

_SAMPLE, _FEW = 16, 256  # every 16th row of more than 256, a few thousandths of the products' work
_SMALLEST = 1 / 32  # of the state: a smaller difference has lost five bits and more


@with_exact_products
def _compute(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor,
    kind: str,
    activation: str,
    backend: str,
    dense: bool,
    wanted: list[bool],
    rounded: bool,
) -> Found:
    """Rows of scale 0 are dropped before the products. Finding them waits for a GPU once, unless the caller knows that
    there are none (`dense`)."""
    name = choose(backend, student.device, row_scale.dtype)
    kernels = module("hidden", name)
    checked = student.device.type == "cpu" and name != "triton" and row_scale.dtype == torch.float32
    if projection is not None:
        states = (student, teacher, projection, bias, row_scale)
        return _projected(kernels, *states, kind, activation, dense, wanted, checked)
    dtype = (student.dtype if rounded else row_scale.dtype) if wanted[0] else None
    wide = (
        checked
        and activation != "none"
        and is_near(student.to(row_scale.dtype), teacher, None, row_scale, kind, activation)
    )
    scale = row_scale.double() if wide else row_scale
    rows, dstudent = kernels.hidden_rows(student, teacher, None, scale, kind, activation, dtype)
    return Found(rows.to(row_scale.dtype), (dstudent, None, None))


def _projected(
    kernels: ModuleType,
    student: Tensor,
    teacher: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    kind: str,
    activation: str,
    dense: bool,
    wanted: list[bool],
    checked: bool,
) -> Found:
    dtype, (count, size_s), size_t = row_scale.dtype, student.shape, projection.shape[0]
    on_cpu = student.device.type == "cpu"
    kept = row_scale.nonzero()[:, 0] if on_cpu or not dense else None
    if kept is not None and len(kept) == count:
        kept = None
    zeros = torch.zeros if kept is not None else torch.empty
    rows = zeros(count, dtype=dtype, device=student.device)
    dstudent = zeros((count, size_s), dtype=dtype, device=student.device) if wanted[0] else None
    dprojection = torch.zeros_like(projection, dtype=dtype) if wanted[1] else None
    dbias = torch.zeros(size_t, dtype=dtype, device=student.device) if wanted[2] else None
    low = multiplied_in(student, projection, dtype)
    weight = projection.to(low)
    shift = None if bias is None else bias.to(dtype)
    near = False
    wide: Tensor | None = None
    step = chunk_rows(size_t, student.device)
    for start in range(0, count if kept is None else len(kept), step):
        chunk = slice(start, min(start + step, count)) if kept is None else kept[start : start + step]
        scale, h = row_scale[chunk], student[chunk].to(low)
        t, offset = teacher[chunk], shift
        if not near:
            z = multiplied(h, weight.T, dtype)
            near = checked and is_near(z, t, shift, scale, kind, activation)
        if near:  # and the rest of the rows without asking
            wide = weight.double() if wide is None else wide
            z, offset, scale = h.double() @ wide.T, None if shift is None else shift.double(), scale.double()
        need = dtype if any(wanted) else None
        values, dz = kernels.hidden_rows(z, t, offset, scale, kind, activation, need)
        rows[chunk] = values.to(dtype)
        if dstudent is not None:
            if kept is None and weight.dtype == dtype:
                torch.mm(dz, weight, out=dstudent[chunk])
            else:
                dstudent[chunk] = multiplied(dz, weight, dtype)
        if dprojection is not None:
            if h.dtype == dtype:
                dprojection.addmm_(dz.T, h)
            else:
                dprojection += multiplied(dz.T, h, dtype)
        if dbias is not None:
            dbias += dz.sum(0)
    return Found(rows, (dstudent, dprojection, dbias))


def multiplied_in(student: Tensor, projection: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the products' factors: that of both where they share one and there are tensor cores."""
    return projection.dtype if student.device.type != "cpu" and student.dtype == projection.dtype else dtype


def chunk_rows(columns: int, device: torch.device) -> int:
    """How many rows of `columns` projected states, of one layer or of several together, exist at a time."""
    return max(1, CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "gpu"] // max(1, columns))


def is_near(z: Tensor, teacher: Tensor, bias: Tensor | None, row_scale: Tensor, kind: str, activation: str) -> bool:
    """Whether what `kind` sees of act(z + bias) - teacher (N, D) is below 1/32 of the state in some row (for cosine,
    which sees no length, the teacher's part across the student below 1/32 of it); rows of scale 0 are not asked."""
    step = _SAMPLE if len(z) > _FEW else 1
    kept = row_scale[::step] != 0
    h, t = z[::step][kept], teacher[::step][kept].to(z.dtype)
    h = h if bias is None else h + bias
    h = torch.nn.functional.gelu(h) if activation == "gelu" else h
    if kind == "cosine":
        h, t = (torch.nn.functional.normalize(x.double(), dim=-1, eps=0.0).nan_to_num(0.0) for x in (h, t))
        cos = torch.linalg.vecdot(h, t)
        return bool((1 - cos.square() < _SMALLEST**2).any())
    difference = h - t
    if kind == "kl":
        difference -= difference.mean(-1, keepdim=True)
    return bool((difference.square().sum(-1) < _SMALLEST**2 * h.square().sum(-1)).any())


# student (N, D_s), teacher (N, D_t), projection (D_t, D_s), bias (D_t,), row_scale (N,) float32 (float64 for float64
# inputs), without a 0 where `dense` -> rows (N,), times row_scale.
TENSORS = "Tensor student, Tensor teacher, Tensor? projection, Tensor? bias, Tensor row_scale"
OPTIONS = "str kind, str activation, str backend, bool dense"
hidden_rows, hidden_total, _ = family(
    "hidden", "hidden_loss", TENSORS, OPTIONS, _compute, gradients=("student", "projection", "bias")
)
