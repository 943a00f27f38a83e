"""What a distillation step takes on 1 to 512 GPUs: memory, bytes sent and time, by formula and a simulation of overlap.

    python benchmarks/scaling.py --table          writes the tables of docs/scaling.md

Memory and bytes are checked to 5% against steps of 1, 2 and 4 processes on a CPU (tests/benchmarks/test_scaling.py).
Every time is a prediction from data sheets: no GPU has run this library. In words: docs/scaling.md.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod
from pathlib import Path

from fastdistil.contracts.logit import STATS
from fastdistil.losses.linear_logit import CHUNK_BYTES
from fastdistil.ops.logit_terms import chunk_rows
from fastdistil.systems.plan import Cost

Shape = tuple[int, ...]
BUCKET_BYTES = 25 << 20  # DistributedDataParallel's bucket_cap_mb
FULL = 4  # bytes of a float32 number
# Memory traffic of the loss for each pair of logits of two heads, in bytes. Both are written by their products (8),
# read for the statistics and again for the gradient (16), which is written (4), rounded twice, for the products with
# the head and the states (ops/products.py: sizes 8, largest 4, divided 8, cast 6), and read by both (4).
PAIR_BYTES = 8 + 16 + 4 + 2 * (8 + 4 + 8 + 6) + 4
TOPK_BYTES = 4 + 8 + 4 + 2 * (8 + 4 + 8 + 6) + 4  # of a top-k teacher, whose logits are not formed


@dataclass(frozen=True)
class Model:
    """An encoder as BERT or, `gated`, a decoder as Llama (RMSNorm, rotary positions, SwiGLU), with its head."""

    name: str
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    gated: bool
    tied: bool
    positions: int = 0
    types: int = 2

    @property
    def kv_width(self) -> int:
        return self.width // self.heads * self.kv_heads

    def block(self) -> list[Shape]:
        """Shapes of a block's parameters, as transformers 5.17 has them."""
        d, f, kv = self.width, self.ffn, self.kv_width
        if self.gated:
            return [(d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f), (d,), (d,)]
        return [*[(d, d)] * 4, *[(d,)] * 8, (f, d), (f,), (d, f), (d,)]

    def root(self) -> list[Shape]:
        """Shapes of all other parameters: tables, last norm or the head's transformation, head."""
        d, v = self.width, self.vocabulary
        own_head = [] if self.tied else [(v, d)]
        rest = [(d,)] if self.gated else [(self.positions, d), (self.types, d), *[(d,)] * 5, (d, d), (v,)]
        return [(v, d), *rest, *own_head]

    def cost(self) -> Cost:
        """The sizes that `fastdistil.systems.plan` counts operations from."""
        every = self.root() + self.block() * self.layers
        count, head = sum(map(prod, every)), self.vocabulary * self.width + (0 if self.gated else self.width**2)
        multiplied = sum(prod(x) for x in self.block() if len(x) > 1) * self.layers + head
        return Cost(count, multiplied, count, self.layers, self.width, self.ffn)

    def block_forward(self, tokens: float, length: float) -> float:
        """Operations of one block's forward pass: what `Cost` counts without the head."""
        return (self.cost().forward(tokens, length) - self.head_forward(tokens)) / max(1, self.layers)

    def head_forward(self, tokens: float) -> float:
        return 2.0 * tokens * self.vocabulary * self.width

    def saved(self, size: int, split: int = 1) -> float:
        """Bytes per token that a block keeps for its backward pass; numbers have `size` bytes. `split`: ranks of tensor
        and sequence parallelism, each of which has the whole input of the projections and its part of the rest."""
        d, f, kv = self.width, self.ffn, self.kv_width
        if not self.gated:  # input, q, k, v, attention, its residual sum, its norm, 2 F, the second residual sum
            return (size * (8 * d + 2 * f) + FULL * (self.heads + 4)) / split
        # RMSNorm computes in float32 and keeps its float32 input, which is the residual stream itself in float32.
        inner = 2 * d * (FULL + size) + size * (2 * d + 2 * kv + 4 * f) + FULL * (self.heads + 2)
        return inner / split + 2 * d * size

    def edges(self, size: int) -> float:
        """The same of embeddings, last norm and the head's transformation."""
        return self.width * (FULL + 2 * size if self.gated else 5 * size)


