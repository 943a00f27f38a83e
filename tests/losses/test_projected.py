"""projected_logit_loss and linear_projected_logit_loss: M softmax(teacher) against the formula in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE, available
from held import MIB, held_mib
from judge import Outcome, judge, judge_exact
from test_logit import DTYPES, F64, outcome, textbook
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

import fastdistil as fd
from fastdistil.contracts.logit import DIVERGENCES

BACKENDS = available("reference", "cpu")
PROBABILITIES = [d for d in DIVERGENCES if d != "mse"]
F32 = torch.float32


def drawn(rows: int, columns: int, entries: int) -> Tensor:
    """A matrix (rows, columns) of some columns a row, in which every seventh row is empty."""
    matrix = torch.zeros(rows, columns, dtype=F64)
    for row in range(rows):
        if row % 7 != 3:
            matrix[row, torch.randperm(columns)[: 1 + row % entries]] = torch.rand(1 + row % entries, dtype=F64) + 0.1
    return matrix.to(DEVICE)


def formula(
    s: Tensor, t: Tensor, matrix: Tensor, divergence: str = "forward_kl", t_s: float = 1.0, t_t: float = 1.0
) -> Tensor:
    """The rows' values as one writes them, over the columns that the matrix maps anything to."""
    mapped = matrix.any(-1)
    q = (t / t_t).softmax(-1) @ matrix.to(t.dtype).T
    return textbook(s[:, mapped] / t_s, q[:, mapped].log(), divergence, 0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", PROBABILITIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_divergence_is_right(backend: str, divergence: str, dtype: torch.dtype) -> None:
    matrix = drawn(60, 80, 4)
    student, teacher = (4 * torch.randn(3, n, dtype=F64).to(DEVICE) for n in (60, 80))
    student, teacher = student.to(dtype), teacher.to(dtype)
    projection = fd.VocabProjection.of(matrix.to_sparse())
    options = {"divergence": divergence, "beta": 0.3, "reduction": "none", "backend": backend}
    found = outcome(
        lambda s: fd.projected_logit_loss(
            s, teacher, projection, temperature=2.0, teacher_temperature=3.0, **options
        ),
        student,
    )  # fmt: skip
    truth = outcome(lambda s: 6 * formula(s.double(), teacher.double(), matrix, divergence, 2.0, 3.0), student)
    eager = outcome(lambda s: 6 * formula(s.float(), teacher.float(), matrix, divergence, 2.0, 3.0), student)
    judge(found, truth, eager, dtype)


@pytest.mark.parametrize("divergence", PROBABILITIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_near_convergence(backend: str, divergence: str) -> None:
    """The student's logits are the logarithms of what arrives, but for noise and a constant."""
    matrix = drawn(700, 900, 3)
    teacher = (4 * torch.randn(2, 900, dtype=F64)).float().to(DEVICE)
    student = (teacher.double().softmax(-1) @ matrix.T).log().clamp(min=-50) - 30
    student = (student + 1e-3 * torch.randn(2, 700, dtype=F64).to(DEVICE)).float()
    projection = fd.VocabProjection.of(matrix.to_sparse())
    options = {"divergence": divergence, "beta": 0.3, "reduction": "none"}
    found = outcome(
        lambda s: fd.projected_logit_loss(s, teacher, projection, backend=backend, **options), student
    )  # fmt: skip
    mapped, q = matrix.any(-1), teacher.double().softmax(-1) @ matrix.T
    truth = outcome(
        lambda s: fd.logit_loss(s[:, mapped], q[:, mapped].log(), backend="reference", **options), student.double()
    )
    judge_exact(found, truth, F32)


@pytest.mark.parametrize("divergence", PROBABILITIES)
def test_a_matrix_of_ones_is_a_vocab_map(divergence: str) -> None:
    columns = torch.randperm(50, device=DEVICE)[:40]
    columns[::6] = -1
    mapped = (columns >= 0).nonzero()[:, 0]
    matrix = torch.sparse_coo_tensor(
        torch.stack((mapped, columns[mapped])), torch.ones(len(mapped), device=DEVICE), (40, 50), check_invariants=True
    )
    student, teacher = torch.randn(5, 40, device=DEVICE), torch.randn(5, 50, device=DEVICE)
    labels = torch.tensor([0, -100, 6, 39, 4], device=DEVICE)
    options = {"divergence": divergence, "beta": 0.3, "labels": labels, "label_weight": 0.3, "temperature": 1.5}
    found = outcome(
        lambda s: fd.projected_logit_loss(s, teacher, fd.VocabProjection.of(matrix), **options), student
    )  # fmt: skip
    truth = outcome(lambda s: fd.logit_loss(s, teacher.double(), vocab_map=columns, **options), student.double())
    judge_exact(found, truth, F32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_it_is(backend: str) -> None:
    """renormalize=False, with labels, of which a row has nothing else."""
    matrix = drawn(30, 40, 3) / 10
    student, teacher = (3 * torch.randn(6, n, dtype=F64).to(DEVICE) for n in (30, 40))
    teacher[2, matrix.any(0)] = -torch.inf  # nothing of this row arrives
    labels = torch.randint(30, (6,), device=DEVICE)
    projection = fd.VocabProjection.of(matrix.to_sparse())
    options = {"renormalize": False, "labels": labels, "label_weight": 0.25, "reduction": "none", "backend": backend}
    found = outcome(lambda s: fd.projected_logit_loss(s, teacher, projection, temperature=2.0, **options), student)
    mapped = matrix.any(-1)

    def plain(s: Tensor) -> Tensor:
        q, log_p = (teacher / 2).softmax(-1) @ matrix.T, (s[:, mapped] / 2).log_softmax(-1)
        terms = torch.where(q > 0, q * q.log(), 0.0)[:, mapped] - q[:, mapped] * log_p
        return 0.75 * 4 * terms.sum(-1) + 0.25 * cross_entropy(s, labels, reduction="none")

    truth = outcome(plain, student)
    judge(found, truth, truth, F64)
    assert torch.allclose(projection.mass(teacher, 2.0), ((teacher / 2).softmax(-1) @ matrix.T).sum(-1))
    assert projection.mass(teacher)[2] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_mapped_is_not_seen(backend: str) -> None:
    """Student columns without an entry get nothing; a teacher that is sure of a column that arrives nowhere has the
    others' probabilities compared all the same."""
    matrix = drawn(30, 40, 3)
    matrix[:, 11] = 0
    student, teacher = (torch.randn(3, n, dtype=F32).to(DEVICE) for n in (30, 40))
    projection = fd.VocabProjection.of(matrix.to_sparse())
    rows = {"reduction": "none", "backend": backend}
    wanted = outcome(lambda s: fd.projected_logit_loss(s, teacher, projection, **rows), student)
    teacher[:, 11] += 5000
    broken = student.clone()
    broken[:, ~matrix.any(-1)] = torch.inf
    found = outcome(lambda s: fd.projected_logit_loss(s, teacher, projection, **rows), broken)
    assert torch.equal(found.value, wanted.value) and torch.equal(found.gradients[0], wanted.gradients[0])
    assert not found.gradients[0][:, ~matrix.any(-1)].any()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_broken_row_is_seen(side: str) -> None:
    matrix = drawn(30, 40, 3)
    student, teacher = (torch.randn(3, n, dtype=F32).to(DEVICE) for n in (30, 40))
    (student if side == "student" else teacher)[1, int(matrix.any(-1 if side == "student" else 0).nonzero()[2])] = (
        torch.nan
    )
    for renormalize in (True, False):
        found = outcome(
            lambda s, r=renormalize: fd.projected_logit_loss(
                s, teacher, fd.VocabProjection.of(matrix.to_sparse()), renormalize=r, reduction="none"
            ),
            student,
        )
        assert found.value.isnan().tolist() == [False, True, False]
        assert found.gradients[0][1].isnan().any() and found.gradients[0][[0, 2]].isfinite().all()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_heads(dtype: torch.dtype, renormalize: bool) -> None:
    matrix = drawn(83, 70, 3) / 10
    shapes = ((13, 7), (83, 7), (83,), (13, 9), (70, 9), (70,))
    h_s, w_s, b_s, h_t, w_t, b_t = (torch.randn(*shape, dtype=F64).to(DEVICE, dtype) for shape in shapes)
    weight = torch.arange(13, device=DEVICE) % 4
    options: dict[str, Any] = {"student_logit_scale": 1.5, "student_softcap": 5.0, "teacher_softcap": 4.0}

    def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fd.linear_projected_logit_loss(
            h, w, h_t, w_t, fd.VocabProjection.of(matrix.to_sparse()), student_bias=b, teacher_bias=b_t, weight=weight,
            renormalize=renormalize, chunk_bytes=20_000, temperature=2.0, **options,
        )  # fmt: skip

    def plain(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        s, t = (
            5 * torch.tanh(1.5 * linear(h, w, b) / 5),
            4 * torch.tanh(linear(*(x.to(h) for x in (h_t, w_t, b_t))) / 4),
        )
        rows = formula(s, t, matrix, t_s=2.0, t_t=2.0)
        if not renormalize:
            mass = ((t / 2).softmax(-1) @ matrix.to(t.dtype).T).sum(-1)
            rows = mass * rows + mass * mass.log()
        return 4 * (rows * weight).sum() / weight.sum()

    wide = _of(plain, *(x.double() for x in (h_s, w_s, b_s)))
    judge(_of(ours, h_s, w_s, b_s), wide, _of(plain, h_s, w_s, b_s), dtype)


def _of(function: Any, *inputs: Tensor) -> Outcome:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    return Outcome(value.detach(), torch.autograd.grad(value.sum(), leaves))


def _wide() -> fd.VocabProjection:
    entries = torch.stack((torch.arange(30_000).repeat(2), torch.randint(32_000, (60_000,))))
    return fd.VocabProjection.of(torch.sparse_coo_tensor(entries, torch.ones(60_000), (30_000, 32_000), check_invariants=True))  # fmt: skip


def test_memory_is_the_gradient_and_a_few_rows(tmp_path: Path) -> None:
    student, teacher, projection = torch.randn(64, 30_000, requires_grad=True), torch.randn(64, 32_000), _wide()
    gradient = student.numel() * 4 / MIB
    found = held_mib(lambda: fd.projected_logit_loss(student, teacher, projection).backward(), tmp_path / "trace.json")
    assert gradient <= found < gradient + 18


def test_memory_of_two_heads_is_a_chunk(tmp_path: Path) -> None:
    hidden, head = torch.randn(256, 8, requires_grad=True), torch.randn(30_000, 8)
    other, projection = (torch.randn(256, 8), torch.randn(32_000, 8)), _wide()
    found = held_mib(
        lambda: fd.linear_projected_logit_loss(hidden, head, *other, projection, chunk_bytes=8 * MIB).backward(),
        tmp_path / "trace.json",
    )
    assert found < 9 < 256 * 30_000 * 4 / MIB


def test_a_projection_is_its_matrix() -> None:
    """From both layouts, with entries given twice, entries of 0, and an empty row."""
    index = torch.tensor([[0, 2, 0, 0, 2], [1, 0, 1, 3, 2]])
    matrix = torch.sparse_coo_tensor(index, torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0]), (4, 4), check_invariants=True)
    found = fd.VocabProjection.of(matrix)
    assert found.offsets.tolist() == [0, 1, 1, 3, 3] and found.columns.tolist() == [1, 0, 2]
    assert found.weights.tolist() == [1.5, 2.0, 3.0] and found.weights.dtype == F64 and found.shape == (4, 4)
    assert torch.equal(found.matrix().to_dense(), matrix.to_dense().double())
    again = fd.VocabProjection.of(matrix.to_sparse_csr())
    assert all(torch.equal(a, b) for a, b in zip(found[:3], again[:3], strict=True))


@pytest.mark.parametrize(
    ("matrix", "kind", "message"),
    [
        ([[1.0]], TypeError, "matrix is list, expected a torch.Tensor"),
        (torch.eye(2), ValueError, "matrix has layout torch.strided, expected torch.sparse_coo or torch.sparse_csr"),
        (torch.eye(2).int().to_sparse(), TypeError, "matrix has dtype torch.int32, expected float32"),
        (torch.ones(2, 2, 2).to_sparse(), ValueError, r"matrix has shape \(2, 2, 2\), expected \(V_s, V_t\)"),
        (-torch.eye(2).to_sparse(), ValueError, "matrix has weights that are negative or not finite"),
        ((torch.eye(2) * torch.inf).to_sparse(), ValueError, "matrix has weights that are negative or not finite"),
        (torch.zeros(2, 2).to_sparse(), ValueError, "matrix has no weight above 0, expected at least one"),
        (torch.eye(2).requires_grad_().to_sparse(), ValueError, "matrix requires grad, expected a constant"),
    ],
)
def test_bad_matrices(matrix: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        fd.VocabProjection.of(matrix)


EYE = fd.VocabProjection.of(torch.eye(3, 4).to_sparse())


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"projection": torch.eye(3, 4)}, TypeError, "projection is Tensor, expected a fastdistil.VocabProjection"),
        ({"student_logits": torch.ones(2, 5)}, ValueError, r"projection has shape \(3, 4\), expected \(5, 4\)"),
        ({"teacher_logits": torch.ones(2, 5)}, ValueError, r"projection has shape \(3, 4\), expected \(3, 5\)"),
        ({"teacher_logits": torch.ones(1, 4)}, ValueError, r"teacher_logits has shape \(1, 4\), expected \(2, V_t\)"),
        ({"divergence": "mse"}, ValueError, "divergence is 'mse', expected one of probabilities"),
        ({"divergence": "tvd", "renormalize": False}, ValueError, "divergence is 'tvd' with renormalize=False"),
        ({"renormalize": 1}, TypeError, "renormalize is int, expected a bool"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, ValueError, "labels came without label_weight"),
        ({"backend": "triton"}, ValueError, "backend is 'triton', which has no float64 kernel"),
    ],
)
def test_bad_calls(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"student_logits": torch.ones(2, 3), "teacher_logits": torch.ones(2, 4), "projection": EYE}
    with pytest.raises(kind, match=message):
        fd.projected_logit_loss(**given | change)


def test_bad_heads() -> None:
    heads = torch.ones(2, 3), torch.ones(3, 3), torch.ones(2, 6), torch.ones(5, 6)
    with pytest.raises(ValueError, match=r"projection has shape \(3, 4\), expected \(3, 5\) to match student_weight"):
        fd.linear_projected_logit_loss(*heads, EYE)
    with pytest.raises(
        ValueError, match=r"VocabProjection.mass: teacher_logits has shape \(2, 3\), expected \(\.\.\., 4\)"
    ):
        EYE.mass(torch.ones(2, 3))
