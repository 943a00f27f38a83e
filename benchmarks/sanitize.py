"""A small run of every CUDA C++ kernel, for compute-sanitizer: aligned, odd and strided rows, all divergences;
a selection and sparse steps."""

from __future__ import annotations

import sys

import torch

import fastdistil
from fastdistil.contracts.logit import DIVERGENCES

SHAPES = ((3, 1), (3, 7), (2, 1024), (2, 2049), (1, 32_003))
ALL_DTYPES = 2049  # columns at which every dtype runs: a launch under the sanitizer takes a hundred times as long
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def main() -> int:
    status = fastdistil.backends()["cuda"]
    if status is not True:
        print(f"nothing to check: {status}")
        return 0
    runs = 0
    for rows, columns in SHAPES:
        for dtype in DTYPES if columns == ALL_DTYPES else DTYPES[:1]:
            wide = torch.randn(2, rows, columns + 3, device="cuda", dtype=dtype)
            for divergence in DIVERGENCES:
                for view in (wide[..., :columns].contiguous(), wide[..., 1 : columns + 1]):
                    _logit(view[0], view[1], divergence)
                    runs += 1
    for dtype in DTYPES:
        _sparse(dtype)
    torch.cuda.synchronize()
    print(f"{runs} runs of logit_loss and {len(DTYPES)} of a sparse selection and its steps on the cuda backend")
    return 0


def _logit(student: torch.Tensor, teacher: torch.Tensor, divergence: str) -> None:
    """Fresh gradient, in place, one row skipped, and a loss that is not the last thing computed."""
    weight = torch.ones(student.shape[0], device="cuda")
    weight[0] = 0.0
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        view = leaf.view_as(leaf)
        loss = fastdistil.logit_loss(
            view, teacher, divergence=divergence, weight=weight, inplace_backward=inplace, backend="cuda"
        )
        (2 * loss).backward()


def _sparse(dtype: torch.dtype) -> None:
    """A selection with ties over odd sizes, and three steps on it."""
    shapes = {"a": (257, 301), "b": (1,), "c": (0, 4), "d": (16_385,)}
    base = {name: torch.randn(shape, device="cuda").to(dtype) for name, shape in shapes.items()}
    params = {n: torch.nn.Parameter(x + torch.randn(x.shape, device="cuda").round().to(dtype)) for n, x in base.items()}
    mask = fastdistil.sparse.select_topk(params, base, density=0.3, backend="cuda")
    optimizer = fastdistil.sparse.SparseAdamW(params, mask, l1=0.1, backend="cuda")
    for _ in range(3):
        for param in params.values():
            param.grad = torch.randn_like(param)
        optimizer.step()


if __name__ == "__main__":
    sys.exit(main())
