"""Losses between two attention maps on the GPU: the configuration, the launcher and what is compiled ahead of time.

The kernels and how they share the work are in `attention_kernels.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from fastdistil.kernels.triton.attention_kernels import (
    attention_dk_kernel,
    attention_dq_kernel,
    attention_fwd_kernel,
    attention_value_kernel,
)
from fastdistil.kernels.triton.attention_relation import attention_dx_kernel
from fastdistil.kernels.triton.numerics import FUSION
from torch import Tensor

from fastdistil.contracts.attention import sum_of_groups

LARGEST_HEAD = 128
COMMON = 0.25  # of a mean's square, in units of the variance: what is less is left where it is


def attention_config(widest: int, itemsize: int, hip: bool) -> tuple[int, int, dict[str, int]]:
    """Rows of the tile that a program owns, of the tiles that it walks over, and the compiler's options.

    widest: the larger head size, padded to a power of two; itemsize: bytes of an element. These are the largest tiles
    that compile without a spill for sm_80, sm_90a and gfx942; they are not yet tuned for speed on a GPU.
    """
    if hip:
        return 32, 16, {"num_warps": 4, "num_stages": 1} | FUSION
    # Left alone, ptxas takes too few registers for wide heads on sm_100a and sm_120a (Triton 3.9).
    registers = {"maxnreg": 255} if widest > 64 else {}
    if itemsize == 4:
        return (32 if widest <= 64 else 16), 16, {"num_warps": 8, "num_stages": 1} | registers | FUSION
    return 64, 32, {"num_warps": 4, "num_stages": 3} | registers | FUSION


def gradient_options(options: dict[str, int], constants: dict[str, Any], float32: bool, hip: bool) -> dict[str, int]:
    """Of the gradients of queries and keys. Left alone, ptxas takes 64 or 80 registers for float32 and spills; at 64
    columns it spills with 128 and with 168 on sm_89 (Triton 3.9), where it takes 118 of 255. With 16-bit heads wider
    than 64 four warps spill (eight would in the forward on sm_100a), as do three stages on sm_80 and 128 registers on
    sm_100a (3.9)."""
    sizes = constants["PAD_S"], constants["PAD_T"]
    if hip:
        return options
    if float32:
        return {**options, "maxnreg": 255 if sizes == (64, 64) else 128}
    wide = max(sizes) > 64
    return {**options, "num_warps": 8, "num_stages": 2, "maxnreg": 255} if wide else options


def relation_config(widest: int, itemsize: int, hip: bool) -> tuple[int, int, dict[str, int]]:
    """As `attention_config` for the relation's gradient, whose tile needs the statistics of its columns too, hence the
    smaller tiles. In 16 bits wider than 64 four warps spill on sm_80."""
    outer, inner, options = attention_config(widest, itemsize, hip)
    if hip:
        return outer, inner, options
    if itemsize == 4:
        return 16, 16, {**options, "maxnreg": 128}
    return outer, 16, {**options, "num_stages": 2, "num_warps": 8 if widest > 64 else 4}


def attention(
    student_q: Tensor,
    student_k: Tensor | None,
    teacher_q: Tensor,
    teacher_k: Tensor | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    row_scale: Tensor,
    kind: str,
    causal: bool,
    student_scale: float,
    teacher_scale: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `fastdistil.reference.attention.attention`, for float32, bfloat16 and float16 tensors of one dtype.

    Without keys Q is K too, and its gradient through both sides comes as one."""
    relation = student_k is None or teacher_k is None
    batch, heads, length, size_s = student_q.shape
    size_t = teacher_q.shape[-1]
    if max(size_s, size_t) > LARGEST_HEAD:
        raise ValueError(
            f"attention_loss: backend 'triton' takes head sizes up to {LARGEST_HEAD}, not {max(size_s, size_t)}; "
            "expected backend='reference'"
        )
    student_q, teacher_q = (x if x.stride(-1) == 1 else x.contiguous() for x in (student_q, teacher_q))
    student_k, teacher_k = (
        q if k is None else k if k.stride(-1) == 1 else k.contiguous()
        for q, k in ((student_q, student_k), (teacher_q, teacher_k))
    )
    tensors = [student_q, student_k, teacher_q, teacher_k]
    row_scale = row_scale.contiguous()
    rows = torch.empty_like(row_scale)
    dq, dk = (
        torch.empty(student_q.shape, dtype=torch.float32, device=student_q.device) if want else None
        for want in (need_grad, need_grad and not relation)  # a gradient of K a query head
    )
    if rows.numel() == 0:
        return rows, dq, None if dk is None else sum_of_groups(dk, student_k.shape[1])
    stats = torch.empty((8, *row_scale.shape), dtype=torch.float32, device=rows.device)
    if kind == "score_mse":
        stats.zero_()
    positions = torch.arange(1, length + 1, dtype=torch.int32, device=rows.device)
    row_end = ((row_scale != 0).any(1) * positions).amax(1)
    key_end = row_end if key_mask is None else (key_mask * positions).amax(1)
    mask = row_end if key_mask is None else key_mask.contiguous().view(torch.uint8)  # without a mask it is not read

    begins, ends = (row_end, row_end) if cu_seqlens is None else _sequences(cu_seqlens, length)

    float32, hip = student_q.dtype == torch.float32, torch.version.hip is not None
    constants, outer, inner, options = _configure(
        kind, causal, key_mask is not None, cu_seqlens is not None, size_s, size_t, float32, hip
    )
    by_rows = {**constants, "BLOCK_M": outer, "BLOCK_N": inner, **options}
    by_keys = {**constants, "BLOCK_M": inner, "BLOCK_N": outer, **options}
    means = (row_scale, row_scale)  # not read
    if constants["CENTRED"]:
        means = _means(student_k, teacher_k, key_mask, relation)
    strides = [x.stride(i) for x in tensors for i in range(3)]
    tensors += means
    groups = (heads // student_k.shape[1], heads // teacher_k.shape[1])
    scalars = (*strides, heads, *groups, length, rows.numel(), student_scale, teacher_scale)
    grid = (triton.cdiv(length, outer), batch * heads)
    if kind != "score_mse":
        attention_fwd_kernel[grid](*tensors, mask, key_end, begins, ends, row_scale, stats, *scalars, **by_rows)
    attention_value_kernel[grid](*tensors, mask, key_end, begins, ends, row_scale, rows, stats, *scalars, **by_rows)
    if need_grad and relation:
        both = torch.full_like(row_end, length) if key_mask is None else torch.maximum(key_end, row_end)
        rule = (kind, causal, key_mask is not None)
        scales = (student_scale, teacher_scale)
        _relation_gradient(student_q, teacher_q, means, mask, both, row_scale, stats, dq, rule, scales)
    elif need_grad:
        of_gradients = gradient_options(options, constants, float32, hip)
        by_rows |= of_gradients
        by_keys |= of_gradients
        attention_dq_kernel[grid](*tensors, mask, key_end, begins, ends, row_scale, stats, dq, *scalars, **by_rows)
        attention_dk_kernel[grid](*tensors, mask, row_end, begins, ends, row_scale, stats, dk, *scalars, **by_keys)
    return rows, dq, None if dk is None else sum_of_groups(dk, student_k.shape[1])


def _means(
    student_k: Tensor, teacher_k: Tensor, key_mask: Tensor | None, exact_difference: bool
) -> tuple[Tensor, Tensor]:
    """Of the keys that count, (B, heads, d) float32; with `exact_difference` rounded to 22 bits of the larger one, so
    that float32 holds their difference. 0 for heads where they are small on both sides and in the difference, as they
    are where one key lies far off, and where they are not finite."""
    real = None if key_mask is None else key_mask[:, None, :, None]
    same = student_k.shape == teacher_k.shape
    found = [_mean(k, real) for k in (student_k, teacher_k)]
    moved = [large for _, large in found]
    if same:
        moved = [moved[0] | moved[1] | _mean(student_k - teacher_k, real)[1]] * 2
    means = [torch.where(large, mean, 0.0) for large, (mean, _) in zip(moved, found, strict=True)]
    if exact_difference and same:
        exponent = torch.frexp(torch.maximum(means[0].abs(), means[1].abs())).exponent
        unit = torch.ldexp(torch.ones_like(means[0]), (exponent - 22).clamp(min=-100))
        means = [(mean / unit).round() * unit for mean in means]
    return means[0].contiguous(), means[1].contiguous()


def _mean(k: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean of keys (B, heads, S, d), and whether (B, heads, 1) it is no small part of them."""
    if real is None:
        variance, mean = torch.var_mean(k, 2, correction=0)
    else:
        k, count = torch.where(real, k, 0.0), real.sum(2).clamp(min=1)
        mean = k.sum(2) / count
        variance = (torch.where(real, k - mean[:, :, None], 0.0)).square().sum(2) / count
    squares = mean.square().sum(-1, keepdim=True)
    return mean, (squares > COMMON * variance.sum(-1, keepdim=True)) & (squares < 1e30)


def _relation_gradient(
    student: Tensor,
    teacher: Tensor,
    means: tuple[Tensor, Tensor],
    mask: Tensor,
    end: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    dstudent: Tensor | None,
    rule: tuple[str, bool, bool],
    scales: tuple[float, float],
) -> None:
    """Into dstudent; behind end (B,) no token counts; rule: kind, causal, whether the mask is one."""
    batch, heads, length, size = student.shape
    float32, hip = student.dtype == torch.float32, torch.version.hip is not None
    constants, outer, inner, options = _configure(*rule, None, size, teacher.shape[-1], float32, hip)
    shift = row_scale  # not read
    if constants["CENTRED"]:
        of_means = [
            scale * ((x - mean[:, :, None].double()) @ mean[..., None].double())[..., 0]
            for x, mean, scale in zip((student, teacher), means, scales, strict=True)
        ]
        shift = torch.stack((of_means[1], of_means[0] - of_means[1])).float().nan_to_num_(0.0, 0.0, 0.0)
    strides = [x.stride(i) for x in (student, teacher) for i in range(3)]
    scalars = (*strides, heads, length, row_scale.numel(), *scales)
    attention_dx_kernel[(triton.cdiv(length, outer), batch * heads)](
        student, teacher, *means, shift, mask, end, row_scale, stats, dstudent, *scalars, **constants, BLOCK_M=outer,
        BLOCK_N=inner, **options,
    )  # fmt: skip


def _sequences(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Where each token's own sequence begins and ends, (S,) int32; nothing waits for the device."""
    tokens = torch.arange(length, device=cu_seqlens.device)
    end = torch.searchsorted(cu_seqlens, tokens, right=True)
    return cu_seqlens[end - 1].to(torch.int32), cu_seqlens[end].to(torch.int32)


def _configure(
    kind: str, causal: bool, masked: bool, packed: bool | None, size_s: int, size_t: int, float32: bool, hip: bool
) -> tuple[dict[str, object], int, int, dict[str, int]]:
    """A kernel's constants but for the tile, and its configuration; packed None: the relation's, which knows no packed
    sequences."""
    pad_s, pad_t = (max(16, triton.next_power_of_2(size)) for size in (size_s, size_t))
    constants = {
        "KIND": kind,
        "CAUSAL": causal,
        "HAS_MASK": masked,
        "PACKED": packed,
        "DIFFERENCE": size_s == size_t and float32,
        "CENTRED": kind != "score_mse" and float32,
        "SIZE_S": size_s,
        "SIZE_T": size_t,
        "PAD_S": pad_s,
        "PAD_T": pad_t,
        "PRECISION": "ieee",  # TF32 would keep three digits; its three-product form spills
    }
    widest, itemsize = max(pad_s, pad_t), 4 if float32 else 2
    if packed is None:
        del constants["PACKED"]
        return constants, *relation_config(widest, itemsize, hip)
    return constants, *attention_config(widest, itemsize, hip)


def aot_cases() -> list[dict[str, object]]:
    """Every kernel in every tile that the launcher reaches, each rule and mask among them."""
    choices = (
        ("fp32", 64, 64, "prob_mse", False, "mask"),
        ("fp32", 32, 64, "score_mse", True, "mask"),
        ("fp32", 128, 128, "prob_kl", True, ""),
        ("fp32", 128, 128, "prob_mse", True, "packed"),
        ("bf16", 64, 64, "prob_mse", False, "mask"),
        ("bf16", 32, 128, "prob_kl", True, ""),
        ("bf16", 128, 128, "prob_mse", True, "packed"),
        ("fp16", 64, 64, "score_mse", True, "mask"),
        ("fp16", 64, 64, "prob_kl", False, ""),
        ("fp16", 128, 128, "prob_kl", True, "packed"),
        ("fp16", 128, 128, "prob_mse", True, "mask"),
    )
    relations = (
        ("fp32", 64, 64, "prob_kl", False, "mask"),
        ("fp32", 64, 64, "prob_mse", True, "mask"),
        ("fp32", 32, 64, "score_mse", True, ""),
        ("fp32", 128, 128, "prob_mse", True, "mask"),
        ("bf16", 64, 64, "prob_mse", False, "mask"),
        ("bf16", 128, 128, "prob_mse", True, "mask"),
        ("fp16", 128, 128, "prob_kl", False, "mask"),
        ("fp16", 128, 128, "prob_mse", True, "mask"),
        ("fp16", 64, 64, "score_mse", True, "mask"),
    )
    return [_aot_case(attention_dx_kernel, *choice, hip) for choice in relations for hip in (False, True)] + [
        _aot_case(kernel, *choice, hip)
        for kernel in (attention_fwd_kernel, attention_value_kernel, attention_dq_kernel, attention_dk_kernel)
        for choice in choices
        for hip in (False, True)
        if (kernel, choice[3]) != (attention_fwd_kernel, "score_mse")  # it needs no statistics
    ]


def _aot_case(
    kernel: triton.JITFunction,
    dtype: str,
    size_s: int,
    size_t: int,
    kind: str,
    causal: bool,
    tokens: str,
    hip: bool,
) -> dict[str, object]:
    packed = None if kernel is attention_dx_kernel else tokens == "packed"
    constants, outer, inner, options = _configure(
        kind, causal, tokens == "mask", packed, size_s, size_t, dtype == "fp32", hip
    )
    if kernel is attention_dk_kernel:
        outer, inner = inner, outer
    if kernel in (attention_dq_kernel, attention_dk_kernel):
        options = gradient_options(options, constants, dtype == "fp32", hip)
    tensors = ("qs_ptr", "ks_ptr", "qt_ptr", "kt_ptr")
    strides = tuple(f"{x}_{axis}" for x in ("qs", "ks", "qt", "kt") for axis in "bhn")
    signature = {
        **dict.fromkeys(tensors, f"*{dtype}"),
        **dict.fromkeys(strides, "i32"),
        **{"key_mask_ptr": "*u8", "key_end_ptr": "*i32", "row_end_ptr": "*i32"},
        **{"begin_ptr": "*i32", "end_ptr": "*i32", "group_s": "i32", "group_t": "i32"},
        **dict.fromkeys(("mean_s_ptr", "mean_t_ptr", "shift_ptr"), "*fp32"),
        **dict.fromkeys(("scale_ptr", "rows_ptr", "stats_ptr", "dq_ptr", "dk_ptr"), "*fp32"),
        **{"heads": "i32", "length": "i32", "plane": "i32", "scale_s": "fp32", "scale_t": "fp32"},
    }
    parts = (kernel.__name__, dtype, size_s, size_t, kind, "causal" * causal, tokens)
    return {
        "name": "-".join(str(part) for part in parts if part),
        "kernel": kernel,
        "signature": {name: kind_ for name, kind_ in signature.items() if name in kernel.arg_names},
        "constants": {**constants, "BLOCK_M": outer, "BLOCK_N": inner},
        "divisible": [name for name in (*tensors, *strides) if name in kernel.arg_names],
        "options": options,
        "targets": ("gfx942",) if hip else ("sm_80", "sm_90a"),
    }
