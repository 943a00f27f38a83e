"""The loop in two processes: one checkpoint of both, parameters that no term reaches, the same result as one process."""

from __future__ import annotations

import os
import socket
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from squares import Squares, collate, examples
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from fastdistil.recipes import terms
from fastdistil.recipes.terms import Distillation
from fastdistil.train import Options, train


class Headless(Squares):
    """With a layer that no term reaches, as a pooler or the head beside losses of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(3, 3)


def failing(module: nn.Module) -> dict[str, float]:
    raise ValueError("no figures today")


def distillation() -> Distillation:
    """Hidden states and maps of a small BERT against a live teacher, with a head and a pooler that no term reaches."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_labels": 3}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student, teacher = (
        BertForSequenceClassification(BertConfig(**sizes, **dropouts, num_hidden_layers=layers)) for layers in (1, 2)
    )
    return Distillation(student, [terms.hidden(-1, -1), terms.attention(-1, -1)], teacher)


def text(rows: list[int]) -> dict[str, torch.Tensor]:
    """Rows of different lengths."""
    ids = torch.stack([torch.arange(row, row + 6) % 29 + 1 for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(6) < torch.tensor(rows)[:, None] % 5 + 2).long()}


def _process(rank: int, out: str, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    from accelerate import Accelerator

    save = Accelerator.save_state

    def late(self: Any, folder: str) -> Any:
        if rank == 1:
            time.sleep(0.3)  # the main process is done long before
        return save(self, folder)

    Accelerator.save_state = late
    options, folder = Options(4, lr=0.1, batch_size=4, save_every=2), Path(out)
    module = Headless()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = train(module, examples(), collate, options, out=folder / "run")
    said = [str(x.message) for x in caught if "no term" in str(x.message)]
    again = Headless()
    assert train(again, examples(), collate, options, out=folder / "run") == history
    assert torch.equal(again.layer.weight, module.layer.weight)
    calls = []

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if rank == 1 and state.global_step == 3:  # asked for on one process alone
                control.should_training_stop = True

    def evaluate(module: Any) -> dict[str, float]:
        calls.append(torch.cat([p.flatten() for p in module.layer.parameters()]).tolist())
        return {"f1": float(-len(calls))}

    evaluated = Options(4, lr=0.1, batch_size=4, evaluate_every=2, metric="f1")
    best = Headless()
    stopped = train(best, examples(), collate, evaluated, evaluate=evaluate, callbacks=[Stop()])
    figures = [x.get("eval_f1") for x in stopped]
    kept = torch.cat([p.flatten() for p in best.layer.parameters()]).tolist()
    with pytest.raises(ValueError if rank == 0 else RuntimeError, match="no figures today"):
        train(Headless(), examples(), collate, evaluated, evaluate=failing)
    layers = train(distillation(), range(24), text, Options(3, lr=0.01, batch_size=2, accumulate=2, warmup=0))
    torch.save(
        {"said": said, "history": history, "figures": figures, "kept": kept, "calls": calls, "layers": layers},
        folder / f"result-{rank}.pt",
    )


def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (str(tmp_path), port), nprocs=2)
    first, second = (torch.load(tmp_path / f"result-{rank}.pt") for rank in (0, 1))
    assert [len(first["said"]), len(second["said"])] == [1, 0]
    assert "pooler.weight, pooler.bias" in first["said"][0]
    assert first["figures"] == second["figures"] == [None, -1.0, -2.0]
    assert len(first["calls"]) == 2 and second["calls"] == []
    assert first["kept"] == second["kept"] == first["calls"][0] != first["calls"][1]
    names = {path.name for path in (tmp_path / "run" / "step-4").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= names
    alone = Headless()
    with pytest.warns(UserWarning, match="no term reaches 2 parameters"):
        history = train(alone, examples(), collate, Options(4, lr=0.1, batch_size=8))
    assert [x["squares"] for x in first["history"]] == pytest.approx([x["squares"] for x in history], rel=1e-5)
    with pytest.warns(UserWarning, match="no term reaches 4 parameters in the first step .*classifier"):
        layers = train(distillation(), range(24), text, Options(3, lr=0.01, batch_size=8, warmup=0))
    for record, other in zip(layers, first["layers"], strict=True):
        assert record == pytest.approx(other, rel=1e-4)
    weights = load_file(tmp_path / "run" / "step-4" / "model.safetensors")
    torch.testing.assert_close(weights, dict(alone.state_dict()), rtol=1e-5, atol=1e-6)


def test_processes_that_accelerate_does_not_join_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"WORLD_SIZE is 2 in the environment, accelerate runs 1 process: .*ACCELERATE_USE_CPU=true"
    ):
        train(Squares(), examples(), collate, Options(1))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(
        ValueError, match=r"train: ACCELERATE_USE_FSDP=true in the environment asks for FSDP, .* NO on 1 x"
    ):
        train(Squares(), examples(), collate, Options(1))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("WORLD_SIZE", "1")
    train(Squares(), examples(), collate, Options(1))
