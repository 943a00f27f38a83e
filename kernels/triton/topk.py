"""topk_logit_loss in Triton: launch configuration and launchers; the kernels are in topk_kernels.py."""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
from fastdistil.kernels.triton.divergence import RULES, Rule
from fastdistil.kernels.triton.logit import _vector, logit_config
from fastdistil.kernels.triton.topk_kernels import topk_bwd_kernel, topk_fwd_kernel
from torch import Tensor

from fastdistil.contracts.topk import BUCKET, RENORMALIZE, STATS, ZERO


def topk_config(columns: int, k: int, lanes: int) -> tuple[int, int, dict[str, int]]:
    """Columns a tile, named columns a tile, and options: the logit kernels' tile, at most one float64 score a thread,
    and registers for two blocks of 8 warps a multiprocessor; left alone, ptxas takes 80 and spills. Not yet tuned on a
    GPU."""
    block, options = logit_config(columns, lanes)
    if lanes == 32:
        options["maxnreg"] = 128
    return block, min(max(triton.next_power_of_2(k), 16), 256), options


def _split(temperature: float) -> tuple[float, float]:
    """1/T as the sum of two float32: kernel arguments are float32, scores are not."""
    high = struct.unpack("f", struct.pack("f", 1.0 / temperature))[0]
    return high, 1.0 / temperature - high


def _arguments(student: Tensor, columns: Tensor, gradient: Tensor | None) -> tuple[list[int], dict[str, Any], int]:
    (rows, width), k = student.shape, columns.shape[1]
    block, kblock, options = topk_config(width, k, lanes=64 if torch.version.hip else 32)
    tensors = (student,) if gradient is None else (student, gradient)
    sizes = [width, k, student.stride(0), tensors[-1].stride(0)]
    return sizes, {"STATS": STATS, "VEC": _vector(rows, *tensors), "BLOCK": block, **options}, kblock


def topk_fwd(
    student: Tensor,
    values: Tensor,
    columns: Tensor,
    rest: Tensor,
    row_scale: Tensor,
    loss: Tensor,
    stats: Tensor,
    gradient: Tensor | None,
    **rule: Any,
) -> None:
    """As fastdistil.reference.topk.topk_fwd, for float32, bfloat16 and float16."""
    sizes, constants, kblock = _arguments(student, columns, gradient)
    divergence = RULES[rule["divergence"]]
    if student.shape[0]:
        topk_fwd_kernel[(student.shape[0],)](
            student, values, columns, rest, row_scale, loss, stats, student if gradient is None else gradient, *sizes,
            *_split(rule["temperature"]), rule["value_factor"], rule["beta"], 1.0 - rule["beta"],
            RULE=divergence.relative, CENTRED=divergence.centred, MIXTURE=divergence.mixture, TAIL=rule["tail"],
            GRADIENT=gradient is not None, KBLOCK=kblock, **constants,
        )  # fmt: skip


def topk_bwd(
    student: Tensor,
    columns: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    gradient: Tensor,
    dloss: Tensor,
    keep_unit: bool,
    temperature: float,
) -> None:
    """As fastdistil.reference.topk.topk_bwd, for float32, bfloat16 and float16."""
    sizes, constants, _ = _arguments(student, columns, gradient)
    if student.shape[0]:
        topk_bwd_kernel[(student.shape[0],)](
            student, columns, row_scale, dloss, stats, gradient, *sizes, 1.0 / temperature, KEEP_UNIT=keep_unit,
            **constants,
        )  # fmt: skip


def aot_cases() -> list[dict[str, Any]]:
    """Every rule in bf16, the first in other dtypes and with the other tails; V 119,547 (odd), K 64."""
    cases = []
    for lanes, targets in ((32, ("sm_80", "sm_90a")), (64, ("gfx942",))):
        cases += [_aot_case(rule, BUCKET, "bf16", lanes, targets) for rule in RULES if rule.softmax]
        cases += [_aot_case(RULES[0], BUCKET, dtype, lanes, targets) for dtype in ("fp16", "fp32")]
        cases += [_aot_case(RULES[0], tail, "bf16", lanes, targets) for tail in (RENORMALIZE, ZERO)]
        cases += [_aot_case(None, BUCKET, dtype, lanes, targets) for dtype in ("bf16", "fp32")]
    return cases


def _aot_case(rule: Rule | None, tail: int, dtype: str, lanes: int, targets: tuple[str, ...]) -> dict[str, Any]:
    """The forward kernel with its gradient, or, without a rule, the backward kernel."""
    kernel = topk_bwd_kernel if rule is None else topk_fwd_kernel
    block, kblock, options = topk_config(119_547, 64, lanes)
    types = {
        **dict.fromkeys(("student_ptr", "gradient_ptr"), f"*{dtype}"),
        **dict.fromkeys(("scale_ptr", "dloss_ptr", "loss_ptr"), "*fp32"),
        **dict.fromkeys(("values_ptr", "rest_ptr", "stats_ptr"), "*fp64"),
        "chosen_ptr": "*i32",
        **dict.fromkeys(("V", "K", "student_stride", "gradient_stride"), "i32"),
        **dict.fromkeys(("inv_high", "inv_low", "value_factor", "beta", "rest"), "fp32"),
    }
    constants: dict[str, Any] = {"STATS": STATS, "VEC": 8 if dtype != "fp32" else 4, "BLOCK": block}
    if rule is None:
        constants |= {"KEEP_UNIT": True}
    else:
        constants |= {"RULE": rule.relative, "CENTRED": rule.centred, "MIXTURE": rule.mixture}
        constants |= {"TAIL": tail, "GRADIENT": True, "KBLOCK": kblock}
    signature = {k: v for k, v in types.items() if k in kernel.arg_names}
    label = "bwd" if rule is None else rule.relative.fn.__name__
    return {
        "name": f"{kernel.fn.__name__}-{label}-{tail}-{dtype}",
        "kernel": kernel,
        "signature": signature,
        "constants": constants,
        "options": options,
        "divisible": [k for k in signature if k.endswith("_ptr")],
        "wide_loads": True,
        "targets": targets,
    }
