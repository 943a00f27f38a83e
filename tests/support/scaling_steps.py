"""Whole steps whose memory and communication are compared with benchmarks/scaling.py; run under torchrun by
test_scaling.py, and imported by it for one process.

Memory is the sum of all allocations less all releases that torch's profiler saw since before the models were built
(the allocator reports them, so that buffers inside of custom ops count, which a dispatch mode does not see).
Collectives are the c10d ops that a dispatch mode sees, DDP's reducer's too: on CPUs its hooks run in this thread."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from fastdistil.benchmarks.scaling import Model, Plan, collectives, loss_bytes, memory, numbers, split_head_bytes
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fastdistil as fd
from fastdistil.ops.products import CPU_ROWS

SEQUENCES, LENGTH, CHUNK_ROWS = 2, 48, 32
SETTLE_SECONDS = 0.02
TOLERANCE = 0.05
STUDENTS = {
    "llama": Model("llama student", 3, 64, 176, 4, 2, 997, gated=True, tied=False),
    "tables": Model("llama student of large tables", 1, 64, 176, 4, 2, 4000, gated=True, tied=False),
    "bert": Model("bert student", 3, 64, 176, 4, 4, 997, gated=False, tied=True, positions=64),
}
TEACHERS = {
    "llama": Model("llama teacher", 4, 96, 256, 4, 2, 997, gated=True, tied=False),
    "tables": Model("llama teacher of large tables", 2, 32, 96, 4, 2, 4000, gated=True, tied=False),
    "bert": Model("bert teacher", 4, 96, 256, 4, 4, 997, gated=False, tied=True, positions=64),
}


def chunk_bytes(model: Model) -> int:
    """Of chunks of CHUNK_ROWS rows of both heads' logits in float32."""
    return 2 * 4 * CHUNK_ROWS * (-(-model.vocabulary // 16) * 16)


def build(model: Model) -> PreTrainedModel:
    shape: dict[str, Any] = {
        "vocab_size": model.vocabulary, "hidden_size": model.width, "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads, "intermediate_size": model.ffn, "tie_word_embeddings": model.tied,
    }  # fmt: skip
    if model.gated:
        return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=model.kv_heads))
    shape |= {"max_position_embeddings": model.positions, "type_vocab_size": model.types}
    return BertForMaskedLM(BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the head is applied to (B, S, D), without the states of all blocks, which output_hidden_states=True keeps."""
    if isinstance(model, LlamaForCausalLM):
        return model.model(ids).last_hidden_state
    return model.cls.predictions.transform(model.bert(ids).last_hidden_state)


def head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    module = model.get_output_embeddings()
    return module.weight, module.bias


class States(nn.Module):
    """`states` as a forward pass, to which DDP and fully_shard attach what they do."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return states(self.model, ids)


class Collectives(TorchDispatchMode):
    """Bytes of the whole tensor (gathered, reduced or scattered) of every collective, by the op's name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = defaultdict[str, list[int]](list)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            sizes = [x.nbytes for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.seen[op.__name__.split(".")[0].strip("_")].append(max(sizes, default=0))
        found = op(*args, **(kwargs or {}))
        if op.namespace == "c10d":
            # What gloo's threads release is not reported: they are to let go of the tensors before this thread does.
            for work in tree_leaves(found):
                if isinstance(work, torch.ScriptObject):
                    work.wait()
            time.sleep(SETTLE_SECONDS)
        return found


def wrapped(module: States, kind: str) -> nn.Module:
    trained = any(p.requires_grad for p in module.parameters())
    if kind in ("fsdp", "mixed"):
        model, policy = module.model, MixedPrecisionPolicy()
        if kind == "mixed" and trained:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        elif kind == "mixed":
            model.to(torch.bfloat16)
        for block in model.model.layers if isinstance(model, LlamaForCausalLM) else model.bert.encoder.layer:
            fully_shard(block, mp_policy=policy)
        fully_shard(module, mp_policy=policy)
    return DistributedDataParallel(module) if kind == "ddp" and trained else module


def step_of(family: str, kind: str) -> Callable[[], None]:
    """The models built and wrapped, and one step of them; kind: "ddp", "fsdp", "mixed" (FSDP2 that computes in bf16) or "one"."""
    torch.manual_seed(0)
    student = States(build(STUDENTS[family]))
    teacher = States(build(TEACHERS[family]).eval().requires_grad_(False))
    trained, frozen = wrapped(student, kind), wrapped(teacher, kind)
    optimizer = torch.optim.AdamW(trained.parameters(), 1e-3, fused=True)  # fused: no temporary tensors
    ids = torch.randint(0, STUDENTS[family].vocabulary, (SEQUENCES, LENGTH))
    most = chunk_bytes(STUDENTS[family])

    def step() -> None:
        with record_function("phase:teacher"), torch.no_grad():
            target = frozen(ids)
        with record_function("phase:forward"):
            hidden = trained(ids)
        with record_function("phase:loss"):
            weight, bias = head(student.model)
            other, other_bias = head(teacher.model)
            loss = fd.linear_logit_loss(
                hidden, weight, target, other, student_bias=bias, teacher_bias=other_bias, chunk_bytes=most
            )
            del hidden, weight, bias
        with record_function("phase:backward"):
            loss.backward()
        with record_function("phase:optimizer"):
            optimizer.step()
        optimizer.zero_grad()

    return step


@contextmanager
def measured(found: dict[str, int]) -> Iterator[None]:
    """Fills `found` with the bytes at the peak of each phase of the last step in the block, all allocations since the
    block began; "after PHASE" is what its end leaves."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda x: x.start_ns())
    spans = {x.name()[6:]: (x.start_ns(), x.end_ns()) for x in events if x.name().startswith("phase:")}
    total = 0
    found.update(dict.fromkeys(spans, 0))
    for event in events:
        if event.name() == "[memory]":
            total += event.nbytes()
            for phase, (start, end) in spans.items():
                if start <= event.start_ns() <= end:
                    found[phase], found[f"after {phase}"] = max(found[phase], total), total


def measure(family: str, kind: str) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Peaks of memory by phase and collectives by name of the third step."""
    found: dict[str, int] = {}
    with measured(found), Collectives() as collectives:
        step = step_of(family, kind)
        for _ in range(3):
            collectives.seen.clear()
            step()
    return found, dict(collectives.seen)


def compared(family: str, kind: str, ranks: int) -> None:
    """Asserts that memory at its peak and at the end of the loss, backward pass and optimizer, and the bytes of each
    kind of collective, are within 5% of the formulas."""
    student, teacher = STUDENTS[family], TEACHERS[family]
    sharded = kind in ("fsdp", "mixed")
    plan = Plan(
        ranks, "fsdp" if sharded else "ddp", "sharded" if sharded else "replicated", SEQUENCES, LENGTH,
        precision="mixed" if kind == "mixed" else "fp32", chunk_bytes=chunk_bytes(student),
    )  # fmt: skip
    held, seen = measure(family, kind)
    moments = {name: sum(x.values()) for name, x in memory(student, teacher, plan).items()}
    if kind == "one":  # DDP's buckets
        moments = {name: x - 4 * student.cost().parameters for name, x in moments.items()}
    if kind == "mixed":  # what only a GPU rounds: a CPU multiplies the float32 gradient
        plain = replace(plan, precision="fp32")
        moments["loss"] -= loss_bytes(student, teacher, plan)["once"] - loss_bytes(student, teacher, plain)["once"]
        moments["loss"] += 4 * (CPU_ROWS + CHUNK_ROWS) * max(student.width, teacher.width)  # of factors in float32
    if sharded and ranks > 1:  # gloo clones what it reduces
        moments["backward, root reduced"] += 4 * numbers(student.root(), ranks)
    wanted = {
        "teacher": moments.get("teacher"),
        "loss": moments["loss"],
        "backward": max(x for name, x in moments.items() if name.startswith("backward")),
        "optimizer": moments["optimizer"],
    }
    for phase, expected in wanted.items():
        if expected is not None:
            near(f"{family}, {kind}, {ranks} processes, memory of {phase}", held[phase], expected)
    formulas = collectives(student, teacher, plan)
    for op, word in (("allreduce", "all-reduce"), ("allgather_base", "all-gather"), ("reduce_scatter_base", "scatter")):
        expected = sum(x for name, x in formulas.items() if name.endswith(word))
        if ranks > 1:  # of one process DDP reduces with itself; the formula counts what is sent
            near(f"{family}, {kind}, {ranks} processes, bytes of {op}", sum(seen.get(op, ())), expected)
    # What the formulas leave out: buffers, which DDP sends before each forward pass.
    known = {"allreduce", "allgather_base", "reduce_scatter_base"}
    assert sum(sum(x) for op, x in seen.items() if op not in known) <= TOLERANCE * sum(map(sum, seen.values()))


def vocabulary_split(ranks: int) -> None:
    """The bytes of a loss of which each rank has its rows of both heads. Its collectives lie inside of a custom op, below
    any dispatch mode: torch.distributed's functions are counted."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(96, width, generator=generator) for width in (64, 96))
    heads = [torch.randn(512, width, generator=generator) for width in (64, 96)]
    group = dist.group.WORLD
    gathers, reduces = (patch(f"torch.distributed.{x}", wraps=getattr(dist, x)) for x in ("all_gather", "all_reduce"))
    with gathers as gather, reduces as reduce:
        fd.linear_logit_loss(student.requires_grad_(), heads[0], teacher, heads[1], group=group).backward()
    sizes = [sum(x.nbytes for x in call.args[0]) for call in gather.call_args_list]
    assert reduce.call_count == 2
    gathered, reduced = split_head_bytes(96, ranks, 64)
    near(f"vocabulary over {ranks}, gathered", sum(sizes), gathered)
    near(f"vocabulary over {ranks}, all-reduced", sum(x.args[0].nbytes for x in reduce.call_args_list), reduced)


def near(what: str, found: float, expected: float) -> None:
    print(f"{what}: measured {found:,.0f}, by formula {expected:,.0f}")
    assert abs(found - expected) <= TOLERANCE * expected, f"{what}: {found:,.0f}, expected {expected:,.0f} within 5%"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for family in STUDENTS:
        for kind in ("ddp", "fsdp"):
            compared(family, kind, dist.get_world_size())
        if dist.get_world_size() > 1:  # alone, nobody shards
            compared(family, "mixed", dist.get_world_size())
    if dist.get_world_size() > 1:
        vocabulary_split(dist.get_world_size())
    dist.barrier()
    dist.destroy_process_group()
