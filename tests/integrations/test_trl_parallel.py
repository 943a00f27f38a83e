"""TRL's trainers over two processes, with our losses and with their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ddp_steps
import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
SCRIPT = Path(__file__).with_name("ddp_steps.py")


@pytest.mark.soak
def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates are TRL's, and what docs/trainers/trl.md says of GKD holds: over two processes half of the gradient."""
    paths = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    quiet = {"CI": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    done = subprocess.run([*call, str(tmp_path)], capture_output=True, text=True, env={**os.environ, **quiet})
    assert done.returncode == 0, done.stderr[-4000:]
    two = json.loads((tmp_path / "found.json").read_text())
    for name in ("CI", "TRL_EXPERIMENTAL_SILENCE"):
        monkeypatch.setenv(name, "1")
    one = ddp_steps.steps(1, tmp_path)
    assert all(x["apart"] < 1e-5 for x in (*one, *two))
    assert one[0]["theirs"] == pytest.approx(2 * two[0]["theirs"], rel=1e-5)  # of the same four chats
    assert two[0]["theirs"] > 1e-3 and two[2]["theirs"] > 1e-3
