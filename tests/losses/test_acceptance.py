"""What drafters of speculative decoding are trained with: the acceptance rate, -log of it, the hybrid with the KL, labels
that are the teacher's, and a vocabulary that is a part of the teacher's (docs/losses.md, section 1e)."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import mpmath
import pytest
import torch
from conftest import DEVICE, available
from judge import EXACT_VALUE, SLACK, Outcome, judge_exact
from test_logit import outcome
from torch import Tensor

import fastdistil as fd
from fastdistil.contracts.logit import ACCEPTANCE_LOSSES, LOSSES
from fastdistil.ops import acceptance, row_statistics

BACKENDS = available("reference", "cpu", "triton", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
F32, F64 = torch.float32, torch.float64


def log_alpha(s: Tensor, t: Tensor) -> Tensor:
    return torch.minimum(s.log_softmax(-1), t.log_softmax(-1)).logsumexp(-1)


# ---- the acceptance rate


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 513, 3000])
@pytest.mark.parametrize("backend", available("reference", "cpu", "triton"))
def test_acceptance_kernels(backend: str, columns: int, dtype: torch.dtype) -> None:
    """On padded rows, from e^-300 to 1, with -inf on either side, rows that do not count and rows that are NaN."""
    if backend == "triton" and dtype == F64:
        pytest.skip("Triton's kernels have no float64: the reference serves it there")
    student, teacher = (4 * torch.randn(7, columns + 3, device=DEVICE)[:, :columns].to(dtype) for _ in range(2))
    student[1, 1::2], teacher[2, 1::3] = -torch.inf, -torch.inf
    student[3], teacher[3] = torch.nan, torch.inf
    student[4, 0] += 120
    teacher[4, -1] += 180
    student[5] = teacher[5]
    student[6, -1] = torch.nan
    scale = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 1.0, 1.0], device=DEVICE, dtype=torch.promote_types(dtype, F32))
    temperatures = (2.0, 0.5)
    found = row_statistics.moments(student, teacher, scale, temperatures, backend)
    levels = acceptance.levels(student, teacher, found, found)
    ours = acceptance.log_acceptance(student, teacher, scale, levels, temperatures, backend)
    assert ours[3] == 0 and ours[6].isnan()
    keep = torch.tensor([0, 1, 2, 4, 5], device=DEVICE)
    wanted = log_alpha(student[keep].double() / 2, teacher[keep].double() / 0.5)
    # Of a logarithm: an absolute error is a relative one of alpha.
    assert (ours[keep] - wanted).abs().max() <= SLACK[dtype if dtype == F64 else F32] * wanted.abs().max().clamp(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_acceptance_keeps_its_digits(backend: str) -> None:
    """Where 1 - TVD has none left, near 0 as near 1, and of the tempered distributions."""
    teacher = torch.randn(5, 400, device=DEVICE)
    student = torch.randn(5, 400, device=DEVICE)
    for row, height in enumerate((0.0, 8.0, 16.0, 32.0, 60.0)):
        student[row, 3] += height
        teacher[row, 7] += height
    _, stats = fd.logit_loss(student, teacher, temperature=1.25, return_stats=True, backend=backend)
    truth = log_alpha(student.double() / 1.25, teacher.double() / 1.25).exp()
    assert truth.min() < 1e-15
    assert (stats.acceptance.double() / truth - 1).abs().max() <= EXACT_VALUE
    _, stats = fd.logit_loss(teacher + 1e-3, teacher, return_stats=True, backend=backend)
    assert (stats.acceptance - 1).abs().max() <= SLACK[F32]


# ---- -log(alpha) and the hybrid


def exactly(s: Tensor, t: Tensor, eta: float | None) -> tuple[float, list[float]]:
    """-ln(alpha), or with eta the hybrid, of two rows in 50 digits, and the gradient by the formula of its terms."""
    with mpmath.workdps(50):
        p, q = ([mpmath.exp(mpmath.mpf(x)) for x in row.tolist()] for row in (s, t))
        p, q = ([x / mpmath.fsum(row) for x in row] for row in (p, q))
        alpha = mpmath.fsum(min(u, v) for u, v in zip(p, q, strict=True))
        below = mpmath.fsum(u for u, v in zip(p, q, strict=True) if u < v)
        tvd = [u * (below - (u < v)) for u, v in zip(p, q, strict=True)]
        if eta is None:
            return float(-mpmath.log(alpha)), [float(x / alpha) for x in tvd]
        share = mpmath.exp(-mpmath.mpf(eta) * alpha)
        kl = mpmath.fsum(v * mpmath.log(v / u) for u, v in zip(p, q, strict=True))
        rows = zip(p, q, tvd, strict=True)
        return float(share * kl + (1 - share) * (1 - alpha)), [
            float(share * (u - v) + (1 - share) * g) for u, v, g in rows
        ]


@pytest.mark.parametrize("case", ["near", "usual", "far", "tiny", "below floats"])
@pytest.mark.parametrize("divergence", ACCEPTANCE_LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_at_every_acceptance(backend: str, divergence: str, case: str) -> None:
    """alpha from 1 - 1e-5 down to e^-120, which no float32 holds."""
    teacher = 2 * torch.randn(40, dtype=F64)
    student = 2 * torch.randn(40, dtype=F64)
    if case == "near":
        student = teacher + 1e-5 * torch.randn(40, dtype=F64)
    height = {"far": 20.0, "tiny": 75.0, "below floats": 120.0}.get(case, 0.0)
    student[3] += height
    teacher[7] += height
    student, teacher = student.to(DEVICE, F32)[None], teacher.to(DEVICE, F32)[None]
    found = outcome(
        lambda s: fd.logit_loss(s, teacher, divergence=divergence, reduction="sum", backend=backend), student
    )
    value, gradient = exactly(student[0].double(), teacher[0].double(), None if divergence == "nla" else 3.0)
    truth = Outcome(torch.tensor(value, dtype=F64), (torch.tensor([gradient], dtype=F64),))
    judge_exact(found, truth, F32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_disjoint_supports(backend: str) -> None:
    """alpha is 0: the value is infinite, no gradient is NaN, other rows are as they were."""
    student, teacher = torch.randn(2, 3, 9, device=DEVICE)
    student[1, :4], teacher[1, 4:] = -torch.inf, -torch.inf
    teacher[2] = torch.nan
    found = outcome(lambda s: fd.logit_loss(s, teacher, divergence="nla", reduction="none", backend=backend), student)
    assert found.value[1] == math.inf and found.value[2].isnan() and found.gradients[0][:2].isfinite().all()
    alone = outcome(
        lambda s: fd.logit_loss(s, teacher[:1], divergence="nla", reduction="none", backend=backend), student[:1]
    )
    assert torch.equal(found.value[:1], alone.value) and torch.equal(found.gradients[0][:1], alone.gradients[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("eta", "like"), [(0.0, "forward_kl"), (1e6, "tvd")])
def test_hybrid_at_its_ends(backend: str, eta: float, like: str) -> None:
    student, teacher = torch.randn(2, 5, 60, device=DEVICE)
    options: dict[str, Any] = {"reduction": "sum", "temperature": 2.0, "backend": backend}
    found = outcome(lambda s: fd.logit_loss(s, teacher, divergence="lk_hybrid", eta=eta, **options), student)
    judge_exact(found, outcome(lambda s: fd.logit_loss(s, teacher, divergence=like, **options), student), F32)


# ---- labels that are the teacher's


@pytest.mark.parametrize(("dtype", "label_weight"), [(F32, 0.3), (torch.bfloat16, 1.0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_of_the_teacher(backend: str, dtype: torch.dtype, label_weight: float) -> None:
    """As labels made outside are, ties as torch.argmax has them; rows of weight 0 have none."""
    student, teacher = (3 * torch.randn(2, 6, 30, device=DEVICE)).to(dtype)
    teacher[1, 4] = teacher[1, 9] = 20.0
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 1.0], device=DEVICE)
    teacher[2] = torch.nan
    mapped = torch.randperm(30, device=DEVICE)[:25]
    mapped[3] = -1
    for more in ({}, {"vocab_map": mapped}, {"divergence": "nla"}, {"return_stats": True}):
        s = student[:, :25] if "vocab_map" in more else student
        t = teacher
        if "vocab_map" in more:
            t = teacher[:, mapped.clamp(min=0)].masked_fill(mapped < 0, -torch.inf)
        options: dict[str, Any] = {"label_weight": label_weight, "weight": weight, "backend": backend, **more}

        def run(s: Tensor, labels: Any, options: dict[str, Any] = options) -> Tensor:
            value = fd.logit_loss(s, teacher, labels=labels, **options)
            return value[0] if isinstance(value, tuple) else value

        labels = t.argmax(-1).masked_fill(weight == 0, -100)
        found, wanted = (outcome(lambda x, y=y, run=run: run(x, y), s) for y in ("teacher", labels))
        assert torch.equal(found.value, wanted.value) and torch.equal(found.gradients[0], wanted.gradients[0])


@pytest.mark.parametrize("mapped", [False, True])
def test_labels_of_a_top_k_teacher(mapped: bool) -> None:
    """As given ones: the first of the mapped columns with the largest value, none where nothing is stored."""
    student, teacher = torch.randn(2, 6, 30, device=DEVICE)
    teacher[1, 20] = teacher[1, 9] = 20.0
    values, indices = teacher.log_softmax(-1).topk(4)
    values[2] = -torch.inf
    weight = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0, 1.0], device=DEVICE)
    options: dict[str, Any] = {"label_weight": 0.5, "weight": weight, "reduction": "sum"}
    columns = torch.arange(30, device=DEVICE)
    if mapped:
        columns = torch.randperm(30, device=DEVICE)
        columns[columns == teacher[4].argmax()] = -1
        options["vocab_map"] = columns
    labels = teacher[:, columns.clamp(min=0)].masked_fill(columns < 0, -torch.inf).argmax(-1)
    labels[2] = -100
    hidden, head = torch.randn(6, 5, device=DEVICE), torch.randn(30, 5, device=DEVICE)
    for loss, tensor in ((fd.topk_logit_loss, student), (fd.linear_topk_logit_loss, hidden)):
        rest = (head,) if tensor is hidden else ()

        def run(x: Tensor, y: Any, loss: Any = loss, rest: Any = rest) -> Tensor:
            return loss(x, *rest, values, indices, labels=y, **options)

        found, wanted = (outcome(lambda x, y=y, run=run: run(x, y), tensor) for y in ("teacher", labels))
        assert torch.equal(found.value, wanted.value) and torch.equal(found.gradients[0], wanted.gradients[0])


# ---- a vocabulary that is a part of the teacher's


def draft(dtype: torch.dtype = F32, noise: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student (6, 23), teacher (6, 41) and the map; the teacher of row 0 is sure of an unmapped column, that of row 1 of a
    mapped one, of row 2 nothing is unmapped but -inf, of row 3 everything mapped is far below the rest."""
    vocab_map = torch.randperm(41)[:23]
    teacher = 2 * torch.randn(6, 41, dtype=F64)
    others = torch.ones(41, dtype=torch.bool)
    vocab_map[5] = -1
    others[vocab_map[vocab_map >= 0]] = False
    at = others.nonzero()[:, 0]
    teacher[0, at[2]] += 20
    teacher[1, vocab_map[0]] += 25
    teacher[2, at] = -torch.inf
    teacher[3, at] += 40
    student = teacher[:, vocab_map.clamp(min=0)] + noise * torch.randn(6, 23, dtype=F64)
    return student.to(DEVICE, dtype), teacher.to(DEVICE, dtype), vocab_map.to(DEVICE)


