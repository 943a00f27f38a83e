"""select_topk: exactly k, ties, every dtype and backend, threads, NaN by name, lazy bases, memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sparse_cases import DTYPES, model, moved, sorted_selection
from torch import Tensor, nn

import fastdistil as fd
from fastdistil import _C
from fastdistil.sparse import _check
from fastdistil.sparse.select import select_topk

BACKENDS = ["reference", "cpu"]


def lists(mask: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in mask.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_a_stable_sort_of_everything(dtype: torch.dtype, backend: str) -> None:
    base = model(dtype)
    params = moved(base)
    total = sum(x.numel() for x in base.values())
    if dtype in (torch.bfloat16, torch.float16):  # differences of 16-bit numbers: many ties
        changes = torch.cat([(params[n].float() - base[n].float()).abs().reshape(-1) for n in base])
        assert len(changes.unique()) < 0.6 * total
    for k in (0, 1, 2, 777, total // 12, total - 1, total):
        mask = select_topk(params, base, k=k, backend=backend)
        assert mask.nnz == k
        assert lists(mask) == sorted_selection(params, base, k)
        assert all(index.dtype == torch.int32 for index in mask.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_first_tensor_and_position(backend: str) -> None:
    base = {"a": torch.zeros(70_000), "b": torch.zeros(200_000)}
    params = {"a": torch.zeros(70_000), "b": torch.zeros(200_000)}
    params["a"][::2] = 0.5
    params["b"][1::2] = -0.5
    params["b"][199_998] = 3.0
    mask = select_topk(params, base, k=60_001, backend=backend)
    assert mask["a"].tolist() == list(range(0, 70_000, 2))
    assert mask["b"].tolist() == [*range(1, 50_000, 2), 199_998]
    everything = select_topk(base, base, k=70_003, backend=backend)  # nothing changed at all
    assert everything["a"].tolist() == list(range(70_000))
    assert everything["b"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_and_neighbouring_floats(backend: str) -> None:
    one = torch.tensor(1.0)
    values = [
        0.0,
        1.0,
        torch.nextafter(one, 2 * one).item(),
        torch.nextafter(one, 0 * one).item(),
        1e-45,
        float("inf"),
        -3e38,
    ]
    params, base = {"x": torch.tensor(values)}, {"x": torch.zeros(len(values))}
    order = [5, 6, 2, 1, 3, 4, 0]
    for k in range(len(values) + 1):
        assert select_topk(params, base, k=k, backend=backend)["x"].tolist() == sorted(order[:k])


def test_mixed_dtypes_compare_in_float32() -> None:
    base = {"x": torch.randn(5000), "y": torch.randn(5000, dtype=torch.float64)}
    params = {"x": (base["x"] + 0.1 * torch.randn(5000)).bfloat16(), "y": base["y"].float() + 0.1 * torch.randn(5000)}
    mask = select_topk(params, base, k=900, backend="cpu")
    assert lists(mask) == lists(select_topk(params, base, k=900, backend="reference"))
    assert lists(mask) == sorted_selection(params, base, 900)


def test_threads_and_instruction_sets_change_nothing() -> None:
    base = {"x": torch.randn(700, 1001), "y": torch.randn(12345)}
    params = {name: (x + torch.randn(x.shape).mul(8).round() / 8) for name, x in base.items()}  # ties
    found, threads, isa = [], torch.get_num_threads(), _C.isa()
    try:
        for name in _C.isas():
            _C.use_isa(name)
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found.append(select_topk(params, base, density=0.08))
    finally:
        torch.set_num_threads(threads)
        _C.use_isa(isa)
    for mask in found:
        assert mask.nnz == round(0.08 * (700 * 1001 + 12345))
        assert all(torch.equal(mask[name], found[0][name]) for name in mask)


def test_views_modules_and_pairs() -> None:
    layer = nn.Linear(30, 40)
    base = {name: p.detach().clone() for name, p in layer.named_parameters()}
    with torch.no_grad():
        layer.weight += torch.randn(40, 30)
    assert lists(select_topk(layer, base, k=55)) == lists(select_topk(layer.named_parameters(), base.items(), k=55))
    turned = {"w": layer.weight.detach().t()}  # flat positions are those of the row-major order of the shape
    assert lists(select_topk(turned, {"w": base["weight"].t()}, k=9)) == lists(
        select_topk({"w": turned["w"].contiguous()}, {"w": base["weight"].t().contiguous()}, k=9)
    )


def test_include_and_exclude() -> None:
    base = model()
    params = moved(base)
    mask = select_topk(params, base, density=0.5, exclude=["head", "bias"])
    assert list(mask) == ["a.weight", "empty", "scalar", "b.weight"]
    assert mask.density == pytest.approx(0.5, abs=1e-4)
    assert list(select_topk(params, base, k=3, include="weight", exclude="b.")) == ["a.weight"]


class Lazy(Mapping[str, Tensor]):
    """Counts how many of its tensors are alive at once."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.alive, self.most, self.looks = tensors, 0, 0, 0

    def __getitem__(self, name: str) -> Tensor:
        owner = self

        class Counted(Tensor):
            def __del__(self) -> None:
                owner.alive -= 1

        self.alive += 1
        self.most, self.looks = max(self.most, self.alive), self.looks + 1
        return self.tensors[name].clone().as_subclass(Counted)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_a_lazy_base_is_read_tensor_by_tensor() -> None:
    base = model()
    params = moved(base)
    lazy = Lazy(base)
    assert lists(select_topk(params, lazy, k=500)) == lists(select_topk(params, base, k=500))
    assert lazy.looks == 3 * len(base)
    assert lazy.most <= 3  # the one in use, and what detach() makes of it


