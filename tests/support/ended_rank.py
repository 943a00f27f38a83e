"""Run by test_sharded_heads.py, as rank RANK: the second one is killed before the loss, as by the system's out-of-memory
killer, and nobody looks after the others."""

from __future__ import annotations

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import fastdistil as fd

dist.init_process_group("gloo", timeout=timedelta(seconds=45))
torch.set_num_threads(1)
head = torch.nn.Linear(8, 6, bias=False)
fully_shard(head)
states = torch.ones(3, 8, requires_grad=True)
loss = fd.linear_logit_loss(states, head.weight, torch.zeros(3, 8), head.weight.detach())
if dist.get_rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
loss.backward()
