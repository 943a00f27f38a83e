"""topk_logit_loss where a teacher is sure of itself, and where logits are large: every divergence, every tail.

The truth is that of the stored inputs. Log-probabilities stored as float32 are u (1 + 6e-8), so a tail 1 - sum q_k that
is the small difference of larger numbers has lost digits, or its sign, before any loss sees it: no backend can bring
back what the teacher had in memory, all must agree on what the stored numbers say. (With teacher_tail they have it:
test_topk_tail.py.)
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE, available
from judge import EXACT_VALUE, error, judge_exact
from test_logit import F64, outcome
from topk_cases import CASES, digits
from torch import Tensor

import fastdistil as fd
from fastdistil.contracts.logit import DIVERGENCES

BACKENDS = available("reference", "cpu", "triton")
# 0.3 is a teacher that is sure of nothing; the others' tails are 1e-4 and 1e-7.
TEACHERS = (0.3, 1 - 1e-4, 1 - 1e-7)
NOISES = (1e-3, 1e-1, 1.0)


def draw(columns: int, k: int, top: float, std: float, noise: float, rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits (rows, columns), and teacher values and indices (rows, k): one column has probability `top`, the
    others' logits are of std `std`."""
    others = std * torch.randn(rows, columns, dtype=F64)
    at = torch.randint(columns // 4 * 3, columns, (rows, 1))
    log_q = others.scatter(1, at, -math.inf).log_softmax(-1) + math.log(1 - top)
    log_q.scatter_(1, at, math.log1p(top - 1))
    teacher = (log_q + 7.7).float()
    student = (teacher.double() + noise * torch.randn(rows, columns, dtype=F64)).float()
    values, indices = log_q.topk(k)
    return student.to(DEVICE), values.float().to(DEVICE), indices.to(DEVICE)


def rows(s: Tensor, values: Tensor, indices: Tensor, tail: str, divergence: str, backend: str) -> Tensor:
    return fd.topk_logit_loss(
        s, values, indices, tail=tail, divergence=divergence, beta=0.3, reduction="none", backend=backend
    )


def compare(backend: str, tail: str, divergence: str, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    student, values, indices = inputs
    found = outcome(lambda s: rows(s, values, indices, tail, divergence, backend), student)
    truth = outcome(lambda s: rows(s, values, indices, tail, divergence, "reference"), student.double())
    judge_exact(found, truth, torch.float32)


@pytest.mark.pairs(2, "tail", "std", "top")
@pytest.mark.parametrize("top", TEACHERS)
@pytest.mark.parametrize("std", [1.0, 20.0])
@pytest.mark.parametrize(("tail", "divergence"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_teachers(backend: str, tail: str, divergence: str, std: float, top: float) -> None:
    few = backend == "triton"  # whose interpreter takes a tenth of a second a row
    for noise in NOISES:
        for columns, k, rows in ((13, 5, 2 if few else 4), (300, 20, 1 if few else 2)):
            compare(backend, tail, divergence, draw(columns, k, top, std, noise, rows))


@pytest.mark.parametrize(("tail", "divergence"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_columns_and_one(backend: str, tail: str, divergence: str) -> None:
    """The whole vocabulary is named, or the teacher's largest column alone."""
    for k in (1, 13):
        compare(backend, tail, divergence, draw(13, k, 1 - 1e-7, 1.0, 1e-3))


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "mse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_sure_of_the_tail(backend: str, divergence: str) -> None:
    """All but 1e-7 of the mass is on columns that it does not name."""
    others = torch.randn(4, 300, dtype=F64).log_softmax(-1)
    named = others[:, :5].exp().sum(-1, keepdim=True)
    log_q = others - torch.log(1 - named)
    log_q[:, :5] = others[:, :5] - named.log() + math.log(1e-7)
    student = (log_q + 1e-3 * torch.randn(4, 300, dtype=F64)).float().to(DEVICE)
    indices = torch.arange(5, device=DEVICE).expand(4, 5)
    compare(backend, "bucket", divergence, (student, log_q[:, :5].float().to(DEVICE), indices))


@pytest.mark.pairs(2, "target", "known", "columns")
@pytest.mark.parametrize("columns", [(13, 5), (700, 300)])
@pytest.mark.parametrize("known", [1e-6, 0.2, 0.9])
@pytest.mark.parametrize("target", ["teacher", "optimum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_near_teacher_and_optimum(backend: str, target: str, known: float, columns: tuple[int, int]) -> None:
    """The optimum of "zero" is p = q / sum q on the K columns: the gradient goes to 0 there, the value does not."""
    width, k = columns
    log_q = torch.randn(3, width, dtype=F64)
    log_q[:, :k] = log_q[:, :k].log_softmax(-1) + math.log(known)
    log_q[:, k:] = log_q[:, k:].log_softmax(-1) + math.log(1 - known)
    student = log_q + 1e-3 * torch.randn(3, width, dtype=F64)
    if target == "optimum":
        student[:, k:] -= 40.0
    indices = torch.arange(k, device=DEVICE).expand(3, k)
    compare(backend, "zero", "forward_kl", (student.float().to(DEVICE), log_q[:, :k].float().to(DEVICE), indices))


@pytest.mark.parametrize(("tail", "divergence"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear(backend: str, tail: str, divergence: str) -> None:
    """A head whose product is exact: the same rows."""
    student, values, indices = draw(13, 5, 1 - 1e-7, 1.0, 1e-3)

    def loss(s: Tensor, name: str) -> Tensor:
        return fd.linear_topk_logit_loss(
            s, torch.eye(13, dtype=s.dtype, device=DEVICE), values, indices, tail=tail, divergence=divergence, beta=0.3,
            reduction="none", backend=name,
        )  # fmt: skip

    found = outcome(lambda s: loss(s, backend), student)
    truth = outcome(lambda s: loss(s, "reference"), student.double())
    judge_exact(found, truth, torch.float32)


@pytest.mark.parametrize("noise", [1e-4, 1e-1])
@pytest.mark.parametrize("top", TEACHERS)
@pytest.mark.parametrize("std", [1.0, 20.0])
@pytest.mark.parametrize(("tail", "divergence"), CASES)
def test_float64_is_the_formula(tail: str, divergence: str, std: float, top: float, noise: float) -> None:
    """What judges the others above, against 60 digits: near convergence float64's own formula is lost."""
    student, values, indices = draw(13, 5, top, std, noise, rows=1)
    truth = digits(student, values, indices, tail, divergence, beta=0.3)
    for backend in available("reference", "cpu"):
        found = outcome(lambda s, b=backend: rows(s, values, indices, tail, divergence, b), student.double())
        assert error(found.value, truth.value) <= EXACT_VALUE / 100  # it judges the others
        judge_exact(found, truth, F64)
