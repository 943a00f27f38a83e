"""Moments of rows of logits in Triton: one program a row, which it reads twice.

Floor: 2 reads x N x V x bytes an element over the copy bandwidth; the second reads come from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdistil.kernels.triton.numerics import FUSION
from torch import Tensor

from fastdistil.contracts.row_moments import MOMENTS


@triton.jit
def _top(row_ptr, V, BLOCK: tl.constexpr):
    """The row's maximum and the first column that holds it."""
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, V, BLOCK):
        columns = begin + lanes
        z = tl.load(row_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        better = z > best
        best = tl.where(better, z, best)
        where = tl.where(better, columns, where)
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, where, V), 0)


@triton.jit
def _moment(weight, x):
    """weight * x, where a weight of 0 counts for nothing however far its logit lies."""
    return tl.where(weight == 0.0, 0.0, weight * x)


@triton.jit
def row_moments_kernel(
    student_ptr, teacher_ptr, scale_ptr, moments_ptr, V, student_stride, teacher_stride, inv_student, inv_teacher,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """moments (N, COLUMNS) as fastdistil.reference.row_moments writes them; rows of scale 0 stay as they are."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(scale_ptr + row) != 0.0:
        s_ptr = student_ptr + row * student_stride
        t_ptr = teacher_ptr + row * teacher_stride
        max_s, top_s = _top(s_ptr, V, BLOCK)
        max_t, top_t = _top(t_ptr, V, BLOCK)
        unit_s = tl.where(max_s == float("-inf"), 0.0, max_s)
        unit_t = tl.where(max_t == float("-inf"), 0.0, max_t)
        lanes = tl.arange(0, BLOCK)
        others_s = tl.zeros((BLOCK,), tl.float32)
        first_s = tl.zeros((BLOCK,), tl.float32)
        others_t = tl.zeros((BLOCK,), tl.float32)
        first_t = tl.zeros((BLOCK,), tl.float32)
        cross = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, V, BLOCK):
            columns = begin + lanes
            z_s = tl.load(s_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
            z_t = tl.load(t_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
            a = (z_s - unit_s) * inv_student
            b = (z_t - unit_t) * inv_teacher
            p = tl.exp(a)
            q = tl.exp(b)
            # 1 + others has no digits of the others where one column is far above them.
            others_s += tl.where(columns == top_s, p - 1.0, p)
            first_s += _moment(p, a)
            others_t += tl.where(columns == top_t, q - 1.0, q)
            first_t += _moment(q, b)
            cross += _moment(q, a)
        out = moments_ptr + row * COLUMNS
        tl.store(out, max_s * inv_student)
        tl.store(out + 1, tl.sum(others_s, 0))
        tl.store(out + 2, tl.sum(first_s, 0))
        tl.store(out + 3, max_t * inv_teacher)
        tl.store(out + 4, tl.sum(others_t, 0))
        tl.store(out + 5, tl.sum(first_t, 0))
        tl.store(out + 6, tl.sum(cross, 0))
        tl.store(out + 7, top_s.to(tl.float32))
        tl.store(out + 8, top_t.to(tl.float32))


def row_moments_config(columns: int) -> tuple[int, dict[str, int]]:
    """Columns a tile, four a thread: one 16-byte load of float32; with eight, sm_100a spills at the 80 registers that
    it takes. Not yet tuned on a GPU."""
    block = min(max(triton.next_power_of_2(columns), 128), 1024)
    return block, {"num_warps": block // 128} | FUSION


def row_moments(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    moments: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> None:
    """As fastdistil.reference.row_moments.row_moments, for any dtype but float64."""
    rows, columns = student.shape
    block, options = row_moments_config(columns)
    moments.zero_()
    if rows:
        row_moments_kernel[(rows,)](
            student, teacher, row_scale, moments, columns, student.stride(0), teacher.stride(0),
            1 / student_temperature, 1 / teacher_temperature, COLUMNS=MOMENTS, BLOCK=block, **options,
        )  # fmt: skip


def aot_cases() -> list[dict[str, object]]:
    block, options = row_moments_config(119_547)
    rest = {"scale_ptr": "*fp32", "moments_ptr": "*fp32", "inv_student": "fp32", "inv_teacher": "fp32"}
    rest |= dict.fromkeys(("V", "student_stride", "teacher_stride"), "i32")
    return [
        {
            "name": f"row_moments_kernel-{kind}",
            "kernel": row_moments_kernel,
            "signature": {"student_ptr": f"*{kind}", "teacher_ptr": f"*{kind}"} | rest,
            "constants": {"COLUMNS": MOMENTS, "BLOCK": block},
            "options": options,
            "divisible": ["student_ptr", "teacher_ptr", "scale_ptr", "moments_ptr", "student_stride", "teacher_stride"],
        }
        for kind in ("fp32", "bf16")
    ]
