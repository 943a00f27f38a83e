"""What accelerate makes of a launch that asks for more than it gives."""

from __future__ import annotations

import os
from typing import Any


def check_fsdp(function: str, accelerator: Any, asked: bool = False) -> None:
    """Raises where FSDP was asked for, by `asked` or `accelerate launch`, and accelerate goes on without it, which it
    does without a word where there is no GPU: every process would hold the whole model and its optimizer."""
    environment = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not (asked or environment) or accelerator.distributed_type == "FSDP":
        return
    who = "args.fsdp" if asked else "ACCELERATE_USE_FSDP=true in the environment"
    raise ValueError(
        f"{function}: {who} asks for FSDP, and accelerate runs {accelerator.distributed_type.value} on "
        f"{accelerator.num_processes} x {accelerator.device.type} without it, expected several GPUs; on CPUs leave it "
        "out, or use torch.distributed.fsdp.fully_shard in a loop of your own"
    )
