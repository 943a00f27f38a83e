"""Steps with changing shapes, dtypes and losses for a long time: what a process holds must not grow.

    python tests/long_run.py [--minutes 30] [--page docs/reliability.md]

Resident memory after the first fifth of the time, and at the end, each as the least of 20 readings after a collection;
memory that the pool of gradients keeps; open files; compiled graphs. Exit code 1 where memory grew by more than 1% or
anything else at all. `make long-run`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import random
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MALLOC_ARENA_MAX", "2")
sys.path.insert(0, str(Path(__file__).parent / "support"))

import torch
from reliability import Row, write_rows
from torch import Tensor

import fastdistil as fd
from fastdistil import _C
from fastdistil.sparse import SparseAdamW, select_topk

ROWS, COLUMNS = [1, 7, 64, 200], [3, 1000, 5003, 30000]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MOST_POOLED = 256 << 20  # bytes: fastdistil.empty_cache's docstring
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes, the least of 20 readings."""
    gc.collect()
    fd.empty_cache()
    found = []
    for _ in range(20):
        found.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)
        time.sleep(0.01)
    return min(found)


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


@torch.compile(dynamic=True)
def compiled(student: Tensor, teacher: Tensor) -> Tensor:
    return fd.logit_loss(student, teacher, temperature=2.0)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def step(draw: random.Random, number: int) -> None:
    n, v, d = draw.choice(ROWS), draw.choice(COLUMNS), draw.choice([8, 64, 96])
    dtype = draw.choice(DTYPES)
    student, teacher = torch.randn(n, v).to(dtype).requires_grad_(), torch.randn(n, v).to(dtype)
    kind = number % 7
    if kind == 0:
        labels = torch.randint(v, (n,))
        fd.logit_loss(student, teacher, divergence=draw.choice(["forward_kl", "jsd", "tvd"]), labels=labels, label_weight=0.3).backward()  # fmt: skip
    elif kind == 1:
        values, indices = teacher.float().log_softmax(-1).topk(min(3, v))
        fd.topk_logit_loss(student, values, indices).backward()
    elif kind == 2:
        fd.hidden_loss(student, teacher, kind=draw.choice(["mse", "cosine", "kl"])).backward()
    elif kind == 3:
        weight = torch.randn(v, d, dtype=torch.float32, requires_grad=True)
        states = torch.randn(n, d, requires_grad=True)
        fd.linear_logit_loss(states, weight, torch.randn(n, d), weight.detach() + 1).backward()
    elif kind == 4:
        length = draw.choice([5, 33, 64])
        q, k, other = (torch.randn(1, 4, length, 16, requires_grad=i < 2) for i in range(3))
        fd.attention_loss(q, k, other, other * 2).backward()
    elif kind == 5:
        weight = torch.nn.Parameter(torch.randn(n, 64))
        before = weight.detach().clone()
        mask = select_topk({"w": before + torch.randn(n, 64)}, {"w": before}, density=0.2)
        optimizer = SparseAdamW([("w", weight)], mask, lr=1e-3)
        weight.grad = torch.randn(n, 64)
        optimizer.step()
    else:
        compiled(torch.randn(n, v, requires_grad=True), torch.randn(n, v)).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", type=Path, help="the page whose rows are written")
    asked = parser.parse_args()
    draw, number, most_pooled = random.Random(asked.seed), 0, 0
    torch.manual_seed(asked.seed)
    for n, v in itertools.product(ROWS, COLUMNS):  # every graph that there is to compile
        compiled(torch.randn(n, v, requires_grad=True), torch.randn(n, v)).backward()
    began = time.monotonic()
    warm: tuple[int, int, int] | None = None
    while (passed := time.monotonic() - began) < 60 * asked.minutes:
        if warm is None and passed > 12 * asked.minutes and number > 70:
            warm, after = (resident(), handles(), graphs()), number
            print(f"after {number} steps: {warm[0]:,} bytes, {warm[1]} files, {warm[2]} graphs", flush=True)
        step(draw, number)
        most_pooled = max(most_pooled, _C.pool_held())
        number += 1
    if warm is None:
        raise RuntimeError(f"long_run: {number} steps in {asked.minutes} minutes, expected more than 70 to warm up")
    memory, files, count = resident(), handles(), graphs()
    returned = _C.pool_held() == 0  # resident() has asked for it
    growth = memory / warm[0] - 1
    print(
        f"after {number} steps: {memory:,} bytes ({growth:+.2%}), {files} files, {count} graphs; pool {most_pooled:,}"
    )
    good = [growth < 0.01, files <= warm[1], count == warm[2], most_pooled <= MOST_POOLED and returned]
    steps = f"{number - after:,}"
    rows = [
        Row(f"resident memory over {asked.minutes:g} minutes: {growth:+.2%}", steps, "no" if good[0] else "yes"),
        Row(f"open files: {warm[1]}, then {files}", steps, "no" if good[1] else "yes"),
        Row(f"compiled graphs: {warm[2]}, then {count}", steps, "no" if good[2] else "yes"),
        Row(
            f"pool of gradients: at most {most_pooled >> 20} MiB, given back when asked",
            steps,
            "no" if good[3] else "yes",
        ),
    ]
    if asked.page:
        write_rows(asked.page, "long run", rows, ("Watched", "Steps", "Grew"))
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
