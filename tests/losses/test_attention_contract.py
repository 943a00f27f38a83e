"""attention_loss as an op: backward, strides, dtypes, torch.library's checks, memory, and what it says to bad calls."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from attention_cases import BACKENDS, KINDS, SHAPES, draw
from conftest import DEVICE

from fastdistil import attention_loss
from fastdistil.ops.attention import attention_rows, attention_total


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_of_any_strides(backend: str, kind: str, reduction: str) -> None:
    q, k = (torch.ones(0, 2, 3, 5, device=DEVICE).mT.requires_grad_() for _ in range(2))
    assert q.stride(-1) != 1
    value = attention_loss(q, k, q.detach(), k.detach(), kind=kind, reduction=reduction, backend=backend)
    assert value.shape == ((0, 2, 5) if reduction == "none" else ())
    value.sum().backward()
    assert value.sum() == 0 and q.grad is not None and q.grad.shape == q.shape


def test_dtypes_may_differ() -> None:
    tensors, mask = draw(SHAPES["padded"], torch.bfloat16)
    expected = attention_loss(*(x.float() for x in tensors), mask=mask)
    mixed = [x.float() for x in tensors[:2]] + tensors[2:]
    assert torch.equal(attention_loss(*mixed, mask=mask), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    tensors, mask = draw((2, 2, 5, 4, 4, True, False), torch.float32)
    tensors = [x.requires_grad_(i < 2) for i, x in enumerate(tensors)]
    scale = torch.rand(2, 2, 5, device=DEVICE)
    arguments = (*tensors, mask, None, scale, kind, False, 0.5, 0.5, "each", "auto")
    torch.library.opcheck(attention_rows.op, arguments)
    torch.library.opcheck(attention_total.op, (*arguments, [True, True], False))
    torch.library.opcheck(attention_total.op, (*arguments, [False, True], True))


_MEMORY = r"""
import os, re, sys, torch
import torch._dynamo  # as an op's first call does
from pathlib import Path
from fastdistil import attention_loss
torch.set_num_threads(2)
def eager(q_s, k_s, q_t, k_t, *, kind):
    a, b = q_s @ k_s.mT / 8, q_t @ k_t.mT / 8
    if kind == "prob_kl":
        return torch.nn.functional.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True)
    return (a - b if kind == "score_mse" else a.softmax(-1) - b.softmax(-1)).square().mean()
def mean(q_s, k_s, q_t, k_t, *, kind):  # half as many heads as the teacher's
    heads = q_s.shape[1] // 2
    return attention_loss(q_s[:, :heads], k_s[:, :heads], q_t, k_t, kind=kind, heads="mean")
def peak():  # MiB; unlike ru_maxrss it does not begin with the parent's
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
def measure(which, kind, *shape):
    function = {"eager": eager, "ours": attention_loss, "mean": mean}[which]
    def run(q, k, q_t, k_t):
        function(q.requires_grad_(), k.requires_grad_(), q_t, k_t, kind=kind).backward()
    run(*torch.randn(4, 1, 2, 64, 64))
    inputs = torch.randn(4, *map(int, shape), 64).unbind()
    before = peak()
    run(*inputs)
    print(which, kind, shape[2], peak() - before, flush=True)
