"""Every Triton loss near convergence, with multiplications and additions fused and not: compilers choose either."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from conftest import DEVICE, available
from judge import Outcome, judge_exact
from torch import Tensor

import fastdistil as fd
from fastdistil.backends import interpreting
from fastdistil.contracts.logit import DIVERGENCES

if not (interpreting() and available("triton")):
    pytest.skip("judges Triton's interpreter", allow_module_level=True)

from triton_interpreter_fusion import fusing

Loss = Callable[[Tensor, Tensor, str], Tensor]


def _logits(divergence: str, temperature: float, teacher_temperature: float) -> Loss:
    options = {"divergence": divergence, "beta": 0.3, "temperature": temperature}
    return lambda s, t, b: fd.logit_loss(s, t, **options, teacher_temperature=teacher_temperature, backend=b)


def _topk(divergence: str) -> Loss:
    def loss(s: Tensor, t: Tensor, backend: str) -> Tensor:
        values, indices = (t.double() / 3).log_softmax(-1).topk(33)
        options = {"divergence": divergence, "beta": 0.3, "temperature": 3.0, "backend": backend}
        return fd.topk_logit_loss(s, values, indices, **options)

    return loss


def _attention(kind: str) -> Loss:
    def loss(s: Tensor, t: Tensor, backend: str) -> Tensor:
        parts = [x[:, :256].reshape(1, 2, -1, 16) for x in (s, s.flip(0), t, t.flip(0))]
        return fd.attention_loss(*parts, kind=kind, backend=backend)

    return loss


LOSSES: dict[str, Loss] = {
    **{f"logit, {d}": _logits(d, 3.0, 3.0) for d in DIVERGENCES},
    "logit, two temperatures": _logits("forward_kl", 3.0, 3.3),
    **{f"topk, {d}": _topk(d) for d in DIVERGENCES if d != "mse"},
    **{f"hidden, {k}": lambda s, t, b, k=k: fd.hidden_loss(s, t, kind=k, backend=b) for k in ("mse", "cosine", "kl")},
    **{f"attention, {k}": _attention(k) for k in ("prob_mse", "score_mse", "prob_kl")},
}

# No float32 product is added to anything but by tl.sum (of cosine near convergence: they are float64).
SQUARES = ("logit, mse", "hidden, mse", "hidden, cosine", "attention, score_mse")


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("name", LOSSES)
def test_near_convergence(name: str, fused: bool) -> None:
    teacher = 4 * torch.randn(2, 1000, device=DEVICE)
    student = teacher + 1e-3 * torch.randn_like(teacher)

    def outcome(s: Tensor, t: Tensor, backend: str) -> Outcome:
        leaf = s.clone().requires_grad_()
        value = LOSSES[name](leaf, t, backend)
        return Outcome(value.detach(), torch.autograd.grad(value, (leaf,)))

    with fusing() if fused else nullcontext([0]) as count:
        found = outcome(student, teacher, "triton")
    assert (count[0] > 0) == (fused and name not in SQUARES)
    judge_exact(found, outcome(student.double(), teacher.double(), "reference"), torch.float32)


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("logit, two temperatures", "topk, tvd")])
def test_equal_inputs_have_no_loss(name: str) -> None:
    """A product that is fused on one side of a difference alone would leave its rounding (and in the total variation of
    stored log-probabilities any rounding has a slope)."""
    teacher = 4 * torch.randn(2, 1000, device=DEVICE)
    leaf = teacher.clone().requires_grad_()
    with fusing():
        value = LOSSES[name](leaf, teacher, "triton")
        (gradient,) = torch.autograd.grad(value, leaf)
    if name.startswith("topk") or name == "hidden, cosine":  # stored log-probabilities and norms are rounded
        assert value < 1e-9 and gradient.norm() < 1e-5
    else:
        assert value == 0 and not gradient.any()
