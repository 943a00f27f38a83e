"""The teacher on a process (and device) of its own, which sends its hidden states to those that train the student.

torchrun --nproc-per-node 3 examples/teacher_rank.py   # two processes of the student, the last one of the teacher
python examples/teacher_rank.py                        # one process of both: the same losses

Its head crosses once, its states (rows, D) for each batch, one batch ahead: never logits. Small random models and data.
"""

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import fastdistil as fd

VOCABULARY, ROWS, LENGTH, WIDTH = 300, 4, 12, 48


def language_model(layers: int, width: int) -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCABULARY, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, hidden_size=width, **sizes))


def batch(step: int) -> torch.Tensor:  # ids (ROWS, LENGTH), the same on every process: a function of the step's number
    return torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step % 4))


def teach(teacher: LlamaForCausalLM, steps: int, students: int) -> None:
    """Sends each student the states of its rows, one step ahead of it."""
    sent = []
    for step in range(steps):
        with torch.no_grad():
            parts = teacher.model(batch(step)).last_hidden_state.chunk(students)
        for work in sent:  # of the step before
            work.wait()
        sent = [dist.isend(part.contiguous(), dst=rank) for rank, part in enumerate(parts)]
    for work in sent:
        work.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", timeout=timedelta(seconds=60), **alone)  # a dead process ends the others after it
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    students, items = max(1, last), ROWS * LENGTH  # of all processes: their gradients add up to those of the batch
    group = dist.new_group(list(range(students)))
    torch.manual_seed(0)  # a real student's process would never hold more of the teacher than its head
    teacher, student = language_model(2, WIDTH).eval().requires_grad_(False), language_model(1, 32)
    dist.broadcast(head := teacher.lm_head.weight.detach(), src=last)
    if last and rank == last:
        return teach(teacher, steps, students)
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=3e-3), []
    for step in range(steps):
        ids = batch(step).chunk(students)[rank]
        if last:
            dist.recv(states := torch.empty(*ids.shape, WIDTH), src=last)
        else:
            states = teacher.model(ids).last_hidden_state
        hidden = student.model(ids).last_hidden_state
        loss = fd.linear_logit_loss(hidden, student.lm_head.weight, states, head, temperature=2.0, num_items=items)
        loss.backward()
        for tensor in (total := loss.detach(), *(p.grad for p in student.parameters())):
            dist.all_reduce(tensor, group=group)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    if rank == 0:
        print({"first": losses[0], "last": losses[-1]})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
