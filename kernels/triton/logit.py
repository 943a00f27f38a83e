"""logit_loss in Triton: launch configuration and launchers; the kernels are in logit_kernels.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from fastdistil.kernels.triton.divergence import RULES, Rule, jsd, skew_kl, skew_reverse_kl
from fastdistil.kernels.triton.logit_kernels import logit_bwd_kernel, logit_fwd_kernel
from fastdistil.kernels.triton.numerics import FUSION
from torch import Tensor

from fastdistil.contracts.logit import PHASE_ALL, STATS


def logit_config(columns: int, lanes: int, most: int = 2048) -> tuple[int, dict[str, int]]:
    """Columns a tile, and warps of `lanes` threads: 8 columns a thread, one 16-byte load of 16-bit logits; 16 columns
    spill. Not yet tuned on a GPU."""
    block = min(max(triton.next_power_of_2(columns), 64), most)
    return block, {"num_warps": max(1, block // (8 * lanes))} | FUSION


def forward_config(
    columns: int, lanes: int, rule: Rule, itemsize: int, labels: bool = False
) -> tuple[int, dict[str, int]]:
    """The forward's. Left alone, ptxas takes 64 or 80 registers and spills: 80 hold rules without a mean of 16 bits,
    and keep three blocks of 256 threads (float32's spill on sm_100a with Triton 3.9); 128 hold all, and keep two of
    those, or four of the mixtures' 128, as 96 and 112 do; with labels a mixture's jsd spilled with 128 on sm_100a."""
    mixture = rule.relative in (jsd, skew_kl, skew_reverse_kl)
    block, options = logit_config(columns, lanes, 1024 if mixture else 2048)
    registers = 168 if mixture and labels else 128 if rule.centred or labels or itemsize == 4 else 80
    return block, options | ({"maxnreg": registers} if lanes == 32 else {})


def _vector(rows: int, *tensors: Tensor) -> int:
    """Elements of a 16-byte load if all rows of all tensors are aligned alike, else 1."""
    size = tensors[0].element_size()
    width = 16 // size
    alike = all(x.data_ptr() % 16 == 0 and (x.stride(0) - tensors[0].stride(0)) % width == 0 for x in tensors)
    return width if alike or rows == 0 else 1


def rounding(x: float) -> float:
    """What float32 leaves off."""
    return x - float(torch.tensor(x, dtype=torch.float32))


def _arguments(
    student: Tensor, teacher: Tensor, gradient: Tensor | None, rule: dict[str, Any], forward: bool, labels: bool = False
) -> tuple[list[Any], dict[str, Any]]:
    """What both kernels share: sizes, strides and temperatures, and the compile-time choices."""
    divergence = RULES[rule["divergence"]]
    t_s, t_t = rule["student_temperature"], rule["teacher_temperature"]
    rows, columns = student.shape
    lanes = 64 if torch.version.hip else 32
    difference = bool(rule.get("difference"))
    config = (
        partial(forward_config, rule=divergence, itemsize=student.element_size(), labels=labels)
        if forward
        else logit_config
    )
    block, options = config(columns, lanes)
    stride = student.stride(0) if gradient is None else gradient.stride(0)
    tensors = (student, teacher) if gradient is None else (student, teacher, gradient)
    constants = {
        "RULE": divergence.relative, "CENTRED": divergence.centred, "MIXTURE": divergence.mixture,
        "SOFTMAX": divergence.softmax, "EQUAL": 2 if difference else t_s == t_t, "STATS": STATS,
        "VEC": _vector(rows, *tensors),
        "BLOCK": block, **options,
    }  # fmt: skip
    strides = [student.stride(0), teacher.stride(0), stride]
    return [columns, *strides, 1.0 / t_s, 1.0 / t_t, rounding(1.0 / t_s), rounding(1.0 / t_t)], constants


def logit_fwd(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    loss: Tensor,
    stats: Tensor,
    gradient: Tensor | None,
    phase: int = PHASE_ALL,
    labels: Tensor | None = None,
    label_scale: Tensor | None = None,
    **rule: Any,
) -> None:
    """As fastdistil.backends.cpu.logit.logit_fwd, for float32, bfloat16 and float16."""
    sizes, constants = _arguments(student, teacher, gradient, rule, forward=True, labels=labels is not None)
    factor = rule["value_factor"]
    if student.shape[0]:
        logit_fwd_kernel[(student.shape[0],)](
            student, teacher, row_scale, row_scale if labels is None else labels.contiguous(),
            row_scale if label_scale is None else label_scale.contiguous(),
            loss, stats, student if gradient is None else gradient, *sizes, factor,
            factor / rule["student_temperature"], rule["beta"], 1.0 - rule["beta"], GRADIENT=gradient is not None,
            PHASE=phase, LABELS=labels is not None, **constants,
        )  # fmt: skip


def logit_bwd(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    gradient: Tensor,
    dloss: Tensor,
    keep_unit: bool,
    **rule: Any,
) -> None:
    """As fastdistil.backends.cpu.logit.logit_bwd, for float32, bfloat16 and float16."""
    sizes, constants = _arguments(student, teacher, gradient, rule, forward=False)
    if student.shape[0]:
        logit_bwd_kernel[(student.shape[0],)](
            student, teacher, row_scale, dloss, stats, gradient,
            *sizes, rule["value_factor"] / rule["student_temperature"], rule["beta"], 1.0 - rule["beta"],
            KEEP_UNIT=keep_unit, **constants,
        )  # fmt: skip


def aot_cases() -> list[dict[str, Any]]:
    """Every kernel and configuration as ahead-of-time compilation sees it: V 119,547 (odd) and V 32,000."""
    cases = [
        _aot_case(logit_fwd_kernel, rule, dtype, itemsize, lanes, targets, labels=True)
        for rule in RULES[:3]
        for dtype, itemsize in (("bf16", 2), ("fp32", 4))
        for lanes, targets in ((32, ("sm_80", "sm_90a")), (64, ("gfx942",)))
    ]
    cases += [
        _aot_case(logit_fwd_kernel, rule, "fp32", 4, lanes, targets, difference=True)
        for rule in (RULES[0], RULES[2])
        for lanes, targets in ((32, ("sm_90a",)), (64, ("gfx942",)))
    ]
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for rule in RULES if dtype == "bf16" else RULES[:3]:
            for lanes, targets in ((32, ("sm_80", "sm_90a")), (64, ("gfx942",))):
                cases += [_aot_case(kernel, rule, dtype, itemsize, lanes, targets) for kernel in _KERNELS]
    return cases


_KERNELS: dict[Any, dict[str, Any]] = {
    logit_fwd_kernel: {"GRADIENT": True, "PHASE": 0, "LABELS": False},
    logit_bwd_kernel: {"KEEP_UNIT": True},
}


def _aot_case(
    kernel: triton.JITFunction,
    rule: Rule,
    dtype: str,
    itemsize: int,
    lanes: int,
    targets: tuple[str, ...],
    labels: bool = False,
    difference: bool = False,
) -> dict[str, Any]:
    forward = kernel is logit_fwd_kernel
    block, options = forward_config(119_547, lanes, rule, itemsize, labels) if forward else logit_config(119_547, lanes)
    pointers = dict.fromkeys(("student_ptr", "teacher_ptr", "gradient_ptr"), f"*{dtype}")
    floats = dict.fromkeys(("scale_ptr", "label_scale_ptr", "dloss_ptr", "loss_ptr", "stats_ptr"), "*fp32")
    floats["labels_ptr"] = "*i64"
    scalars = {"V": "i32", **{f"{x}_stride": "i32" for x in ("student", "teacher", "gradient")}}
    scalars |= dict.fromkeys(
        ("inv_s", "inv_t", "low_s", "low_t", "value_factor", "gradient_factor", "beta", "rest"), "fp32"
    )
    constants = {
        "RULE": rule.relative,
        "CENTRED": rule.centred,
        "MIXTURE": rule.mixture,
        "SOFTMAX": rule.softmax,
        "EQUAL": 2 if difference else True,
        "STATS": STATS,
        "VEC": 16 // itemsize,
        "BLOCK": block,
    }
    signature = {k: v for k, v in (pointers | floats | scalars).items() if k in kernel.arg_names}
    kind = "-labels" * labels + "-difference" * difference
    return {
        "name": f"{kernel.fn.__name__}-{rule.relative.fn.__name__}-{dtype}{kind}",
        "kernel": kernel,
        "signature": signature,
        "constants": constants | _KERNELS[kernel] | ({"LABELS": True} if labels else {}),
        "options": options,
        "divisible": [k for k in signature if k.endswith("_ptr")],
        "wide_loads": True,
        "targets": targets,
    }
