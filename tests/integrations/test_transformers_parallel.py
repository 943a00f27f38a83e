"""Two gloo processes with ragged batches: gradients, logs and evaluation are those of one process with all of the data."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_cases import TASKS, InOrder, arguments, collate, model, rows, teacher, trained

from fastdistil.integrations.transformers import DistillationTrainer
from fastdistil.recipes import terms

# Every task in float64, one of them in float32, one with parameters that no term reaches.
CASES = [(task, torch.float64, True) for task in TASKS]
CASES += [("token", torch.float32, True), ("causal", torch.float32, True), ("sequence", torch.float64, False)]


def case_terms(reads_logits: bool, dtype: torch.dtype) -> list[terms.Term]:
    torch.manual_seed(3)
    projection = nn.Linear(8, 12).to(dtype)
    found = [terms.hidden(0, 0, projection=projection), terms.attention(1, 2, scale=0.3)]
    return [*found, terms.logits(temperature=2.0), terms.labels(scale=0.5)] if reads_logits else found


def step(case: tuple[str, torch.dtype, bool], folder: Path, accumulate: int, processes: int) -> dict[str, Any]:
    """Two optimiser steps over all rows, and an evaluation of seven of them."""
    task, dtype, reads_logits = case
    options: dict[str, Any] = {"per_device_train_batch_size": 8 // accumulate // processes, "max_steps": 2}
    options |= {"gradient_accumulation_steps": accumulate, "per_device_eval_batch_size": 2, "learning_rate": 0.05}
    chosen = case_terms(reads_logits, dtype)
    other = teacher(task, dtype=dtype)
    args = arguments(folder, **options)
    trainer = InOrder(model(task, dtype=dtype), args, collate, rows(task), teacher=other, terms=chosen)
    trainer.eval_dataset = rows(task)[:7]
    changed = trained(trainer)
    changed["projection"] = trainer.objective.projections["hidden_0_0"].weight.detach().clone()
    logged = [{k: x for k, x in record.items() if "loss" in k} for record in trainer.state.log_history[:2]]
    figures = {name: x for name, x in trainer.evaluate().items() if "loss" in name}
    return {"changed": changed, "logged": logged, "figures": figures}


def _process(rank: int, out: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    found = [step(case, Path(out), 2, 2) for case in CASES]
    torch.save(found, Path(out) / f"result-{rank}.pt")
    # accelerate 1.15 leaves FSDP out on CPUs without a word, and would run DistributedDataParallel.
    with pytest.raises(ValueError, match=r"DistillationTrainer: args.fsdp asks for FSDP, and .* MULTI_CPU on 2 x cpu"):
        DistillationTrainer(
            model("token"), arguments(Path(out), fsdp=True), collate, rows("token"), teacher=teacher("token")
        )


def close(found: Any, expected: Any, dtype: torch.dtype) -> None:
    tolerance = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.soak
def test_two_processes_are_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (str(tmp_path), port), nprocs=2)
    first, second = (torch.load(tmp_path / f"result-{rank}.pt") for rank in (0, 1))
    for case, one, two in zip(CASES, first, second, strict=True):
        alone = step(case, tmp_path, 1, 1)
        moved: dict[str, Tensor] = alone["changed"]
        assert sum(bool(x.abs().max() > 0) for x in moved.values()) >= 10, case
        for found in (one, two):
            close(found["changed"], moved, case[1])
        assert one["figures"] == two["figures"]
        for logged, expected in zip(one["logged"], alone["logged"], strict=True):
            assert logged == pytest.approx(expected, rel=1e-5), case
        assert one["figures"] == pytest.approx(alone["figures"], rel=1e-10 if case[1] == torch.float64 else 1e-5), case
