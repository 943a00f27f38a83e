"""The squared difference of two heads' logits without any logits (docs/losses.md, section 5).

With X = [h / T, 1 / T] and Y = [W, b] the logits are X Y^T, so that a row of the difference has the squared norm
u (W^T W) u^T with U = [X_s - X_t, X_t] and W = [Y_s, Y_s - Y_t]: time linear in N + V, and nothing cancels as the
student's factors near its teacher's. Where only the logits are alike (factors in another basis) the halves of U W^T
cancel each other: then all is done again in float64, on a GPU, which should not wait to be asked, from the beginning.
Heads of different width have no difference to form, and are in float64 too.

FLOPs: 6 V D^2 for the Gram matrices (none for frozen heads that were seen before), 8 N D^2 for the rows, 4 V D^2 for
the gradient of the weight; the chunks of linear_logit.py take 2 N V (2 D_s + D_t) and 2 N V D_s for the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastdistil.backends.memory import new_empty
from fastdistil.contracts.logit import LogitRule
from fastdistil.ops.products import float64_cost

# How much faster a GPU multiplies in the chunks' 16 bits than in float32 (data sheets, not a record).
LOW_PRECISION_GAIN = 12.0
# A row's squared difference this many times smaller than those of its two halves has lost too many of float32's digits.
CANCELLED = 16.0

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
Head = tuple[Tensor, Tensor | None]  # weight (V, D), bias (V,)


@dataclass
class _Grams:
    """Y_s^T Y_s, Y_s^T E and E^T E with E = Y_s - Y_t; for heads of different width E stands for Y_t."""

    first: Tensor
    mixed: Tensor
    second: Tensor


# student weight -> dtype -> (what the heads were then, their Gram matrices)
_frozen: Any = WeakTensorKeyDictionary()


def forget() -> None:
    """Drops the kept Gram matrices."""
    _frozen.clear()


def pays(student: Tensor, student_weight: Tensor, teacher: Tensor, wanted: tuple[bool, bool, bool]) -> bool:
    """Whether this form needs less time than the chunks, by operations."""
    (rows, size_s), size_t, columns = student.shape, teacher.shape[1], student_weight.shape[0]
    chunks = 2.0 * rows * columns * (size_s + size_t + size_s * (wanted[0] + wanted[1]))
    if size_s == size_t:
        own = 8.0 * rows * size_s**2 + columns * size_s**2 * (6.0 + 4.0 * wanted[1])
    else:
        grams = 2.0 * columns * (size_s**2 + size_s * size_t + size_t**2)
        own = grams + 2.0 * rows * (size_s + size_t) ** 2 + 2.0 * columns * size_s * (size_s + size_t) * wanted[1]
    if student.device.type != "cpu" or size_s != size_t:
        own *= float64_cost(student.device)
    if student.device.type != "cpu" and student.dtype in (torch.float16, torch.bfloat16):
        own *= LOW_PRECISION_GAIN
    if not wanted[1] and _frozen.get(student_weight) is not None:
        own = 8.0 * rows * size_s**2
    return own < chunks


def compute(
    student: Tensor,
    teacher: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    scale: Tensor,
    rule: LogitRule,
    chunk_bytes: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:
    """As `linear_logit._chunks` for the mse; chunk_bytes bounds the blocks of the heads."""
    heads = ((student_weight, student_bias), (teacher_weight, teacher_bias))
    arguments = (student, teacher, heads, scale, rule, chunk_bytes, wanted)
    if student.device.type == "cpu" and student.shape[1] == teacher.shape[1]:
        found = _compute(*arguments, scale.dtype)
        if found is not None:
            return found
    found = _compute(*arguments, torch.float64)
    assert found is not None
    return found


def _compute(
    student: Tensor,
    teacher: Tensor,
    heads: tuple[Head, Head],
    scale: Tensor,
    rule: LogitRule,
    chunk_bytes: int,
    wanted: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Gradients] | None:
    """None where less than float64 is not enough."""
    (student_weight, student_bias), (_, teacher_bias) = heads
    (_, size_s), size_t, columns = student.shape, teacher.shape[1], student_weight.shape[0]
    same = size_s == size_t
    biased = student_bias is not None or teacher_bias is not None
    block = max(1, chunk_bytes // (4 * (size_s + size_t + 2) * dtype.itemsize))
    x_s = _rows(student, rule["student_temperature"], biased, dtype)
    x_t = _rows(teacher, rule["teacher_temperature"], biased, dtype)
    grams = _grams(heads, biased, dtype, block, frozen=not (wanted[1] or wanted[2]))
    left, right = _apart(student, teacher, x_t, rule, biased) if same else x_s, x_t if same else -x_t
    # U [W^T Y_s, W^T E]: (A_s - A_t) Y_s and (A_s - A_t) E for every row
    first, second = left @ grams.first, right @ grams.second
    halves = torch.linalg.vecdot(first, left) + torch.linalg.vecdot(second, right)
    first.addmm_(right, grams.mixed.T)
    second.addmm_(left, grams.mixed)
    values = torch.linalg.vecdot(first, left) + torch.linalg.vecdot(second, right)
    unit = (scale * (rule["value_factor"] / columns)).to(dtype)
    if dtype != torch.float64 and bool(((CANCELLED * values < halves) & (unit != 0)).any()):
        return None
    rows = (values * unit).to(scale.dtype)
    factor = (2 * unit)[:, None]
    dstudent = (first[:, :size_s] * (factor / rule["student_temperature"])).to(scale.dtype) if wanted[0] else None
    if not (wanted[1] or wanted[2]):
        return rows, (dstudent, None, None)
    x = x_s * factor
    m_left, m_right = left.T @ x, right.T @ x
    dweight = new_empty(scale, student_weight.shape) if wanted[1] else None
    dbias = scale.new_empty(columns) if wanted[2] else None
    for start in range(0, columns, block):
        part = slice(start, start + block)
        y, e = _block(heads, part, biased, dtype)
        dy = y @ m_left + e @ m_right
        if dweight is not None:
            dweight[part] = dy[:, :size_s]
        if dbias is not None:
            dbias[part] = dy[:, -1]
    return rows, (dstudent, dweight, dbias)


def _rows(hidden: Tensor, temperature: float, biased: bool, dtype: torch.dtype) -> Tensor:
    x = hidden.to(dtype)
    if biased:
        x = torch.cat((x, x.new_ones(len(x), 1)), 1)
    return x if temperature == 1 else x / temperature


def _apart(student: Tensor, teacher: Tensor, x_t: Tensor, rule: LogitRule, biased: bool) -> Tensor:
    """X_s - X_t, whose digits are those of h_s - h_t: the quotients' own rounding would be its."""
    apart = student.to(x_t.dtype) - teacher.to(x_t.dtype)
    if biased:
        apart = torch.cat((apart, apart.new_zeros(len(apart), 1)), 1)
    t_s, t_t = rule["student_temperature"], rule["teacher_temperature"]
    apart = apart if t_s == 1 else apart / t_s
    return apart if t_s == t_t else apart.add_(x_t, alpha=t_t / t_s - 1)


