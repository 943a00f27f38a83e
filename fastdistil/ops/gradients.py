"""Gradients that come with the value: a forward pass computes them for an incoming gradient of 1 and keeps them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdistil.backends import backends, get

# Bytes from which on a GPU reading the factor in a kernel of its own, to leave the gradient alone where it is 1, beats
# torch's multiplication: its launch costs the host some 20 us more, in which a GPU moves this much.
SMALLEST_SKIPPED = 32 << 20


def hand_out(ctx: Any, dloss: Tensor, again: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The kept gradients times `dloss` (), in place: the first backward pass needs no memory of its own.

    The caller owns what it gets, so a second pass through a retained graph computes them `again`. Under torch.compile,
    which traces this function once for all passes, they are multiplied out of place.
    """
    kept: tuple[Tensor, ...] | None = ctx.kept
    if torch.compiler.is_compiling() or type(dloss) is not Tensor:  # the latter where AOTAutograd traces by itself
        assert kept is not None  # never handed out while tracing
        return tuple(g * dloss for g in kept)
    ctx.kept = None
    gradients = again() if kept is None else kept
    for gradient in gradients:
        multiply_(gradient, dloss)
    return gradients


def multiply_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, () or one a row (N,) of a gradient (N, V), float32; only reads the factor where it is 1."""
    on_cpu = gradient.device.type == "cpu"
    if on_cpu and bool((factor == 1).all()):  # the usual case, and looking costs nothing here
        return
    fits = gradient.dtype != torch.float64 and (factor.ndim == 1 or gradient.is_contiguous())
    if not on_cpu and fits and gradient.nbytes >= SMALLEST_SKIPPED and backends()["triton"] is True:
        get("scale", "triton", gradient.device).scale_(gradient, factor)
    else:  # a dimension of its own keeps torch from rounding the factor to 16 bits first
        torch.mul(gradient, factor[:, None] if factor.ndim else factor.reshape(1), out=gradient)


def refuse_double_backward(function: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{function}: its gradient cannot be differentiated again (create_graph=True)")
