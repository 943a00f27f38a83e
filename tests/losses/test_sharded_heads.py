"""Heads on several ranks under torchrun: FSDP2, whose ranks have tokens of their own, and tensor parallelism, whose
ranks have the same ones. A step is that of one process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastdistil as fd

SUPPORT = Path(__file__).parents[1] / "support"
needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="needs gloo and torchrun"
)
FOUR = pytest.param(4, marks=pytest.mark.soak)


def torchrun(script: str, processes: int) -> None:
    """Runs a script of tests/support, which raises where something is wrong."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    found = subprocess.run(
        [*launch, str(SUPPORT / script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr[-6000:]


@needs_gloo
@pytest.mark.parametrize("processes", [2, FOUR])
def test_heads_under_fully_shard(processes: int) -> None:
    torchrun("fsdp_steps.py", processes)


@needs_gloo
@pytest.mark.soak
@pytest.mark.parametrize("processes", [2, 4])
def test_a_llama_under_tensor_and_sequence_parallelism(processes: int) -> None:
    torchrun("tensor_parallel_steps.py", processes)


@needs_gloo
@pytest.mark.soak
@pytest.mark.parametrize("processes", [2, 4])
def test_a_rank_that_is_killed_ends_the_others(processes: int, tmp_path: Path) -> None:
    """Within a minute, and their errors say what was waited for."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    errors = [tmp_path / f"{rank}.txt" for rank in range(processes)]
    started = []
    for rank, path in enumerate(errors):
        with path.open("w", encoding="utf-8") as file:
            call = [sys.executable, str(SUPPORT / "ended_rank.py")]
            started.append(subprocess.Popen(call, env=environment | {"RANK": str(rank)}, stderr=file))
    try:
        assert started[1].wait(timeout=120) == -signal.SIGKILL, errors[1].read_text(encoding="utf-8")
        assert [started[rank].wait(timeout=60) for rank in range(processes) if rank != 1] == [1] * (processes - 1)
    finally:
        for process in started:
            process.kill()
    for rank in range(processes):
        told = errors[rank].read_text(encoding="utf-8")
        assert rank == 1 or "One of them has ended, or did not call the loss or its backward" in told, told


@pytest.mark.parametrize("status", ["NOT_AVAILABLE", "INFLIGHT"])
def test_parameters_that_zero3_has_split_are_refused(status: str) -> None:
    """As DeepSpeed leaves them: no memory, and attributes of its own (which was not run here)."""
    head = torch.nn.Parameter(torch.empty(0))
    head.ds_id, head.ds_shape, head.ds_status = 3, torch.Size((5, 4)), SimpleNamespace(name=status)  # type: ignore[attr-defined]
    states, whole = torch.ones(2, 4), torch.ones(5, 4)
    told = r"student_weight is split by DeepSpeed's ZeRO-3 \(shape \(0,\) of \(5, 4\) here\)"
    with pytest.raises(ValueError, match=f"linear_logit_loss: {told}"):
        fd.linear_logit_loss(states, head, states, whole)
    with pytest.raises(ValueError, match=f"linear_topk_logit_loss: {told}"):
        fd.linear_topk_logit_loss(states, head, states.log_softmax(-1), torch.arange(4).expand(2, 4))
    with pytest.raises(ValueError, match="teacher_weight is split by DeepSpeed's ZeRO-3"):
        fd.linear_logit_loss(states, whole, states, head)
    projection = fd.VocabProjection.of(torch.eye(5).to_sparse())
    for name, call in {
        "linear_uld_loss: student_weight": lambda: fd.linear_uld_loss(states, head, states, whole),
        "linear_uld_loss: teacher_weight": lambda: fd.linear_uld_loss(states, whole, states, head),
        "linear_projected_logit_loss: student_weight": lambda: fd.linear_projected_logit_loss(
            states, head, states, whole, projection
        ),
        "hidden_loss: projection": lambda: fd.hidden_loss(states, torch.ones(2, 5), projection=head),
        "hidden_loss: bias": lambda: fd.hidden_loss(states, torch.ones(2, 5), projection=whole, bias=head),
    }.items():
        with pytest.raises(ValueError, match=f"{name} is split by DeepSpeed's ZeRO-3"):
            call()
    gathered = torch.nn.Parameter(whole)
    gathered.ds_id, gathered.ds_status = 3, SimpleNamespace(name="AVAILABLE")  # type: ignore[attr-defined]
    assert fd.linear_logit_loss(states, gathered, states, whole) == 0


def test_parts_of_a_flat_parameter_are_refused() -> None:
    head = torch.nn.Parameter(torch.ones(7))
    head._fsdp_flattened = True  # type: ignore[attr-defined] # as FSDP1 marks them with use_orig_params
    with pytest.raises(ValueError, match="student_weight has shape .7,., a part of a flat parameter"):
        fd.linear_logit_loss(torch.ones(2, 4), head, torch.ones(2, 4), torch.ones(5, 4))