def whole(s: Tensor, t: Tensor, vocab_map: Tensor, divergence: str, beta: float, temperature: float) -> Tensor:
    """docs/losses.md, section 1e, with the unmapped columns one by one."""
    there = vocab_map >= 0
    p = (s[:, there] / temperature).log_softmax(-1)
    q = (t / temperature).log_softmax(-1)
    outside = torch.ones(t.shape[1], dtype=torch.bool, device=t.device)
    outside[vocab_map[there]] = False
    inside = q[:, vocab_map[there]]
    alpha = torch.minimum(p, inside).exp().sum(-1)
    kl = torch.where(inside == -torch.inf, 0.0, inside.exp() * (inside - p)).sum(-1)
    if divergence == "forward_kl":
        return kl
    both = torch.cat((p, torch.full_like(q[:, outside], -torch.inf)), 1), torch.cat((inside, q[:, outside]), 1)
    tvd = 0.5 * (both[0].exp() - both[1].exp()).abs().sum(-1)
    if divergence == "lk_hybrid":
        share = torch.exp(-3 * alpha.detach())
        return share * kl + (1 - share) * tvd
    if divergence == "nla":
        return -torch.minimum(p, inside).logsumexp(-1)

    def part(x: Tensor, y: Tensor) -> Tensor:
        zero = x == -torch.inf  # 0 log 0, without a NaN in its gradient
        return torch.where(zero, 0.0, x.exp() * (x.masked_fill(zero, 0.0) - y.masked_fill(zero, 0.0))).sum(-1)

    def mixed(x: Tensor, y: Tensor) -> Tensor:
        return (beta * x.exp() + (1 - beta) * y.exp()).log()

    p, q = both
    return {
        "reverse_kl": lambda: part(p, q),
        "jsd": lambda: beta * part(q, mixed(q, p)) + (1 - beta) * part(p, mixed(q, p)),
        "skew_kl": lambda: part(q, mixed(q, p)),
        "skew_reverse_kl": lambda: part(p, mixed(p, q)),
        "tvd": lambda: tvd,
    }[divergence]()


