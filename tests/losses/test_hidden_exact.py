"""hidden_loss where float32 loses digits: cosine at any two lengths and angles, against 50 digits, kl behind any two
constants, mse beyond the range of its squares."""

from __future__ import annotations

from functools import partial

import mpmath
import pytest
import torch
from conftest import DEVICE, available
from judge import EXACT_GRADIENT, EXACT_VALUE, Outcome, error, judge_exact
from torch import Tensor

from fastdistil import hidden_loss

BACKENDS = available("reference", "cpu", "triton")


def truth_of(h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (N,) of 1 - cos and their gradients (N, D) in h, float64, of the very inputs."""
    found = [_row([*map(mpmath.mpf, x)], [*map(mpmath.mpf, y)]) for x, y in zip(h.tolist(), t.tolist(), strict=True)]
    rows, gradients = ([pair[i] for pair in found] for i in (0, 1))
    return torch.tensor(rows, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)


def _row(h: list[mpmath.mpf], t: list[mpmath.mpf]) -> tuple[float, list[float]]:
    with mpmath.workdps(400):  # squares of 1e-45 beside those of 1e38
        norm_h, norm_t = mpmath.norm(h), mpmath.norm(t)
        if norm_h == 0 or norm_t == 0:
            return 1.0, [0.0] * len(h)
        cos = mpmath.fdot(h, t) / (norm_h * norm_t)
        return float(1 - cos), [float((cos * x / norm_h - y / norm_t) / norm_h) for x, y in zip(h, t, strict=True)]


def run(h: Tensor, t: Tensor, dtype: torch.dtype = torch.float32, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Rows, and the gradient of their sum."""
    student = h.to(DEVICE, dtype, copy=True).requires_grad_()
    rows = hidden_loss(student, t.to(DEVICE), kind="cosine", reduction="none", backend=backend)
    rows.sum().backward()
    assert student.grad is not None and student.grad.dtype == dtype
    return rows.detach().cpu(), student.grad.cpu()


def draw(rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Pairs as training makes them: lengths up to 1e30 apart and more, at random, or within 1 to 1e-6 of a multiple."""
    t = torch.randn(rows, size, dtype=torch.float64)
    noise = 10 ** (-6 * torch.rand(rows, 1, dtype=torch.float64)) * torch.randn(rows, size, dtype=torch.float64)
    near = torch.arange(rows)[:, None] % 3 > 0
    h = torch.where(near, t * torch.randn(rows, 1, dtype=torch.float64).sign() + noise, noise)
    lengths = 10 ** (60 * torch.rand(2, rows, 1, dtype=torch.float64) - 30)
    lengths[:, ::4] = lengths[:, ::4] ** 0.2
    return (h * lengths[0]).float(), (t * lengths[1]).float()


def check(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Row by row."""
    values = [error(x, y) for x, y in zip(*(x[0] for x in (found, truth)), strict=True)]
    gradients = [error(x, y) for x, y in zip(*(x[1] for x in (found, truth)), strict=True)]
    assert max(values) <= EXACT_VALUE, f"value of row {values.index(max(values))}: {max(values):.2e}"
    assert max(gradients) <= EXACT_GRADIENT[dtype], f"row {gradients.index(max(gradients))}: {max(gradients):.2e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [2, 3, 40])
def test_any_lengths_and_angles(size: int, backend: str) -> None:
    h, t = draw(24 if backend == "triton" else 150, size)
    check(run(h, t, backend=backend), truth_of(h, t), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1.0, 1e3, 1e16, 1e35, 1e-25, 1e-39])
def test_a_raw_state_against_a_unit_embedding(factor: float, backend: str) -> None:
    h, t = torch.tensor([[1000.0, 2000.0, -500.0]]) * factor, torch.tensor([[0.3, -0.1, 0.7]])
    if factor == 1:
        expected = torch.tensor([[-1.97514e-04, 2.7057e-06, -3.84205e-04]])
        torch.testing.assert_close(truth_of(h, t)[1].float(), expected, rtol=0, atol=5e-10)
    check(run(h, t, backend=backend), truth_of(h, t), torch.float32)
    swapped = run(t, h, backend=backend)
    check(swapped, truth_of(t, h), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype: torch.dtype, backend: str) -> None:
    h, t = draw(12, 5)
    h = (h / h.norm(dim=1, keepdim=True) * torch.logspace(-2, 3, 12)[:, None]).to(dtype).float()
    found, truth = run(h, t, dtype, backend), truth_of(h, t)
    kept = truth[1].norm(dim=1) > 4 * torch.finfo(dtype).tiny / torch.finfo(dtype).eps  # no subnormals
    assert kept.sum() > 1
    check((found[0], found[1][kept]), (truth[0], truth[1][kept]), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_subnormal_and_single_entries(backend: str) -> None:
    h = torch.tensor([[0.0, 0.0], [1e-45, 3e-45], [1.0, 2.0], [3e38, -3e38], [0.0, 0.0]])
    t = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 0.0], [1e-44, 3e-45], [0.0, 0.0]])
    rows, gradient = run(h, t, backend=backend)
    truth = truth_of(h, t)
    assert error(rows, truth[0]) <= EXACT_VALUE
    assert (gradient[1].abs() == torch.inf).all()  # 1e44 has no float32
    assert torch.equal(gradient[[0, 2, 4]], torch.zeros(3, 2))
    assert error(gradient[3], truth[1][3]) <= EXACT_GRADIENT[torch.float32] or truth[1][3].norm() < 1e-37
    rows, gradient = run(torch.tensor([[3.0], [-7e-30], [0.0]]), torch.tensor([[5e20], [0.3], [1.0]]), backend=backend)
    assert torch.equal(rows, torch.tensor([0.0, 2.0, 1.0])) and not gradient.any()


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x != "triton"])
@pytest.mark.parametrize("length", [1e-200, 1e200])
def test_float64_beyond_the_range_of_its_squares(length: float, backend: str) -> None:
    h, t = torch.tensor([[1.0, 2.0, -0.5]]).double() * length, torch.tensor([[0.3, -0.1, 0.7]]).double() * 1e180
    truth = truth_of(h, t)
    student = h.requires_grad_()
    row = hidden_loss(student, t, kind="cosine", reduction="sum", backend=backend)
    (gradient,) = torch.autograd.grad(row, student)
    exact = Outcome(truth[0].sum(), (truth[1] * length,))  # times the length, for the norms of the judge
    judge_exact(Outcome(row, (gradient * length,)), exact, torch.float64)


