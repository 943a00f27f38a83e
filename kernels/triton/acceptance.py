"""ln of the sum of min(p, q) of rows of logits in Triton: one program a row, which it reads once.

Floor: 2 reads x N x V x bytes an element over the copy bandwidth, from L2 where the row's moments were taken before.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdistil.kernels.triton.numerics import FUSION
from torch import Tensor

from fastdistil.contracts.acceptance import LEVELS


@triton.jit
def acceptance_kernel(
    student_ptr, teacher_ptr, scale_ptr, levels_ptr, log_ptr, V, student_stride, teacher_stride, inv_student,
    inv_teacher, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log_acceptance (N,) as fastdistil.reference.acceptance writes it; rows of scale 0 stay as they are."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(scale_ptr + row) != 0.0:
        s_ptr = student_ptr + row * student_stride
        t_ptr = teacher_ptr + row * teacher_stride
        level_s, log_s = tl.load(levels_ptr + row * COLUMNS), tl.load(levels_ptr + row * COLUMNS + 1)
        level_t, log_t = tl.load(levels_ptr + row * COLUMNS + 2), tl.load(levels_ptr + row * COLUMNS + 3)
        lanes = tl.arange(0, BLOCK)
        largest = tl.full((), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, V, BLOCK):
            columns = begin + lanes
            z_s = tl.load(s_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
            z_t = tl.load(t_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
            a = (z_s - level_s) * inv_student - log_s
            b = (z_t - level_t) * inv_teacher - log_t
            lower = tl.where((b < a) | (b != b), b, a)  # NaN where either is
            # Relative to the largest term so far: the sum may lie far below the smallest float.
            top = tl.maximum(largest, tl.max(lower, 0))
            unit = tl.where(top == float("-inf"), 0.0, top)
            total = total * tl.exp(largest - unit) + tl.exp(lower - unit)
            largest = top
        unit = tl.where(largest == float("-inf"), 0.0, largest)
        tl.store(log_ptr + row, unit + tl.log(tl.sum(total, 0)))


def acceptance_config(columns: int) -> tuple[int, dict[str, int]]:
    """As the row moments', which read the same rows. Not yet tuned on a GPU."""
    block = min(max(triton.next_power_of_2(columns), 128), 1024)
    return block, {"num_warps": block // 128} | FUSION


def acceptance(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    levels: Tensor,
    log_acceptance: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> None:
    """As fastdistil.reference.acceptance.acceptance, for any dtype but float64."""
    rows, columns = student.shape
    block, options = acceptance_config(columns)
    log_acceptance.zero_()
    if rows:
        acceptance_kernel[(rows,)](
            student, teacher, row_scale, levels, log_acceptance, columns, student.stride(0), teacher.stride(0),
            1 / student_temperature, 1 / teacher_temperature, COLUMNS=LEVELS, BLOCK=block, **options,
        )  # fmt: skip


def aot_cases() -> list[dict[str, object]]:
    block, options = acceptance_config(119_547)
    rest = {
        "scale_ptr": "*fp32",
        "levels_ptr": "*fp32",
        "log_ptr": "*fp32",
        "inv_student": "fp32",
        "inv_teacher": "fp32",
    }
    rest = {**rest, **dict.fromkeys(("V", "student_stride", "teacher_stride"), "i32")}
    aligned = ["student_ptr", "teacher_ptr", "scale_ptr", "levels_ptr", "log_ptr", "student_stride", "teacher_stride"]
    return [
        {
            "name": f"acceptance_kernel-{kind}",
            "kernel": acceptance_kernel,
            "signature": {"student_ptr": f"*{kind}", "teacher_ptr": f"*{kind}"} | rest,
            "constants": {"COLUMNS": LEVELS, "BLOCK": block},
            "options": options,
            "divisible": aligned,
        }
        for kind in ("fp32", "bf16")
    ]
