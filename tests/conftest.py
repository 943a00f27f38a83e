"""Set before anything imports triton: without a GPU its kernels run in the interpreter, on CPU tensors."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

import fastdistil
from fastdistil.backends import interpreting

if interpreting():
    import triton_interpreter_fast  # noqa: F401
    import triton_interpreter_fix  # noqa: F401


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Each test draws its own numbers, the same ones every time."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """torch.empty is full of NaN, so that an element which a kernel forgets to write is seen."""
    fill, deterministic = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of modules that use DEVICE, and lets them run first: on a GPU they are the ones that prove it."""
    for item in items:
        if getattr(getattr(item, "module", None), "DEVICE", None) is not None:
            item.add_marker(pytest.mark.device)
    items.sort(key=lambda item: item.get_closest_marker("device") is None)  # stable: else in their order


def available(*names: str) -> list[str]:
    """Those of the backends that can run here on the tests' device."""
    status = fastdistil.backends()
    on_cpu = DEVICE.type == "cpu"
    return [n for n in names if status[n] is True and n != ("cuda" if on_cpu else "cpu")]
