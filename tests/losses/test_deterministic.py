"""The same bits twice, with any number of threads: every loss, and the sparse optimizer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from contract import LOSSES, Loss, Options, outcome
from torch import Tensor

import fastdistil as fd
from fastdistil.sparse import SparseAdamW, SparseMask, select_topk

CASES = [pytest.param(loss, x, id=f"{name}: {n}") for name, loss in LOSSES.items() for n, x in loss.options.items()]


@pytest.fixture(autouse=True)
def strictly() -> Iterator[None]:
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
    torch.set_num_threads(threads)


def bits(tensors: list[Tensor]) -> list[list[int]]:
    """NaN is itself here."""
    return [x.detach().contiguous().view(-1).view(torch.uint8).tolist() for x in tensors]


@pytest.mark.parametrize(("loss", "options"), CASES)
def test_a_loss_has_the_same_bits_twice(loss: Loss, options: Options) -> None:
    inputs, constants = loss.draw(torch.float32)
    backend = "cpu" if "cpu" in loss.backends else "reference"
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found = [outcome(loss, inputs, constants, backend=backend, **options) for _ in range(2)]
        first, second = (bits([x.value, *x.gradients]) for x in found)
        assert first == second


def test_large_losses_have_the_same_bits_twice() -> None:
    """Enough rows for a thread each, with labels and a temperature; what differs between numbers of threads is the sum."""
    student, teacher, labels = torch.randn(257, 3001), torch.randn(257, 3001), torch.randint(3001, (257,))
    rows = {}
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found = []
        for _ in range(2):
            leaf = student.clone().requires_grad_()
            value = fd.logit_loss(leaf, teacher, labels=labels, label_weight=0.5, temperature=2.0, reduction="none")
            value.sum().backward()
            assert leaf.grad is not None
            found.append(bits([value, leaf.grad]))
        assert found[0] == found[1]
        rows[threads] = found[0]
    assert rows[1] == rows[2] == rows[4]


def test_the_sparse_optimizer_has_the_same_bits_with_any_number_of_threads() -> None:
    start = torch.randn(300, 401)
    moved = start + torch.randn(300, 401) * 1e-2
    found = []
    for threads in (1, 2, 4, 1, 2, 4):
        torch.set_num_threads(threads)
        mask: SparseMask = select_topk({"w": moved}, {"w": start}, density=0.3)
        weight = torch.nn.Parameter(start.clone())
        optimizer = SparseAdamW([("w", weight)], mask, lr=1e-2)
        for _ in range(3):
            weight.grad = moved * weight.detach()
            optimizer.step()
        found.append(bits([mask["w"], weight]))
    assert all(x == found[0] for x in found)
