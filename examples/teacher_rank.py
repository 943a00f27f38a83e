"""The teacher on a process (and device) of its own, which sends its hidden states to those that train the student.

torchrun --nproc-per-node 3 examples/teacher_rank.py   # two processes of the student, the last one of the teacher
python examples/teacher_rank.py                        # one process of both: the same losses

The teacher's head crosses once, its states (rows, D) for each batch: never logits, which are V / D times as large. The
teacher works on the next batch while the student trains. Small random models and data, nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastdistil as fd

VOCABULARY, ROWS, LENGTH = 300, 4, 12


def language_model(layers: int, width: int) -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCABULARY, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, hidden_size=width, **sizes))


def batch(step: int) -> Tensor:
    """Ids (ROWS, LENGTH) of a step, the same on every process: a function of its number."""
    return torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step % 4))


def states_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    found: Tensor = model.model(ids).last_hidden_state
    return found


def teach(teacher: LlamaForCausalLM, steps: int, students: int) -> None:
    """Sends each student the states of its rows, one step ahead of it."""
    sent: list[dist.Work | None] = []
    for step in range(steps):
        with torch.no_grad():
            parts = states_of(teacher, batch(step)).chunk(students)
        for work in sent:  # of the step before
            if work is not None:
                work.wait()
        sent = [dist.isend(part.contiguous(), dst=rank) for rank, part in enumerate(parts)]
    for work in sent:
        if work is not None:
            work.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    if "RANK" in os.environ:  # a process that has died ends the others after a minute at the latest
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    students = max(1, world - 1)
    group = dist.new_group(list(range(students)))

    torch.manual_seed(0)
    teacher, student = language_model(2, 48).eval().requires_grad_(False), language_model(1, 32)
    head = teacher.lm_head.weight.detach()
    dist.broadcast(head, src=world - 1)
    if world > 1 and rank == world - 1:
        teach(teacher, steps, students)
    else:
        if world > 1:
            del teacher  # of a real one, this process has never had more than the head
        optimizer, losses = torch.optim.AdamW(student.parameters(), lr=3e-3), []
        for step in range(steps):
            ids = batch(step).chunk(students)[rank]
            if world > 1:
                states = torch.empty(*ids.shape, head.shape[1])
                dist.recv(states, src=world - 1)
            else:
                with torch.no_grad():
                    states = states_of(teacher, ids)
            # Divided by the rows of all processes, the gradients add up to those of the whole batch.
            loss = fd.linear_logit_loss(
                states_of(student, ids), student.lm_head.weight, states, head, temperature=2.0, num_items=ROWS * LENGTH
            )
            loss.backward()
            for p in student.parameters():
                dist.all_reduce(p.grad, group=group)
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach()
            dist.all_reduce(total, group=group)
            losses.append(total.item())
        if rank == 0:
            print({"first": losses[0], "last": losses[-1]})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
