"""SparseAdamW: torch.optim.AdamW's numbers inside the mask, not a bit changed outside, and all that surrounds it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sparse_cases import DTYPES, HYPER, LAYERS, flat, gradients, masks, network, run_steps
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor  # without memory of its own, as a DTensor

import fastdistil as fd
from fastdistil import _C
from fastdistil.backends import interpreting
from fastdistil.sparse import SparseAdamW, SparseMask

BACKENDS = ["reference", "cpu", *(["triton"] if interpreting() else [])]


def inside(mask: SparseMask, name: str) -> Tensor:
    found = torch.ones(mask.shapes[name].numel(), dtype=torch.bool) if name in mask else None
    assert found is not None
    found[:] = False
    found[mask[name].long()] = True
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_trajectory_of_torch_adamw(backend: str) -> None:
    """100 steps: the selected entries as a dense AdamW has them, the head too, the rest untouched bit for bit."""
    sparse, dense = network(), network()
    start = {name: flat(sparse, name) for name in LAYERS}
    mask = masks(sparse)
    ours = SparseAdamW(sparse.named_parameters(), mask, **HYPER, backend=backend)
    theirs = torch.optim.AdamW(dense.parameters(), **HYPER)
    for step in range(100 if backend != "triton" else 20):
        for model, optimizer in ((sparse, ours), (dense, theirs)):
            gradients(model, step)
            optimizer.step()
    for name in LAYERS:
        a, b = flat(sparse, name), flat(dense, name)
        if name in mask:
            chosen = inside(mask, name)
            assert torch.equal(a[~chosen], start[name][~chosen])
            a, b = a[chosen], b[chosen]
        assert (a - b).norm() <= 1e-5 * b.norm()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert not torch.equal(a, start[name][inside(mask, name)] if name in mask else start[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_the_update(backend: str) -> None:
    """A backward through weights that have been updated since is an error, not a wrong gradient."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = SparseAdamW({"w": weight}, {"w": torch.tensor([1], dtype=torch.int32)}, backend=backend)
    loss = weight.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_agree_with_float64(dtype: torch.dtype, backend: str) -> None:
    """16-bit parameters: the masters hold what a float32 run on the same gradients would."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernel is for float32 and 16-bit parameters")
    model, exact = network(dtype), network(dtype).double()
    mask = masks(model, head=True)
    ours = SparseAdamW(model.named_parameters(), mask, **HYPER, l1=0.3, backend=backend)
    truth = SparseAdamW(exact.named_parameters(), mask, **HYPER, l1=0.3, backend="reference")
    for step in range(10):
        gradients(model, step)
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.double()
        ours.step()
        truth.step()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        state = ours.state[p]
        assert state["exp_avg"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        chosen = mask[name].long()
        best = state.get("master", p.detach().reshape(-1)[chosen])
        assert (best.double() - q.detach().reshape(-1)[chosen]).norm() <= 1e-6 * q.detach().reshape(-1)[chosen].norm()
        torch.testing.assert_close(p.detach().reshape(-1)[chosen], best.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_positions(backend: str) -> None:
    """int64, as tensors of 2^31 elements and more have them."""
    found = []
    for dtype in (torch.int32, torch.int64):
        model = network()
        mask = {name: index.to(dtype) for name, index in masks(model).items()}
        optimizer = SparseAdamW(model, mask, **HYPER, backend=backend)
        for step in range(3):
            gradients(model, step)
            optimizer.step()
        found.append([flat(model, name) for name in LAYERS])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_small_steps_reach_bf16_through_the_master() -> None:
    """1,000 steps of 1e-5 at 1.0, where bfloat16's spacing is 8e-3: without a master nothing would ever move."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = SparseAdamW({"w": weight}, {"w": torch.tensor([1, 3], dtype=torch.int32)}, lr=1e-5)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["master"], torch.full((2,), 0.99), rtol=0, atol=1e-4)
    assert weight.tolist() == [1.0, 0.98828125, 1.0, 0.98828125]
    with torch.no_grad():
        weight[1] = 5.0  # someone else's write: the master gives way
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["master"][0] == pytest.approx(5.0, abs=1e-3)


def test_l1_pulls_towards_the_start() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    optimizer = SparseAdamW({"w": weight}, {"w": torch.tensor([0, 2], dtype=torch.int32)}, lr=0.01, l1=6.0)
    loss = torch.tensor([5.0, 0.0, -5.0, 0.0])  # gradient of the data; the pull is 6 / 2 entries = 3
    for _ in range(50):
        weight.grad = loss.clone()
        optimizer.step()
    away = weight.detach() - torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert away[0] < -0.1 < 0.1 < away[2]
    assert away[[1, 3]].tolist() == [0.0, 0.0]
    for _ in range(400):
        weight.grad = torch.zeros(4)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0, 2.0, 3.0, 4.0]), atol=0.05, rtol=0)


def test_state_is_for_the_mask_alone() -> None:
    weight = nn.Parameter(torch.randn(1000, 100))
    mask = fd.sparse.random_mask({"w": weight}, density=0.08)
    optimizer = SparseAdamW({"w": weight}, mask)
    weight.grad = torch.randn(1000, 100)
    optimizer.step()
    held = sum(x.nbytes for x in optimizer.state[weight].values() if isinstance(x, Tensor)) + mask["w"].nbytes
    assert held <= 2 * weight.nbytes / 7
    assert optimizer.state[weight]["exp_avg"].shape == (8000,)