@pytest.mark.parametrize("factor", [1.0, 1e5, 1e-5])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_a_projected_state_near_its_teachers_direction(activation: str, factor: float) -> None:
    """On a CPU the products that are near are in float64, whatever the two lengths are."""
    student, projection = torch.randn(32, 12), torch.randn(9, 12)

    def h(x: Tensor, p: Tensor) -> Tensor:
        z = x @ p.T
        return torch.nn.functional.gelu(z) if activation == "gelu" else z

    teacher = (h(student.double(), projection.double()) * (1 + 1e-3 * torch.randn(32, 9))).float() * factor
    leaves = [x.clone().requires_grad_() for x in (student, projection)]
    value = hidden_loss(leaves[0], teacher, projection=leaves[1], kind="cosine", activation=activation, backend="cpu")
    exact = [x.double().requires_grad_() for x in (student, projection)]
    truth = (1 - torch.nn.functional.cosine_similarity(h(*exact), teacher.double(), dim=-1)).mean()
    judge_exact(
        Outcome(value, torch.autograd.grad(value, leaves)), Outcome(truth, torch.autograd.grad(truth, exact)),
        torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_mse_whose_sum_is_beyond_float32(backend: str) -> None:
    h, t = torch.full((2, 700), 1.5e19), torch.zeros(2, 700)
    h[1] = 1.0
    student = h.to(DEVICE).requires_grad_()
    run_mse = partial(hidden_loss, student, t.to(DEVICE), backend=backend)
    rows = run_mse(reduction="none")
    truth = h.double().square().mean(1)
    assert error(rows, truth) <= EXACT_VALUE
    rows.sum().backward()
    assert student.grad is not None and error(student.grad, 2 * h.double() / 700) <= EXACT_GRADIENT[torch.float32]


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x != "cpu"])  # which takes logit_loss's own kernel
@pytest.mark.parametrize(("of_student", "of_teacher"), [(0, 100), (0, 1000), (-60, 0), (-1000, 300), (100, 100)])
def test_kl_behind_a_constant_of_either_side(of_student: float, of_teacher: float, backend: str) -> None:
    """KL does not see it: the difference of what is left of the inputs, which were rounded with it, is exact."""
    clean = torch.randn(8, 37)
    h = clean + 1e-2 * torch.randn(8, 37) + of_student
    t = clean + of_teacher
    student = h.to(DEVICE, copy=True).requires_grad_()
    rows = hidden_loss(student, t.to(DEVICE), kind="kl", reduction="none", backend=backend)
    rows.sum().backward()
    exact = h.double().requires_grad_()
    log_p, log_q = exact.log_softmax(-1), t.double().log_softmax(-1)
    truth = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert student.grad is not None
    check(
        (rows.detach().cpu(), student.grad.cpu()), (truth.detach(), log_p.exp().detach() - log_q.exp()), torch.float32
    )
