"""What logit_loss and linear_logit_loss take besides the divergence: labels, a vocabulary map, statistics."""

from __future__ import annotations

import math
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from fastdistil.losses import _check


class LogitStats(NamedTuple):
    """Of each row's tempered distributions p (student) and q (teacher), float32, detached; 0 in rows of weight 0."""

    student_entropy: Tensor  # (...,) H(p), nats
    teacher_entropy: Tensor  # (...,) H(q), nats
    cross_entropy: Tensor  # (...,) H(q, p), nats
    agreement: Tensor  # (...,) 1.0 where p and q have the same most likely column
    acceptance: Tensor  # (...,) sum of min(p, q): the rate at which speculative decoding accepts a draft from p


def row_stats(found: Tensor, rows: torch.Size) -> LogitStats:
    """From the ops' (N, ROW_STATISTICS)."""
    return LogitStats(*(x.reshape(rows) for x in found.unbind(-1)))


def vocab_map(
    function: str, value: object, columns: int, teacher_columns: int, device: torch.device, part: bool
) -> Tensor:
    """The checked map as int64, which may be empty where it is a rank's `part`. Its entries are looked at on a CPU
    alone: a GPU would have to be waited for."""
    found = _integers(function, "vocab_map", value, torch.Size((columns,)), device)
    if found.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(found.min()), int(found.max())
        if low < -1 or high >= teacher_columns:
            raise ValueError(
                f"{function}: vocab_map has entries from {low} to {high}, expected -1 (no partner) to "
                f"{teacher_columns - 1}, the teacher's last column"
            )
        if high < 0 and not part:
            raise ValueError(f"{function}: vocab_map maps no column, expected at least one")
    return found


def renormalized(function: str, value: object, partners: Tensor | None, divergence: str, group: str) -> bool:
    """The checked `renormalize`."""
    if not isinstance(value, bool):
        raise TypeError(f"{function}: renormalize is {type(value).__name__}, expected a bool")
    if value:
        return True
    if partners is None:
        raise ValueError(f"{function}: renormalize is False without a vocab_map, expected both or neither")
    if divergence == "mse":
        raise ValueError(
            f"{function}: renormalize is False with divergence 'mse', expected one of probabilities: it compares "
            "logits, which nothing normalises"
        )
    if group:
        raise ValueError(
            f"{function}: renormalize is False with a group, expected one of the two: a rank's map points to its own "
            "teacher columns alone"
        )
    return False


def row_weights(
    function: str, weight: object, shift: object, rows: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """The checked weight of each row, flat; with `shift` that of the token which the row predicts, 0 for the last."""
    if not isinstance(shift, bool):
        raise TypeError(f"{function}: shift is {type(shift).__name__}, expected a bool")
    found = None if weight is None else _check.row_weight(function, weight, rows, device, dtype)
    if not shift:
        return found
    if not rows:
        raise ValueError(f"{function}: shift came with a single row, expected sequences of them: (..., S, V)")
    each = torch.ones(rows, dtype=dtype, device=device) if found is None else found.reshape(rows)
    return _next(each, 0).reshape(-1)


def _next(x: Tensor, last: float) -> Tensor:
    """Each entry's successor along the last dimension."""
    return torch.nn.functional.pad(x[..., 1:], (0, min(1, x.shape[-1])), value=last)


def labels(
    function: str,
    value: object,
    label_weight: object,
    ignore_index: int,
    weight: Tensor | None,
    rows: torch.Size,
    columns: int | None,
    device: torch.device,
    label_num_items: object = None,
    shift: bool = False,
) -> tuple[Tensor | None, Tensor | None, float]:
    """Flat labels int64 and which of them count, both (N,), and the checked label_weight; None where that is 0.
    "teacher" is for labels that are made of the teacher's logits: none yet, and every row counts.
    Rows that are ignored or of weight 0 may hold anything, and get label 0, which no kernel can read beyond.
    weight: what `row_weights` returned. columns: None where they lie on several ranks, which check together."""
    if label_num_items is not None and value is None:
        raise ValueError(f"{function}: label_num_items came without labels, expected both or neither")
    if label_weight is None:
        if value is not None:
            raise ValueError(
                f"{function}: labels came without label_weight, expected both: label_weight is the cross entropy's "
                "share of the loss, 0 to 1 (0 leaves the labels out)"
            )
        return None, None, 0.0
    alpha = _check.number(function, "label_weight", label_weight)
    if not 0 <= alpha <= 1:
        raise ValueError(f"{function}: label_weight is {alpha}, expected 0 to 1")
    if value is None:
        if alpha > 0:
            raise ValueError(f"{function}: label_weight is {alpha} without labels, expected both or neither")
        return None, None, 0.0
    if isinstance(value, str):
        _check.one_of(function, "labels", value, ("teacher",))
        every = torch.ones(math.prod(rows), dtype=torch.bool, device=device) if weight is None else weight != 0
        return (None, every, alpha) if alpha > 0 else (None, None, 0.0)
    found = _integers(function, "labels", value, rows, device)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, Integral):
        raise TypeError(f"{function}: ignore_index is {ignore_index!r}, expected an integer")
    found = (_next(found, int(ignore_index)) if shift else found).reshape(-1)
    counted = found != ignore_index
    if weight is not None:
        counted = counted & (weight != 0)
    if columns is not None and device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to wait
        wrong = found[counted & ((found < 0) | (found >= columns))]
        if len(wrong):
            raise ValueError(
                f"{function}: labels has {int(wrong[0])}, expected 0 to {columns - 1} or ignore_index = {ignore_index}"
            )
    return (torch.where(counted, found, 0), counted, alpha) if alpha > 0 else (None, None, 0.0)