def test_threads_and_instruction_sets() -> None:
    found, threads, isa = [], torch.get_num_threads(), _C.isa()
    try:
        for name in _C.isas():
            _C.use_isa(name)
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                torch.manual_seed(3)
                weight = nn.Parameter(torch.randn(400, 300))
                optimizer = SparseAdamW({"w": weight}, fd.sparse.random_mask({"w": weight}, density=0.4), **HYPER)
                for _ in range(3):
                    weight.grad = torch.randn(400, 300)
                    optimizer.step()
                found.append(weight.detach().clone())
    finally:
        torch.set_num_threads(threads)
        _C.use_isa(isa)
    for i, other in enumerate(found):
        assert torch.equal(other, found[i - i % 3])  # threads change nothing
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-7)  # an instruction set a rounding


# ---- bad calls


def index(*positions: int) -> Tensor:
    return torch.tensor(positions, dtype=torch.int32)


W = {"w": nn.Parameter(torch.zeros(2, 3))}
BAD: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    (W, {"v": index(0)}, {}, ValueError, "mask has 'v', which named_params has not"),
    (W, {"w": index(6)}, {}, ValueError, r"positions\['w'\] goes from 6 to 6, expected 0 to 5"),
    (W, SparseMask({"w": index(0)}, {"w": (3, 2)}), {}, ValueError, r"has shape \(2, 3\), expected \(3, 2\)"),
    ([W["w"]], {}, {}, TypeError, "named_params holds Parameter, expected pairs"),
    ({}, {}, {}, ValueError, "named_params is empty"),
    ({"w": nn.Parameter(torch.zeros(2, 3).t())}, {}, {}, ValueError, "has strides"),
    ({"w": torch.zeros(2, dtype=torch.complex64)}, {}, {}, TypeError, "has dtype torch.complex64"),
    ({"w": torch.zeros(2, device="meta")}, {}, {}, TypeError, "is on the meta device, expected a torch.Tensor that is"),
    ({"w": TwoTensor(torch.zeros(2), torch.zeros(2))}, {}, {}, TypeError, "is TwoTensor, expected a torch.Tensor that"),
    (W, {}, {"lr": -1.0}, ValueError, "lr is -1.0, expected at least 0"),
    (W, {}, {"eps": -1.0}, ValueError, "eps is -1.0"),
    (W, {}, {"betas": (0.9, 1.0)}, ValueError, r"betas is \(0.9, 1.0\)"),
    (W, {}, {"weight_decay": "x"}, TypeError, "weight_decay is str, expected a number"),
    (W, {}, {"l1": math.nan}, ValueError, "l1 is nan"),
]


@pytest.mark.parametrize(("params", "mask", "options", "kind", "message"), BAD)
def test_bad_construction(params: Any, mask: Any, options: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        SparseAdamW(params, mask, **options)


def test_bad_states_and_gradients() -> None:
    model = network()
    optimizer = SparseAdamW(model, masks(model))
    run_steps(model, optimizer, range(1))
    state = optimizer.state_dict()
    other = SparseAdamW(model, masks(model, density=0.3))
    with pytest.raises(ValueError, match="state_dict was saved with mask '[0-9a-f]{16}', expected"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="was saved with mask None"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    cut = {**state, "state": {0: {**state["state"][0], "exp_avg": torch.zeros(3)}}}
    with pytest.raises(ValueError, match=r"exp_avg of '0.weight' has shape \(3,\), expected"):
        optimizer.load_state_dict(cut)
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = SparseAdamW(embedding, {"weight": index(3, 7)})
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="the gradient of 'weight' is torch.sparse_coo"):
        optimizer.step()


@pytest.mark.parametrize("mask", [{"w": index(1, 5)}, {}], ids=["masked", "dense"])
def test_parameters_that_were_swapped_under_the_optimizer(mask: dict[str, Tensor]) -> None:
    """Sharding trainers replace a parameter's memory: writing at the old positions would be outside of it."""
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = SparseAdamW({"w": weight}, mask)
    weight.grad = torch.ones(2, 3)
    optimizer.step()
    for other in (torch.zeros(3, 2).t(), torch.zeros(4)):
        weight.data = other
        weight.grad = torch.ones_like(other)
        with pytest.raises(ValueError, match="'w' has (become|4 elements, but a state of another number)"):
            optimizer.step()


def test_state_follows_its_parameter() -> None:
    """accelerate moves a model behind its optimizer's back; kernels must not get addresses of another device."""
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = SparseAdamW({"w": weight}, {"w": index(1, 5)}, l1=0.1)
    assert optimizer.state[weight]["base"].device.type == "cpu"
    torch.utils.swap_tensors(weight, nn.Parameter(torch.ones(2, 3, device="meta")))
    state = optimizer._fitting_state(weight, "w")
    assert {state[key].device.type for key in ("base", "exp_avg", "exp_avg_sq")} == {"meta"}
