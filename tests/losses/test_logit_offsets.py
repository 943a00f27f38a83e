"""logit_loss where rows lie apart, temperatures differ and students are sure of themselves, against 50 digits."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from conftest import DEVICE, available
from judge import EXACT_GRADIENT, EXACT_VALUE, Outcome, error, judge_exact
from torch import Tensor

import fastdistil as fd
from fastdistil.contracts.logit import DIVERGENCES

BACKENDS = available("reference", "cpu", "triton", "cuda")
SOFTMAX = [d for d in DIVERGENCES if d != "mse"]
MIXTURES = ["jsd", "skew_kl", "skew_reverse_kl"]


def _softmax(row: list[float], temperature: float) -> list[mpmath.mpf]:
    scores = [mpmath.mpf(x) / mpmath.mpf(temperature) for x in row]
    largest = max(scores)
    weights = [mpmath.exp(x - largest) for x in scores]
    total = mpmath.fsum(weights)
    return [w / total for w in weights]


def _kl(p: list[mpmath.mpf], q: list[mpmath.mpf]) -> mpmath.mpf:
    return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)


def _mix(weight: float, p: list[mpmath.mpf], q: list[mpmath.mpf]) -> list[mpmath.mpf]:
    return [mpmath.mpf(weight) * x + (1 - mpmath.mpf(weight)) * y for x, y in zip(p, q, strict=True)]


def _row(s: list[float], t: list[float], divergence: str, beta: float, t_s: float, t_t: float) -> list[mpmath.mpf]:
    """Value and gradient: p (f - sum p f) with f the derivative in p."""
    p, q = _softmax(s, t_s), _softmax(t, t_t)
    log = [mpmath.log(x / y) if x > 0 and y > 0 else mpmath.mpf(0) for x, y in zip(p, q, strict=True)]
    m = _mix(beta, p, q) if divergence == "skew_reverse_kl" else _mix(beta, q, p)
    rest = 1 - mpmath.mpf(beta)
    columns = [(x, y, z) for x, y, z in zip(p, q, m, strict=True)]
    inside = [z if z > 0 else mpmath.mpf(1) for z in m]
    if divergence == "forward_kl":
        value, slopes = _kl(q, p), [-y / x if x > 0 else mpmath.mpf(0) for x, y in zip(p, q, strict=True)]
    elif divergence == "reverse_kl":
        value, slopes = _kl(p, q), log
    elif divergence == "jsd":
        value = beta * _kl(q, m) + rest * _kl(p, m)
        slopes = [rest * mpmath.log(x / z) if x > 0 else mpmath.mpf(0) for x, _, z in columns]
    elif divergence == "skew_kl":
        value, slopes = _kl(q, m), [-rest * y / z for y, z in zip(q, inside, strict=True)]
    elif divergence == "skew_reverse_kl":
        value = _kl(p, m)
        slopes = [mpmath.log(x / z) - beta * x / z if x > 0 else mpmath.mpf(0) for x, _, z in columns]
    else:
        value = mpmath.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2
        slopes = [mpmath.sign(x - y) / 2 for x, y in zip(p, q, strict=True)]
    mean = mpmath.fsum(x * f for x, f in zip(p, slopes, strict=True))
    return [value, *(x * (f - mean) / mpmath.mpf(t_s) for x, f in zip(p, slopes, strict=True))]


def truth(
    student: Tensor, teacher: Tensor, divergence: str, beta: float = 0.3, t_s: float = 1.0, t_t: float = 1.0
) -> Outcome:
    """Of rows (N, V) as they are, rounded to float64 at the end."""
    with mpmath.workdps(60):
        pairs = zip(student.double().tolist(), teacher.double().tolist(), strict=True)
        rows = [[float(x) for x in _row(s, t, divergence, beta, t_s, t_t)] for s, t in pairs]
    found = torch.tensor(rows, dtype=torch.float64)
    return Outcome(found[:, 0], (found[:, 1:],))


def outcome(student: Tensor, teacher: Tensor, divergence: str, backend: str, **options: object) -> Outcome:
    leaf = student.clone().requires_grad_()
    options = {"beta": 0.3, **options}
    value = fd.logit_loss(
        leaf, teacher, divergence=divergence, scale_by_t2=False, reduction="none", backend=backend, **options
    )
    value.sum().backward()
    assert leaf.grad is not None
    return Outcome(value.detach(), (leaf.grad,))


def judge_each(found: Outcome, right: Outcome) -> None:
    """As judge_exact, each row by itself."""
    for i in range(len(right.value)):
        row, wanted = (Outcome(x.value[i], (x.gradients[0][i],)) for x in (found, right))
        judge_exact(row, wanted, torch.float32)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", SOFTMAX)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_between_the_rows(backend: str, divergence: str, side: str) -> None:
    """Neither side's offset costs a digit, whichever columns hold the same on both sides."""
    student = torch.tensor([0.1, -0.7, 1.3, 0.4, 2.1]).repeat(7, 1)
    teacher = torch.tensor([0.101, -0.702, 1.3005, 0.4015, 2.1003]).repeat(7, 1)
    far = student if side == "student" else teacher
    far += torch.tensor([0.3, 5.0, -30.0, 100.0, -1000.0, 1e4, 100.0])[:, None]
    student[6, 1:3] = teacher[6, 1:3] = -1e4
    student[5, 1] = teacher[5, 1] = -math.inf
    found = outcome(student.to(DEVICE), teacher.to(DEVICE), divergence, backend)
    judge_each(found, truth(student, teacher, divergence))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_offset_of_a_few_columns_in_many(backend: str) -> None:
    """All but three are masked on both sides, those that the first guess looks at among them."""
    student, teacher = torch.full((1, 1100), -1e4), torch.full((1, 1100), -1e4)
    at = torch.tensor([1, 600, 1050])
    student[:, at] = torch.tensor([0.3, 1.2, -0.4])
    teacher[:, at] = torch.tensor([100.301, 101.199, 99.602])
    found = outcome(student.to(DEVICE), teacher.to(DEVICE), "forward_kl", backend)
    judge_each(found, truth(student, teacher, "forward_kl"))


