"""The sparse kernels on a GPU against the reference on the CPU: the same selection, the same numbers."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, available
from sparse_cases import DTYPES, model, moved
from torch import nn

import fastdistil as fd
from fastdistil.sparse import SparseAdamW, select_topk

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")


@pytest.mark.parametrize("backend", available("reference", "cuda"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection(dtype: torch.dtype, backend: str) -> None:
    base = model(dtype)
    params = moved(base)
    params["a.weight"] = (base["a.weight"] + torch.randn(257, 301).round()).to(dtype)  # ties
    there = [{name: x.to(DEVICE) for name, x in tensors.items()} for tensors in (params, base)]
    total = sum(x.numel() for x in base.values())
    for k in (0, 1, 777, total // 3, total):
        here = select_topk(params, base, k=k, backend="reference")
        found = select_topk(*there, k=k, backend=backend)
        lazy = select_topk(there[0], base, k=k, backend=backend)  # the base on the CPU, moved one by one
        for name, index in here.items():
            assert torch.equal(found[name].cpu(), index)
            assert torch.equal(lazy[name].cpu(), index)
    there[0]["b.weight"][1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"params\['b.weight'\] holds NaN"):
        select_topk(*there, k=5, backend=backend)


@pytest.mark.parametrize("backend", available("reference", "triton", "cuda"))
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_steps(dtype: torch.dtype, backend: str) -> None:
    start = model(dtype)
    mask = fd.sparse.random_mask(start, density=0.1, exclude="head", seed=1)
    found = []
    for device, name in ((torch.device("cpu"), "reference"), (DEVICE, backend)):
        params = {n: nn.Parameter(x.clone().to(device)) for n, x in start.items()}
        optimizer = SparseAdamW(params, mask, lr=3e-3, weight_decay=0.1, l1=0.3, backend=name)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            for param in params.values():
                param.grad = torch.randn(param.shape, generator=generator).to(device, dtype)
            optimizer.step()
        found.append({n: optimizer.state[p].get("master", p.detach()).cpu().float() for n, p in params.items()})
        for n, p in params.items():
            if n in mask:
                outside = torch.ones(p.numel(), dtype=torch.bool)
                outside[mask[n].long()] = False
                assert torch.equal(p.detach().cpu().reshape(-1)[outside], start[n].reshape(-1)[outside])
    for n, expected in found[0].items():
        torch.testing.assert_close(found[1][n], expected, rtol=1e-5, atol=1e-6)