@pytest.mark.soak
def test_positions_beyond_int32_are_int64() -> None:
    size = 2**31 + 5
    memory = torch.zeros(size + 1, dtype=torch.bfloat16)  # which takes none as long as nobody writes
    memory[[3, 2**31, size]] = torch.tensor([1.0, -3.0, 0.5], dtype=torch.bfloat16)
    params, base = memory[1:], memory[:-1]  # one memory, read once for both: each number is a change at two positions
    small = torch.zeros(10)
    small[4] = 1.0
    mask = select_topk({"s": small, "x": params}, {"s": torch.zeros(10), "x": base}, k=4)
    assert mask["x"].tolist() == [2, 2**31 - 1, 2**31]
    assert mask["x"].dtype == torch.int64
    assert mask["s"].tolist() == [4]
    assert mask["s"].dtype == torch.int32


@pytest.mark.parametrize("k", [np.int64(3), np.int32(3), np.uint8(3), torch.tensor(3)], ids=lambda k: type(k).__name__)
def test_k_is_any_integer(k: Any) -> None:
    params = {"x": torch.tensor([0.0, 3.0, -2.0, 1.0, 0.5])}
    mask = select_topk(params, {"x": torch.zeros(5)}, k=k)
    assert mask["x"].tolist() == [1, 2, 3]
    assert fd.sparse.random_mask(params, k=k).nnz == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_random_mask_is_the_same_under_any_default_dtype(dtype: torch.dtype) -> None:
    params = {"x": torch.zeros(5000), "y": torch.zeros(70, 3)}
    expected = fd.sparse.random_mask(params, density=0.1, seed=3).digest()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        assert fd.sparse.random_mask(params, density=0.1, seed=3).digest() == expected
    finally:
        torch.set_default_dtype(before)


NAN = float("nan")
X = {"x": torch.zeros(4)}
BAD: list[tuple[tuple[Any, Any], dict[str, Any], type[Exception], str]] = [
    ((X, X), {}, ValueError, "k is None and density is None, expected exactly one"),
    ((X, X), {"k": 1, "density": 0.5}, ValueError, "k is 1 and density is 0.5, expected exactly one"),
    ((X, X), {"k": 5}, ValueError, "k is 5, expected 0 to the 4 elements"),
    ((X, X), {"k": -1}, ValueError, "k is -1, expected 0 to"),
    ((X, X), {"k": 1.0}, TypeError, "k is float, expected an int"),
    ((X, X), {"k": True}, TypeError, "k is bool, expected an int"),
    ((X, X), {"k": np.float64(1)}, TypeError, "k is float64, expected an int"),
    ((X, X), {"k": np.bool_(True)}, TypeError, "k is bool, expected an int"),
    ((X, X), {"k": torch.tensor(True)}, TypeError, "k is Tensor, expected an int"),
    ((X, X), {"density": 1.5}, ValueError, "density is 1.5, expected 0 to 1"),
    ((X, X), {"density": NAN}, ValueError, "density is nan, expected a finite number"),
    ((X, {}), {"k": 1}, ValueError, "base_params has no 'x', which params has"),
    ((X, {"x": torch.zeros(5)}), {"k": 1}, ValueError, r"base_params\['x'\] has shape \(5,\), expected \(4,\)"),
    (({"x": torch.zeros(4, dtype=torch.int64)}, X), {"k": 1}, TypeError, r"params\['x'\] has dtype torch.int64"),
    (({"x": [1.0]}, X), {"k": 1}, TypeError, r"params\['x'\] is list, expected a torch.Tensor"),
    (({"x": torch.tensor([0, 1, NAN, 0])}, X), {"k": 1}, ValueError, r"params\['x'\] holds NaN"),
    ((X, {"x": torch.tensor([0, 1, NAN, 0])}), {"k": 1}, ValueError, r"base_params\['x'\] holds NaN"),
    (({"x": torch.full((4,), -torch.inf)}, {"x": torch.full((4,), -torch.inf)}), {"k": 1}, ValueError, ".* hold the same infinity"),
    ((X, X), {"k": 1, "include": "y"}, ValueError, "include holds 'y', which is part of no parameter's name"),
    ((X, X), {"k": 1, "exclude": ["x"]}, ValueError, "include and exclude leave none of the 1 parameters"),
    ((5, X), {"k": 1}, TypeError, "params is int, expected a module, a mapping"),
    (([("x", X["x"]), ("x", X["x"])], X), {"k": 1}, ValueError, "params holds 'x' twice"),
    (([X["x"]], X), {"k": 1}, TypeError, "params holds Tensor, expected pairs"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "kind", "message"), BAD)
