"""logit_loss where a teacher is sure of itself, and where logits are large: what a difference of logsumexps loses."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE, available
from judge import EXACT_VALUE, SLACK, error, judge_exact, judge_rows
from test_logit import Outcome, outcome, textbook
from torch import Tensor

import fastdistil as fd
from fastdistil.backends import get
from fastdistil.contracts.logit import DIVERGENCES, PHASE_STATISTICS, PHASE_VALUE, STATS, LogitRule

BACKENDS = available("reference", "cpu", "triton", "cuda")
SOFTMAX = [d for d in DIVERGENCES if d != "mse"]


def rows(s: Tensor, t: Tensor, divergence: str, backend: str, **options: object) -> Tensor:
    return fd.logit_loss(
        s, t, divergence=divergence, beta=0.3, scale_by_t2=False, reduction="none", backend=backend, **options
    )


def exact(student: Tensor, teacher: Tensor, divergence: str) -> Outcome:
    """The textbook form loses these values even in float64."""
    return outcome(lambda s: rows(s, teacher.double(), divergence, "reference"), student.double())


@pytest.mark.pairs(3, "divergence", "columns", "noise")
@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("columns", [2, 5, 13, 3000])
@pytest.mark.parametrize("divergence", SOFTMAX)
@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_teachers(backend: str, divergence: str, columns: int, noise: float) -> None:
    """Nearly all mass in one column, in 3000 columns behind the first tile: D is then that column's own difference."""
    count = 2 if columns == 3000 else 8
    teacher = torch.randn(count, columns, device=DEVICE)
    top = torch.randint(columns // 4 * 3, columns, (count,), device=DEVICE)
    teacher[torch.arange(count, device=DEVICE), top] += 18
    student = teacher + noise * torch.randn(count, columns, device=DEVICE)
    found = outcome(lambda s: rows(s, teacher, divergence, backend), student)
    judge_exact(found, exact(student, teacher, divergence), torch.float32)


@pytest.mark.parametrize("divergence", SOFTMAX)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_teachers_largest_logit_rises(backend: str, divergence: str) -> None:
    """Each tile has a larger one than all before, at another difference."""
    teacher = torch.randn(2, 8200, device=DEVICE) + torch.linspace(0, 30, 8200, device=DEVICE)
    student = teacher + 1e-3 * torch.randn(2, 8200, device=DEVICE)
    found = outcome(lambda s: rows(s, teacher, divergence, backend), student)
    judge_exact(found, exact(student, teacher, divergence), torch.float32)


@pytest.mark.pairs(2, "divergence", "std", "related")
@pytest.mark.parametrize("related", [False, True])
@pytest.mark.parametrize(("std", "temperature"), [(20.0, 1.0), (100.0, 1.0), (1e4, 1.0), (1.0, 0.01)])
@pytest.mark.parametrize("divergence", SOFTMAX)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend: str, divergence: str, std: float, temperature: float, related: bool) -> None:
    """Probabilities have the precision of a logit's distance from the row's largest, not that of a logit."""
    count = 3 if backend == "triton" else 8
    student, teacher = (std * torch.randn(count, 300, device=DEVICE) for _ in "st")
    if related:
        teacher = student + 3 * temperature * torch.randn(count, 300, device=DEVICE)

    def plain(s: Tensor, t: Tensor) -> Tensor:
        return textbook(s, t, divergence, 0.3, temperature, temperature)

    found = outcome(lambda s: rows(s, teacher, divergence, backend, temperature=temperature), student)
    truth = outcome(lambda s: plain(s, teacher.double()), student.double())
    eager = outcome(lambda s: plain(s, teacher), student)
    judge_rows(found.value, truth.value, eager.value)
    judge_rows(*(temperature * x.gradients[0] for x in (found, truth, eager)))


