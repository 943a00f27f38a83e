"""logit_loss on every backend that can run here."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE, available
from judge import EXACT_GRADIENT, EXACT_VALUE, SLACK, Outcome, error, judge, judge_exact
from torch import Tensor

import fastdistil as fd
from fastdistil.contracts.logit import LOSSES
from fastdistil.ops.logit import logit_rows, logit_rows_overwrite_, logit_total
from fastdistil.ops.logit_terms import pack

BACKENDS = available("reference", "cpu", "triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
F64 = torch.float64


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b), 0 where a is 0."""
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b), 0.0).sum(-1)


def textbook(s: Tensor, t: Tensor, divergence: str, beta: float = 0.5, t_s: float = 1.0, t_t: float = 1.0) -> Tensor:
    """The rows' values as the papers write them, in the inputs' dtype."""
    if divergence == "mse":
        return (s / t_s - t / t_t).square().mean(-1)
    p, q = (s / t_s).log_softmax(-1), (t / t_t).log_softmax(-1)

    def hybrid() -> Tensor:
        share = torch.exp(-3 * torch.minimum(p, q).exp().sum(-1).detach())
        return share * kl(q, p) + (1 - share) * 0.5 * (p.exp() - q.exp()).abs().sum(-1)

    def mixed(x: Tensor, y: Tensor) -> Tensor:
        if beta == 0:
            return y
        return torch.logaddexp(x + math.log(beta), y + math.log(1 - beta))

    return {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "jsd": lambda: beta * kl(q, mixed(q, p)) + (1 - beta) * kl(p, mixed(q, p)),
        "skew_kl": lambda: kl(q, mixed(q, p)),
        "skew_reverse_kl": lambda: kl(p, mixed(p, q)),
        "tvd": lambda: 0.5 * (p.exp() - q.exp()).abs().sum(-1),
        "nla": lambda: -torch.minimum(p, q).exp().sum(-1).log(),
        "lk_hybrid": hybrid,
    }[divergence]()


def outcome(compute: Callable[[Tensor], Tensor], student: Tensor) -> Outcome:
    leaf = student.detach().clone().requires_grad_()
    value = compute(leaf)
    return Outcome(value.detach(), torch.autograd.grad(value.sum(), leaf))


