"""SparseAdamW in the hands of a trainer: state, groups, schedulers, GradScaler, accelerate, and inside of the backward."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
from typing import Any

import pytest
import torch
from sparse_cases import HYPER, LAYERS, flat, gradients, masks, network, run_steps
from torch import Tensor, nn

from fastdistil.sparse import SparseAdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dict_continues_bit_identically(dtype: torch.dtype) -> None:
    def fresh() -> tuple[nn.Module, SparseAdamW, Any]:
        model = network(dtype)
        optimizer = SparseAdamW(model.named_parameters(), masks(model), **HYPER, l1=0.1)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    whole, optimizer, scheduler = fresh()
    run_steps(whole, optimizer, range(12), scheduler)
    first, optimizer, scheduler = fresh()
    run_steps(first, optimizer, range(5), scheduler)
    buffer = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict(), scheduler.state_dict()], buffer)
    second, optimizer, scheduler = fresh()
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    for thing, state in zip((second, optimizer, scheduler), states, strict=True):
        thing.load_state_dict(state)
    assert all(s["exp_avg"].dtype == torch.float32 for s in optimizer.state.values() if "exp_avg" in s)
    run_steps(second, optimizer, range(5, 12), scheduler)
    for name in LAYERS:
        assert torch.equal(flat(whole, name), flat(second, name))


def test_groups_and_schedulers() -> None:
    model, dense = network(), network()
    mask = masks(model, head=True)
    pairs = dict(model.named_parameters())
    body = {"params": [(n, p) for n, p in pairs.items() if n.startswith("0.")], "lr": 1e-2, "weight_decay": 0.2}
    head = {"params": [(n, p) for n, p in pairs.items() if n.startswith("2.")]}
    ours = SparseAdamW([body, head], mask, lr=1e-3)
    theirs = torch.optim.AdamW(
        [{"params": list(dense[0].parameters()), "lr": 1e-2, "weight_decay": 0.2}, {"params": list(dense[2].parameters())}],
        lr=1e-3, weight_decay=0.0,
    )  # fmt: skip
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1 / (1 + s)) for o in (ours, theirs)]
    for step in range(8):
        for m, o, s in ((model, ours, schedules[0]), (dense, theirs, schedules[1])):
            gradients(m, step)
            o.step()
            s.step()
    for name in LAYERS:
        chosen = mask[name].long()
        torch.testing.assert_close(flat(model, name)[chosen], flat(dense, name)[chosen], rtol=1e-5, atol=1e-7)


def test_parameters_without_gradient_and_closures() -> None:
    model = network()
    optimizer = SparseAdamW(model.named_parameters(), masks(model))
    model[2].requires_grad_(False)
    before = flat(model, "2.weight")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 31)).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    for _ in range(30):
        last = optimizer.step(closure).item()
    assert last < first
    assert torch.equal(flat(model, "2.weight"), before)


def test_grad_scaler() -> None:
    model, plain = network(), network()
    ours = SparseAdamW(model.named_parameters(), masks(model), **HYPER)
    same = SparseAdamW(plain.named_parameters(), masks(plain), **HYPER)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    data = torch.randn(16, 31)
    for step in range(4):
        scaler.scale(model(data).square().mean()).backward()
        if step == 2:
            model[0].weight.grad[0, 0] = math.inf  # this step must be skipped
        scaler.step(ours)
        scaler.update()
        ours.zero_grad()
        if step != 2:
            plain(data).square().mean().backward()
            same.step()
            same.zero_grad()
    for name in LAYERS:
        torch.testing.assert_close(flat(model, name), flat(plain, name), rtol=1e-6, atol=1e-7)


def test_accelerate() -> None:
    from accelerate import Accelerator

    model, plain = network(), network()
    same = SparseAdamW(plain.named_parameters(), masks(plain), **HYPER)
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, SparseAdamW(model.named_parameters(), masks(model), **HYPER))
    data = torch.randn(16, 31)
    for _ in range(3):
        accelerator.backward(wrapped(data).square().mean())
        accelerator.clip_grad_norm_(wrapped.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        plain(data).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        same.step()
        same.zero_grad()
    for name in LAYERS:
        assert torch.equal(flat(model, name), flat(plain, name))


# ---- in backward


def test_step_in_backward_is_the_same_update() -> None:
    model, plain = network(), network()
    ours = SparseAdamW(model.named_parameters(), masks(model), **HYPER, step_in_backward=True)
    same = SparseAdamW(plain.named_parameters(), masks(plain), **HYPER)
    scheduler = torch.optim.lr_scheduler.LambdaLR(ours, lambda s: 1.0)
    data = torch.randn(16, 31)
    for _ in range(5):
        model(data).square().mean().backward()
        assert all(p.grad is None for p in model.parameters())
        ours.step()
        scheduler.step()
        plain(data).square().mean().backward()
        same.step()
        same.zero_grad()
    for name in LAYERS:
        assert torch.equal(flat(model, name), flat(plain, name))
    ours.remove_hooks()
    model(data).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_step_in_backward_refuses_accumulation_and_ends_with_its_owner() -> None:
    model = network()
    optimizer = SparseAdamW(model, masks(model), step_in_backward=True)
    model(torch.randn(2, 31)).sum().backward()
    with pytest.raises(RuntimeError, match="got a second gradient before step"):
        model(torch.randn(2, 31)).sum().backward()
    optimizer.step()
    model.zero_grad()
    del optimizer
    gc.collect()
    before = flat(model, "2.bias")
    model(torch.randn(2, 31)).sum().backward()
    assert torch.equal(flat(model, "2.bias"), before)
    assert model[2].bias.grad is not None


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_of_model_and_optimizer_goes_its_own_way(copied: Any, in_backward: bool) -> None:
    def step(model: nn.Module, optimizer: SparseAdamW, data: Tensor) -> None:
        optimizer.zero_grad()
        model(data).square().mean().backward()
        assert all((p.grad is None) == in_backward for p in model.parameters())
        optimizer.step()

    model, data = network(), torch.randn(16, 31)
    optimizer = SparseAdamW(model, masks(model), **HYPER, l1=0.1, step_in_backward=in_backward)
    step(model, optimizer, data)
    other, its = copied((model, optimizer))
    step(model, optimizer, data)
    assert not torch.equal(flat(other, "0.weight"), flat(model, "0.weight"))
    step(other, its, data)
    for name in LAYERS:
        assert torch.equal(flat(other, name), flat(model, name))
    its.load_state_dict(optimizer.state_dict())
