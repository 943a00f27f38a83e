"""hidden_loss: its memory, and what it says to bad calls."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from fastdistil import hidden_loss

_MEMORY = r"""
import os, re, sys, torch
import torch._dynamo  # as an op's first call does
from pathlib import Path
from fastdistil import hidden_loss
def peak():  # MiB; unlike ru_maxrss it does not begin with the parent's
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
def eager(student, teacher, projection):
    return torch.nn.functional.mse_loss(torch.nn.functional.linear(student, projection), teacher)
def ours(student, teacher, projection):
    return hidden_loss(student, teacher, projection=projection)
def run(function, rows):
    s, t, p = torch.randn(rows, 384), torch.randn(rows, 768), torch.randn(768, 384)
    before = peak()
    function(s.requires_grad_(), t, p.requires_grad_()).backward()
    return peak() - before
for function in (ours, eager):
    child = os.fork()  # from a process that has only imported
    if child == 0:
        run(function, 1024)
        print(run(function, 20000), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(function.__name__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_peak_memory() -> None:
    """N = 20,000, D 384 -> 768: the projected states are 59 MiB, the student's gradient, which both return, 29 MiB."""
    result = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ours, eager = map(float, result.stdout.split())
    assert 0 < ours < eager / 2, f"{ours:.0f} MiB, eager {eager:.0f} MiB"


S, T = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
BAD = [
    ({"student": "x"}, TypeError, "student is str, expected a torch.Tensor or a list of them"),
    ({"student": []}, ValueError, "student is an empty list, expected at least one layer"),
    ({"student": [S, S]}, ValueError, "teacher has 1 layers, expected 2 to match student"),
    ({"student": [1.0]}, TypeError, "student is float, expected a torch.Tensor"),
    ({"student": S.int()}, TypeError, "student has dtype torch.int32, expected float32"),
    ({"student": torch.zeros(2, 3, 0)}, ValueError, "student has shape (2, 3, 0), expected (..., D) with D > 0"),
    ({"teacher": torch.zeros(2, 4, 4)}, ValueError, "teacher has shape (2, 4, 4), expected (2, 3, 4) to match student"),
    ({"teacher": torch.zeros(2, 3, 4, requires_grad=True)}, ValueError, "teacher requires grad, expected a constant"),
    ({"teacher": T.to("meta")}, ValueError, "teacher is on meta, expected cpu to match student"),
    ({"student": [S, S[:1]], "teacher": [T, T[:1]]}, ValueError, "student has layers with rows (2, 3) and (1, 3)"),
    ({"kind": "l1"}, ValueError, "kind is 'l1', expected one of 'mse', 'cosine', 'kl'"),
    ({"activation": "relu"}, ValueError, "activation is 'relu', expected one of 'none', 'gelu'"),
    ({"projection": torch.zeros(4, 5)}, ValueError, "projection has shape (4, 5), expected (4, 4), (D_t, D_s)"),
    ({"projection": [torch.zeros(4, 4)] * 2}, ValueError, "projection has 2 layers, expected 1 to match student"),
    ({"bias": torch.zeros(4)}, ValueError, "bias came without a projection, expected both or neither"),
    (
        {"projection": torch.zeros(4, 4), "bias": torch.zeros(5)},
        ValueError,
        "bias has shape (5,), expected (4,), (D_t,)",
    ),
    ({"weight": torch.ones(6)}, ValueError, "weight has shape (6,), expected (2, 3) to match the rows"),
    ({"weight": [1.0]}, TypeError, "weight is list, expected a torch.Tensor"),
    ({"layer_weights": [1, 2]}, ValueError, "layer_weights has 2 entries, expected 1, one a layer"),
    ({"layer_weights": ["1"]}, TypeError, "layer_weights is str, expected a number"),
    ({"layer_weights": [float("nan")]}, ValueError, "layer_weights is nan, expected a finite number"),
    ({"layer_weights": 1.0}, TypeError, "layer_weights is float, expected a list of numbers"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[message[:30] for _, _, message in BAD])
def test_bad_calls(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    hidden_loss(S, T)
    with pytest.raises(kind) as raised:
        hidden_loss(**({"student": S, "teacher": T} | change))
    assert message in str(raised.value)
