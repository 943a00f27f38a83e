"""topk_logit_loss on every backend that can run here: its numbers."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE, available
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import EXACT_VALUE, SLACK, SMALLEST, error, judge, judge_exact
from test_logit import DTYPES, F64, draw, outcome, skip_float64
from topk_cases import CASES, formula, known
from torch import Tensor

import fastdistil as fd
from fastdistil import _C
from fastdistil.contracts.logit import DIVERGENCES
from fastdistil.contracts.topk import TAILS

BACKENDS = available("reference", "cpu", "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tail", "divergence"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_divergence_is_right(backend: str, tail: str, divergence: str, dtype: torch.dtype) -> None:
    skip_float64(backend, dtype)
    student, teacher = draw(3, 1000, dtype)
    values, indices = known(teacher, 20, 2.0, torch.float32)
    options = {"tail": tail, "divergence": divergence, "beta": 0.3, "reduction": "none", "backend": backend}

    def plain(s: Tensor) -> Tensor:
        return 4.0 * formula(s, values, indices, tail, divergence, 0.3, 2.0)

    found = outcome(lambda s: fd.topk_logit_loss(s, values, indices, temperature=2.0, **options), student)
    truth = outcome(lambda s: plain(s.double()), student)
    judge(found, truth, outcome(lambda s: plain(s).float(), student), dtype)


@pytest.mark.parametrize(("tail", "divergence"), CASES)
def test_the_reference_is_the_formula(tail: str, divergence: str) -> None:
    for beta in (0.1, 0.5, 0.9):
        student, teacher = draw(4, 301, F64, noise=2.0)
        values, indices = known(teacher, 9)

        def loss(s: Tensor, b: float = beta, v: Tensor = values, i: Tensor = indices) -> Tensor:
            return fd.topk_logit_loss(s, v, i, tail=tail, divergence=divergence, beta=b, reduction="none", backend="reference")  # fmt: skip

        truth = outcome(lambda s, b=beta, v=values, i=indices: formula(s, v, i, tail, divergence, b), student)
        judge(outcome(loss, student), truth, truth, F64)


@pytest.mark.parametrize(("tail", "divergence"), CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_columns_are_the_full_loss(backend: str, tail: str, divergence: str) -> None:
    student, teacher = draw(3, 130, torch.float32, noise=1e-2)
    log_q = teacher.double().log_softmax(-1)
    values, indices = log_q.topk(130)
    found = outcome(
        lambda s: fd.topk_logit_loss(
            s, values, indices, tail=tail, divergence=divergence, beta=0.3, temperature=2.0, reduction="none", backend=backend
        ),
        student,
    )  # fmt: skip
    truth = outcome(
        lambda s: fd.logit_loss(
            s, log_q, divergence=divergence, beta=0.3, temperature=2.0, teacher_temperature=1.0, scale_by_t2=False,
            reduction="none", backend="reference",
        ) * 4.0,
        student.double(),
    )  # fmt: skip
    judge_exact(found, truth, torch.float32)


@pytest.mark.parametrize("columns", [1, 7, 515, 1024, 32003, 119_547])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ugly_shapes(backend: str, rows: int, columns: int) -> None:
    if backend == "triton" and DEVICE.type == "cpu" and rows * columns > 40_000:
        rows = 1
        if columns > 100_000:
            pytest.skip("minutes in the interpreter; the near-convergence test covers one such row")
    for k in {1, min(columns, 5), min(columns, 70)}:
        student, teacher = draw(rows, columns, torch.float32)
        values, indices = known(teacher, k)
        for tail in TAILS:

            def plain(s: Tensor, v: Tensor = values, i: Tensor = indices, t: str = tail) -> Tensor:
                whole = v.shape[-1] == s.shape[-1]  # then the formula's rest is the logarithm of a rounding error
                return formula(s, v, i, "renormalize" if whole and t == "bucket" else t, "forward_kl")

            found = outcome(
                lambda s, v=values, i=indices, t=tail: fd.topk_logit_loss(
                    s, v, i, tail=t, reduction="none", backend=backend
                ),
                student,
            )
            truth = outcome(lambda s, f=plain: f(s.double()), student)
            if columns == 1:
                assert error(found.value, truth.value) <= SLACK[torch.float32] and (found.gradients[0] == 0).all()
            else:
                judge(found, truth, outcome(plain, student), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("noise", [1e-2, 1e-4])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_near_convergence(backend: str, tail: str, noise: float, dtype: torch.dtype) -> None:
    """V 119,547, K 64, a student within `noise` of the teacher (for "renormalize" of a teacher that knows no others)."""
    slow = backend == "triton" and DEVICE.type == "cpu"
    teacher = (4 * torch.randn(1 if slow else 4, 119_547, dtype=F64)).to(DEVICE, dtype)
    student = (teacher.double() + noise * torch.randn(teacher.shape, dtype=F64).to(DEVICE)).to(dtype)
    values, indices = known(teacher, 64, dtype=torch.float32)
    if tail == "renormalize":
        rest = torch.ones_like(student, dtype=torch.bool).scatter(-1, indices, False)
        student = student.masked_fill(rest, -60.0)

    def loss(s: Tensor, b: str) -> Tensor:
        return fd.topk_logit_loss(s, values, indices, tail=tail, reduction="sum", backend=b)

    found = outcome(lambda s: loss(s, backend), student)
    truth = outcome(lambda s: loss(s, "reference"), student.double())
    judge_exact(found, truth, dtype)
    if dtype == torch.float32 and noise == 1e-2:  # beyond, the formula is lost even in float64
        plain = outcome(lambda s: formula(s.double(), values, indices, tail, "forward_kl").sum(), student)
        judge_exact(found, plain, dtype)


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d not in ("mse", "forward_kl")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_divergence_is_exact_near_convergence(backend: str, divergence: str) -> None:
    student, teacher = draw(2, 5003, torch.float32, noise=1e-3)
    values, indices = known(teacher, 33)

    def loss(s: Tensor, b: str) -> Tensor:
        return fd.topk_logit_loss(s, values, indices, divergence=divergence, beta=0.3, reduction="sum", backend=b)

    judge_exact(
        outcome(lambda s: loss(s, backend), student),
        outcome(lambda s: loss(s, "reference"), student.double()),
        torch.float32,
    )


@pytest.mark.parametrize("offset", [0.3, -40.0, 3000.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_offset_costs_nothing(backend: str, offset: float) -> None:
    student, teacher = draw(2, 1027, torch.float32, noise=1e-2)
    values, indices = known(teacher, 33)
    student = student + offset
    found = outcome(lambda s: fd.topk_logit_loss(s, values, indices, reduction="sum", backend=backend), student)
    truth = outcome(lambda s: formula(s.double(), values, indices, "bucket", "forward_kl").sum(), student)
    judge_exact(found, truth, torch.float32)


@pytest.mark.parametrize("gap", [10.0, 60.0, 300.0, 3000.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_far_apart(backend: str, tail: str, gap: float) -> None:
    """The student's mass is on columns that the teacher does not name, or on one that it does."""
    student, teacher = draw(2, 1029, torch.float32)
    values, indices = known(teacher, 40)
    student[0, teacher[0].argmin()] += gap
    student[1, indices[1, 7]] += gap
    found = outcome(
        lambda s: fd.topk_logit_loss(s, values, indices, tail=tail, reduction="none", backend=backend), student
    )
    truth = outcome(lambda s: formula(s.double(), values, indices, tail, "forward_kl"), student)
    judge(found, truth, outcome(lambda s: formula(s, values, indices, tail, "forward_kl"), student), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_confident_teacher_keeps_its_tail(backend: str) -> None:
    """1 - sum q is 1e-9 here: float32 would round it to 0."""
    student, _ = draw(1, 257, torch.float32)
    q_rest = 1e-9
    values = torch.tensor([[math.log1p(-q_rest - 1e-12), math.log(1e-12)]], dtype=F64, device=DEVICE)
    indices = torch.tensor([[3, 200]], device=DEVICE)
    found = outcome(
        lambda s: fd.topk_logit_loss(s, values, indices, divergence="reverse_kl", reduction="sum", backend=backend),
        student,
    )
    truth = outcome(lambda s: formula(s.double(), values, indices, "bucket", "reverse_kl").sum(), student)
    assert error(found.value, truth.value) < EXACT_VALUE
    assert error(found.gradients[0], truth.gradients[0]) < EXACT_VALUE


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_and_nan(backend: str, tail: str) -> None:
    inf, nan = math.inf, math.nan
    student, teacher = draw(5, 45, torch.float32)
    values, indices = known(teacher, 6)
    student[1, indices[1, 2]] = -inf  # the student excludes what the teacher does not: infinite value, finite gradient
    student[2] = torch.full_like(student[2], -inf).scatter(-1, indices[2], student[2, indices[2]])  # no other column
    values[3, 4] = nan
    student[4, (indices[4, 0] + 1) % 45] = nan
    found = outcome(
        lambda s: fd.topk_logit_loss(s, values, indices, tail=tail, reduction="none", backend=backend), student
    )
    truth = outcome(lambda s: formula(s.double(), values, indices, tail, "forward_kl"), student)
    assert error(found.value[0], truth.value[0]) <= EXACT_VALUE
    assert error(found.gradients[0][0], truth.gradients[0][0]) <= EXACT_VALUE
    assert found.value[1] == inf and found.gradients[0][1].isfinite().all()
    mass = values[1, 2].exp().item() / (values[1].exp().sum().item() if tail == "renormalize" else 1.0)
    assert found.gradients[0][1, indices[1, 2]].item() == pytest.approx(-mass, rel=EXACT_VALUE)
    assert found.value[2] == inf if tail == "bucket" else error(found.value[2], truth.value[2]) <= EXACT_VALUE
    assert found.gradients[0][2].isfinite().all()
    assert found.value[3].isnan() and found.value[4].isnan()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_entries_of_minus_infinity_are_not_there(backend: str, tail: str) -> None:
    """Whatever their index says, a repeated or impossible one included."""
    student, teacher = draw(2, 77, torch.float32)
    values, indices = known(teacher, 5)
    gaps = torch.full((2, 3), -math.inf, device=DEVICE)
    strange = torch.tensor([[-1, 900, 4], [-100, 76, 76]], device=DEVICE)
    order = torch.tensor([5, 0, 6, 1, 2, 7, 4, 3], device=DEVICE)
    padded = torch.cat((values, gaps), -1)[:, order], torch.cat((indices, strange), -1)[:, order]

    def loss(s: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
        return fd.topk_logit_loss(s, *teacher, tail=tail, reduction="none", backend=backend)

    plain, found = outcome(lambda s: loss(s, (values, indices)), student), outcome(lambda s: loss(s, padded), student)
    assert torch.equal(plain.value, found.value)
    assert torch.equal(plain.gradients[0], found.gradients[0])
    nothing = outcome(lambda s: loss(s, (gaps, strange)), student)
    if tail == "renormalize":
        assert nothing.value.isnan().all()
    else:
        assert (nothing.value.abs() <= SMALLEST).all() and (nothing.gradients[0].abs() <= SMALLEST).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_probabilities_beyond_one(backend: str) -> None:
    """Rounding may leave a sum a little over 1: the tail is then 0 and the teacher is normalised."""
    student, _ = draw(1, 50, torch.float32)
    values = torch.tensor([[0.6, 0.45]], device=DEVICE).log()
    indices = torch.tensor([[8, 2]], device=DEVICE)
    found, truth = (
        outcome(lambda s, t=t: fd.topk_logit_loss(s, values, indices, tail=t, reduction="sum", backend=backend), student)
        for t in ("bucket", "renormalize")
    )  # fmt: skip
    assert torch.equal(found.value, truth.value) or error(found.value, truth.value) < EXACT_VALUE
    assert error(found.gradients[0], truth.gradients[0]) < EXACT_VALUE
    assert fd.topk_logit_loss(student, values + 5, indices, tail="renormalize", backend=backend).isfinite()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(2, 1100), st.data())
def test_isas_agree_with_the_reference(rows: int, columns: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, columns))
    tail, divergence = data.draw(st.sampled_from(CASES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    student = 3 * torch.randn(rows, columns, generator=generator)
    values, indices = known(3 * torch.randn(rows, columns, generator=generator), k, dtype=F64)

    def loss(s: Tensor, backend: str) -> Tensor:
        return fd.topk_logit_loss(s, values, indices, tail=tail, divergence=divergence, beta=0.4, reduction="none", backend=backend)  # fmt: skip

    truth = outcome(lambda s: loss(s, "reference"), student.double())
    assume_finite = truth.value.isfinite()
    first = _C.isa()
    try:
        for isa in _C.isas():
            _C.use_isa(isa)
            found = outcome(lambda s: loss(s, "cpu"), student)
            scale = truth.value[assume_finite].abs().max().item() if assume_finite.any() else 1.0
            assert ((found.value - truth.value).abs()[assume_finite] <= EXACT_VALUE * max(scale, 1e-3)).all(), isa
            assert error(found.gradients[0], truth.gradients[0]) <= EXACT_VALUE, isa
    finally:
        _C.use_isa(first)
