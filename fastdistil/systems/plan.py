"""What a run will take, before it runs: steps, tokens, memory and time, by formula.

Floating-point operations of a forward pass over n tokens in sequences of length S: 2 n P for the P parameters that
multiply (all but embedding tables, biases and norms), and 4 n S D for the two products of each block's attention. A
backward pass takes twice the forward; the losses are under a few percent and are not counted. Time is operations over
the rate of this machine's own float32 matrix products, measured for half a second.

Bytes of a training step in float32: 4 a parameter of both models, 12 a trained one (gradient and AdamW's two moments),
and per token and block of the student 4 (9 D + 2 F) for what the backward needs (F: width of the feed-forward layer).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

_RATE_SECONDS = 0.5


@dataclass(frozen=True)
class Cost:
    """Sizes of one model: parameters of each kind, and what its attention and its activations are counted from."""

    parameters: int
    multiplied: int
    trained: int
    blocks: int = 0
    width: int = 0
    feed_forward: int = 0

    def forward(self, tokens: float, length: float) -> float:
        """Floating-point operations of a forward pass over `tokens` in sequences of `length`."""
        return tokens * (2 * self.multiplied + 4 * self.blocks * length * self.width)

    def activations(self, tokens: float) -> float:
        """Bytes that a backward pass over `tokens` needs."""
        return 4 * tokens * max(1, self.blocks) * (9 * self.width + 2 * self.feed_forward)


def cost(model: nn.Module) -> Cost:
    """The sizes of a model, which may lie on the meta device. A tied table counts once, and as multiplied where a
    linear layer uses it."""
    config: Any = getattr(model, "config", None)
    multiplied: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for p in module.parameters(recurse=False):
            if p.ndim > 1:
                multiplied[id(p)] = p.numel()
    unique = {id(p): p for p in model.parameters()}.values()
    return Cost(
        parameters=sum(p.numel() for p in unique),
        multiplied=sum(multiplied.values()),
        trained=sum(p.numel() for p in unique if p.requires_grad),
        blocks=int(getattr(config, "num_hidden_layers", 0) or 0),
        width=int(getattr(config, "hidden_size", 0) or 0),
        feed_forward=int(getattr(config, "intermediate_size", 0) or 0),
    )


@dataclass(frozen=True)
class StagePlan:
    """One stage: `steps` updates over `tokens` each (all micro-batches and processes) in sequences of about `length`.

    `micro_tokens` are those of one micro-batch on one process, whose activations are in memory at a time. `teacher` is
    None where its outputs are read from disk. `examples` without a backward pass (caching the teacher's outputs) have
    `backward=False` and `student=None`.
    """

    name: str
    steps: int
    tokens: float
    micro_tokens: float
    length: float
    student: Cost | None
    teacher: Cost | None = None
    backward: bool = True

    @property
    def operations(self) -> float:
        """Floating-point operations of the whole stage."""
        one = 0.0
        if self.student is not None:
            one += self.student.forward(self.tokens, self.length) * (3 if self.backward else 1)
        if self.teacher is not None:
            one += self.teacher.forward(self.tokens, self.length)
        return one * self.steps

    @property
    def bytes(self) -> float:
        """Bytes of weights, gradients, optimizer state and activations on one process."""
        found = 0.0 if self.teacher is None else 4.0 * self.teacher.parameters
        if self.student is not None:
            found += 4.0 * self.student.parameters
            if self.backward:
                found += 12.0 * self.student.trained + self.student.activations(self.micro_tokens)
        return found


@dataclass(frozen=True)
class Plan:
    """What `--dry-run` prints: facts of the data by name, and the stages. `processes` share the time."""

    system: str
    data: Mapping[str, str]
    stages: Sequence[StagePlan]
    processes: int = 1
    notes: Sequence[str] = field(default_factory=tuple)

    def seconds(self, rate: float) -> float:
        """At `rate` floating-point operations per second and process."""
        return sum(stage.operations for stage in self.stages) / rate / self.processes


def product_rate() -> float:
    """Floating-point operations per second of float32 products (1024, 768) x (768, 3072) here, on the GPU if any."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    a, b = torch.ones(1024, 768, device=device), torch.ones(768, 3072, device=device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    a @ b
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < _RATE_SECONDS:
        a @ b
        wait()
        count += 1
    return count * 2.0 * 1024 * 768 * 3072 / (time.perf_counter() - start)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def show(plan: Plan, console: Console, rate: float | None = None) -> dict[str, Any]:
    """Print the plan and return it as what JSON holds; `rate` is `product_rate()` unless it is given."""
    rate = product_rate() if rate is None else rate
    console.print(f"[bold]{plan.system}[/bold]: what it would do (nothing is trained, nothing written)")
    for name, value in plan.data.items():
        console.print(f"  {name}: {value}")
    table = Table()
    for head in ("stage", "steps", "tokens per step", "memory", "time"):
        table.add_column(head, justify="left" if head == "stage" else "right")
    rows = []
    for stage in plan.stages:
        seconds = stage.operations / rate / plan.processes
        cells = (f"{stage.steps:,}", f"{stage.tokens:,.0f}", size(stage.bytes), duration(seconds))
        table.add_row(stage.name, *cells)
        rows.append({"stage": stage.name, "steps": stage.steps, "tokens_per_step": stage.tokens}
                    | {"bytes": stage.bytes, "operations": stage.operations, "seconds": seconds})  # fmt: skip
    console.print(table)
    total = plan.seconds(rate)
    console.print(
        f"About {duration(total)} on {plan.processes} such process{'' if plan.processes == 1 else 'es'}, at "
        f"{rate / 1e9:.0f} GFLOP/s of float32 products and nothing else; real steps take longer, small models most."
    )
    for note in plan.notes:
        console.print(f"  {note}")
    return {"system": plan.system, "data": dict(plan.data), "stages": rows, "seconds": total, "rate": rate}