def test_bad_calls(arguments: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match="select_topk: " + message):
        select_topk(*arguments, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 65_536, 99_999])
def test_nan_is_found_wherever_it_is(dtype: torch.dtype, place: int) -> None:
    params, base = model(dtype), {}
    params["late"] = torch.zeros(100_000, dtype=dtype)
    base = {name: x.clone() for name, x in params.items()}
    params["late"][place] = NAN
    with pytest.raises(ValueError, match=r"params\['late'\] holds NaN"):
        select_topk(params, base, k=5)


def test_random_mask_is_uniform_and_repeatable() -> None:
    params = {"a": torch.zeros(4000), "b": torch.zeros(12_000), "head": torch.zeros(9)}
    mask = fd.sparse.random_mask(params, k=4000, exclude="head", seed=3)
    assert (mask.nnz, list(mask)) == (4000, ["a", "b"])
    assert 900 < len(mask["a"]) < 1100  # 1,000 expected, standard deviation 24
    assert 5500 < mask["b"].double().mean() < 6500
    assert mask.digest() == fd.sparse.random_mask(params, k=4000, exclude="head", seed=3).digest()
    assert mask.digest() != fd.sparse.random_mask(params, k=4000, exclude="head", seed=4).digest()


def test_masks_check_what_they_are_given() -> None:
    good = fd.sparse.SparseMask({"x": torch.tensor([0, 3], dtype=torch.int32)}, {"x": (2, 2)})
    assert (good.nnz, good.numel, good.density, len(good)) == (2, 4, 0.5, 1)
    assert repr(good) == "SparseMask(2 of 4 entries in 1 tensors)"
    for index, message in [
        (torch.tensor([3, 0]), "not ascending"),
        (torch.tensor([0, 0]), "not ascending"),
        (torch.tensor([0, 4]), "goes from 0 to 4, expected 0 to 3"),
        (torch.tensor([-1, 2]), "goes from -1 to 2"),
        (torch.tensor([0.5]), "expected a vector of int32 or int64"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            fd.sparse.SparseMask({"x": index}, {"x": (2, 2)})
    with pytest.raises(ValueError, match="shapes has no 'x'"):
        fd.sparse.SparseMask({"x": torch.tensor([0])}, {})
    assert _check.position_dtype(2**31 - 1) == torch.int32
    assert _check.position_dtype(2**31) == torch.int64


MEMORY = """
import ctypes, sys, torch
from pathlib import Path
from fastdistil.sparse import Checkpoint, files, select_topk
torch.manual_seed(0)
base = {str(i): torch.randn(4_000_000) for i in range(8)}
params = {n: x + torch.randn(4_000_000) for n, x in base.items()}
def rss(line):
    status = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
    return int(status[line].split()[0]) / 1024
select_topk({"0": params["0"]}, base, density=0.08)
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = rss("VmRSS")
mask = select_topk(params, base, density=0.08)
print(rss("VmHWM") - before, 4 * mask.nnz / 2**20)

files.write(sys.argv[1], base, {})
del base, mask
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = rss("VmRSS")
mask = select_topk(params, Checkpoint(sys.argv[1]), density=0.08)
print(rss("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_peak_memory(tmp_path: Path) -> None:
    """32M elements, 122 MiB a model: neither is copied, nothing is concatenated, and a base on disk is never resident
    whole, but a tensor of 15 MiB at a time."""
    run = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "base.safetensors"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peak, result, from_disk = map(float, run.stdout.split())
    assert peak - result < 64
    assert from_disk - result < 64
