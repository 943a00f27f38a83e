"""Gradients that come with the value: a forward pass computes them for an incoming gradient of 1 and keeps them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
    if dloss.device.type == "cpu" and float(dloss) == 1:  # the usual case, and looking costs nothing here
        return gradients
    return tuple(g.mul_(dloss) for g in gradients)


def refuse_double_backward(function: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{function}: its gradient cannot be differentiated again (create_graph=True)")
