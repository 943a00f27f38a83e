"""Set before anything imports triton: without a GPU its kernels run in the interpreter, on CPU tensors."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

import fastdistil
from fastdistil.backends import interpreting

if interpreting():
    import triton_interpreter_fast  # noqa: F401


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Each test draws its own numbers, the same ones every time, in whatever folder its file is."""
    folderless = f"tests/{request.node.path.name}::{request.node.nodeid.partition('::')[2]}"
    value = zlib.crc32(folderless.encode())
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


# Files that take minutes, or whose one test does: begun last, they would leave the other workers idle.
LONG = (
    "test_aot",
    "test_cuda_host",
    "test_linear_logit",
    "test_logit",
    "test_attention_contract",
    "test_topk_confident",
)
LONG += ("test_capture_compile", "test_logit_terms", "test_package", "test_vocab_parallel", "test_demo", "test_bench")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out what `pairs` says. Marks the tests of modules that use DEVICE. On a GPU they run first, for they are the
    ones that prove it; else the longest files do."""
    if interpreting():
        items[:] = [item for item in items if _taken(item)]
    for item in items:
        if getattr(getattr(item, "module", None), "DEVICE", None) is not None:
            item.add_marker(pytest.mark.device)
    if DEVICE.type == "cuda":
        items.sort(key=lambda item: item.get_closest_marker("device") is None)  # stable: else in their order
    else:
        items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def _taken(item: pytest.Item) -> bool:
    """False for combinations that `pairs` leaves out. With n no more than the values of each of three parameters, every
    pair of values is met, which is what shows a fault: hardly one needs three."""
    marker = item.get_closest_marker("pairs")
    if marker is None:
        return True
    params: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
    if params.get("backend", "triton") != "triton":
        return True
    count, *wanted = marker.args
    total = 0
    for names, values, *_ in (mark.args for mark in item.iter_markers("parametrize")):
        names = [names] if isinstance(names, str) else names
        if names[0] in wanted:
            rows = [value if len(names) > 1 else (value,) for value in values]
            same = [all(params[n] is x for n, x in zip(names, row, strict=True)) for row in rows]
            total += same.index(True)
    return bool(total % count == 0)


def available(*names: str) -> list[str]:
    """Those of the backends that can run here on the tests' device."""
    status = fastdistil.backends()
    on_cpu = DEVICE.type == "cpu"
    return [n for n in names if status[n] is True and n != ("cuda" if on_cpu else "cpu")]
