"""Losses between hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fastdistil.backends import choose
from fastdistil.contracts.hidden import KINDS
from fastdistil.losses import _check
from fastdistil.ops.hidden import hidden_rows, hidden_total
from fastdistil.ops.hidden_layers import hidden_layers, hidden_projected_rows, hidden_projected_total

ACTIVATIONS = ("none", "gelu")
_NAME = "hidden_loss"

TensorOrLayers = Tensor | Sequence[Tensor]


def hidden_loss(
    student: TensorOrLayers,
    teacher: TensorOrLayers,
    *,
    kind: str = "mse",
    projection: TensorOrLayers | None = None,
    bias: TensorOrLayers | None = None,
    activation: str | None = None,
    weight: Tensor | None = None,
    layer_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The distance between hidden states, `h = act(student P^T + bias)` against the teacher's, row by row.

    On a GPU a list of layers is one launch without projections, and with them one for each chunk of rows, of all
    layers together; lists whose teachers differ in shape, or whose parts differ in dtype, go layer by layer.

    Args:
        student: (..., D_s) float32, bfloat16, float16 or float64, as all others, in any combination; or a list of such
            layers.
        teacher: (..., D_t), a constant, or as many layers. Without a projection D_t = D_s.
        kind: "mse" |h - t|^2 / D_t; "cosine" 1 - cos(h, t), where a zero vector has cos = 0 and no gradient; "kl"
            KL(softmax(t) || softmax(h)) over the D_t entries (XtremeDistil's option, arXiv 2004.05686).
        projection: P (D_t, D_s) as in torch.nn.Linear.weight, for all layers or a list with one for each.
        bias: (D_t,) as in torch.nn.Linear.bias, likewise; needs a projection.
        activation: None or "none", or "gelu" (the exact one), after projection and bias.
        weight: (...), bool or number per row; a row with weight 0 contributes 0 whatever it holds, and takes no part
            in the products with a projection (finding these rows synchronises with a GPU, once per call where the list
            is one launch, else once per layer).
        layer_weights: one finite number per layer, used as they are; by default 1 / number of layers each.
        reduction: "mean" = sum of w * l / sum of w, "sum", or "none" (...), float32, w * l per row.
        num_items: replaces the sum of w in "mean": a number or a tensor with one entry; 0 as in `logit_loss`.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        A scalar, or (...) for "none": float32 (float64 where an input is). 0 where all weights are 0.

    Raises:
        TypeError, ValueError: what came and what was wanted, by argument; a teacher that requires grad.
        NotImplementedError: in forward-mode differentiation (torch.func.jvp).

    Example:
        >>> import torch, fastdistil
        >>> student, teacher = torch.tensor([[1.0, 2.0], [5.0, 5.0]]), torch.tensor([[1.0, 4.0], [0.0, 0.0]])
        >>> fastdistil.hidden_loss(student, teacher, weight=torch.tensor([True, False])).item()
        2.0
        >>> wider = torch.nn.Linear(2, 3)
        >>> loss = fastdistil.hidden_loss(student, torch.zeros(2, 3), projection=wider.weight, bias=wider.bias)
        >>> loss.backward()
        >>> wider.weight.grad.shape
        torch.Size([3, 2])
    """
    _check.no_tangents(_NAME, student=student, teacher=teacher, projection=projection, bias=bias, weight=weight)
    _check.one_of(_NAME, "kind", kind, KINDS)
    _check.one_of(_NAME, "reduction", reduction, _check.REDUCTIONS)
    activation = "none" if activation is None else activation
    _check.one_of(_NAME, "activation", activation, ACTIVATIONS)
    layers = _layers("student", student)
    teachers = _layers("teacher", teacher, len(layers))
    projections = _optional_layers("projection", projection, len(layers))
    biases = _optional_layers("bias", bias, len(layers))
    factors = _layer_weights(layer_weights, len(layers))
    for s, t, p, c in zip(layers, teachers, projections, biases, strict=True):
        _check_layer(s, t, p, c)
    first = layers[0]
    shape = first.shape[:-1]
    for s in layers[1:]:
        _check.same_device(_NAME, "student", s, "its first layer", first.device)
        if s.shape[:-1] != shape:
            raise ValueError(
                f"{_NAME}: student has layers with rows {tuple(shape)} and {tuple(s.shape[:-1])}, expected equal ones"
            )
    name = choose(backend, first.device)

    wide = any(x is not None and x.dtype == torch.float64 for x in (*layers, *teachers, *projections, *biases))
    dtype = torch.float64 if wide else torch.float32
    rows_weight = None if weight is None else _check.row_weight(_NAME, weight, shape, first.device, dtype)
    scale = _check.row_scale(_NAME, math.prod(shape), rows_weight, reduction, num_items, first.device, dtype)
    if name == "triton" and not wide and len(layers) > 1 and _alike(teachers):
        common = (kind, activation, backend)
        if all(x is None for x in projections) and _alike([*layers, *teachers]):
            rows = _plain_layers(layers, teachers, scale, factors, *common)
            return rows.reshape(shape) if reduction == "none" else rows.sum()
        projected = [x for x in projections if x is not None]  # all or none
        if projected and all(len({x.dtype for x in xs}) == 1 for xs in (layers, projected)):
            dense = weight is None
            found = _projected_layers(
                layers, teachers, projected, biases, scale, factors, *common, dense, reduction == "none"
            )
            return found.reshape(shape) if reduction == "none" else found
    losses = [
        _layer(
            s, t, p, c, scale if factor == 1 else scale * factor, kind, activation, reduction, backend, weight is None
        )
        for s, t, p, c, factor in zip(layers, teachers, projections, biases, factors, strict=True)
    ]
    loss = losses[0]
    for other in losses[1:]:
        loss = loss + other
    return loss.reshape(shape) if reduction == "none" else loss


