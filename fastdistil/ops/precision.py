"""What must not touch the products inside a loss: autocast, and torch's permission to round float32 factors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# The permission of each library, beside torch.set_float32_matmul_precision, which sets both.
_read: Any = torch._C._get_fp32_precision_getter
_write: Any = torch._C._set_fp32_precision_setter
_LIBRARIES = ("mkldnn", "cuda")
_REDUCED = ("bf16", "tf32")


class _FullPrecision:
    """Float32 products in full, while any thread is inside.

    torch keeps the permission for the process, not for a thread. So the first thread to enter takes it away and the
    last one to leave gives it back; in between, products elsewhere in the process are exact as well. A setting that
    somebody has changed meanwhile is left alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: tuple[str | None, ...] | None = None  # None: nothing was taken away
        self._within: tuple[str | None, ...] = ()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1 and _may_round():
                self._before = _state()
                _refuse(self._before)
                self._within = _state()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._before is not None:
                if _state() == self._within:
                    _restore(self._before)
                self._before = None


# Float32 products are computed in float32, whatever torch.set_float32_matmul_precision allows.
full_precision = _FullPrecision()


def _state() -> tuple[str | None, ...]:
    """The setting of torch.set_float32_matmul_precision, None where the newer one has left its words, then the newer
    one's of each library."""
    try:
        common: str | None = torch._C._get_float32_matmul_precision()
    except RuntimeError:
        common = None
    return common, *(_read(library, "matmul") for library in _LIBRARIES)


def _may_round() -> bool:
    return _read("mkldnn", "matmul") in _REDUCED or _read("cuda", "matmul") in _REDUCED


def _refuse(state: tuple[str | None, ...]) -> None:
    if state[0] not in (None, "highest"):  # the libraries' settings follow, and torch finds no contradiction
        torch._C._set_float32_matmul_precision("highest")
    for library in _LIBRARIES:
        if _read(library, "matmul") in _REDUCED:
            _write(library, "matmul", "ieee")


def _restore(state: tuple[str | None, ...]) -> None:
    common, *libraries = state
    if common not in (None, "highest"):
        torch._C._set_float32_matmul_precision(common)
    for library, wanted in zip(_LIBRARIES, libraries, strict=True):
        if _read(library, "matmul") != wanted:
            _write(library, "matmul", "none")  # what torch.backends.fp32_precision says, where that is what was read
        if _read(library, "matmul") != wanted:
            _write(library, "matmul", wanted)


def with_exact_products(function: Callable[P, R]) -> Callable[P, R]:
    """Runs `function`, whose first argument is a tensor, with autocast off on that tensor's device and with float32
    products in full.

    Under torch.autocast a trainer's losses are called with its matrix products in 16 bits; after
    torch.set_float32_matmul_precision("medium") its float32 products round their factors to bfloat16 on CPUs that
    multiply it, and to TF32 on a GPU. A difference of logits or scores that is formed like that is lost
    (docs/losses.md, section 1)."""

    @wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        with full_precision:
            if not torch.is_autocast_enabled(first.device.type):
                return function(*args, **kwargs)
            with torch.autocast(first.device.type, enabled=False):
                return function(*args, **kwargs)

    return inner
