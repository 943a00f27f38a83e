"""Loops under DistributedDataParallel, whose processes have tokens of their own, against one process with all of them:
plain torch, accelerate by hand, Lightning and fastdistil.train. Trainer's are in test_transformers_parallel.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.soak
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_are_one(processes: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    found = subprocess.run(
        [*launch, str(SUPPORT / "data_parallel_steps.py")], env=environment, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-6000:]
