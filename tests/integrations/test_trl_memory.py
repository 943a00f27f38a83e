"""What our losses hold beside TRL's own: bytes of every tensor that is allocated, counted by torch's profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from held import MIB, held_mib

from fastdistil import linear_logit_loss, logit_loss

RULES: list[tuple[float, dict[str, Any]]] = [
    (0.0, {"divergence": "forward_kl"}),
    (0.5, {"divergence": "jsd", "beta": 0.5}),
]


@pytest.mark.parametrize(("beta", "rule"), RULES)
def test_gkd_holds_the_gradient_alone(beta: float, rule: dict[str, Any], tmp_path: Path) -> None:
    """Whole logits: theirs are the log-probabilities of both sides, the mixture, two divergences, copies of a shift."""
    from trl.experimental.gkd import GKDTrainer

    student, teacher = torch.randn(2, 16, 65_536, requires_grad=True), torch.randn(2, 16, 65_536)
    labels = torch.ones(2, 16, dtype=torch.long)
    labels[:, :9] = -100
    weight = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))

    def theirs() -> None:
        GKDTrainer.generalized_jsd_loss(student[:, :-1], teacher[:, :-1], labels[:, 1:], beta).backward()

    def mine() -> None:
        loss: torch.Tensor = logit_loss(student, teacher, weight=weight, scale_by_t2=False, **rule)
        loss.backward()

    found = []
    for work in (mine, theirs):
        student.grad = None
        found.append(held_mib(work, tmp_path / "trace.json"))
    gradient = student.numel() * 4 / MIB
    assert gradient <= found[0] < 1.05 * gradient and found[1] > 5 * gradient


@pytest.mark.parametrize(("beta", "rule"), RULES)
def test_two_heads_hold_less_than_the_tiles(beta: float, rule: dict[str, Any], tmp_path: Path) -> None:
    """The kernel's two float32 tiles of min(N, 4,096) x 32,768 are there wherever it runs; on a CPU it holds more."""
    from trl.kernels.chunked_divergence import TOKEN_CHUNK_SIZE, VOCAB_CHUNK_SIZE
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    rows, width, columns = 256, 32, 40_000
    student, teacher = torch.randn(1, rows, width, requires_grad=True), torch.randn(1, rows, width)
    heads = torch.randn(columns, width, requires_grad=True), torch.randn(columns, width)
    mask = torch.ones(1, rows, dtype=torch.long)

    def theirs() -> None:
        _chunked_divergence_loss(student, teacher, *heads, mask, beta)[0].backward()

    def mine() -> None:
        options: dict[str, Any] = {"weight": mask, "return_stats": True, "chunk_bytes": 16 * MIB, **rule}
        loss, _ = linear_logit_loss(student, heads[0], teacher, heads[1], **options)
        loss.backward()

    found = []
    for work in (mine, theirs):
        student.grad = heads[0].grad = None
        found.append(held_mib(work, tmp_path / "trace.json"))
    gradient = heads[0].numel() * 4 / MIB
    tiles = 2 * min(rows, TOKEN_CHUNK_SIZE) * VOCAB_CHUNK_SIZE * 4 / MIB
    assert found[0] < 1.05 * (gradient + 16) < tiles + gradient < found[1]