@pytest.mark.parametrize("divergence", SOFTMAX)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_that_is_sure(backend: str, divergence: str) -> None:
    """Of a column that its teacher does not favour, or not as much, or more; with neither, one or both sure."""
    base = torch.tensor([0.3, -0.5, 1.0, 0.1, -1.2, 0.7])
    student, teacher = base.repeat(7, 1), (base + torch.tensor([0.2, -0.1, 0.4, 0.3, -0.2, 0.1])).repeat(7, 1)
    student[:, 4] = torch.tensor([8.0, 15.0, 21.0, 21.0, 21.0, 15.0, 9.0])
    teacher[3, 1] = 22.0
    teacher[4, 4], teacher[5, 4], teacher[6, 4] = 15.0, 21.0, -math.inf
    if divergence == "reverse_kl":
        teacher[6, 4] = -9.0
    found = outcome(student.to(DEVICE), teacher.to(DEVICE), divergence, backend)
    judge_each(found, truth(student, teacher, divergence))


@pytest.mark.parametrize("beta", [1e-6, 0.9999, 1 - 1e-6])
@pytest.mark.parametrize("divergence", MIXTURES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mixtures_of_nearly_one(backend: str, divergence: str, beta: float) -> None:
    student = torch.tensor([[0.1, -0.7, 1.3, 0.4], [0.1, -0.7, 1.3, 0.4], [9.0, -0.7, 1.3, 0.4]])
    teacher = torch.tensor([[0.3, -1.7, 1.0, 0.9], [0.1, -0.7, 1.3, 12.0], [0.1, -0.6, 1.2, 0.6]])
    found = outcome(student.to(DEVICE), teacher.to(DEVICE), divergence, backend, beta=beta)
    judge_each(found, truth(student, teacher, divergence, beta))


@pytest.mark.parametrize(("t_s", "t_t"), [(1.0, 1 + 1e-6), (2.0, 2 - 1e-4), (1.7, 3.0), (0.05, 0.1)])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_temperatures(backend: str, divergence: str, t_s: float, t_t: float) -> None:
    student = torch.tensor([0.1, -0.7, 1.3, 0.4, 0.9]).repeat(2, 1) * t_s
    teacher = torch.tensor([0.101, -0.702, 1.3005, 0.4015, 0.9]) * t_t + torch.tensor([0.0, 30.0])[:, None]
    options = {"temperature": t_s, "teacher_temperature": t_t}
    found = outcome(student.to(DEVICE), teacher.to(DEVICE), divergence, backend, **options)
    judge_each(found, truth(student, teacher, divergence, 0.3, t_s, t_t))


@pytest.mark.parametrize("temperature", [0.05, 3.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_far_from_zero_at_a_temperature(backend: str, temperature: float) -> None:
    """What is divided by the temperature is a distance from the row's largest logit."""
    student = torch.tensor([[0.1, -0.7, 1.3, 0.4, 0.9]]) * temperature + 1000
    teacher = torch.tensor([[0.3, -0.2, 1.1, 0.4, 0.9]]) * temperature + 1000
    found = outcome(student.to(DEVICE), teacher.to(DEVICE), "forward_kl", backend, temperature=temperature)
    judge_each(found, truth(student, teacher, "forward_kl", 0.3, temperature, temperature))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_kl_behind_an_offset(backend: str) -> None:
    student = torch.tensor([0.1, -0.7, 1.3, 0.4]).repeat(3, 1)
    teacher = torch.tensor([0.101, -0.702, 1.3005, 0.4015]) + torch.tensor([100.0, -30.0, 1000.0])[:, None]
    leaf = student.to(DEVICE).requires_grad_()
    value = fd.hidden_loss(leaf, teacher.to(DEVICE), kind="kl", reduction="none", backend=backend)
    value.sum().backward()
    right = truth(student, teacher, "forward_kl")
    assert leaf.grad is not None
    for i in range(3):
        assert error(value[i], right.value[i]) <= EXACT_VALUE
        assert error(leaf.grad[i], right.gradients[0][i]) <= EXACT_GRADIENT[torch.float32]


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_ends_of_jsd_name_what_others_mean(beta: float) -> None:
    name = "forward_kl" if beta == 0 else "reverse_kl"
    with pytest.raises(ValueError, match=rf"beta is {beta} for jsd, .* 0 and 1 the divergence itself is 0.*{name}"):
        fd.logit_loss(torch.randn(2, 3), torch.randn(2, 3), divergence="jsd", beta=beta)
    s, t = torch.randn(2, 5), torch.randn(2, 5)
    tiny = 1e-7 if beta == 0 else 1 - 1e-7
    limit = fd.logit_loss(s, t, divergence="jsd", beta=tiny, reduction="none") / min(tiny, 1 - tiny)
    assert error(limit, fd.logit_loss(s, t, divergence=name, reduction="none")) <= EXACT_VALUE


def test_a_mixture_of_one_is_the_divergence_from_it() -> None:
    s, t = torch.randn(2, 5), torch.randn(2, 5)
    for mixed, plain in (("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")):
        assert torch.equal(fd.logit_loss(s, t, divergence=mixed, beta=0.0), fd.logit_loss(s, t, divergence=plain))