@dataclass(frozen=True)
class Machine:
    """Rates per GPU and direction, in units of 1 and seconds. `efficiency`: part of the peak that products reach."""

    name: str
    flops: float  # a second, dense bf16
    memory: float
    memory_rate: float
    nvlink: float
    network: float
    gpus_a_node: int = 8
    efficiency: float = 0.40
    base_latency: float = 8.4e-6
    nvlink_latency: float = 3.4e-6
    network_latency: float = 14.0e-6

    def group(self, ranks: int, stride: int = 1) -> tuple[float, float]:
        """Bytes per second that each rank sends in a ring, and seconds of one hop on average; the ranks lie `stride`
        GPUs apart. Rings over nodes use the network cards of all the node's ranks together."""
        here = max(1, min(ranks, self.gpus_a_node // stride))
        nodes = -(-ranks // here)
        rate = self.nvlink if nodes == 1 else min(self.nvlink, here * self.network)
        hops = max(1, ranks - 1)
        return rate, ((hops - (nodes - 1)) * self.nvlink_latency + (nodes - 1) * self.network_latency) / hops

    def passes(self, size: float, ranks: int, stride: int = 1, rounds: int = 1) -> float:
        """Seconds of an all-gather or reduce-scatter of `size` bytes (of the whole); an all-reduce is two `rounds`."""
        if ranks == 1:
            return 0.0
        rate, hop = self.group(ranks, stride)
        return self.base_latency + rounds * (sent(size, ranks) / rate + (ranks - 1) * hop)

    def products(self, operations: float) -> float:
        return operations / (self.efficiency * self.flops)


# NVIDIA H100 and H200 Tensor Core GPU data sheets, SXM: 989.4 TFLOP/s of dense bf16, 80 and 141 GB, 3.35 and 4.8 TB/s,
# NVLink 900 GB/s both ways. DGX H100 and H200: 8 GPUs and 8 ConnectX-7 of 400 Gb/s a node. Efficiency: Llama 3 ran at
# 38 to 43% of the peak on H100s (arXiv 2407.21783, table 4). Latencies: NCCL's own model of a ring with its protocol
# Simple (src/graph/tuning.cc: base 8.4 us, a hop 3.4 over NVLink and 14.0 over the network).
H100 = Machine("H100", 989.4e12, 80e9, 3.35e12, 450e9, 50e9)
H200 = Machine("H200", 989.4e12, 141e9, 4.8e12, 450e9, 50e9)


@dataclass(frozen=True)
class Plan:
    """How a step is spread. kind: "ddp" or "fsdp" over gpus / tensor ranks of data parallelism, each with `sequences`
    of `length`. teacher: "replicated", "sharded" (FSDP2), "tensor" (parallel), "own ranks" (teacher_ranks GPUs beside
    these), or "hidden" or "topk" read from disk. precision: "fp32", or "mixed": computed in bf16 with float32
    parameters, gradients and optimizer states."""

    gpus: int
    kind: str
    teacher: str
    sequences: int
    length: int
    tensor: int = 1
    precision: str = "mixed"
    optimizer_bytes: int = 8  # a parameter: AdamW's two moments
    checkpointing: bool = False
    teacher_ranks: int = 0
    teacher_split: int = 8  # its ranks of tensor parallelism
    k: int = 64
    chunk_bytes: int = CHUNK_BYTES["gpu"]

    @property
    def data(self) -> int:
        return self.gpus // self.tensor

    @property
    def tokens(self) -> int:
        """Of one data-parallel rank."""
        return self.sequences * self.length

    @property
    def size(self) -> int:
        return FULL if self.precision == "fp32" else 2

    @property
    def shards(self) -> int:
        return self.data if self.kind == "fsdp" else 1


def numbers(shapes: Sequence[Shape], ranks: int = 1) -> int:
    """Of parameters, padded as fully_shard pads them: rows to a multiple of the ranks."""
    return sum(-(-x[0] // ranks) * ranks * prod(x[1:]) for x in shapes)


def sent(size: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring's all-gather or reduce-scatter of `size` bytes; an all-reduce is both."""
    return size * (ranks - 1) / ranks


def loss_bytes(student: Model, teacher: Model, plan: Plan) -> dict[str, float]:
    """What the two-head loss keeps: until the backward pass, and only in its forward pass."""
    n, v = plan.tokens, -(-student.vocabulary // plan.tensor)
    rows = chunk_rows(n, v, FULL, plan.chunk_bytes)
    padded, dweight = -(-v // 16) * 16, FULL * v * student.width
    once = 2.0 * FULL * rows * padded
    if plan.size < FULL:  # the rounded gradient of a chunk, and a product to be added where there are several chunks
        once += (FULL + plan.size) * rows * v + (dweight if rows < n else 0)
    target = n * (teacher.width * plan.size if plan.teacher != "topk" else 8 * plan.k + FULL)
    again = 3 * dweight * (-(-n // rows) - 1)  # bytes moved to add up the chunks' gradients of the head
    return {"kept": dweight + FULL * n * student.width + target, "once": once, "target": target, "again": again}


def teacher_bytes(teacher: Model, plan: Plan) -> float:
    """What lies in a GPU's memory of the teacher between steps."""
    block, root = numbers(teacher.block()) * teacher.layers, numbers(teacher.root())
    held = 0.0 if plan.teacher == "topk" else float(prod(teacher.root()[0])) / plan.tensor
    if plan.teacher == "replicated":
        held = block + root
    elif plan.teacher == "sharded":  # the root group of fully_shard stays whole: nothing runs backward that frees it
        shards = numbers(teacher.block(), plan.gpus) * teacher.layers + numbers(teacher.root(), plan.gpus)
        held = shards / plan.gpus + root
    elif plan.teacher == "tensor":
        held = (block + root) / plan.teacher_split + (0.0 if plan.tensor == plan.teacher_split else held)
    return plan.size * held


def memory(student: Model, teacher: Model, plan: Plan) -> dict[str, dict[str, float]]:
    """Bytes on one GPU by category, at the moments of a step of which one is the peak."""
    n, size, parts = plan.tokens, plan.size, plan.shards * plan.tensor
    sharded, spread = plan.kind == "fsdp", plan.shards > 1
    block = numbers(student.block(), plan.shards) / plan.tensor
    root = numbers(student.root(), plan.shards) / plan.tensor
    own = (numbers(student.block(), plan.shards) * student.layers + numbers(student.root(), plan.shards)) / parts
    loss = loss_bytes(student, teacher, plan)
    each = student.saved(size, plan.tensor) * n
    # With checkpointing blocks keep their input, and are computed again one by one.
    again, kept = (each, n * student.width * size / plan.tensor) if plan.checkpointing else (0.0, each)
    saved = student.edges(size) * n + student.layers * kept
    buffers = 0.0 if sharded else FULL * own
    casts = size * own if not sharded and size < FULL else 0.0
    whole = size * root if sharded else 0.0  # the root group, gathered from its forward to its backward pass
    twice = 2 if spread else 1  # what was gathered, and the parameters that it is copied to
    gathered = twice * size * block if sharded else 0.0
    base = {"parameters": FULL * own, "gradients": 0.0, "optimizer": plan.optimizer_bytes * own}
    base |= {"activations": saved, "teacher": teacher_bytes(teacher, plan), "loss": loss["kept"]}
    base |= {"communication": buffers + casts + whole}
    working = 2 * student.ffn * n * size / plan.tensor  # gradients inside of a block
    reduced = (size + FULL) * block - each if spread else 0.0
    first = base | {"communication": base["communication"] + gathered}
    # The tables' gradient comes last, of a tied one in both parts. fully_shard frees the root group's parameters before
    # it fills what is reduced, and all gradients but the last before it makes room for the result.
    last = base | {"gradients": FULL * own, "activations": n * student.width * size, "loss": loss["target"]}
    last["communication"] += size * student.tied * student.vocabulary * student.width / plan.tensor
    if sharded:
        last["gradients"] = FULL * (own - root / plan.shards)
        last["communication"] = 2 * whole
    found = {
        "loss": base | {"loss": loss["kept"] + loss["once"]},
        "backward, first block": first | {"activations": saved + again + max(working, reduced)},
        "backward, tables": last,
        "optimizer": base
        | {"gradients": FULL * own, "activations": 0.0, "loss": loss["target"], "communication": buffers},
    }
    if spread:
        sums = FULL * root * (1 + 1 / plan.shards) + size * prod(student.root()[-1]) / plan.tensor
        found["backward, root reduced"] = last | {"communication": sums}
    if plan.teacher == "sharded":
        passing = plan.size * numbers(teacher.block(), plan.gpus) * (2 if plan.gpus > 1 else 1)
        rows = n / plan.tensor
        run = (6 * teacher.width + (3 if teacher.gated else 2) * teacher.ffn) * rows * size
        found["teacher"] = base | {"activations": run, "loss": 0.0, "communication": buffers + passing}
    return found


def split_head_bytes(rows: int, ranks: int, width: int) -> tuple[float, float]:
    """Of a loss whose vocabulary is split over ranks: gathered (float64 statistics of rows), and all-reduced (two sums
    a row, and the states' gradient)."""
    return float(8 * STATS * rows * ranks), FULL * rows * (2.0 + width)


def collectives(student: Model, teacher: Model, plan: Plan) -> dict[str, float]:
    """Bytes of the whole tensors of a step's collectives, by group and kind: what `sent` is applied to."""
    found, n, size = dict[str, float](), plan.tokens, plan.size
    if plan.data > 1:
        if plan.kind == "ddp":
            found["data all-reduce"] = FULL * student.cost().parameters / plan.tensor
        else:
            block, root = (numbers(x, plan.data) / plan.tensor for x in (student.block(), student.root()))
            found["data all-gather"] = size * (2 * student.layers * block + root)
            found["data reduce-scatter"] = FULL * (student.layers * block + root)
    if plan.teacher == "sharded" and plan.gpus > 1:
        found["teacher all-gather"] = size * teacher.layers * float(numbers(teacher.block(), plan.gpus))
    if plan.tensor > 1:
        # Sequence parallelism: rows gathered before attention and feed-forward, scattered behind them, and backward.
        times = student.layers * (4 + 2 * plan.checkpointing)
        states = student.width * (times + 1) + (0 if plan.teacher == "topk" else teacher.width)
        found["tensor all-gather"] = float(size * n * states + split_head_bytes(n, plan.tensor, 0)[0])
        found["tensor reduce-scatter"] = float(size * n * student.width * times)
        found["tensor all-reduce"] = split_head_bytes(n, plan.tensor, student.width)[1]
    if plan.teacher == "tensor" and plan.gpus > 1:
        rows = n // plan.tensor * plan.teacher_split
        found["teacher tensor all-gather"] = found["teacher tensor reduce-scatter"] = (
            2.0 * size * rows * teacher.width * teacher.layers
        )
    return found


def sent_by_kind(student: Model, teacher: Model, plan: Plan) -> dict[str, float]:
    """Bytes that a GPU sends in a step, by group and kind."""
    ranks = {"data": plan.data, "teacher": plan.gpus, "teacher tensor": plan.teacher_split, "tensor": plan.tensor}
    whole = collectives(student, teacher, plan).items()
    return {x: sent(size, ranks[x.rsplit(" ", 1)[0]]) * (2 if x.endswith("all-reduce") else 1) for x, size in whole}


@dataclass(frozen=True)
class Task:
    """Work on one stream, "compute" or "network", that begins when the tasks `after` it depends on have ended."""

    stream: str
    seconds: float
    after: Sequence[str] = ()


def simulate(tasks: Mapping[str, Task]) -> dict[str, float]:
    """When each task ends, in seconds. A stream runs its tasks one after another, in the order given."""
    ends, free = dict[str, float](), dict[str, float]()
    for name, task in tasks.items():
        start = max([free.get(task.stream, 0.0), *(ends[x] for x in task.after)])
        ends[name] = free[task.stream] = start + task.seconds
    return ends


def step_tasks(student: Model, teacher: Model, plan: Plan, machine: Machine) -> dict[str, Task]:
    """A step's tasks in the order in which they are issued; every block is one. Collectives of tensor parallelism are
    part of their block's time: its products wait for them."""
    n, size, t, own = plan.tokens, plan.size, plan.tensor, plan.tokens // plan.tensor
    tasks = dict[str, Task]()

    def add(name: str, stream: str, seconds: float, *after: str) -> None:
        tasks[name] = Task(stream, seconds, [x for x in after if x in tasks])

    def data(shapes: Sequence[Shape], width: int, rounds: int = 1) -> float:
        return machine.passes(width * numbers(shapes, plan.data) / t, plan.data, t, rounds)

    if plan.teacher in ("replicated", "sharded", "tensor"):
        forward = machine.products(teacher.block_forward(own, plan.length))
        if plan.teacher == "tensor":
            forward += 4 * machine.passes(size * own * plan.teacher_split * teacher.width, plan.teacher_split)
        gather = machine.passes(size * numbers(teacher.block(), plan.gpus), plan.gpus)
        for i in range(teacher.layers):
            if plan.teacher == "sharded":  # one block ahead: what is gathered waits for the block before the last
                add(f"gather teacher {i}", "network", gather, f"teacher {i - 2}")
            add(f"teacher {i}", "compute", forward, f"gather teacher {i}")
    sharded = plan.kind == "fsdp" and plan.data > 1
    split = 4 * machine.passes(size * n * student.width, t)
    forward = machine.products(student.block_forward(n, plan.length)) / t + split
    backward = forward + machine.products(student.block_forward(n, plan.length)) / t + forward * plan.checkpointing
    gather, reduce = data(student.block(), size), data(student.block(), FULL)
    last = student.layers - 1
    if sharded:
        add("gather root", "network", data(student.root(), size))
    for i in range(student.layers):
        if sharded:
            add(f"gather {i}", "network", gather, f"forward {i - 2}")
        add(f"forward {i}", "compute", forward, "gather root", f"gather {i}")
    products = 3 * student.head_forward(n) + (0 if plan.teacher == "topk" else teacher.head_forward(n))
    traffic = (TOPK_BYTES if plan.teacher == "topk" else PAIR_BYTES) * float(n * student.vocabulary)
    statistics, gradient = split_head_bytes(n, t, student.width)
    merged = machine.passes(size * n * (student.width + teacher.width) + statistics, t)
    merged += machine.passes(gradient, t, rounds=2)
    traffic = traffic / t + loss_bytes(student, teacher, plan)["again"]
    add("loss", "compute", machine.products(products) / t + traffic / machine.memory_rate + merged)
    bucket = 0.0 if student.tied else FULL * prod(student.root()[0]) / t  # the head's gradient is there first
    for i in range(last, -1, -1):
        if sharded:
            add(f"gather back {i}", "network", gather, f"backward {i + 2}", "loss" if i == last else "")
            if i < last:
                add(f"reduce {i + 1}", "network", reduce, f"backward {i + 1}")
        add(f"backward {i}", "compute", backward, f"gather back {i}")
        bucket += FULL * numbers(student.block()) / t
        if plan.kind == "ddp" and bucket >= BUCKET_BYTES:
            add(f"all-reduce {i}", "network", machine.passes(bucket, plan.data, t, 2), f"backward {i}")
            bucket = 0.0
    if sharded:
        add("reduce 0", "network", reduce, "backward 0")
        add("reduce root", "network", data(student.root(), FULL), "backward 0")
    else:
        bucket += FULL * (numbers(student.root()) - (0 if student.tied else prod(student.root()[0]))) / t
        add("all-reduce", "network", machine.passes(bucket, plan.data, t, 2), "backward 0")
    # AdamW reads parameter, gradient and two moments and writes three of them: 28 bytes.
    update = (3 * FULL + 2 * plan.optimizer_bytes) * student.cost().parameters / t / plan.shards
    add("optimizer", "compute", update / machine.memory_rate, "reduce root", "all-reduce")
    return tasks


def seconds(student: Model, teacher: Model, plan: Plan, machine: Machine) -> float:
    """Of a step; with a teacher on ranks of its own, of the slower side, as they work at the same time."""
    found = max(simulate(step_tasks(student, teacher, plan, machine)).values())
    if plan.teacher != "own ranks":
        return found
    rows, split = plan.data * plan.tokens / plan.teacher_ranks, plan.teacher_split
    forward = teacher.layers * machine.products(teacher.block_forward(rows, plan.length))
    forward += 4 * teacher.layers * machine.passes(plan.size * rows * split * teacher.width, split)
    return max(found, forward, plan.size * rows * teacher.width / machine.network)


if __name__ == "__main__":
    if sys.argv[1:] != ["--table"]:
        raise SystemExit(__doc__)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs/tools"))
    import_module("scaling_tables").write()