@pytest.mark.parametrize("divergence", [d for d in LOSSES if d != "mse"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_draft_vocabulary(backend: str, divergence: str) -> None:
    for dtype in (F32, torch.bfloat16) if backend in ("triton", "cuda") else (F32, F64):
        student, teacher, vocab_map = draft(dtype)
        options: dict[str, Any] = {"divergence": divergence, "beta": 0.3, "vocab_map": vocab_map, "renormalize": False}
        options |= {"temperature": 1.5, "scale_by_t2": False, "reduction": "none", "backend": backend}
        found = outcome(lambda s, t=teacher, o=options: fd.logit_loss(s, t, **o), student)
        truth = outcome(
            lambda s, t=teacher, m=vocab_map: whole(s.double(), t.double(), m, divergence, 0.3, 1.5), student
        )
        assert not found.gradients[0][:, 5].any()
        judge_exact(found, truth, dtype)


def test_forward_kl_of_a_draft_vocabulary_may_be_negative() -> None:
    student, teacher, vocab_map = draft()
    options: dict[str, Any] = {"vocab_map": vocab_map, "renormalize": False, "reduction": "none"}
    value, stats = fd.logit_loss(student, teacher, return_stats=True, **options)
    assert value[0] < 0
    tvd = fd.logit_loss(student, teacher, divergence="tvd", **options)
    torch.testing.assert_close(stats.acceptance, 1 - tvd, rtol=0, atol=SLACK[F32])
    assert stats.agreement[0] == 0 and stats.agreement[3] == 0  # the teacher's own column is none of the student's
    same = fd.logit_loss(student, teacher, vocab_map=vocab_map, reduction="none")
    torch.testing.assert_close(value[2], same[2], rtol=SLACK[F32], atol=0)  # nothing is left out there


@pytest.mark.parametrize("divergence", ["forward_kl", "tvd", "nla", "lk_hybrid"])
@pytest.mark.parametrize("backend", available("reference", "cpu", "triton"))
def test_draft_vocabulary_of_two_heads(backend: str, divergence: str) -> None:
    """As logits are, with labels of the teacher, of which some are no column of the student's, softcaps and biases."""
    hidden, weight, bias = torch.randn(6, 5, dtype=F64), torch.randn(23, 5, dtype=F64), torch.randn(23, dtype=F64)
    teacher, head, level = torch.randn(6, 7, dtype=F64), torch.randn(41, 7, dtype=F64), torch.randn(41, dtype=F64)
    vocab_map = torch.randperm(41, device=DEVICE)[:23]
    # Two rows' most likely columns: one that the student does not have, one that it has.
    teacher[:2] = 2 * torch.eye(7, dtype=F64)[:2]
    none = (~torch.isin(torch.arange(41), vocab_map.cpu())).nonzero()[0, 0]
    head[none], head[vocab_map[0].cpu()] = 6 * torch.eye(7, dtype=F64)[:2]
    level[none] = level[vocab_map[0].cpu()] = 0
    tensors = [x.to(DEVICE, F32) for x in (hidden, weight, bias, teacher, head, level)]
    options: dict[str, Any] = {"divergence": divergence, "vocab_map": vocab_map, "renormalize": False}
    options |= {"labels": "teacher", "label_weight": 0.4, "temperature": 1.5}

    def heads(h: Tensor) -> Tensor:
        _, w, b, t, v, c = tensors
        caps = {"student_softcap": 5.0, "teacher_softcap": 4.0}
        return fd.linear_logit_loss(
            h, w, t, v, student_bias=b, teacher_bias=c, chunk_bytes=1200, backend=backend, **caps, **options
        )

    def logits(h: Tensor) -> Tensor:
        _, w, b, t, v, c = (x.double() for x in tensors)
        z, y = 5 * torch.tanh((h @ w.T + b) / 5), 4 * torch.tanh((t @ v.T + c) / 4)
        top = y.argmax(-1)
        labels = torch.where(vocab_map == top[:, None], torch.arange(23, device=DEVICE), -1).amax(1)
        assert labels[0] < 0 and labels[1] == 0
        plain = whole(z, y, vocab_map, divergence, 0.5, 1.5) * 1.5**2
        entropy = torch.nn.functional.cross_entropy(z, labels, ignore_index=-1, reduction="sum")
        return 0.6 * plain.mean() + 0.4 * entropy / 6  # a row without such a column counts as one

    judge_exact(outcome(heads, tensors[0]), outcome(lambda h: logits(h.double()), tensors[0]), F32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_own_vocabulary_is_exact_near_convergence(backend: str) -> None:
    """Nothing but 1e-3 apart on the mapped columns, and 1e-9 outside of them."""
    student, teacher, vocab_map = draft(noise=1e-3)
    teacher[0], teacher[3] = teacher[4], teacher[5]
    outside = torch.ones(41, dtype=torch.bool, device=DEVICE)
    outside[vocab_map[vocab_map >= 0]] = False
    teacher[:, outside] -= 25
    student[[0, 3]] = student[[4, 5]]
    for divergence in ("forward_kl", "tvd", "nla", "reverse_kl"):
        options: dict[str, Any] = {"divergence": divergence, "vocab_map": vocab_map, "renormalize": False}
        found = outcome(lambda s, o=options: fd.logit_loss(s, teacher, reduction="none", backend=backend, **o), student)
        truth = outcome(lambda s, d=divergence: whole(s.double(), teacher.double(), vocab_map, d, 0.3, 1.0), student)
        judge_exact(found, truth, F32)


_MEMORY = r"""
import os, re, sys, torch
import torch._dynamo  # as an op's first call does
from pathlib import Path
import fastdistil as fd
def peak():  # MiB; unlike ru_maxrss it does not begin with the parent's
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
def run(rows, columns, **options):
    h, w, t, v = (torch.randn(n, 8) for n in (rows, columns, rows, 20_000))
    before = peak()
    options |= {"labels": "teacher", "label_weight": 0.1, "chunk_bytes": 2 << 20, "return_stats": True}
    fd.linear_logit_loss(h.requires_grad_(), w.requires_grad_(), t, v, **options)[0].backward()
    return peak() - before
draft = {"vocab_map": torch.arange(0, 20_000, 4), "renormalize": False}
for columns, name, options in ((20_000, "nla", {}), (5_000, "lk_hybrid", draft)):
    child = os.fork()  # from a process that has only imported
    if child == 0:
        run(32, columns, divergence=name, **options)
        print(run(512, columns, divergence=name, **options), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(name)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_two_heads_never_hold_the_logits() -> None:
    """N 512, V 20,000: 39 MiB of logits of either side, of which a chunk of 2 MiB is there at a time."""
    result = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = [*map(float, result.stdout.split())]
    assert len(found) == 2 and all(x < 39 / 4 for x in found), found


BAD = [
    ({"divergence": "lk_hybrid", "eta": -1.0}, ValueError, "eta is -1.0, expected at least 0"),
    ({"divergence": "lk_hybrid", "eta": "3"}, TypeError, "eta is str, expected a number"),
    ({"labels": "student", "label_weight": 0.5}, ValueError, "labels is 'student', expected one of 'teacher'"),
    ({"labels": "teacher"}, ValueError, "labels came without label_weight"),
    ({"renormalize": False}, ValueError, "renormalize is False without a vocab_map, expected both or neither"),
    ({"renormalize": 0}, TypeError, "renormalize is int, expected a bool"),
    (
        {"renormalize": False, "vocab_map": torch.arange(5), "divergence": "mse"},
        ValueError,
        "renormalize is False with divergence 'mse', expected one of probabilities",
    ),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_bad_calls(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    change = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in change.items()}
    logits, states = torch.randn(2, 5, device=DEVICE), torch.randn(5, 3, device=DEVICE)
    for call in (
        lambda: fd.logit_loss(logits, logits, **change),
        lambda: fd.linear_logit_loss(*[states] * 4, **change),
    ):
        with pytest.raises(kind) as raised:
            call()
        assert message in str(raised.value)


def test_a_top_k_teacher_has_no_acceptance_losses() -> None:
    values, indices = torch.randn(2, 5, device=DEVICE).log_softmax(-1).topk(2)
    for divergence in ACCEPTANCE_LOSSES:
        with pytest.raises(ValueError, match=f"divergence is '{divergence}', expected one of"):
            fd.topk_logit_loss(torch.randn(2, 5, device=DEVICE), values, indices, divergence=divergence)