def draw(rows: int, columns: int, dtype: torch.dtype, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    teacher = 4 * torch.randn(rows, columns, dtype=F64)
    student = teacher + noise * torch.randn(rows, columns, dtype=F64)
    return student.to(DEVICE, dtype), teacher.to(DEVICE, dtype)


def skip_float64(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == F64:
        pytest.skip("the Triton kernels compute in float32")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_divergence_is_right(backend: str, divergence: str, dtype: torch.dtype) -> None:
    skip_float64(backend, dtype)
    student, teacher = draw(3, 1000, dtype)
    settings = {"divergence": divergence, "beta": 0.3}

    def plain(s: Tensor, t: Tensor) -> Tensor:
        return 2.0 * 3.0 * textbook(s, t, divergence, 0.3, 2.0, 3.0)

    found = outcome(
        lambda s: fd.logit_loss(
            s, teacher, temperature=2.0, teacher_temperature=3.0, reduction="none", backend=backend, **settings
        ),
        student,
    )
    truth = outcome(lambda s: plain(s.double(), teacher.double()), student)
    eager = outcome(lambda s: plain(s, teacher).float(), student)
    judge(found, Outcome(truth.value, truth.gradients), eager, dtype)


@pytest.mark.parametrize("columns", [1, 7, 1000, 1024, 2049, 32003, 119_547])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ugly_shapes(backend: str, rows: int, columns: int) -> None:
    if backend == "triton" and DEVICE.type == "cpu" and rows * columns > 40_000:
        pytest.skip("minutes in the interpreter; one row of 32,003 and the near-convergence test cover such rows")
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = draw(rows, columns, dtype)
        found = outcome(lambda s, t=teacher: fd.logit_loss(s, t, reduction="none", backend=backend), student)
        truth = outcome(lambda s, t=teacher: textbook(s.double(), t.double(), "forward_kl"), student)
        eager = outcome(lambda s, t=teacher: textbook(s, t, "forward_kl").float(), student)
        judge(found, truth, eager, dtype)


@pytest.mark.pairs(3, "noise", "dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_near_convergence(backend: str, noise: float, dtype: torch.dtype) -> None:
    """V 119,547, logits of std 4: PyTorch's float32 is 1.6% off in the gradient at 1e-4, and 300 times in the value."""
    slow = backend == "triton" and DEVICE.type == "cpu"
    teacher = (4 * torch.randn(1 if slow else 4, 119_547, dtype=F64)).to(DEVICE, dtype)
    # 16-bit inputs cannot be closer than their spacing; what they hold is what counts.
    student = (teacher.double() + noise * torch.randn(teacher.shape, dtype=F64).to(DEVICE)).to(dtype)
    if error(student, teacher) == 0:
        student[:, ::97] = torch.nextafter(student[:, ::97], torch.full_like(student[:, ::97], torch.inf))
    # Without loss scaling most of a float16 gradient lies below its smallest number.
    scale = 2.0 ** round(math.log2(6700 / noise)) if dtype == torch.float16 else 1.0

    def loss(s: Tensor, t: Tensor, b: str) -> Tensor:
        return scale * fd.logit_loss(s, t, reduction="sum", backend=b)

    found = outcome(lambda s: loss(s, teacher, backend), student)
    truth = outcome(lambda s: loss(s, teacher.double(), "reference"), student.double())
    judge_exact(found, truth, dtype)
    if dtype == torch.float32:  # what 16 bits leave of the noise is too little for the textbook form even in float64
        judge_exact(
            found, outcome(lambda s: textbook(s.double(), teacher.double(), "forward_kl").sum(), student), dtype
        )


@pytest.mark.parametrize("divergence", [d for d in LOSSES if d != "forward_kl"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_divergence_is_exact_near_convergence(backend: str, divergence: str) -> None:
    student, teacher = draw(2, 5003, torch.float32, noise=1e-3)
    found = outcome(
        lambda s: fd.logit_loss(s, teacher, divergence=divergence, beta=0.3, reduction="sum", backend=backend), student
    )
    # The textbook form is lost here even in float64 where the value is 1e-7 of its terms; the reference is not.
    truth = outcome(
        lambda s: fd.logit_loss(
            s, teacher.double(), divergence=divergence, beta=0.3, reduction="sum", backend="reference"
        ),
        student.double(),
    )
    judge_exact(found, truth, torch.float32)


@pytest.mark.parametrize("divergence", LOSSES)
def test_the_reference_is_the_textbook(divergence: str) -> None:
    for beta in (0.1, 0.5, 0.9):
        student, teacher = draw(4, 501, F64, noise=2.0)
        found = outcome(
            lambda s, b=beta, t=teacher: fd.logit_loss(
                s, t, divergence=divergence, beta=b, reduction="none", backend="reference"
            ),
            student,
        )
        truth = outcome(lambda s, b=beta, t=teacher: textbook(s, t, divergence, b), student)
        judge(found, truth, truth, F64)


@pytest.mark.parametrize("offset", [0.3, 5.0, 7.7, -40.0, 100.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_offset_costs_nothing(backend: str, offset: float) -> None:
    student, teacher = draw(2, 4099, torch.float32, noise=1e-3)
    student = student + offset
    found = outcome(lambda s: fd.logit_loss(s, teacher, reduction="sum", backend=backend), student)
    truth = outcome(lambda s: textbook(s.double(), teacher.double(), "forward_kl").sum(), student)
    judge_exact(found, truth, torch.float32)


@pytest.mark.parametrize("gap", [10.0, 60.0, 300.0, 3000.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_far_apart(backend: str, gap: float) -> None:
    """Student and teacher put their mass on different columns: the log1p form gives way to the plain one."""
    student, teacher = draw(3, 2049, torch.float32)
    student[:, 5] += gap
    teacher[:, 7] += gap
    found = outcome(lambda s: fd.logit_loss(s, teacher, reduction="none", backend=backend), student)
    truth = outcome(lambda s: textbook(s.double(), teacher.double(), "forward_kl"), student)
    eager = outcome(lambda s: textbook(s, teacher, "forward_kl"), student)
    judge(found, truth, eager, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_peak_before_the_teacher_rises(backend: str) -> None:
    """The student's peak overflows relative to the teacher's largest logit so far, not to a later one."""
    student, teacher = draw(3, 4099, torch.float32)
    teacher[:, :2048] -= 25
    student[:, :2048] -= 25
    student[:, 5] += torch.tensor([60.0, 120.0, 3000.0], device=DEVICE)
    found = outcome(lambda s: fd.logit_loss(s, teacher, reduction="none", backend=backend), student)
    truth, eager = (textbook(s, t, "forward_kl") for s, t in ((student.double(), teacher.double()), (student, teacher)))
    judge(Outcome(found.value, ()), Outcome(truth, ()), Outcome(eager, ()), torch.float32)
    assert found.gradients[0].isfinite().all()


@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_logits_far_from_zero(backend: str, offset: float) -> None:
    """e^x is 0 or infinite for every one of them; few columns, so that most of a GPU's threads have none. The reference
    takes logsumexps from logits as they are, which in float32 costs it a digit here."""
    student, teacher = (x + offset for x in draw(3, 33, torch.float32))
    found = outcome(lambda s: fd.logit_loss(s, teacher, reduction="none", backend=backend), student)
    truth, eager = (textbook(s, t, "forward_kl") for s, t in ((student.double(), teacher.double()), (student, teacher)))
    judge(Outcome(found.value, ()), Outcome(truth, ()), Outcome(eager, ()), torch.float32)
    assert found.gradients[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities(backend: str) -> None:
    inf = math.inf
    student, teacher = draw(5, 37, torch.float32)
    teacher[0, 3] = -inf  # the teacher excludes a column: contributes nothing beyond the student's mass there
    student[1, 4] = -inf  # the student excludes what the teacher does not: infinite value, finite gradient
    student[2, 5] = teacher[2, 5] = -inf
    teacher[3, :] = -inf  # a caller's error
    found = outcome(lambda s: fd.logit_loss(s, teacher, reduction="none", backend=backend), student)
    p, q = student.double().softmax(-1), teacher.double().softmax(-1)
    truth = textbook(student.double(), teacher.double(), "forward_kl")
    for row in (0, 4):
        assert error(found.value[row], truth[row]) <= EXACT_VALUE
    plain = [c for c in range(37) if c != 5]
    assert (
        error(found.value[2], textbook(student[2, plain].double(), teacher[2, plain].double(), "forward_kl"))
        <= EXACT_VALUE
    )
    assert found.value[1] == inf
    assert found.value[3].isnan()
    for row in (0, 1, 2, 4):
        assert error(found.gradients[0][row], (p - q)[row]) <= EXACT_VALUE, row


@pytest.mark.parametrize("divergence", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_never_make_a_finite_loss_nan(backend: str, divergence: str) -> None:
    """Columns that both sides exclude are as if they were not there."""
    if divergence == "mse":
        pytest.skip("a mean over V counts every column")
    student, teacher = draw(2, 50, torch.float32)
    student[:, 10:20] = teacher[:, 10:20] = -math.inf
    keep = [c for c in range(50) if not 10 <= c < 20]

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return fd.logit_loss(s, t, divergence=divergence, reduction="none", backend=backend)

    found = outcome(lambda s: loss(s, teacher), student)
    truth = outcome(lambda s: textbook(s.double(), teacher[:, keep].double(), divergence), student[:, keep])
    assert error(found.value, truth.value) <= EXACT_VALUE
    assert error(found.gradients[0][:, keep], truth.gradients[0]) <= EXACT_VALUE
    assert (found.gradients[0][:, 10:20] == 0).all()


@pytest.mark.parametrize("divergence", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_weight_zero_are_not_read(backend: str, divergence: str) -> None:
    student, teacher = draw(6, 301, torch.float32)
    weight = torch.tensor([1, 0, 1, 1, 0, 1], device=DEVICE, dtype=torch.bool)
    student[1], teacher[4] = math.nan, math.inf
    kept = (student[weight], teacher[weight])
    for reduction in ("mean", "sum", "none"):

        def loss(s: Tensor, t: Tensor, w: Tensor | None, r: str = reduction) -> Tensor:
            return fd.logit_loss(s, t, divergence=divergence, weight=w, reduction=r, backend=backend)

        found = outcome(lambda s: loss(s, teacher, weight), student)
        truth = outcome(lambda s: loss(s, kept[1], None), kept[0])
        value = found.value[weight] if reduction == "none" else found.value
        assert error(value, truth.value) <= SLACK[torch.float32]
        assert error(found.gradients[0][weight], truth.gradients[0]) <= SLACK[torch.float32]
        assert (found.gradients[0][~weight] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_weights_and_num_items(backend: str) -> None:
    student, teacher = draw(6, 129, torch.float32)
    student, teacher = student.reshape(2, 3, 129), teacher.reshape(2, 3, 129)
    weight = torch.rand(2, 3, device=DEVICE)
    rows = textbook(student.double(), teacher.double(), "forward_kl")

    def loss(**options: object) -> Tensor:
        return fd.logit_loss(student, teacher, backend=backend, **options)

    assert error(loss(), rows.mean()) <= SLACK[torch.float32]
    assert error(loss(reduction="sum"), rows.sum()) <= SLACK[torch.float32]
    assert error(loss(reduction="none"), rows) <= SLACK[torch.float32]
    assert error(loss(weight=weight), (rows * weight).sum() / weight.sum()) <= SLACK[torch.float32]
    assert error(loss(weight=weight, reduction="none"), rows * weight) <= SLACK[torch.float32]
    assert error(loss(num_items=50), rows.sum() / 50) <= SLACK[torch.float32]
    assert (
        error(loss(weight=weight, num_items=torch.tensor(50, device=DEVICE)), (rows * weight).sum() / 50)
        <= SLACK[torch.float32]
    )
    assert error(loss(temperature=2.0, scale_by_t2=False), textbook(student.double(), teacher.double(), "forward_kl", t_s=2, t_t=2).mean()) <= SLACK[torch.float32]  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_counts(backend: str, reduction: str) -> None:
    student, teacher = draw(3, 11, torch.float32)
    for s, t, w in ((student, teacher, torch.zeros(3, device=DEVICE)), (student[:0], teacher[:0], None)):
        found = outcome(lambda x, t=t, w=w: fd.logit_loss(x, t, weight=w, reduction=reduction, backend=backend), s)
        assert found.value == 0
        assert (found.gradients[0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_item_in_any_batch(backend: str) -> None:
    student, teacher = draw(3, 11, torch.float32)
    none = torch.tensor(0, device=DEVICE)
    options = {"weight": torch.zeros(3, device=DEVICE), "num_items": none, "backend": backend}
    found = outcome(lambda x: fd.logit_loss(x, teacher, **options), student)
    assert found.value == 0
    assert (found.gradients[0] == 0).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_a_gradient_of_the_gradient_is_refused(inplace: bool) -> None:
    student, teacher = draw(3, 11, torch.float32)
    leaf = student.requires_grad_()
    values, indices = teacher.log_softmax(-1).topk(4)
    for loss in (
        fd.logit_loss(leaf.clone(), teacher, inplace_backward=inplace),
        fd.topk_logit_loss(leaf.clone(), values, indices, inplace_backward=inplace),
    ):
        with pytest.raises(RuntimeError, match="logit_loss: its gradient cannot be differentiated again"):
            torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_and_any_incoming_gradient(backend: str, reduction: str, dtype: torch.dtype) -> None:
    student, teacher = draw(4, 515, dtype)
    leaf = student.requires_grad_()
    loss = fd.logit_loss(leaf, teacher, reduction=reduction, backend=backend)
    dloss = torch.ones_like(loss)
    first, second, third = (
        torch.autograd.grad(loss, leaf, d, retain_graph=True)[0] for d in (dloss, dloss, 0.37 * dloss)
    )
    assert torch.equal(first, second)
    once = torch.autograd.grad(0.37 * fd.logit_loss(leaf, teacher, reduction=reduction, backend=backend).sum(), leaf)[0]
    exact = outcome(
        lambda s: 0.37 * fd.logit_loss(s, teacher.double(), reduction=reduction, backend="reference"), student.double()
    ).gradients[0]
    limit = EXACT_GRADIENT[dtype]
    assert error(third, exact) <= limit
    assert torch.equal(third, once)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_misaligned_rows(backend: str) -> None:
    """Views into larger buffers, off by one element, with sentinels around them."""
    for dtype in (torch.float32, torch.bfloat16):
        wide = torch.full((5, 1040), 1e4, dtype=dtype, device=DEVICE)
        student, teacher = draw(5, 1021, dtype)
        view = wide[:, 3 : 3 + 1021]
        view.copy_(student)
        columns = torch.empty(1021, 5, dtype=dtype, device=DEVICE).copy_(teacher.T).T
        truth = outcome(lambda s, t=teacher: fd.logit_loss(s, t, backend=backend), student)
        leaf = wide.detach().requires_grad_()
        loss = fd.logit_loss(leaf[:, 3 : 3 + 1021], columns, backend=backend)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert error(loss, truth.value) <= SLACK[torch.float32]
        assert error(gradient[:, 3 : 3 + 1021], truth.gradients[0]) <= EXACT_GRADIENT[dtype]
        assert (gradient[:, :3] == 0).all() and (gradient[:, 3 + 1021 :] == 0).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inplace_backward_overwrites_the_logits(backend: str, divergence: str) -> None:
    student, teacher = draw(4, 1003, torch.float32)
    for dloss in (1.0, 0.37):

        def loss(s: Tensor, inplace: bool) -> Tensor:
            return fd.logit_loss(
                s, teacher, divergence=divergence, temperature=2.0, inplace_backward=inplace, backend=backend
            )

        truth = outcome(lambda s, d=dloss, f=loss: d * f(s, False), student)
        leaf = student.clone().requires_grad_()
        logits = leaf * 1.0
        found = dloss * loss(logits, True)
        (gradient,) = torch.autograd.grad(found, leaf, retain_graph=True)
        assert error(found, truth.value) <= SLACK[torch.float32]
        assert error(gradient, truth.gradients[0]) <= SLACK[torch.float32]
        assert error(logits, truth.gradients[0]) <= SLACK[torch.float32], "the gradient was written elsewhere"
        with pytest.raises(RuntimeError, match="a second backward came through inplace_backward=True"):
            torch.autograd.grad(found, leaf)


def test_inplace_backward_is_noticed_by_whoever_saved_the_logits() -> None:
    student, teacher = draw(2, 31, torch.float32)
    logits = student.requires_grad_() * 1.0
    other = logits.square().sum()
    total = other + fd.logit_loss(logits, teacher, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    student, teacher = draw(3, 65, torch.float32)
    scale = torch.rand(3, device=DEVICE)
    constants = pack((0, 0.5, 2.0, 2.0, 4.0), (1.0, 0.0, 1.0, 0.0))
    rest = (teacher, scale, None, None, None, constants, False, backend, "")
    leaf = student.clone().requires_grad_()
    torch.library.opcheck(logit_rows.op, (leaf, *rest))
    for rounded in (True, False):
        torch.library.opcheck(logit_total.op, (leaf, *rest, [True], rounded))
    _, _, state = logit_rows(student, *rest)
    torch.library.opcheck(torch.ops.fastdistil.logit_back, (student, *rest, state, torch.rand(3, device=DEVICE)))
    torch.library.opcheck(logit_rows_overwrite_, (student.clone(), *rest))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("backend", available("cpu", "triton"))
def test_fullgraph_compile(backend: str, divergence: str) -> None:
    student, teacher = draw(3, 257, torch.float32)
    weight = torch.tensor([1.0, 0.0, 2.0], device=DEVICE)

    def loss(s: Tensor) -> Tensor:
        return 3.0 * fd.logit_loss(
            2.0 * s, teacher, divergence=divergence, weight=weight, temperature=2.0, backend=backend
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain, found = outcome(loss, student), outcome(compiled, student)
    assert error(found.value, plain.value) <= SLACK[torch.float32]
    assert error(found.gradients[0], plain.gradients[0]) <= SLACK[torch.float32]


@pytest.mark.parametrize("dynamic", [None, True])
def test_fullgraph_compile_where_the_numbers_change(dynamic: bool | None) -> None:
    def loss(s: Tensor, t: Tensor, temperature: float) -> Tensor:
        options = {"temperature": temperature, "num_items": 3 * len(s)}
        linear = fd.linear_logit_loss(s, t[:2].detach() + 1, t, t[:2], **options)
        return fd.logit_loss(s, t, **options) + linear + fd.hidden_loss([s, s], [t, t], layer_weights=[1, temperature])

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, temperature in ((5, 2.0), (6, 1.9), (7, 1.8)):
        student, teacher = draw(rows, 33, torch.float32)
        plain = outcome(lambda s, t=teacher, x=temperature: loss(s, t, x), student)
        found = outcome(lambda s, t=teacher, x=temperature: compiled(s, t, x), student)
        assert error(found.value, plain.value) <= SLACK[torch.float32]
        assert error(found.gradients[0], plain.gradients[0]) <= SLACK[torch.float32]


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    student, teacher = draw(2, 33, torch.float32)
    assert not fd.logit_loss(student, teacher).requires_grad
    with torch.no_grad():
        assert not fd.logit_loss(student.requires_grad_(), teacher).requires_grad


GOOD = torch.zeros(4, 8)
BAD = [
    ("student type", lambda: fd.logit_loss([1.0], GOOD), TypeError, "student_logits is list, expected a torch.Tensor"),
    ("student dtype", lambda: fd.logit_loss(GOOD.long(), GOOD), TypeError, "student_logits has dtype torch.int64"),
    ("no columns", lambda: fd.logit_loss(GOOD[:, :0], GOOD[:, :0]), ValueError, r"expected \(..., V\) with V >= 1"),
    ("scalar", lambda: fd.logit_loss(GOOD[0, 0], GOOD[0, 0]), ValueError, r"student_logits has shape \(\)"),
    ("shape", lambda: fd.logit_loss(GOOD, GOOD[:, :5]), ValueError, r"teacher_logits has shape \(4, 5\), expected \(4, 8\) to match student_logits"),
    ("teacher dtype", lambda: fd.logit_loss(GOOD, GOOD.long()), TypeError, "teacher_logits has dtype torch.int64, expected float32"),
    ("device", lambda: fd.logit_loss(GOOD, GOOD.to("meta")), ValueError, "teacher_logits is on meta, expected cpu"),
    ("teacher grad", lambda: fd.logit_loss(GOOD, GOOD.clone().requires_grad_()), ValueError, "teacher_logits requires grad"),
    ("divergence", lambda: fd.logit_loss(GOOD, GOOD, divergence="kl"), ValueError, "divergence is 'kl', expected one of 'forward_kl'"),
    ("temperature 0", lambda: fd.logit_loss(GOOD, GOOD, temperature=0), ValueError, "temperature is 0.0, expected more than 0"),
    ("temperature nan", lambda: fd.logit_loss(GOOD, GOOD, temperature=math.nan), ValueError, "temperature is nan, expected a finite number"),
    ("temperature type", lambda: fd.logit_loss(GOOD, GOOD, temperature="2"), TypeError, "temperature is str, expected a number"),
    ("teacher temperature", lambda: fd.logit_loss(GOOD, GOOD, teacher_temperature=-1.0), ValueError, "teacher_temperature is -1.0"),
    ("beta jsd", lambda: fd.logit_loss(GOOD, GOOD, divergence="jsd", beta=0.0), ValueError, "beta is 0.0 for jsd, expected 0 < beta < 1"),
    ("beta skew", lambda: fd.logit_loss(GOOD, GOOD, divergence="skew_kl", beta=1.0), ValueError, "beta is 1.0 for skew_kl"),
    ("weight shape", lambda: fd.logit_loss(GOOD, GOOD, weight=torch.ones(3)), ValueError, r"weight has shape \(3,\), expected \(4,\)"),
    ("weight type", lambda: fd.logit_loss(GOOD, GOOD, weight=[1, 1, 1, 1]), TypeError, "weight is list"),
    ("weight grad", lambda: fd.logit_loss(GOOD, GOOD, weight=torch.ones(4, requires_grad=True)), ValueError, "weight requires grad"),
    ("num_items shape", lambda: fd.logit_loss(GOOD, GOOD, num_items=torch.ones(2)), ValueError, r"num_items has shape \(2,\)"),
    ("leaf in place", lambda: fd.logit_loss(GOOD.clone().requires_grad_(), GOOD, inplace_backward=True), ValueError, "inplace_backward came with student_logits that are a leaf"),
    ("expanded in place", lambda: fd.logit_loss(GOOD[:1].expand(4, 8), GOOD, inplace_backward=True), ValueError, r"inplace_backward came with expanded student_logits, of strides \(0, 1\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_calls(call: Callable[[], Tensor], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        call()
    assert str(caught.value).startswith(("logit_loss: ", "backend"))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="there is a GPU here")
def test_a_backend_that_is_not_there_says_why() -> None:
    with pytest.raises(
        ValueError, match="backend 'cuda' is not available: (there is no NVIDIA GPU|fastdistil was built)"
    ):
        fd.logit_loss(GOOD, GOOD, backend="cuda")
