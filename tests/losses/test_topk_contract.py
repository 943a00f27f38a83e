"""topk_logit_loss on every backend that can run here: wrong input, weights, reductions, autograd and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from conftest import DEVICE, available
from fastdistil.benchmarks import measure
from fastdistil.benchmarks.cases import Case
from judge import EXACT_GRADIENT, SLACK, error
from test_logit import draw, outcome
from topk_cases import formula, known
from torch import Tensor

import fastdistil as fd
from fastdistil.ops.topk import topk_rows, topk_total

BACKENDS = available("reference", "cpu", "triton")


WRONG = [
    ("beyond", [[0, 9]], [[-1.0, -1.0]], "teacher_indices holds 9 in row 0, entry 1, expected 0 to 7"),
    ("negative", [[-1, 2]], [[-1.0, -1.0]], "teacher_indices holds -1 in row 0, entry 0, expected 0 to 7"),
    ("repeated", [[5, 5]], [[-1.0, -1.0]], "teacher_indices holds 5 twice in row 0, expected each column once"),
    ("not logarithms", [[0, 1]], [[7.0, 2.0]], "teacher_values has probabilities that sum to 1104 in row 0, expected log-probabilities"),
]  # fmt: skip


@pytest.mark.parametrize(("indices", "values", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_entries(backend: str, indices: list, values: list, message: str) -> None:
    """An error on a CPU, a NaN of that row on a GPU, and nothing at all where the row does not count."""
    student, _ = draw(1, 8, torch.float32)
    teacher = (torch.tensor(values, device=DEVICE), torch.tensor(indices, device=DEVICE))
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=message) as caught:
            fd.topk_logit_loss(student, *teacher, backend=backend)
        assert str(caught.value).startswith("topk_logit_loss: ")
    else:
        assert fd.topk_logit_loss(student, *teacher, backend=backend).isnan()
    nothing = torch.zeros(1, device=DEVICE)
    assert fd.topk_logit_loss(student, *teacher, weight=nothing, backend=backend) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_weights_and_num_items(backend: str) -> None:
    student, teacher = draw(6, 129, torch.float32)
    student, teacher = student.reshape(2, 3, 129), teacher.reshape(2, 3, 129)
    values, indices = known(teacher, 7)
    weight = torch.rand(2, 3, device=DEVICE)
    rows = formula(student.double(), values, indices, "bucket", "forward_kl")

    def loss(**options: object) -> Tensor:
        return fd.topk_logit_loss(student, values, indices.int(), backend=backend, **options)

    assert error(loss(), rows.mean()) <= SLACK[torch.float32]
    assert error(loss(reduction="sum"), rows.sum()) <= SLACK[torch.float32]
    assert error(loss(reduction="none"), rows) <= SLACK[torch.float32]
    assert error(loss(weight=weight), (rows * weight).sum() / weight.sum()) <= SLACK[torch.float32]
    assert error(loss(weight=weight, reduction="none"), rows * weight) <= SLACK[torch.float32]
    assert error(loss(num_items=50), rows.sum() / 50) <= SLACK[torch.float32]
    tempered = formula(student.double(), values, indices, "bucket", "forward_kl", t=2.0)
    assert error(loss(temperature=2.0, scale_by_t2=False), tempered.mean()) <= SLACK[torch.float32]
    nothing = outcome(lambda s: fd.topk_logit_loss(s, values, indices, weight=0 * weight, backend=backend), student)
    assert nothing.value == 0 and (nothing.gradients[0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_misaligned_rows(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        wide = torch.full((5, 1040), 1e4, dtype=dtype, device=DEVICE)
        student, teacher = draw(5, 1021, dtype)
        wide[:, 3 : 3 + 1021].copy_(student)
        values, indices = known(teacher, 12)
        truth = outcome(lambda s, v=values, i=indices: fd.topk_logit_loss(s, v, i, backend=backend), student)
        leaf = wide.detach().requires_grad_()
        columns = [x.T.contiguous().T for x in (values, indices)]
        loss = fd.topk_logit_loss(leaf[:, 3 : 3 + 1021], *columns, backend=backend)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert error(loss, truth.value) <= SLACK[torch.float32]
        assert error(gradient[:, 3 : 3 + 1021], truth.gradients[0]) <= EXACT_GRADIENT[dtype]
        assert (gradient[:, :3] == 0).all() and (gradient[:, 3 + 1021 :] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    student, teacher = draw(3, 65, torch.float32)
    values, indices = known(teacher, 5)
    scale = torch.rand(3, device=DEVICE)
    leaf = student.clone().requires_grad_()
    constants = [0.0, 0.5, 0.0, 2.0, 4.0, 1.0, 0.0]
    for tail in (None, torch.log1p(-values.exp().sum(-1))):
        rest = (values, indices, tail, scale, None, None, None, constants, backend)
        torch.library.opcheck(topk_rows.op, (leaf, *rest))
        torch.library.opcheck(topk_total.op, (leaf, *rest, [True], True))
        _, *state = topk_rows(student, *rest)
        torch.library.opcheck(torch.ops.fastdistil.topk_back, (student, *rest, *state, torch.rand(3, device=DEVICE)))


@pytest.mark.parametrize("backend", available("cpu", "triton"))
def test_fullgraph_compile(backend: str) -> None:
    student, teacher = draw(3, 257, torch.float32)
    values, indices = known(teacher, 5)
    weight = torch.tensor([1.0, 0.0, 2.0], device=DEVICE)

    def loss(s: Tensor) -> Tensor:
        return 3.0 * fd.topk_logit_loss(2.0 * s, values, indices, weight=weight, temperature=2.0, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain, found = outcome(loss, student), outcome(compiled, student)
    assert error(found.value, plain.value) <= SLACK[torch.float32]
    assert error(found.gradients[0], plain.gradients[0]) <= SLACK[torch.float32]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="resident memory is the CPU's")
def test_the_gradient_is_the_only_large_memory() -> None:
    case = Case("topk", "memory", {"N": 256, "V": 32_000, "K": 64}, (), options={"tail": "bucket", "temperature": 2.0})
    found = measure.child("memory", {"case": asdict(case), "implementation": "fastdistil:cpu"})
    assert 25 < found["peak_mib"] < 45  # the gradient is 31.25 MiB


Z, U, I = torch.zeros(4, 8), torch.full((4, 3), -2.0), torch.arange(3).repeat(4, 1)
LOSS = fd.topk_logit_loss
BAD = [
    ("student type", lambda: LOSS([1.0], U, I), TypeError, "student_logits is list, expected a torch.Tensor"),
    ("student dtype", lambda: LOSS(Z.long(), U, I), TypeError, "student_logits has dtype torch.int64"),
    ("no columns", lambda: LOSS(Z[:, :0], U, I), ValueError, r"student_logits has shape \(4, 0\), expected \(..., V\)"),
    ("values type", lambda: LOSS(Z, None, I), TypeError, "teacher_values is NoneType"),
    ("values rows", lambda: LOSS(Z, U[:3], I), ValueError, r"teacher_values has shape \(3, 3\), expected \(4, K\) with 1 <= K <= 8"),
    ("no values", lambda: LOSS(Z, U[:, :0], I[:, :0]), ValueError, r"teacher_values has shape \(4, 0\), expected \(4, K\) with 1 <= K <= 8"),
    ("too many", lambda: LOSS(Z[:, :2], U, I), ValueError, r"teacher_values has shape \(4, 3\), expected \(4, K\) with 1 <= K <= 2"),
    ("values grad", lambda: LOSS(Z, U.clone().requires_grad_(), I), ValueError, "teacher_values requires grad"),
    ("values device", lambda: LOSS(Z, U.to("meta"), I), ValueError, "teacher_values is on meta, expected cpu"),
    ("indices type", lambda: LOSS(Z, U, [0]), TypeError, "teacher_indices is list, expected a torch.Tensor"),
    ("indices dtype", lambda: LOSS(Z, U, I.float()), TypeError, "teacher_indices has dtype torch.float32, expected int32 or int64"),
    ("indices shape", lambda: LOSS(Z, U, I[:, :2]), ValueError, r"teacher_indices has shape \(4, 2\), expected \(4, 3\) to match teacher_values"),
    ("indices device", lambda: LOSS(Z, U, I.to("meta")), ValueError, "teacher_indices is on meta, expected cpu"),
    ("tail", lambda: LOSS(Z, U, I, tail="rest"), ValueError, "tail is 'rest', expected one of 'bucket'"),
    ("divergence", lambda: LOSS(Z, U, I, divergence="kl"), ValueError, "divergence is 'kl', expected one of 'forward_kl'"),
    ("mse", lambda: LOSS(Z, U, I, divergence="mse"), ValueError, "divergence is 'mse', expected one of probabilities"),
    ("zero", lambda: LOSS(Z, U, I, tail="zero", divergence="jsd"), ValueError, "divergence is 'jsd' with tail='zero', expected 'forward_kl'"),
    ("infinite", lambda: LOSS(Z, U, I, tail="renormalize", divergence="reverse_kl"), ValueError, "divergence is 'reverse_kl' .* expected one that is finite"),
    ("infinite skew", lambda: LOSS(Z, U, I, tail="renormalize", divergence="skew_reverse_kl", beta=0), ValueError, r"divergence is 'skew_reverse_kl' \(beta 0\)"),
    ("beta", lambda: LOSS(Z, U, I, divergence="jsd", beta=1.0), ValueError, "beta is 1.0 for jsd"),
    ("temperature", lambda: LOSS(Z, U, I, temperature=0), ValueError, "temperature is 0.0, expected more than 0"),
    ("weight", lambda: LOSS(Z, U, I, weight=torch.ones(3)), ValueError, r"weight has shape \(3,\), expected \(4,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_calls(call: Callable[[], Tensor], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        call()
    assert str(caught.value).startswith(("topk_logit_loss: ", "backend"))
