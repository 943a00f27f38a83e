"""transformers' Trainer with distillation terms: every task against plain PyTorch in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainer_cases import (
    TASKS,
    InOrder,
    arguments,
    collate,
    gradient,
    model,
    plain,
    rows,
    teacher,
    trained,
)

from fastdistil.recipes import terms

BOTH = [terms.logits(temperature=2.0), terms.labels(scale=0.5)]


@pytest.mark.parametrize("heads", [None, False])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("task", TASKS)
def test_step_is_plain_pytorch(task: str, accumulate: int, heads: bool | None, tmp_path: Path) -> None:
    student, other = model(task), teacher(task)
    loss = plain(task, student, other, collate(rows(task)))
    expected = gradient(loss, student)
    options = {"per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
    args = arguments(tmp_path, logits_from_heads=heads, **options)
    trainer = InOrder(student, args, collate, rows(task), teacher=other, terms=BOTH)
    assert (trainer.objective.heads is not None) == (heads is None and task in ("masked", "causal"))
    torch.testing.assert_close(trained(trainer), expected, rtol=1e-10, atol=1e-12)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert logged["loss_logits"] + logged["loss_labels"] == pytest.approx(logged["loss"], rel=1e-6)
