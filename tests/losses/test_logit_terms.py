"""What logit_loss and linear_logit_loss take besides the divergence: labels, vocab_map, caps, statistics."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conftest import DEVICE, available
from judge import EXACT_VALUE, SLACK, Outcome, error, judge, judge_exact
from test_logit import textbook
from torch import Tensor
from torch.nn import functional

import fastdistil as fd
from fastdistil.contracts.logit import DIVERGENCES
from fastdistil.ops import row_statistics
from fastdistil.ops.logit import logit_rows, logit_rows_overwrite_, logit_total
from fastdistil.ops.logit_terms import pack
from fastdistil.reference import cross_entropy as reference

BACKENDS = available("reference", "cpu", "triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROWS, COLUMNS, TEACHER_COLUMNS = 6, 53, 61
IGNORED = -7


def draw(dtype: torch.dtype = torch.float32, noise: float = 1.0) -> dict[str, Tensor]:
    """Logits of different vocabularies, their map, labels (some ignored) and weights (some 0)."""
    teacher = 3 * torch.randn(ROWS, TEACHER_COLUMNS, dtype=torch.float64)
    partner = torch.randperm(TEACHER_COLUMNS)[:COLUMNS]
    student = teacher[:, partner] + noise * torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    vocab_map = torch.where(torch.arange(COLUMNS) % 5 == 2, -1, partner)
    labels = torch.randint(COLUMNS, (ROWS,))
    labels[1], labels[4], labels[5] = IGNORED, IGNORED, 2  # 2 has no partner
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0, 1.0])
    found = {"student": student.to(dtype), "teacher": teacher.to(dtype), "vocab_map": vocab_map, "labels": labels}
    return {name: x.to(DEVICE) for name, x in (found | {"weight": weight}).items()}


def plain(student: Tensor, x: dict[str, Any], divergence: str, alpha: float, mapped: bool, labelled: bool) -> Tensor:
    """losses.md, section 1, by autograd: the mean over each term's own rows."""
    dtype, t = student.dtype, 2.0
    teacher, s = x["teacher"].to(dtype), student
    if mapped:
        keep = x["vocab_map"] >= 0
        s, teacher = student[:, keep], teacher[:, x["vocab_map"][keep]]
    elif teacher.shape[1] != student.shape[1]:
        teacher = teacher[:, : student.shape[1]]
    rows, w = textbook(s, teacher, divergence, 0.5, t, t) * t * t, x["weight"].to(dtype)
    first = (w * rows).sum() / w.sum()
    if not labelled:
        return first
    counts = w * (x["labels"] != IGNORED)
    entropy = functional.cross_entropy(student, x["labels"], ignore_index=IGNORED, reduction="none")
    return (1 - alpha) * first + alpha * (counts * entropy).sum() / counts.sum()


def ours(
    student: Tensor, x: dict[str, Any], divergence: str, alpha: float, mapped: bool, labelled: bool, **more: Any
) -> Any:
    options: dict[str, Any] = {"divergence": divergence, "temperature": 2.0, "weight": x["weight"]} | more
    options |= {"labels": x["labels"], "label_weight": alpha, "ignore_index": IGNORED} if labelled else {}
    teacher = x["teacher"]
    if mapped:
        options["vocab_map"] = x["vocab_map"]
    elif teacher.shape[1] != student.shape[1]:
        teacher = teacher[:, : student.shape[1]]
    return fd.logit_loss(student, teacher, **options)


def outcome(function: Any, student: Tensor, factor: float = 1.0) -> Outcome:
    leaf = student.detach().clone().requires_grad_()
    value = function(leaf)
    return Outcome(value.detach(), torch.autograd.grad(value, leaf, torch.full_like(value, factor)))


KINDS = {
    "labels": (0.3, False, True),
    "only labels": (1.0, False, True),
    "map": (0.0, True, False),
    "both": (0.6, True, True),
}


