"""student_topk_logit_loss against its formula in float64, and against the losses that it is made of."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import available
from held import MIB, held_mib
from judge import judge, judge_exact
from test_logit import DTYPES, F64, draw, outcome, skip_float64, textbook
from torch import Tensor

import fastdistil as fd
from fastdistil.contracts.logit import DIVERGENCES

BACKENDS = available("reference", "cpu", "triton")
PROBABILITIES = [d for d in DIVERGENCES if d != "mse"]
F32 = torch.float32


def formula(s: Tensor, t: Tensor, k: int, tail: str, divergence: str, t_s: float = 1.0, t_t: float = 1.0) -> Tensor:
    columns = s.detach().topk(k).indices

    def classes(z: Tensor) -> Tensor:
        if tail == "renormalize":
            return z.gather(-1, columns)
        rest = z.scatter(-1, columns, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat((z.gather(-1, columns), rest), -1)

    return textbook(classes(s / t_s), classes(t / t_t), divergence, 0.3)


@pytest.mark.pairs(2, "tail", "divergence")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", PROBABILITIES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_formula(backend: str, tail: str, divergence: str, dtype: torch.dtype) -> None:
    skip_float64(backend, dtype)
    student, teacher = draw(3, 500, dtype)
    # A gap behind the k-th place: of equal logits topk may choose others in another dtype.
    top = student.topk(20).indices
    student = student.scatter_add(-1, top, torch.ones_like(top, dtype=dtype))
    options = {"tail": tail, "divergence": divergence, "beta": 0.3, "reduction": "none", "backend": backend}
    found = outcome(
        lambda s: fd.student_topk_logit_loss(s, teacher, k=20, temperature=2.0, teacher_temperature=3.0, **options),
        student,
    )

    def plain(s: Tensor, t: Tensor) -> Tensor:
        return 6 * formula(s, t, 20, tail, divergence, 2.0, 3.0)

    truth = outcome(lambda s: plain(s.double(), teacher.double()), student)
    judge(found, truth, outcome(lambda s: plain(s.float(), teacher.float()), student), dtype)


@pytest.mark.parametrize("divergence", PROBABILITIES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_all_columns_are_the_whole_loss(tail: str, divergence: str) -> None:
    student, teacher = draw(4, 37, F32)
    rule = {"divergence": divergence, "beta": 0.3, "temperature": 2.0}
    found = outcome(lambda s: fd.student_topk_logit_loss(s, teacher, k=37, tail=tail, **rule), student)
    judge_exact(found, outcome(lambda s: fd.logit_loss(s, teacher.double(), **rule), student.double()), F32)


def test_a_bucket_is_a_bound() -> None:
    """Merged classes have less to differ in, and more columns are never less."""
    student, teacher = draw(8, 60, F64)
    for divergence in PROBABILITIES:
        rows = {"divergence": divergence, "beta": 0.3, "reduction": "none"}
        values = [fd.student_topk_logit_loss(student, teacher, k=k, **rows) for k in (1, 3, 10, 59, 60)]
        assert all((a <= b + 1e-12).all() for a, b in pairwise(values)), divergence
        assert torch.allclose(values[-1], fd.logit_loss(student, teacher, **rows))


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_what_the_gradient_reaches(tail: str) -> None:
    student, teacher = draw(3, 50, F32)
    (gradient,) = outcome(lambda s: fd.student_topk_logit_loss(s, teacher, k=5, tail=tail), student).gradients
    outside = gradient.scatter(-1, student.topk(5).indices, 0.0)
    assert bool(outside.any()) == (tail == "bucket")
    assert gradient.sum(-1).abs().max() < 1e-6 * gradient.abs().max()


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("noise", [1e-2, 1e-4])
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_exact_near_convergence(tail: str, noise: float, dtype: torch.dtype) -> None:
    student, teacher = draw(2, 119_547, dtype, noise)
    rows = {"k": 64, "tail": tail, "reduction": "sum"}
    found = outcome(lambda s: fd.student_topk_logit_loss(s, teacher, **rows), student)
    # The same columns on both sides: of equal 16-bit logits at the 64th place, topk chooses by the dtype.
    columns = student.topk(64).indices
    if tail == "renormalize":
        truth = outcome(
            lambda s: fd.logit_loss(
                s.gather(-1, columns), teacher.double().gather(-1, columns), divergence="reverse_kl", reduction="sum",
                backend="reference",
            ),
            student.double(),
        )  # fmt: skip
    else:
        log_q = teacher.double().log_softmax(-1)
        truth = outcome(
            lambda s: fd.topk_logit_loss(
                s, log_q.gather(-1, columns), columns, divergence="reverse_kl", reduction="sum", backend="reference",
                teacher_tail=log_q.scatter(-1, columns, -torch.inf).logsumexp(-1),
            ),
            student.double(),
        )  # fmt: skip
    judge_exact(found, truth, dtype)


def test_the_teacher_is_left_alone() -> None:
    student, teacher = draw(3, 50, F64)
    before = teacher.clone()
    fd.student_topk_logit_loss(student, teacher, k=5, temperature=2.0)
    assert torch.equal(teacher, before)


def test_memory_is_the_gradient_and_a_few_rows(tmp_path: Path) -> None:
    student, teacher = torch.randn(64, 60_000, requires_grad=True), torch.randn(64, 60_000)
    gradient = student.numel() * 4 / MIB
    found = held_mib(lambda: fd.student_topk_logit_loss(student, teacher, k=16).backward(), tmp_path / "trace.json")
    assert gradient <= found < gradient + 18


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"student_logits": [1.0]}, TypeError, "student_logits is list, expected a torch.Tensor"),
        ({"teacher_logits": torch.ones(2, 4)}, ValueError, r"teacher_logits has shape \(2, 4\), expected \(2, 5\)"),
        ({"teacher_logits": torch.ones(2, 5, requires_grad=True)}, ValueError, "teacher_logits requires grad"),
        ({"k": 0}, ValueError, "k is 0, expected 1 to 5, the number of columns"),
        ({"k": 6}, ValueError, "k is 6, expected 1 to 5, the number of columns"),
        ({"k": 2.0}, TypeError, "k is float, expected an int"),
        ({"tail": "zero"}, ValueError, "tail is 'zero', expected one of 'bucket', 'renormalize'"),
        ({"divergence": "mse"}, ValueError, "divergence is 'mse', expected one of probabilities"),
        ({"teacher_temperature": 0}, ValueError, "teacher_temperature is 0.0, expected more than 0"),
        ({"weight": torch.ones(3)}, ValueError, r"weight has shape \(3,\), expected \(2,\)"),
        ({"weight": torch.ones(3), "tail": "renormalize"}, ValueError, r"weight has shape \(3,\), expected \(2,\)"),
    ],
)
def test_bad_calls(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"student_logits": torch.ones(2, 5), "teacher_logits": torch.ones(2, 5), "k": 2}
    with pytest.raises(kind, match=f"student_topk_logit_loss: {message}"):
        fd.student_topk_logit_loss(**given | change)