def _block(heads: tuple[Head, Head], part: slice, biased: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows `part` of Y_s, and of Y_s - Y_t, or of Y_t where the widths differ."""
    y = []
    for weight, bias in heads:
        rows = weight[part].to(dtype)
        if biased:
            column = rows.new_zeros(len(rows)) if bias is None else bias[part].to(dtype)
            rows = torch.cat((rows, column[:, None]), 1)
        y.append(rows)
    return y[0], y[0] - y[1] if y[0].shape == y[1].shape else y[1]


def _grams(heads: tuple[Head, Head], biased: bool, dtype: torch.dtype, block: int, frozen: bool) -> _Grams:
    # Tensors of inference mode have no version that would tell of a change.
    if not frozen or any(x is not None and x.is_inference() for head in heads for x in head):
        return _accumulate(heads, biased, dtype, block)
    state = tuple(_state(x) for head in heads for x in head)
    known = _frozen.setdefault(heads[0][0], {})
    if dtype not in known or known[dtype][0] != state:
        known[dtype] = (state, _accumulate(heads, biased, dtype, block))
    grams: _Grams = known[dtype][1]
    return grams


def _accumulate(heads: tuple[Head, Head], biased: bool, dtype: torch.dtype, block: int) -> _Grams:
    weight = heads[0][0]
    size_s, size_t = (head[0].shape[1] + biased for head in heads)
    shapes = ((size_s, size_s), (size_s, size_t), (size_t, size_t))
    first, mixed, second = (weight.new_zeros(shape, dtype=dtype) for shape in shapes)
    for start in range(0, weight.shape[0], block):
        y, e = _block(heads, slice(start, start + block), biased, dtype)
        first.addmm_(y.T, y)
        mixed.addmm_(y.T, e)
        second.addmm_(e.T, e)
    return _Grams(first, mixed, second)


def _state(x: Tensor | None) -> tuple[Any, ...]:
    """What changes when a head does: its memory, its version, and on a CPU, where looking does not wait for a device,
    a weighted sum of its entries, which also sees writes through .data."""
    if x is None:
        return ()
    if x.device.type != "cpu":
        return (x.data_ptr(), x._version, x.shape)
    matrix = x if x.ndim == 2 else x[:, None]
    single = partial(torch.linspace, dtype=torch.float32, device=x.device)  # whatever the default dtype
    columns, rows = single(0.5, 1.5, matrix.shape[1]), single(1.0, 2.0, len(matrix))
    parts = [slice(start, start + 8192) for start in range(0, len(matrix), 8192)]
    total = sum(float(torch.dot(torch.mv(matrix[part].float(), columns), rows[part])) for part in parts)
    return (x.data_ptr(), x._version, x.shape, total)