@pytest.mark.pairs(3, "divergence", "kind", "dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_textbook(backend: str, divergence: str, kind: Any, dtype: torch.dtype) -> None:
    x = draw(dtype)
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match="backend is 'triton', which has no float64 kernel"):
            ours(x["student"], x, divergence, *kind, backend=backend)
        return
    truth = outcome(lambda s: plain(s, x, divergence, *kind), x["student"].double(), 64.0)
    eager = outcome(lambda s: plain(s, x, divergence, *kind), x["student"], 64.0)
    found = outcome(lambda s: ours(s, x, divergence, *kind, backend=backend), x["student"], 64.0)
    judge(found, truth, eager, dtype)
    if kind[1] and not kind[2]:
        assert not found.gradients[0][:, x["vocab_map"] < 0].any()


@pytest.mark.pairs(2, "columns", "divergence", "dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])  # the second is centred: one pass more
@pytest.mark.parametrize("columns", [16, 700, 4321])
@pytest.mark.parametrize("backend", available("cpu", "triton"))
def test_labels_in_every_part_of_a_row(backend: str, columns: int, divergence: str, dtype: torch.dtype) -> None:
    """The gradient of both terms in the pass that writes it, over several tiles of unaligned rows."""
    labels = torch.tensor([0, 7, columns // 2, columns - 2, columns - 1, IGNORED], device=DEVICE)
    teacher = (3 * torch.randn(ROWS, columns + 1, device=DEVICE)).to(dtype)[:, 1:]
    x = {"teacher": teacher, "labels": labels, "weight": torch.tensor([1.0, 2, 3, 0.5, 1, 1], device=DEVICE)}
    student = torch.randn(ROWS, columns + 1, device=DEVICE).to(dtype)[:, 1:]
    truth, eager = (
        outcome(lambda s: plain(s, x, divergence, 0.3, False, True), student.to(d)) for d in (torch.float64, dtype)
    )
    for inplace in (False, True):

        def run(s: Tensor, inplace: bool = inplace) -> Any:
            s = s * 1 if inplace else s
            return ours(s, x, divergence, 0.3, False, True, backend=backend, inplace_backward=inplace)

        judge(outcome(run, student), truth, eager, dtype)


@pytest.mark.parametrize("noise", [1e-1, 1e-3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_map_keeps_the_digits_near_convergence(backend: str, noise: float) -> None:
    x = draw(noise=noise)
    truth = outcome(lambda s: plain(s, x, "forward_kl", 0.0, True, False), x["student"].double())
    judge_exact(
        outcome(lambda s: ours(s, x, "forward_kl", 0.0, True, False, backend=backend), x["student"]),
        truth,
        torch.float32,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions(backend: str) -> None:
    x, alpha = draw(), 0.25
    loss = partial(ours, x=x, divergence="jsd", alpha=alpha, mapped=True, labelled=True, backend=backend)
    rows = loss(x["student"], reduction="none")
    without = partial(ours, x=x, divergence="jsd", alpha=0.0, mapped=True, labelled=False, backend=backend)
    entropy = functional.cross_entropy(x["student"], x["labels"], ignore_index=IGNORED, reduction="none") * x["weight"]
    torch.testing.assert_close(rows, (1 - alpha) * without(x["student"], reduction="none") + alpha * entropy)
    assert rows[2] == 0
    total = outcome(lambda s: loss(s, reduction="sum"), x["student"])
    judge_exact(outcome(lambda s: loss(s, reduction="none").sum(), x["student"]), total, torch.float32)
    items = outcome(lambda s: loss(s, num_items=torch.tensor(4.0, device=DEVICE)) * 4, x["student"])
    judge_exact(items, total, torch.float32)


@pytest.mark.pairs(2, "alpha", "reduction")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_of_rows_of_weight_0_may_be_anything(backend: str, alpha: float, reduction: str) -> None:
    x = draw()
    function = partial(ours, divergence="jsd", alpha=alpha, mapped=False, labelled=True, backend=backend)
    weight = torch.tensor([1.0, 0.0, 0.0, 0.5, 0.0, 0.0], device=DEVICE)
    good, wild = x | {"weight": weight}, x | {"weight": weight, "labels": x["labels"].clone()}
    wild["labels"][[1, 2, 4, 5]] = torch.tensor([COLUMNS, -1, 2**40, -(2**62)], device=DEVICE)
    expected = outcome(partial(function, x=good, reduction=reduction), x["student"])
    found = outcome(partial(function, x=wild, reduction=reduction), x["student"])
    assert torch.equal(found.value, expected.value)
    assert torch.equal(found.gradients[0], expected.gradients[0])
    assert not found.gradients[0][[1, 2, 4, 5]].any()
    value = found.value.sum()
    if reduction == "mean":
        truth = plain(x["student"].double(), good, "jsd", alpha, mapped=False, labelled=True)
        assert error(value, truth) <= SLACK[torch.float32]
    counted = wild | {"weight": torch.tensor([True, False, False, True, True, False], device=DEVICE)}
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=f"^logit_loss: labels has {2**40}, expected 0 to {COLUMNS - 1} or"):
            function(x["student"], x=counted)


@pytest.mark.parametrize("nan", [False, True], ids=["weights", "a weight of NaN"])
def test_labels_of_two_heads_where_rows_do_not_count(nan: bool) -> None:
    """With a weight of NaN every row is computed: even then nothing is read where a label of no row points to."""
    student, head, labels = torch.randn(4, 8), torch.randn(11, 8), torch.tensor([3, 11, -(2**62), 10])
    weight = torch.tensor([1.0, 0.0, 0.0, torch.nan if nan else 2.0])
    arguments = (student.to(DEVICE), head.to(DEVICE), 2 * student.to(DEVICE), head.to(DEVICE))
    options: dict[str, Any] = {"weight": weight.to(DEVICE), "label_weight": 0.5}
    found, wanted = (
        fd.linear_logit_loss(*arguments, labels=x.to(DEVICE), **options) for x in (labels, labels.clamp(0, 10))
    )
    assert found.isnan() if nan else torch.equal(found, wanted)


def test_only_labels_do_not_look_at_the_teacher() -> None:
    x = draw()
    clean = outcome(lambda s: ours(s, x, "forward_kl", 1.0, False, True), x["student"])
    x["teacher"] = torch.full_like(x["teacher"], torch.nan)
    found = outcome(lambda s: ours(s, x, "forward_kl", 1.0, False, True), x["student"])
    assert torch.equal(found.value, clean.value) and torch.equal(found.gradients[0], clean.gradients[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics(backend: str, reduction: str) -> None:
    x = draw()
    loss, stats = ours(
        x["student"].requires_grad_(),
        x,
        "forward_kl",
        0.2,
        True,
        True,
        backend=backend,
        reduction=reduction,
        return_stats=True,
    )
    alone = ours(x["student"], x, "forward_kl", 0.2, True, True, backend=backend, reduction=reduction)
    assert torch.equal(loss, alone) and loss.requires_grad and not any(s.requires_grad for s in stats)
    keep = x["vocab_map"] >= 0
    p = (x["student"][:, keep] / 2).double().log_softmax(-1)
    q = (x["teacher"][:, x["vocab_map"][keep]] / 2).double().log_softmax(-1)
    entropies = (-(p.exp() * p).sum(-1), -(q.exp() * q).sum(-1), -(q.exp() * p).sum(-1))
    expected = (*entropies, p.argmax(-1) == q.argmax(-1), torch.minimum(p, q).exp().sum(-1))
    for found, wanted in zip(stats, expected, strict=True):
        assert found.shape == (ROWS,) and found[2] == 0
        wanted[2] = 0
        assert error(found, wanted) <= SLACK[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mapped", [False, True])
def test_statistics_where_the_labels_alone_count(mapped: bool, backend: str) -> None:
    x = draw()
    options: dict[str, Any] = {"backend": backend, "return_stats": True}
    _, wanted = ours(x["student"], x, "forward_kl", 0.2, mapped, True, **options)
    logits = x["student"].requires_grad_() * 1  # the gradient overwrites these
    loss, found = ours(logits, x, "forward_kl", 1.0, mapped, True, inplace_backward=True, **options)
    loss.backward()
    assert found.student_entropy.count_nonzero() == 5
    for one, other in zip(found, wanted, strict=True):
        assert not one.requires_grad
        torch.testing.assert_close(one, other)


def test_statistics_of_two_heads_where_the_labels_alone_count() -> None:
    hidden, head = (torch.randn(n, 8, device=DEVICE) for n in (4, 11))
    labels, weight = torch.tensor([3, 0, -100, 10], device=DEVICE), torch.tensor([1.0, 0.0, 2.0, 3.0], device=DEVICE)
    options: dict[str, Any] = {"labels": labels, "weight": weight, "student_softcap": 3.0, "return_stats": True}
    options["student_bias"] = torch.randn(11, device=DEVICE)
    arguments = (hidden.requires_grad_(), head, hidden.detach() + 1, head)
    some, alone = (fd.linear_logit_loss(*arguments, label_weight=x, **options) for x in (0.2, 1.0))
    for one, other in zip(alone[1], some[1], strict=True):
        torch.testing.assert_close(one, other)
    assert alone[1].student_entropy.count_nonzero() == 3
    bare = fd.linear_logit_loss(*arguments, label_weight=1.0, **options | {"return_stats": False})
    assert torch.equal(alone[0], bare) and bare.requires_grad


@pytest.mark.pairs(2, "divergence", "capped")
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "mse"])
@pytest.mark.parametrize("backend", available("reference", "cpu", "triton"))
def test_two_heads_with_everything(backend: str, divergence: str, capped: bool) -> None:
    """Labels, map, logit scales and softcaps over two heads, in chunks of one row, against whole logits."""
    x = draw()
    hidden, matrix, bias = torch.randn(ROWS, 9), torch.randn(COLUMNS, 9), torch.randn(COLUMNS)
    teacher = [torch.randn(ROWS, 7), torch.randn(TEACHER_COLUMNS, 7), torch.randn(TEACHER_COLUMNS)]
    inputs, teacher = [y.to(DEVICE) for y in (hidden, matrix, bias)], [y.to(DEVICE) for y in teacher]
    caps = {"student_softcap": 4.0, "teacher_softcap": 3.0} if capped else {}
    caps |= {"student_logit_scale": 1.5, "teacher_logit_scale": 0.5}

    def whole(*heads: Tensor) -> Tensor:
        def cap(z: Tensor, side: str) -> Tensor:
            z, c = z * caps[f"{side}_logit_scale"], caps.get(f"{side}_softcap")
            return z if c is None else c * torch.tanh(z / c)

        dtype = heads[0].dtype
        z_t = functional.linear(*(y.to(dtype) for y in teacher))
        there = x | {"teacher": cap(z_t, "teacher")}
        return plain(cap(functional.linear(*heads), "student"), there, divergence, 0.4, True, True)

    def fused(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fd.linear_logit_loss(
            h, w, teacher[0], teacher[1], student_bias=b, teacher_bias=teacher[2], chunk_bytes=1, divergence=divergence,
            temperature=2.0, weight=x["weight"], vocab_map=x["vocab_map"], labels=x["labels"], label_weight=0.4,
            ignore_index=IGNORED, backend=backend, **caps,
        )  # fmt: skip

    def run(function: Any, tensors: list[Tensor]) -> Outcome:
        leaves = [y.detach().clone().requires_grad_() for y in tensors]
        value = function(*leaves)
        return Outcome(value.detach(), torch.autograd.grad(value, leaves))

    truth = run(whole, [y.double() for y in inputs])
    judge(run(fused, inputs), truth, run(whole, inputs), torch.float32)
    loss, stats = fd.linear_logit_loss(inputs[0], inputs[1], teacher[0], teacher[1], vocab_map=x["vocab_map"],
                                       weight=x["weight"], return_stats=True, backend=backend)  # fmt: skip
    z = [functional.linear(*pair) for pair in ((inputs[0], inputs[1]), (teacher[0], teacher[1]))]
    expected = fd.logit_loss(*z, vocab_map=x["vocab_map"], weight=x["weight"], return_stats=True, backend=backend)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(torch.stack(stats), torch.stack(expected[1]))


@pytest.mark.pairs(2, "columns", "scale")
@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("columns", [1, 7, 1000, 2049, 9001])
@pytest.mark.parametrize("backend", available("cpu", "triton"))
def test_cross_entropy_kernels(backend: str, columns: int, scale: float) -> None:
    """Against the reference in float64, on padded rows, with -inf among the logits; it adds to what is there."""
    from fastdistil.backends import get

    z = 5 * torch.randn(4, columns + 3, device=DEVICE)[:, :columns]
    z[1, 1 % columns :: 2] = -torch.inf
    labels = torch.randint(columns, (4,), device=DEVICE)
    labels[1] = 0
    factor = torch.tensor([1.0, 0.5, scale, 2.0], device=DEVICE)
    if scale == 0:
        z[2], labels[2] = torch.nan, columns + 5
    loss, gradient = torch.rand(4, device=DEVICE), torch.rand(4, columns, device=DEVICE)
    wanted = [x.double() for x in (loss, gradient)]
    reference.cross_entropy_rows(z.double(), labels, factor.double(), *wanted)
    get("cross_entropy", backend, DEVICE).cross_entropy_rows(z, labels, factor, loss, gradient)
    assert error(loss, wanted[0]) <= SLACK[z.dtype] and error(gradient, wanted[1]) <= SLACK[z.dtype]


@pytest.mark.pairs(2, "columns", "dtype")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 511, 513, 3000])
@pytest.mark.parametrize("backend", available("reference", "cpu", "triton"))
def test_row_moments_kernels(backend: str, columns: int, dtype: torch.dtype) -> None:
    """Against the formula in float64, on padded rows, with -inf on either side and a row that does not count."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels have no float64: the reference serves it there")
    student, teacher = (4 * torch.randn(5, columns + 3, device=DEVICE).to(dtype)[:, :columns] for _ in range(2))
    student[1, 1::2], teacher[2, 1::3], teacher[1, 1::7] = -torch.inf, -torch.inf, -torch.inf
    student[3], teacher[3] = torch.nan, torch.inf
    scale = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0], device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    found = row_statistics.moments(student, teacher, scale, (2.0, 0.5), backend)
    assert not found[3].any()
    keep = torch.tensor([0, 1, 2, 4], device=DEVICE)
    a, b = student[keep].double() / 2, teacher[keep].double() / 0.5
    p, q = (a - a.amax(-1, keepdim=True)).exp(), (b - b.amax(-1, keepdim=True)).exp()

    def moment(weight: Tensor, x: Tensor) -> Tensor:
        return torch.where(weight == 0, 0.0, weight * (x - x.amax(-1, keepdim=True))).sum(-1)

    wanted = [a.amax(-1), p.sum(-1) - 1, moment(p, a), b.amax(-1), q.sum(-1) - 1, moment(q, b), moment(q, a)]
    allowed = SLACK[torch.float64 if dtype == torch.float64 else torch.float32]
    for i, truth in enumerate(wanted):
        assert error(found[keep, i], truth) <= allowed, i
    for i, x in ((7, a), (8, b)):
        assert torch.equal(found[keep, i].long(), x.argmax(-1))


def test_moments_of_parts_merge_into_the_whole() -> None:
    student, teacher = 5 * torch.randn(4, 50, dtype=torch.float64), 5 * torch.randn(4, 50, dtype=torch.float64)
    student[1, :20], teacher[1, :20], teacher[2, 20:27] = -torch.inf, -torch.inf, -torch.inf
    student[3, 22], teacher[3, 48] = 60.0, 40.0  # so sure that 1 + the others is 1
    scale = torch.ones(4, dtype=torch.float64)
    whole = row_statistics.moments(student, teacher, scale, (2.0, 1.0), "reference")
    parts = (slice(0, 20), slice(20, 27), slice(27, 50))
    found = [row_statistics.moments(student[:, p], teacher[:, p], scale, (2.0, 1.0), "reference") for p in parts]
    merged = row_statistics.merged(torch.stack(found), torch.tensor([20, 7, 23]))
    assert error(merged, whole) <= SLACK[torch.float64]
    assert ((merged[3, [1, 4]] / whole[3, [1, 4]]) - 1).abs().max() <= SLACK[torch.float64]


@pytest.mark.parametrize("columns", [7, 513, 3000])
@pytest.mark.parametrize("backend", available("reference", "cpu", "triton"))
def test_statistics_of_sure_rows(backend: str, columns: int) -> None:
    """Entropies from 1e-2 down to 1e-13, of which 1 + the other columns' sum has no digits; truth: the same logits in
    float64, whose own 1 + sum has three digits left at worst, so that the sum is taken without the largest column."""
    student, teacher = torch.randn(2, 5, columns, device=DEVICE)
    at = torch.tensor([0, columns - 1, columns // 2, 3, 5], device=DEVICE)
    margin = torch.tensor([8.0, 14.0, 20.0, 26.0, 32.0], device=DEVICE)
    student[torch.arange(5), at] += margin
    teacher[torch.arange(5), at.flip(0)] += margin
    _, found = fd.logit_loss(student, teacher, return_stats=True, backend=backend)

    def entropy(z: Tensor) -> Tensor:
        top, column = z.max(-1, keepdim=True)
        others = (z - top).exp().scatter(1, column, 0.0)
        log_sum = others.sum(-1).log1p()
        p = (z - top).exp() / (1 + others.sum(-1, keepdim=True))
        return log_sum - (p * (z - top)).sum(-1)

    for ours_, z in ((found.student_entropy, student), (found.teacher_entropy, teacher)):
        assert (ours_ / entropy(z.double()) - 1).abs().max() <= EXACT_VALUE


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_backward_writes_over_the_logits(reduction: str, dtype: torch.dtype, kind: Any) -> None:
    x = draw(dtype)
    factor = 1 + torch.rand(ROWS, device=DEVICE) if reduction == "none" else torch.tensor(1.0, device=DEVICE)

    def run(s: Tensor, **more: Any) -> Tensor:
        loss, stats = ours(s, x, "forward_kl", *kind, reduction=reduction, return_stats=True, **more)
        assert not any(y.requires_grad for y in stats)
        return (loss * factor).sum()

    wanted = outcome(run, x["student"])
    logits: list[Tensor] = []

    def overwritten(s: Tensor) -> Tensor:
        logits.append(s.clone())
        return run(logits[0], inplace_backward=True)

    found = outcome(overwritten, x["student"])
    torch.testing.assert_close(found.value, wanted.value, rtol=SLACK[torch.float32], atol=0)
    overwrites = found.gradients[0].data_ptr() == logits[0].data_ptr()
    assert overwrites == (dtype != torch.float16)  # whose gradient waits for the incoming one
    # An incoming gradient other than 1 costs a rounding more.
    assert error(found.gradients[0], wanted.gradients[0]) <= (2 if reduction == "none" else 1) * SLACK[dtype]


@pytest.mark.pairs(2, "mapped", "inplace")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("mapped", "labelled"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_gradients_do_not_underflow_before_they_are_scaled(
    backend: str, mapped: bool, labelled: bool, inplace: bool
) -> None:
    """A GradScaler begins with 65536, which float16 does not have either."""
    x = draw(torch.float16)
    more: dict[str, Any] = {"num_items": 1e5, "inplace_backward": inplace}  # rows' gradients below float16's smallest

    def run(s: Tensor, backend: str = backend) -> Tensor:
        value: Tensor = ours(s.clone(), x, "forward_kl", 0.5, mapped, labelled, backend=backend, **more)
        return 65536.0 * value

    found = outcome(run, x["student"])
    x = {name: y.double() if y.is_floating_point() else y for name, y in x.items()}
    truth = outcome(lambda s: run(s, "reference"), x["student"])
    assert error(found.gradients[0], truth.gradients[0]) <= SLACK[torch.float16]


def test_opcheck() -> None:
    x = draw()
    constants = pack((0, 0.5, 2.0, 2.0, 4.0), (1.0, 0.0, 1.0, 0.0))
    labels = x["labels"].clamp(min=0)
    arguments = (
        x["student"].requires_grad_(),
        x["teacher"],
        x["weight"],
        labels,
        x["weight"],
        x["vocab_map"],
        constants,
    )
    torch.library.opcheck(logit_rows.op, (*arguments, True, "auto", ""))
    for rounded in (True, False):
        torch.library.opcheck(logit_total.op, (*arguments, False, "auto", "", [True], rounded))
    torch.library.opcheck(logit_rows_overwrite_, (x["student"].detach().clone(), *arguments[1:], True, "auto", ""))


Z = torch.zeros(3, 5)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"label_weight": 0.5}, ValueError, "label_weight is 0.5 without labels"),
    ({"labels": torch.zeros(3).long(), "label_weight": 1.5}, ValueError, "label_weight is 1.5, expected 0 to 1"),
    ({"labels": torch.zeros(2).long(), "label_weight": 0.5}, ValueError, r"labels has shape \(2,\), expected \(3,\)"),
    ({"labels": torch.zeros(3), "label_weight": 0.5}, TypeError, "labels has dtype torch.float32, expected int64"),
    (
        {"labels": torch.tensor([0, 5, 1]), "label_weight": 0.5},
        ValueError,
        "labels has 5, expected 0 to 4 or ignore_index = -100",
    ),
    (
        {"labels": torch.zeros(3).long(), "label_weight": 0.5, "ignore_index": None},
        TypeError,
        "ignore_index is None, expected an integer",
    ),
    ({"vocab_map": torch.zeros(4).long()}, ValueError, r"vocab_map has shape \(4,\), expected \(5,\)"),
    ({"vocab_map": torch.tensor([0, 1, 2, 3, 5])}, ValueError, "vocab_map has entries from 0 to 5, expected -1"),
    ({"vocab_map": torch.tensor([-2, 1, 2, 3, 4])}, ValueError, "vocab_map has entries from -2 to 4"),
    ({"vocab_map": torch.full((5,), -1)}, ValueError, "vocab_map maps no column"),
    ({"vocab_map": [0, 1, 2, 3, 4]}, TypeError, "vocab_map is list, expected a torch.Tensor"),
]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="entries are checked on a CPU alone")
@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_bad_calls(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"logit_loss: {message}"):
        fd.logit_loss(Z, Z, **options)
    with pytest.raises(kind, match=f"linear_logit_loss: {message}"):
        fd.linear_logit_loss(torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(3, 2), torch.zeros(5, 2), **options)


def test_bad_caps_and_a_teacher_of_other_rows() -> None:
    heads = (torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(3, 2), torch.zeros(5, 2))
    with pytest.raises(ValueError, match="linear_logit_loss: student_softcap is 0.0, expected more than 0"):
        fd.linear_logit_loss(*heads, student_softcap=0.0)
    with pytest.raises(ValueError, match="linear_logit_loss: teacher_logit_scale is -1.0, expected more than 0"):
        fd.linear_logit_loss(*heads, teacher_logit_scale=-1.0)
    with pytest.raises(
        ValueError, match=r"teacher_logits has shape \(2, 6\), expected \(3, V_t\) to match student_logits"
    ):
        fd.logit_loss(Z, torch.zeros(2, 6), vocab_map=torch.arange(5))