# Each begins in the same process, which has only imported: what one leaves, such as the CPU backend's blocks of memory,
# would be there for the next.
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        measure(*name.split("-"))
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(name)
"""
# What is measured in one process, by S. B and H are such that the blocks, which do not grow with them, weigh little.
_MEASURED = {512: (2, 12), 2048: (1, 8)}


@functools.cache
def _peaks_mib() -> dict[tuple[str, str, int], float]:
    """Beyond the inputs, by implementation, kind and length."""
    names = [f"{which}-{kind}" for kind in KINDS for which in ("ours", "eager")] + ["mean-prob_mse"]
    measured = [f"{name}-{b}-{h}-{length}" for length, (b, h) in _MEASURED.items() for name in names]
    command = [sys.executable, "-c", _MEMORY, *measured]
    # Maps of 24 MiB would else come from a heap whose holes count as eager's.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    lines = map(str.split, result.stdout.splitlines())
    return {(which, kind, int(length)): float(mib) for which, kind, length, mib in lines}


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("which", "kind", "length", "at_least"),
    [
        ("ours", "prob_kl", 512, 10),
        ("ours", "prob_mse", 512, 10),
        ("ours", "score_mse", 512, 10),
        ("ours", "prob_kl", 2048, 50),
        ("ours", "prob_mse", 2048, 50),
        ("ours", "score_mse", 2048, 40),
        ("mean", "prob_mse", 2048, 15),  # blocks of two MiB, keys and their differences in float64
    ],
)
def test_peak_memory(which: str, kind: str, length: int, at_least: int) -> None:
    """Beyond the inputs: eager holds several maps, we two blocks of 256 KiB a thread. For score_mse eager holds so
    little that the gradients alone are 1/48 of it; beyond them every kind keeps to 1/10 and 1/50."""
    ours, eager = (_peaks_mib()[x, kind, length] for x in (which, "eager"))
    batch, heads = _MEASURED[length]
    gradients = 2 * batch * heads * length * 64 * 4 / 2**20
    assert 0 < ours < eager / at_least, f"{ours:.1f} MiB, eager {eager:.0f} MiB"
    if which == "ours":
        assert ours - gradients < (eager - gradients) / {512: 10, 2048: 50}[length], f"{ours:.1f} MiB"


def _good() -> dict[str, Any]:
    q_s, k_s = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 4)
    return {
        "student_q": q_s,
        "student_k": k_s,
        "teacher_q": torch.zeros(2, 3, 5, 6),
        "teacher_k": torch.zeros(2, 3, 5, 6),
    }


BAD = [
    ({"student_q": [1.0]}, TypeError, "student_q is list, expected a torch.Tensor"),
    ({"teacher_k": torch.zeros(2, 3, 5, 6).int()}, TypeError, "teacher_k has dtype torch.int32, expected float32"),
    ({"student_q": torch.zeros(3, 5, 4)}, ValueError, "student_q has shape (3, 5, 4), expected (B, H, S, d)"),
    ({"student_q": torch.zeros(2, 3, 5, 0)}, ValueError, "student_q has shape (2, 3, 5, 0), expected (B, H, S, d)"),
    ({"student_k": torch.zeros(2, 3, 5, 6)}, ValueError, "student_k has shape (2, 3, 5, 6), expected (2, 3, 5, 4) to"),
    ({"teacher_k": torch.zeros(2, 3, 5, 4)}, ValueError, "teacher_k has shape (2, 3, 5, 4), expected (2, 3, 5, 6) to"),
    (
        {"teacher_q": torch.zeros(2, 4, 5, 6), "teacher_k": torch.zeros(2, 4, 5, 6)},
        ValueError,
        "teacher_q has shape (2, 4, 5, 6), expected (2, 3, 5, d) to match student_q",
    ),
    ({"teacher_q": torch.zeros(2, 3, 5, 6, requires_grad=True)}, ValueError, "teacher_q requires grad, expected a con"),
    ({"teacher_q": torch.zeros(2, 3, 5, 6, device="meta")}, ValueError, "teacher_q is on meta, expected cpu to match"),
    ({"kind": "mse"}, ValueError, "kind is 'mse', expected one of 'prob_mse', 'prob_kl', 'score_mse'"),
    ({"mask": torch.ones(2, 5)}, TypeError, "mask has dtype torch.float32, expected bool, True = real token"),
    ({"mask": torch.ones(2, 4).bool()}, ValueError, "mask has shape (2, 4), expected (2, 5), (B, S) of the student"),
    ({"mask": [True]}, TypeError, "mask is list, expected a torch.Tensor"),
    (
        {"mask": torch.ones(2, 5, device="meta").bool()},
        ValueError,
        "mask is on meta, expected cpu to match the student",
    ),
    ({"causal": 1}, TypeError, "causal is int, expected a bool"),
    ({"mask_queries": None}, TypeError, "mask_queries is NoneType, expected a bool"),
    ({"student_scale": "1"}, TypeError, "student_scale is str, expected a number"),
    ({"teacher_scale": float("nan")}, ValueError, "teacher_scale is nan, expected a finite number"),
    ({"num_items": torch.ones(2)}, ValueError, "num_items has shape (2,), expected one number"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[message[:30] for _, _, message in BAD])
def test_bad_calls(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    attention_loss(**_good())
    with pytest.raises(kind) as raised:
        attention_loss(**(_good() | change))
    assert message in str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_round_the_scores(backend: str, kind: str) -> None:
    tensors, mask = draw(SHAPES["padded"], torch.float32)
    loss = partial(attention_loss, kind=kind, mask=mask, backend=backend)
    expected = loss(*tensors)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(loss(*tensors), expected)
