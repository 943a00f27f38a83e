"""Kept gradients times the incoming gradient (ops/families.py, kernels/triton/scale.py)."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, available
from torch import Tensor

from fastdistil.ops import families

LOW = [torch.float32, torch.bfloat16, torch.float16]


def expected(x: Tensor, factor: Tensor) -> Tensor:
    """One product in float32, rounded once."""
    return (x.float() * (factor[:, None] if factor.ndim else factor)).to(x.dtype)


@pytest.mark.skipif(not available("triton"), reason="Triton cannot run here")
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(3, 70_001), (5, 7), (1, 1), (0, 4)])
def test_kernel_with_one_factor(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    from fastdistil.kernels.triton.scale import scale_

    x = torch.randn(shape, device=DEVICE).to(dtype)
    for number in (0.3, 1.0, -2.0, float("nan")):
        factor, found = torch.tensor(number, device=DEVICE), x.clone()
        scale_(found, factor)
        torch.testing.assert_close(found, expected(x, factor), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not available("triton"), reason="Triton cannot run here")
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("columns", [1, 119, 2500])
def test_kernel_with_a_factor_a_row(dtype: torch.dtype, columns: int) -> None:
    from fastdistil.kernels.triton.scale import scale_

    whole = torch.randn(4, columns + 5, device=DEVICE).to(dtype)
    found, factor = whole.clone(), torch.tensor([1.0, 0.3, 0.0, float("nan")], device=DEVICE)
    scale_(found[:, :columns], factor)
    torch.testing.assert_close(found[:, :columns], expected(whole[:, :columns], factor), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[:, columns:], whole[:, columns:])  # what lies between the rows


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("rows", [False, True], ids=["one", "each"])
@pytest.mark.parametrize("smallest", [0, 1 << 40], ids=["kernel", "torch"])
def test_multiplication_rounds_once(
    dtype: torch.dtype, rows: bool, smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "SMALLEST_SKIPPED", smallest)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(6, 33, device=DEVICE).to(dtype)
    factor = torch.rand(6 if rows else (), device=DEVICE, dtype=wide) + 0.5
    found = x.clone()
    families.multiply_(found, factor)
    product = (x.to(wide) * (factor[:, None] if rows else factor)).to(dtype)
    assert torch.equal(found, product)