@pytest.mark.pairs(2, "divergence", "change", "side")
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("change", [-30.0, -math.inf])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_far_column_leaves_the_others_exact(backend: str, divergence: str, change: float, side: str) -> None:
    """It has next to no mass on either side: the row is still one that is near its teacher."""
    teacher = torch.randn(3, 2500, device=DEVICE)
    student = teacher + 1e-3 * torch.randn(3, 2500, device=DEVICE)
    student[:, 2100] = teacher[:, 2100] = -40.0
    (student if side == "student" else teacher)[:, 2100] += change
    others = [c for c in range(2500) if c != 2100]
    found = outcome(lambda s: rows(s, teacher, divergence, backend), student)
    truth = exact(student, teacher, divergence)
    assert error(found.gradients[0][:, others], truth.gradients[0][:, others]) <= EXACT_VALUE
    assert found.gradients[0].isfinite().all()


@pytest.mark.pairs(3, "columns", "noise")
@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("columns", [2, 13, 3000])
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_kl_of_confident_teachers(backend: str, columns: int, noise: float) -> None:
    teacher = torch.randn(4, columns, device=DEVICE)
    teacher[:, columns // 4 * 3] += 18
    student = teacher + noise * torch.randn(4, columns, device=DEVICE)
    found = outcome(lambda s: fd.hidden_loss(s, teacher, kind="kl", reduction="none", backend=backend), student)
    judge_exact(found, exact(student, teacher, "forward_kl"), torch.float32)


@pytest.mark.parametrize("divergence", SOFTMAX)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_a_row_in_two_phases(backend: str, divergence: str) -> None:
    """Confident, far apart, and a part of a row in which the teacher, or nobody, has any mass."""
    teacher = torch.randn(5, 70, device=DEVICE)
    student = teacher + 1e-3 * torch.randn(5, 70, device=DEVICE)
    teacher[0, 3] += 18
    student[0, 3] += 18
    student[1] = 100 * torch.randn(70, device=DEVICE)
    teacher[2:4] = student[3] = -math.inf
    ones = torch.ones(5, device=DEVICE)
    rule: LogitRule = {
        "divergence": DIVERGENCES.index(divergence), "beta": 0.3,
        "student_temperature": 1.0, "teacher_temperature": 1.0, "value_factor": 1.0,
    }  # fmt: skip
    module = get("logit", backend, DEVICE)
    stats, loss, gradient = torch.empty(5, STATS, device=DEVICE), torch.empty_like(ones), torch.empty_like(student)
    module.logit_fwd(student, teacher, ones, loss, stats, None, phase=PHASE_STATISTICS, **rule)
    own = stats[:, 6] + stats[:, 7]
    lse = [x.double().logsumexp(-1) for x in (student, teacher)]
    assert error(own[:3], lse[0][:3]) <= SLACK[torch.float32]
    assert own[3] == -math.inf
    assert (stats[2:4, 0] == -math.inf).all()
    assert (
        error((stats[:, 5] + stats[:, 3] + stats[:, 2])[[0, 4]], (lse[0] - lse[1])[[0, 4]]) < 1e-3
    )  # of a noise of 1e-3: a rounding
    assert (stats[1:4, 3] == math.inf).all()
    whole = [0, 1, 4]
    module.logit_fwd(student, teacher, ones, loss, stats, None, phase=PHASE_VALUE, **rule)
    module.logit_bwd(student, teacher, ones, stats, gradient, ones, False, **rule)
    truth = outcome(lambda s: rows(s, teacher[whole].double(), divergence, "reference"), student[whole].double())
    assert error(loss[whole], truth.value) <= EXACT_VALUE
    assert error(gradient[[0, 4]], truth.gradients[0][[0, 2]]) <= EXACT_VALUE


@pytest.mark.pairs(2, "divergence", "side")
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", SOFTMAX)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_visible(backend: str, divergence: str, side: str) -> None:
    student, teacher = torch.randn(3, 2100, device=DEVICE), torch.randn(3, 2100, device=DEVICE)
    (student if side == "student" else teacher)[1, 2090] = math.nan
    (student if side == "student" else teacher)[2] = -math.inf
    found = outcome(lambda s: rows(s, teacher, divergence, backend), student)
    assert found.value.isnan().tolist() == [False, True, True]
    assert found.gradients[0][1:].isnan().all()