def _alike(tensors: list[Tensor]) -> bool:
    """One shape and dtype: one launch."""
    return len({(x.shape, x.dtype) for x in tensors}) == 1


def _plain_layers(
    layers: list[Tensor],
    teachers: list[Tensor],
    scale: Tensor,
    factors: list[float],
    kind: str,
    activation: str,
    backend: str,
) -> Tensor:
    """Rows (N,) of a list without projections, summed over its layers."""
    scales = torch.stack([scale * factor for factor in factors])
    flat = [[x.reshape(-1, x.shape[-1]) for x in xs] for xs in (layers, teachers)]
    rows: Tensor = hidden_layers(*flat, scales, kind, activation, backend).sum(0)
    return rows


def _projected_layers(
    layers: list[Tensor],
    teachers: list[Tensor],
    projections: list[Tensor],
    biases: list[Tensor | None],
    scale: Tensor,
    factors: list[float],
    kind: str,
    activation: str,
    backend: str,
    dense: bool,
    by_row: bool,
) -> Tensor:
    """Rows (N,) of a list with projections, summed over its layers, or their sum ()."""
    matrices, projection_of = _distinct(projections)
    shifts, bias_of = _distinct(biases)
    flat = [[x.reshape(-1, x.shape[-1]) for x in xs] for xs in (layers, teachers)]
    arguments = (*flat, matrices, shifts, scale, projection_of, bias_of, factors, kind, activation, backend, dense)
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (*layers, *matrices, *shifts)]
    if not by_row and any(wanted):
        total: Tensor = hidden_projected_total(*arguments, wanted, False)[0]
        return total
    rows: Tensor = hidden_projected_rows(*arguments)
    return rows if by_row else rows.sum()


def _distinct(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[int]]:
    """Each tensor once, and which of them a layer has: -1 for none."""
    found: list[Tensor] = []
    which = []
    for x in tensors:
        index = next((i for i, y in enumerate(found) if y is x), len(found) if x is not None else -1)
        if x is not None and index == len(found):
            found.append(x)
        which.append(index)
    return found, which


