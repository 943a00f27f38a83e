"""Run by test_trl_parallel.py under torchrun: one step of GKD and of DistillationTrainer, and what came of it as JSON."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
from test_trl import run  # noqa: E402

CASES: list[tuple[str, dict[str, Any]]] = [
    ("GKD", {"lmbda": 0.0, "members": {"two_heads": False}}),
    ("GKD", {"lmbda": 0.0, "members": {"two_heads": True}}),
    ("Distillation", {}),
]


def steps(count: int, folder: Path) -> list[dict[str, float]]:
    """The size of TRL's update in each case, and how far ours is from it; four chats, over `count` processes."""
    found = []
    for kind, options in CASES:
        one = {"per_device_train_batch_size": 4 // count, "gradient_accumulation_steps": 1, "max_steps": 1}
        one |= {"ddp_backend": "gloo"} if count > 1 else {}
        theirs, mine = (run(kind, fused, folder, **one, **options)[1] for fused in (False, True))
        found.append({"theirs": float(theirs.norm()), "apart": float((mine - theirs).norm() / theirs.norm())})
    return found


if __name__ == "__main__":
    count, rank, folder = int(os.environ["WORLD_SIZE"]), os.environ["RANK"], Path(sys.argv[1])
    result = json.dumps(steps(count, folder / rank))
    if rank == "0":
        (folder / "found.json").write_text(result)
