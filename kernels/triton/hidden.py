"""Losses between two hidden states, a row per program (losses.md, section 3): mse, cosine and kl in one kernel.

Float64 is left to the reference. A row is read twice for cosine and kl (statistics, then value and gradient) and once
for mse; the second read comes from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastdistil.kernels.triton.exact import forward_kl_terms, scaled_expm1
from fastdistil.kernels.triton.logit_statistics import _add_masses, _add_to_lse_tile, _agreed, _misplaced, _scores
from fastdistil.kernels.triton.numerics import FUSION, log1p
from torch import Tensor


def hidden_config(size: int, kind: str, nvidia: bool = torch.version.hip is None) -> tuple[int, dict[str, int]]:
    """Columns that a program holds at a time, and its warps: 8 elements a thread, for 16 spill on sm_80 with kl and
    gelu. Wider rows take several steps. Left alone, ptxas gives kl 56 registers and spills."""
    block = min(triton.next_power_of_2(size), 2048)
    most = {"maxnreg": 80} if kind == "kl" and nvidia else {}
    return block, {"num_warps": max(1, block // 256)} | most | FUSION


@triton.jit
def _load_pair(z_ptr, t_ptr, bias_ptr, columns, inside, HAS_BIAS: tl.constexpr, GELU: tl.constexpr):
    """The student before and after the activation, and the teacher, float32."""
    z = tl.load(z_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    h = z
    if GELU:
        h = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    return z, tl.where(inside, h, 0.0), t


@triton.jit
def _logits(z_ptr, t_ptr, bias_ptr, columns, inside, offset, HAS_BIAS: tl.constexpr, GELU: tl.constexpr):
    """Student and teacher as logits, -inf where there are none, and their difference less the offset."""
    _, h, t = _load_pair(z_ptr, t_ptr, bias_ptr, columns, inside, HAS_BIAS, GELU)
    h, t = tl.where(inside, h, -float("inf")), tl.where(inside, t, -float("inf"))
    return h, t, _scores(h, t, 1.0, 1.0, 0.0, 0.0, offset, 0.0, True)


@triton.jit
def _difference_at(z_ptr, t_ptr, bias_ptr, column, there, HAS_BIAS: tl.constexpr, GELU: tl.constexpr):
    _, h, t = _load_pair(z_ptr, t_ptr, bias_ptr, column, there, HAS_BIAS, GELU)
    return h - t


@triton.jit
def hidden_fwd_kernel(
    z_ptr, t_ptr, bias_ptr, scale_ptr, rows_ptr, dz_ptr, index_ptr, first, z_stride, t_stride, size,
    KIND: tl.constexpr, GELU: tl.constexpr, HAS_BIAS: tl.constexpr, NEED_GRAD: tl.constexpr, BLOCK: tl.constexpr,
    LAYERS: tl.constexpr, ALIGNMENT: tl.constexpr, PROJECTED: tl.constexpr,
):  # fmt: skip
    """rows (N,) and, with NEED_GRAD, dz (N, size, contiguous), both times the row's scale; scale 0 reads nothing.

    With LAYERS, program axis 1 is the layer: z_ptr and t_ptr hold the layers' addresses (int64), which are multiples of
    ALIGNMENT and point to elements of LAYERS' type; scale, rows and dz have the layers one behind the other. With
    PROJECTED, so have z and bias, which then are no addresses, and the rows are a chunk: the teacher's row is
    `first` + row, or index[row] where there is an index (N,) int64. dz may be z: a column is read before it is
    written, by one program alone."""
    row = tl.program_id(0).to(tl.int64)
    at = row
    z_row = row
    t_row = row + first
    if LAYERS is not None:
        layer = tl.program_id(1)
        at += layer.to(tl.int64) * tl.num_programs(0)
        t_ptr = tl.multiple_of(tl.load(t_ptr + layer).to(tl.pointer_type(LAYERS)), ALIGNMENT)
        if PROJECTED:
            z_row = at
            bias_ptr += layer * size
        else:
            z_ptr = tl.multiple_of(tl.load(z_ptr + layer).to(tl.pointer_type(LAYERS)), ALIGNMENT)
    if index_ptr is not None:
        t_row = tl.load(index_ptr + row)
    z_ptr += z_row * z_stride
    t_ptr += t_row * t_stride
    dz_ptr += at * size
    scale = tl.load(scale_ptr + at)
    end = tl.where(scale != 0, size, 0)
    lanes = tl.arange(0, BLOCK)

    # Statistics of the row. cosine: |h|^2, |t|^2, h t. kl: logit_statistics.py.
    hh = 0.0
    tt = 0.0
    ht = 0.0
    offset = 0.0
    if KIND == "cosine":
        for start in range(0, end, BLOCK):
            columns = start + lanes
            _, h, t = _load_pair(z_ptr, t_ptr, bias_ptr, columns, columns < end, HAS_BIAS, GELU)
            hh += tl.sum(h * h, 0)
            tt += tl.sum(t * t, 0)
            ht += tl.sum(h * t, 0)
    if KIND == "kl":
        middle = _difference_at(z_ptr, t_ptr, bias_ptr, size // 2, end > 0, HAS_BIAS, GELU)
        before = _difference_at(z_ptr, t_ptr, bias_ptr, size // 4, end > 0, HAS_BIAS, GELU)
        behind = _difference_at(z_ptr, t_ptr, bias_ptr, size * 3 // 4, end > 0, HAS_BIAS, GELU)
        behind = tl.where(size < 3, float("nan"), behind)  # no column is one of two that agree
        second, first = _agreed(before, middle, behind)
        offset = tl.where(second, middle, tl.where(first, before, 0.0))
        nothing = tl.full((), 0.0, tl.float32)
        infinite = nothing - float("inf")
        max_b, own, ref, mass_b, excess = infinite, infinite, nothing, nothing, nothing
        max_a, mass_a = infinite, nothing
        tries = 0
        while tries < 2:
            max_b, own, ref, mass_b, excess = infinite, infinite, nothing, nothing, nothing
            max_a, mass_a, unmatched, lost = infinite, nothing, nothing, nothing
            for start in range(0, end, BLOCK):
                columns = start + lanes
                h, t, d = _logits(z_ptr, t_ptr, bias_ptr, columns, columns < end, offset, HAS_BIAS, GELU)
                max_b, own, ref, mass_b, excess, unmatched, lost = _add_masses(
                    h, t, d, 1.0, 1.0, 0.0, 0.0, offset, 0.0, max_b, own, ref, mass_b, excess, unmatched, lost, True
                )
                max_a, mass_a = _add_to_lse_tile(h, 1.0, max_a, mass_a)
            again = _misplaced(ref, mass_b, excess) & (tries == 0)
            offset = tl.where(again, own - max_b, offset)
            tries = tl.where(again, 1, 2)
        log_mass_a = tl.log(mass_a)
        log_mass_b = tl.log(mass_b)
        ratio = excess / mass_b
        near = (ratio > -0.9) & (ratio < 1e3)  # beyond, the plain difference of the logsumexps is good enough
        whole = _scores(max_a, max_b, 1.0, 1.0, 0.0, 0.0, offset, 0.0, True) + (log_mass_a - log_mass_b)
        smaller = (near == 0) & (tl.abs(whole) < tl.abs(whole - ref))
        ref = tl.where(smaller, 0.0, ref)
        log_ratio = tl.where(near, log1p(tl.where(near, ratio, 0.0)), whole - ref)
    if KIND == "cosine":
        # w = (h part - t) / |t| is perpendicular to h; its squares add up to 1 - cos^2, w / |h| is the gradient.
        part = ht / hh
        inverse_h = scale / tl.sqrt(hh)
        inverse_t = 1.0 / tl.sqrt(tt)
        cos = ht / (tl.sqrt(hh) * tl.sqrt(tt))
        # Float32 has not the digits of an angle below 1/16, nor the range of the squares of extreme lengths.
        ordinary = (hh > 1e-30) & (tt > 1e-30) & (hh < 1e30) & (tt < 1e30) & (part * (ht / tt) < 0.99609375)
        wide = (scale != 0) & (ordinary == 0)
        wide_part = part.to(tl.float64)  # type: ignore[attr-defined]  # a float, mypy thinks
        wide_inverse_h = inverse_h.to(tl.float64)
        wide_inverse_t = inverse_t.to(tl.float64)
        if wide:
            wide_hh = tl.full((), 0.0, tl.float64)
            wide_tt = tl.full((), 0.0, tl.float64)
            wide_ht = tl.full((), 0.0, tl.float64)
            for start in range(0, end, BLOCK):
                columns = start + lanes
                _, h, t = _load_pair(z_ptr, t_ptr, bias_ptr, columns, columns < end, HAS_BIAS, GELU)
                wide_hh += tl.sum(h.to(tl.float64) * h.to(tl.float64), 0)
                wide_tt += tl.sum(t.to(tl.float64) * t.to(tl.float64), 0)
                wide_ht += tl.sum(h.to(tl.float64) * t.to(tl.float64), 0)
            nonzero = (wide_hh != 0.0) & (wide_tt != 0.0)  # cos = 0 by definition
            wide_hh = tl.where(nonzero, wide_hh, 1.0)
            wide_tt = tl.where(nonzero, wide_tt, 1.0)
            wide_part = tl.where(nonzero, wide_ht / wide_hh, 0.0)
            wide_inverse_h = scale.to(tl.float64) / tl.sqrt(wide_hh)
            # Nothing is perpendicular in one dimension.
            wide_inverse_t = tl.where(nonzero & (size > 1), 1.0 / tl.sqrt(wide_tt), 0.0)
            cos = tl.where(nonzero, wide_ht / (tl.sqrt(wide_hh) * tl.sqrt(wide_tt)), 0.0).to(tl.float32)

    value = 0.0
    for start in range(0, end, BLOCK):
        columns = start + lanes
        inside = columns < end
        z, h, t = _load_pair(z_ptr, t_ptr, bias_ptr, columns, inside, HAS_BIAS, GELU)
        if KIND == "mse":
            r = h - t
            d = r * (1.0 / size)
            value += tl.sum(r * d, 0)  # the mean may be within a range that the sum is not
            d *= 2.0
        elif KIND == "cosine":
            if wide:
                wide_w = (h.to(tl.float64) * wide_part - t.to(tl.float64)) * wide_inverse_t
                value += tl.sum(wide_w * wide_w, 0).to(tl.float32)
                d = (wide_w * wide_inverse_h).to(tl.float32)
            else:
                w = (h * part - t) * inverse_t
                value += tl.sum(w * w, 0)
                d = w * inverse_h
        else:
            h, t, c = _logits(z_ptr, t_ptr, bias_ptr, columns, inside, offset, HAS_BIAS, GELU)
            q = tl.where(inside, tl.exp((t - max_b) - log_mass_b), 0.0)
            delta = tl.where(inside, (c - ref) - log_ratio, 0.0)
            d = scaled_expm1(q, delta, tl.where(inside, (h - max_a) - log_mass_a, -float("inf")))
            value += tl.sum(forward_kl_terms(q, delta, d), 0)
        if NEED_GRAD:
            if GELU:
                density = tl.exp(-0.5 * z * z) * 0.3989422804014327
                d *= 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
            if KIND != "cosine":  # which has the scale in it
                d *= scale
            tl.store(dz_ptr + columns, d, mask=inside)
    if KIND == "cosine":
        value = tl.where(cos > 0, value / (1.0 + tl.maximum(cos, 0.0)), 1.0 - cos)
    tl.store(rows_ptr + at, tl.where(scale != 0, value * scale, 0.0))
    if NEED_GRAD:
        for start in range(end, size, BLOCK):  # a skipped row
            tl.store(dz_ptr + start + lanes, tl.zeros((BLOCK,), tl.float32), mask=start + lanes < size)


def hidden_rows(
    student: Tensor,
    teacher: Tensor,
    bias: Tensor | None,
    row_scale: Tensor,
    kind: str,
    activation: str,
    grad_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """As `fastdistil.reference.hidden.hidden_rows`, for float32, bfloat16 and float16 tensors."""
    count, size = student.shape
    student, teacher = (x if x.stride(1) == 1 else x.contiguous() for x in (student, teacher))
    rows = torch.empty_like(row_scale)
    dz = None if grad_dtype is None else torch.empty((count, size), dtype=grad_dtype, device=student.device)
    if count == 0:
        return rows, dz
    block, options = hidden_config(size, kind)
    hidden_fwd_kernel[(count,)](
        student,
        teacher,
        row_scale if bias is None else bias.contiguous(),
        row_scale.contiguous(),
        rows,
        rows if dz is None else dz,
        None,
        0,
        student.stride(0),
        teacher.stride(0),
        size,
        KIND=kind,
        GELU=activation == "gelu",
        HAS_BIAS=bias is not None,
        NEED_GRAD=dz is not None,
        BLOCK=block,
        LAYERS=None,
        ALIGNMENT=1,
        PROJECTED=False,
        **options,
    )
    return rows, dz


AOT_CHOICES = [  # elements, kind, with bias and activation, with the gradient, for NVIDIA
    (*choice, nvidia)
    for choice in (
        ("fp32", "mse", True, True),
        ("bf16", "mse", False, True),
        ("bf16", "cosine", False, True),
        ("fp16", "cosine", True, False),
        ("fp32", "kl", True, True),
        ("bf16", "kl", False, True),
    )
    for nvidia in (True, False)
]


def aot_cases() -> list[dict[str, object]]:
    """Each kind with and without bias, activation and gradient, for narrow, wide and odd rows."""
    return [aot_case(size, *choice) for size in (384, 1024, 7168) for choice in AOT_CHOICES]


def aot_case(
    size: int,
    dtype: str,
    kind: str,
    extras: bool,
    need_grad: bool,
    nvidia: bool,
    *,
    layers: str = "",
    indexed: bool = False,
) -> dict[str, object]:
    """layers: "" one layer, "layers" a list of them, "projected" a list whose projected states are float32."""
    block, options = hidden_config(size, kind, nvidia)
    state, projected = f"*{dtype}", layers == "projected"
    parts = (dtype, str(size), kind, "bias-gelu" * extras, "grad" * need_grad, layers, "indexed" * indexed)
    return {
        "name": "-".join(part for part in ("hidden_fwd_kernel", *parts) if part),
        "kernel": hidden_fwd_kernel,
        "signature": {
            "z_ptr": "*fp32" if projected else "*i64" if layers else state,
            "t_ptr": "*i64" if layers else state,
            **dict.fromkeys(("bias_ptr", "scale_ptr", "rows_ptr"), "*fp32"),
            "dz_ptr": "*fp32" if projected else state,
            **({"index_ptr": "*i64"} if indexed else {}),
            **dict.fromkeys(("first", "z_stride", "t_stride", "size"), "i32"),
        },
        "constants": {
            **({} if indexed else {"index_ptr": None}),
            "KIND": kind,
            "GELU": extras,
            "HAS_BIAS": extras,
            "NEED_GRAD": need_grad,
            "BLOCK": block,
            "LAYERS": {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[dtype] if layers else None,
            "ALIGNMENT": 16 if layers else 1,
            "PROJECTED": projected,
        },
        "divisible": ["z_ptr", "t_ptr", "bias_ptr", "dz_ptr", "z_stride", "t_stride", "size"],
        "options": options,
        "targets": ("sm_80", "sm_90a") if nvidia else ("gfx942",),
    }
