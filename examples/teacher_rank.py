"""The teacher on a process (and device) of its own, which sends its hidden states to those that train the student.

torchrun --nproc-per-node 3 examples/teacher_rank.py --out run.pt   # the last has the teacher; one process has all

The head crosses once, then states (rows, D) for each batch: never logits. Small random models and data. A process that
ends takes the others with it, within a minute, and the same call again goes on from the file `--out`.
"""

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import fastdistil as fd

VOCABULARY, ROWS, LENGTH, WIDTH = 300, 4, 12, 48
SEED = torch.Generator().manual_seed(0)
BATCHES = torch.randint(3, VOCABULARY, (4, ROWS, LENGTH), generator=SEED)  # on every process


def language_model(layers: int, width: int) -> LlamaForCausalLM:
    sizes = {"vocab_size": VOCABULARY, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, hidden_size=width, **sizes))


@torch.no_grad()
def teach(teacher: LlamaForCausalLM, numbers: range, students: int) -> None:
    """Sends each student the states of its rows, which are made while it is at the step before."""
    for step in numbers:
        for rank, part in enumerate(teacher.model(BATCHES[step % 4]).last_hidden_state.chunk(students)):
            dist.send(part.contiguous(), dst=rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="", help="a file, after every step; one that is there is continued")
    args = parser.parse_args()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", timeout=timedelta(seconds=50), **alone)  # what a silent process is waited for
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    students, items = max(1, last), ROWS * LENGTH  # of all processes: their gradients add up to those of the batch
    group = dist.new_group(list(range(students)))
    torch.manual_seed(0)  # a real student's process would never hold more of the teacher than its head
    teacher, student = language_model(2, WIDTH).eval().requires_grad_(False), language_model(1, 32)
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=3e-3), []
    if os.path.exists(args.out):
        weights, moments, losses = torch.load(args.out)
        student.load_state_dict(weights)
        optimizer.load_state_dict(moments)
    dist.broadcast(head := teacher.lm_head.weight.detach(), src=last)  # all have read the file
    if last and rank == last:
        return teach(teacher, range(len(losses), args.steps), students)
    for step in range(len(losses), args.steps):
        ids = BATCHES[step % 4].chunk(students)[rank]
        states = torch.empty(*ids.shape, WIDTH) if last else teacher.model(ids).last_hidden_state
        if last:
            dist.recv(states, src=last)
        hidden = student.model(ids).last_hidden_state
        loss = fd.linear_logit_loss(hidden, student.lm_head.weight, states, head, temperature=2.0, num_items=items)
        loss.backward()
        for tensor in (total := loss.detach(), *(p.grad for p in student.parameters())):
            dist.all_reduce(tensor, group=group)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
        if rank == 0 and args.out:  # in one move: a process may end in the middle of writing
            torch.save((student.state_dict(), optimizer.state_dict(), losses), args.out + ".new")
            os.replace(args.out + ".new", args.out)
    if rank == 0:
        print({"first": losses[0], "last": losses[-1]})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
