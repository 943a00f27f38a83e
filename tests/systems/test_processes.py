"""Losses from many threads of Python at once, and from workers of data loaders, as the number of torch's threads changes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fastdistil as fd


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(37, 1009, generator=generator),
        torch.randn(37, 1009, generator=generator),
        torch.randint(1009, (37,), generator=generator),
    )


def losses(seed: int) -> list[Tensor]:
    """Rows of each family, and a gradient: what no number of threads changes."""
    student, teacher, labels = drawn(seed)
    leaf = student.requires_grad_()
    divergence = ("forward_kl", "jsd", "tvd")[seed % 3]
    rows = fd.logit_loss(leaf, teacher, divergence=divergence, labels=labels, label_weight=0.3, reduction="none")
    rows.sum().backward()
    values, indices = teacher.log_softmax(-1).topk(8)
    top = fd.topk_logit_loss(leaf.detach(), values, indices, reduction="none")
    hidden = fd.hidden_loss(leaf.detach(), teacher, kind="cosine", reduction="none")
    assert leaf.grad is not None
    return [rows.detach(), leaf.grad, top, hidden]


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Losses(Dataset[bool]):
    """Example i: whether a worker's losses are the parent's."""

    def __init__(self, wanted: list[list[Tensor]], most_threads: int) -> None:
        self.wanted, self.most_threads = wanted, most_threads

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, i: int) -> bool:
        torch.set_num_threads(1 + i % self.most_threads)
        return same(losses(i), self.wanted[i])


def test_eight_threads_at_once() -> None:
    wanted, wrong, before = [losses(seed) for seed in range(8)], list[Any](), torch.get_num_threads()
    stop = threading.Event()

    def call(seed: int) -> None:
        try:
            for _ in range(6):
                if not same(losses(seed), wanted[seed]):
                    wrong.append(seed)
        except BaseException as error:
            wrong.append(error)

    def change() -> None:
        n = 0
        while not stop.wait(0.002):
            n += 1
            torch.set_num_threads(1 + n % 4)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
    changer = threading.Thread(target=change)
    for thread in (*callers, changer):
        thread.start()
    for thread in callers:
        thread.join()
    stop.set()
    changer.join()
    torch.set_num_threads(before)
    assert wrong == []


@pytest.mark.parametrize(("method", "most_threads"), [("fork", 1), pytest.param("spawn", 3, marks=pytest.mark.soak)])
def test_workers_of_a_data_loader(method: str, most_threads: int) -> None:
    """Forked after the parent has used its threads, or started anew. A forked worker has the one thread that torch gives
    it: of the parent's OpenMP threads it has none, and waits for them for ever, in torch's operators as in ours."""
    wanted = [losses(seed) for seed in range(8)]
    loader = DataLoader(
        Losses(wanted, most_threads), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=300
    )
    assert list(loader) == [True] * 8