def scales(
    function: str,
    rows: int,
    weight: Tensor | None,
    counted: Tensor | None,
    alpha: float,
    reduction: str,
    num_items: object,
    label_num_items: object,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The factors (rows,) of each row's divergence and of its cross entropy; for "mean" each has its denominator."""
    scale = _check.row_scale(function, rows, weight, reduction, num_items, device, dtype)
    if counted is None:
        if label_num_items is not None:  # with labels that have no share it is checked, and not needed
            _check.given_items(function, reduction, label_num_items, device, dtype, "label_num_items")
        return scale, None
    labelled = counted.to(dtype) if weight is None else weight * counted
    items, name = (num_items, "num_items") if label_num_items is None else (label_num_items, "label_num_items")
    label_scale = _check.row_scale(function, rows, labelled, reduction, items, device, dtype, name)
    return scale * (1 - alpha), label_scale * alpha


def group_name(function: str, group: object) -> str:
    """The process group's name for the ops, "" for None."""
    if group is None:
        return ""
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"{function}: group is {type(group).__name__}, expected a torch.distributed.ProcessGroup")
    found: str = group.group_name
    return found


def caps(
    function: str, student_scale: object, student_cap: object, teacher_scale: object, teacher_cap: object
) -> tuple[float, float, float, float]:
    """The checked logit scales and softcaps (0 for none)."""
    found = []
    for side, scale, cap in (("student", student_scale, student_cap), ("teacher", teacher_scale, teacher_cap)):
        found.append(_check.positive(function, f"{side}_logit_scale", scale))
        found.append(0.0 if cap is None else _check.positive(function, f"{side}_softcap", cap))
    return found[0], found[1], found[2], found[3]


def _integers(function: str, name: str, value: object, shape: torch.Size, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        raise _check.no_tensor(function, name, value)
    _check.no_dtensor(function, name, value)
    if value.dtype not in (torch.int64, torch.int32, torch.int16):
        way = _check.way_to_integers(name, value)
        raise TypeError(f"{function}: {name} has dtype {value.dtype}, expected int64{way}")
    if value.shape != shape:
        came, way = tuple(value.shape), _way_to_shape(name, value.shape, shape)
        raise ValueError(f"{function}: {name} has shape {came}, expected {tuple(shape)}{way}")
    _check.same_device(function, name, value, "the logits", device)
    return _check.usable(value).to(torch.int64)


def _way_to_shape(name: str, came: torch.Size, wanted: torch.Size) -> str:
    """What is mostly meant by integers of another shape than the rows'."""
    if name != "labels":
        return ""
    if came[:-1] == wanted and came:
        return " (labels.argmax(-1), where they are one-hot)"
    if came.numel() == wanted.numel():
        return f" (labels.reshape{tuple(wanted)} has it)"
    if came[:-1] == wanted[:-1] and came and wanted and abs(came[-1] - wanted[-1]) == 1:
        return " (shift=True takes a causal model's logits and labels as they are, unsliced)"
    return ""