def _layer(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    kind: str,
    activation: str,
    reduction: str,
    backend: str,
    dense: bool,
) -> Tensor:
    """One layer's loss; see ops/hidden.py for which op serves which case."""
    states = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    arguments = (*states, projection, bias, scale, kind, activation, backend, dense)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (student, projection, bias)]
    at_once = projection is not None or student.device.type == "cpu"  # where computing twice costs more than keeping
    if at_once and reduction != "none" and any(wanted):
        total: Tensor = hidden_total(*arguments, wanted, False)[0]
        return total
    rows: Tensor = hidden_rows(*arguments)
    return rows if reduction == "none" else rows.sum()


def _layers(name: str, value: object, count: int | None = None) -> list[Tensor]:
    """`value` as a list of layers, `count` of them where that is known."""
    if isinstance(value, Tensor):
        found: list[object] = [value]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        found = list(value)
    else:
        raise _check.no_tensor(_NAME, name, value, "a torch.Tensor or a list of them")
    if not found:
        raise ValueError(f"{_NAME}: {name} is an empty list, expected at least one layer")
    if count is not None and len(found) != count:
        raise ValueError(f"{_NAME}: {name} has {len(found)} layers, expected {count} to match student")
    return [_check.float_tensor(_NAME, name, x) for x in found]


def _optional_layers(name: str, value: TensorOrLayers | None, count: int) -> list[Tensor | None]:
    """A tensor serves all layers."""
    if value is None:
        return [None] * count
    if isinstance(value, Tensor):
        return [_check.float_tensor(_NAME, name, value)] * count
    return cast("list[Tensor | None]", _layers(name, value, count))


def _layer_weights(layer_weights: Sequence[float] | None, count: int) -> list[float]:
    if layer_weights is None:
        return [1.0 / count] * count
    if isinstance(layer_weights, (str, Tensor)) or not isinstance(layer_weights, Sequence):
        raise TypeError(f"{_NAME}: layer_weights is {type(layer_weights).__name__}, expected a list of numbers")
    if len(layer_weights) != count:
        raise ValueError(f"{_NAME}: layer_weights has {len(layer_weights)} entries, expected {count}, one a layer")
    return [_check.number(_NAME, "layer_weights", x) for x in layer_weights]


def _check_layer(student: Tensor, teacher: Tensor, projection: Tensor | None, bias: Tensor | None) -> None:
    for name, x in (("student", student), ("teacher", teacher)):
        if x.ndim < 1 or x.shape[-1] == 0:
            raise ValueError(f"{_NAME}: {name} has shape {tuple(x.shape)}, expected (..., D) with D > 0")
    _check.constant(_NAME, "teacher", teacher)
    for name, y in (("teacher", teacher), ("projection", projection), ("bias", bias)):
        if y is not None:
            _check.same_device(_NAME, name, y, "student", student.device)
    if projection is None:
        if bias is not None:
            raise ValueError(f"{_NAME}: bias came without a projection, expected both or neither")
        _check.same_shape(
            _NAME, "teacher", teacher, "student", student.shape, "for two widths pass a projection (D_t, D_s)"
        )
        return
    size_s, size_t = student.shape[-1], teacher.shape[-1]
    if teacher.shape[:-1] != student.shape[:-1]:
        wanted = (*student.shape[:-1], size_t)
        raise ValueError(f"{_NAME}: teacher has shape {tuple(teacher.shape)}, expected {wanted} to match student")
    if tuple(projection.shape) != (size_t, size_s):
        raise ValueError(
            f"{_NAME}: projection has shape {tuple(projection.shape)}, expected {(size_t, size_s)}, (D_t, D_s)"
        )
    if bias is not None and tuple(bias.shape) != (size_t,):
        raise ValueError(f"{_NAME}: bias has shape {tuple(bias.shape)}, expected {(size_t,)}, (D_t,)")
