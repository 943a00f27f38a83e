"""What autocast must not touch: the products inside a loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function`, whose first argument is a tensor, with autocast off on that tensor's device.

    Under torch.autocast a trainer's losses are called with its matrix products in 16 bits; a difference of logits or
    scores that is formed in 16 bits is lost (docs/losses.md, section 1)."""

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        if not torch.is_autocast_enabled(first.device.type):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return inner
