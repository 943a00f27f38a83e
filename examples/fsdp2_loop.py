"""Distil a language model under FSDP2 (fully_shard) in a plain loop: each process has tokens of its own, and a part of
every parameter of student and teacher, their heads included.

torchrun --nproc-per-node 2 examples/fsdp2_loop.py   # on CPUs; on GPUs use nccl, and put models and batches on them
python examples/fsdp2_loop.py                        # one process: the same losses, of small random models and data
"""

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import fastdistil as fd

VOCABULARY, ROWS, LENGTH = 300, 4, 12


def language_model(layers: int, width: int) -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCABULARY, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, hidden_size=width, **sizes))


def sharded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A unit for each block, one for the head, one for the rest. `model.model` is the one whose forward is called."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model.model, mesh=mesh)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Ids (ROWS, LENGTH) and which of them count, of all processes."""
    draw = torch.Generator().manual_seed(step % 4)
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=draw)
    lengths = torch.randint(2, LENGTH + 1, (ROWS, 1), generator=draw)
    return ids, torch.arange(LENGTH) < lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", timeout=timedelta(seconds=60), **alone)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    teacher = sharded(language_model(2, 48).eval().requires_grad_(False))
    student = sharded(language_model(1, 32))
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=3e-3), []
    for step in range(steps):
        everything, counted = batch(step)
        ids, weight = everything[rank::world], counted[rank::world]
        with torch.no_grad():
            target = teacher.model(ids).last_hidden_state
        loss = fd.linear_logit_loss(
            student.model(ids).last_hidden_state, student.lm_head.weight, target, teacher.lm_head.weight,
            temperature=2.0, weight=weight, num_items=int(counted.sum()),
        )  # fmt: skip
        (loss * world).backward()  # FSDP averages the gradients of the processes, heads included
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total := loss.detach())
        losses.append(total.item())
    if rank == 0:
        print({"first": losses[0], "last": losses[-1]})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
