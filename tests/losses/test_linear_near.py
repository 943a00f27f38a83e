"""linear_logit_loss of a student that is near its teacher: exact whatever makes it near."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE, available
from judge import EXACT_GRADIENT, EXACT_VALUE, Outcome, error, judge, judge_exact
from torch import Tensor

import fastdistil as fd
from fastdistil.backends import get
from fastdistil.contracts.logit import LOSSES, STATS
from fastdistil.ops import linear_logit
from fastdistil.ops.linear_difference import Form, form_of
from fastdistil.ops.linear_logit import linear_logit_total
from fastdistil.ops.logit_terms import cap_back, cap_difference, chunk_rows, pack

ON_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU is not asked")
ROWS, SIZE, COLUMNS = 20, 32, 700  # two blocks of a head
Heads = dict[str, Tensor]


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(DEVICE)


def draw(kind: str, noise: float, dtype: torch.dtype = torch.float32, columns: int = COLUMNS) -> Heads:
    """The student's three tensors and the teacher's, near each other for the reason that `kind` says."""
    h_t, w_t, b_t = random(ROWS, SIZE), random(columns, SIZE, scale=4 / SIZE**0.5), random(columns)

    def near(x: Tensor) -> Tensor:
        return x * (1 + noise * random(*x.shape))

    h, w, b = near(h_t), w_t, b_t
    if kind == "near heads":
        w, b = near(w), near(b) + 5.0  # a softmax does not see the 5
    elif kind in ("another basis", "other widths"):
        more = SIZE + (kind == "other widths") * 8
        basis = torch.linalg.qr(random(more, SIZE)).Q
        h, w, b = near(h_t @ basis.T), near(w_t @ basis.T), near(b_t) - 30.0
    tensors = {"h": h, "w": w, "b": b, "h_t": h_t, "w_t": w_t, "b_t": b_t}
    found = {name: x.to(dtype, copy=True) for name, x in tensors.items()}
    return found | ({"w_t": found["w"], "b_t": found["b"]} if kind == "one head" else {})


KINDS = {
    "one head": Form.ONE_HEAD, "equal heads": Form.NEAR_HEADS, "near heads": Form.NEAR_HEADS,
    "another basis": Form.FLOAT64, "other widths": Form.FLOAT64,
}  # fmt: skip


def ours(heads: Heads, wanted: str = "hwb", **options: Any) -> Outcome:
    student = {name: heads[name].detach().requires_grad_(name in wanted) for name in "hwb"}
    value = fd.linear_logit_loss(
        student["h"], student["w"], heads["h_t"], heads["w_t"],
        student_bias=student["b"], teacher_bias=heads["b_t"], **options,
    )  # fmt: skip
    gradients = torch.autograd.grad(value.sum(), [student[name] for name in wanted])
    return Outcome(value.detach(), gradients)


def truth(heads: Heads, wanted: str = "hwb", **options: Any) -> Outcome:
    """In float64, where no difference is lost."""
    double = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    return ours({name: x.double() for name, x in heads.items()}, wanted, **(double | {"backend": "reference"}))


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[Form | None]:
    """Those that the calls of a test choose."""
    seen: list[Form | None] = []

    def listening(*args: Any) -> Form | None:
        seen.append(form_of(*args))
        return seen[-1]

    monkeypatch.setattr(linear_logit, "form_of", listening)
    return seen


@ON_CPU
@pytest.mark.parametrize("noise", [1e-2, 1e-4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_exact(backend: str, kind: str, noise: float, forms: list[Form | None]) -> None:
    heads = draw(kind, noise)
    for divergence in LOSSES:
        if divergence != "mse":  # which needs no logits here
            expected = truth(heads, divergence=divergence)
            del forms[:]
            judge_exact(ours(heads, divergence=divergence, backend=backend), expected, torch.float32)
            assert forms == [KINDS[kind]]


@pytest.mark.parametrize("backend", available("triton"))
def test_exact_on_a_gpu(backend: str) -> None:
    """One head costs no look at its numbers."""
    heads = draw("one head", 1e-3, columns=67)
    heads |= {"h": heads["h"][:3], "h_t": heads["h_t"][:3]}
    for divergence in ("forward_kl", "jsd", "nla"):
        judge_exact(
            ours(heads, divergence=divergence, backend=backend), truth(heads, divergence=divergence), torch.float32
        )


VOCAB_MAP = torch.arange(COLUMNS).roll(3)
VOCAB_MAP[[0, 5, 600]] = -1

OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 3.0, "chunk_bytes": 6 * 4 * 2 * 704},
    "logit scale": {"student_logit_scale": 0.5, "teacher_logit_scale": 0.5},
    "softcap": {"student_softcap": 3.0, "teacher_softcap": 3.0, "student_logit_scale": 2.0, "teacher_logit_scale": 2.0},
    "weights": {"weight": torch.arange(ROWS) % 3},
    "vocab_map": {"vocab_map": VOCAB_MAP},
    "vocab_map and softcap": {"vocab_map": VOCAB_MAP, "student_softcap": 5.0, "teacher_softcap": 5.0},
    "labels": {"labels": torch.arange(ROWS), "label_weight": 1e-6},
    "labels, a map": {"labels": torch.arange(ROWS), "label_weight": 1e-6, "vocab_map": VOCAB_MAP},
    "labels and softcap": {"labels": torch.arange(ROWS), "label_weight": 1e-6, "student_softcap": 9.0,
                           "teacher_softcap": 9.0},
    "a row": {"reduction": "none"},
    "nla": {"divergence": "nla", "labels": "teacher", "label_weight": 1e-6, "vocab_map": VOCAB_MAP, "temperature": 2.0},
    "lk_hybrid": {"divergence": "lk_hybrid", "student_softcap": 9.0, "teacher_softcap": 9.0, "reduction": "none"},
    "mse": {"divergence": "mse", "vocab_map": VOCAB_MAP},
}  # fmt: skip


@ON_CPU
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_options_stay_exact(kind: str, options: dict[str, Any]) -> None:
    heads = draw(kind, 1e-3)
    if "vocab_map" in options:
        columns = options["vocab_map"].clamp(min=0)  # the student has the teacher's rows in its own order
        if kind != "one head":
            heads["w"], heads["b"] = heads["w"][columns], heads["b"][columns]
            heads["b"][options["vocab_map"] < 0] += 1.0
        elif options.get("divergence") == "mse":
            return
    if options.get("divergence") == "mse":
        heads["b"] = heads["b_t"][columns] * 1.001
    elif "student_softcap" in options and kind in ("another basis", "other widths"):
        heads["b"] += 30.0  # a softcap sees a constant, too
    judge_exact(ours(heads, **options), truth(heads, **options), torch.float32)


@ON_CPU
@pytest.mark.parametrize("kind", ["one head", "near heads", "other widths"])
def test_statistics(kind: str) -> None:
    heads = draw(kind, 1e-3)
    for options in ({}, {"student_softcap": 9.0, "teacher_softcap": 9.0}, {"vocab_map": VOCAB_MAP}):
        arguments = [(heads["h"], heads["w"], heads["h_t"], heads["w_t"])]
        arguments += [tuple(x.double() for x in arguments[0])]
        (_, found), (_, expected) = (fd.linear_logit_loss(*x, return_stats=True, **options) for x in arguments)
        for name in ("student_entropy", "teacher_entropy", "cross_entropy", "agreement", "acceptance"):
            assert error(getattr(found, name), getattr(expected, name)) <= EXACT_VALUE


@ON_CPU
@pytest.mark.parametrize("wanted", ["h", "w", "b", "hb"])
@pytest.mark.parametrize("kind", ["one head", "near heads", "other widths"])
def test_what_is_frozen_costs_no_digits(kind: str, wanted: str) -> None:
    heads = draw(kind, 1e-3)
    judge_exact(ours(heads, wanted), truth(heads, wanted), torch.float32)


@ON_CPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["one head", "equal heads", "other widths"])
def test_heads_of_16_bits(kind: str, dtype: torch.dtype) -> None:
    """The gradients before their rounding to 16 bits."""
    heads = draw(kind, 2e-2, dtype)
    heads["h_t"] = (
        torch.where(torch.rand(ROWS, SIZE) < 0.9, heads["h"], heads["h_t"]) if kind != "other widths" else heads["h_t"]
    )
    scale, constants = torch.full((ROWS,), 1 / ROWS), pack((0, 0.5, 1.0, 1.0, 1.0), (1.0, 0.0, 1.0, 0.0))
    tensors = [heads[name] for name in ("h", "w", "b", "h_t", "w_t", "b_t")]
    options = (scale, None, None, None, constants, False, 1 << 22, "cpu", True, "", [True, True, True], False)
    value, _, *gradients = linear_logit_total.op(*tensors, *options)
    expected = truth(heads)
    assert error(value, expected.value) <= EXACT_VALUE
    for found, wanted in zip(gradients, expected.gradients, strict=True):
        assert error(found, wanted) <= EXACT_GRADIENT[torch.float32]


@ON_CPU
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_not_near_is_computed_as_before(kind: str, forms: list[Form | None]) -> None:
    heads = draw(kind, 1.0)
    expected, plain = truth(heads), {name: x.clone() for name, x in heads.items()}
    del forms[:]
    found = ours(heads)
    assert forms == [Form.ONE_HEAD if kind == "one head" else None]
    eager = ours(plain, backend="reference")
    judge(found, expected, eager, torch.float32)


@ON_CPU
def test_different_temperatures_or_caps_take_two_products(forms: list[Form | None]) -> None:
    heads = draw("one head", 1e-3)
    for options in ({"teacher_temperature": 2.0}, {"teacher_softcap": 9.0}, {"student_logit_scale": 2.0}):
        expected = truth(heads, **options)
        judge_exact(ours(heads, **options), expected, torch.float32)
    assert not forms


@ON_CPU
def test_a_teacher_that_excludes_a_column_of_the_student() -> None:
    """Its logit is -inf: the student's cannot be told from a difference."""
    heads = draw("one head", 1e-3)
    heads["b_t"] = heads["b"].clone()
    heads["b_t"][3] = -torch.inf
    judge(ours(heads), truth(heads), ours({k: v.clone() for k, v in heads.items()}, backend="reference"), torch.float32)
    both = draw("one head", 1e-3)
    both["b"][3] = -torch.inf  # and the teacher's, which is the same tensor
    judge_exact(ours(both, "hw"), truth(both, "hw"), torch.float32)


@ON_CPU
@pytest.mark.parametrize("kind", ["one head", "near heads"])
def test_a_row_of_nan_is_seen(kind: str) -> None:
    heads = draw(kind, 1e-3)
    heads["h"][2] = torch.nan
    rows = ours(heads, reduction="none").value
    assert rows.isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("apart", [1e-3, 3e3])
@pytest.mark.parametrize("spread", [30.0, 300.0])  # of logits whose cap is 20: the latter are nearly all at it
def test_softcaps_of_a_difference(spread: float, apart: float) -> None:
    y, d = random(50, 40, scale=spread).float(), random(50, 40, scale=apart).float()
    a, b = (x.double().cpu() / 20 for x in (y + d.double(), y))
    expected = 20 * torch.sinh(d.double().cpu() / 20) / (torch.cosh(a) * torch.cosh(b))
    difference, teacher = d.clone(), y.clone()
    own, raw, spare = (torch.empty_like(y) for _ in range(3))
    cap_difference(difference, teacher, own, raw, spare, 1.0, 20.0)
    assert error(difference, expected) <= EXACT_VALUE
    assert error(own, 20 * torch.tanh(a)) <= EXACT_VALUE
    gradient = torch.ones_like(y)
    cap_back(gradient, raw, 2.0, 20.0)
    each = gradient.double().cpu() * torch.cosh(a).square() / 2 - 1
    assert each[a.abs() < 15].abs().max() <= EXACT_VALUE


@ON_CPU
def test_a_difference_has_one_temperature() -> None:
    rows = torch.zeros(2, 8)
    rule = {"divergence": 0, "beta": 0.5, "student_temperature": 1.0, "teacher_temperature": 2.0, "value_factor": 1.0}
    with pytest.raises(ValueError, match="difference: the temperatures differ"):
        get("logit", "cpu", DEVICE).logit_fwd(
            rows, rows, torch.ones(2), torch.empty(2), torch.empty(2, STATS), None, difference=True, **rule
        )


def test_three_buffers_fit_where_two_did() -> None:
    assert chunk_rows(512, 119_547, 4, 124_000_000, 3) == 80


@ON_CPU
def test_compiles_with_one_head() -> None:
    heads = draw("one head", 1e-3)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return fd.linear_logit_loss(h, w, heads["h_t"], w.detach())

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [heads[name].detach().requires_grad_() for name in "hw"]
    (found, expected) = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= EXACT_VALUE
    arguments = (*leaves, None, heads["h_t"], leaves[1].detach(), None, torch.rand(ROWS))
    terms = (None, None, None, pack((0, 0.5, 1.0, 1.0, 1.0), (1.0, 0.0, 1.0, 0.0)), False)
    torch.library.opcheck(
        linear_logit_total.op, (*arguments, *terms, 1 << 20, "auto", True, "", [True, True, False], False)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_without_a_partner_may_hold_anything(value: float, dtype: torch.dtype) -> None:
    """Of either head: they have no gradient, and give none."""
    vocab_map = VOCAB_MAP.clone().to(DEVICE)
    vocab_map[vocab_map == 8] = -1
    for kind in ("near heads", "other widths"):
        heads = draw(kind, 1e-2 if dtype == torch.float32 else 0.5, dtype)
        clean = ours(heads, vocab_map=vocab_map)
        for name in ("w", "b"):
            heads[name][vocab_map < 0] = value
            heads[f"{name}_t"][8] = value  # no column of the student points there
        found = ours(heads, vocab_map=vocab_map)
        judge_exact(found, clean, dtype)
        assert not found.gradients[1][vocab_map < 0].any() and not found.gradients[2][vocab_map < 0].any()


def test_rows_without_a_partner_may_hold_anything_with_few_columns_of_a_teacher() -> None:
    heads = draw("equal heads", 1e-2)
    vocab_map = VOCAB_MAP.to(DEVICE)
    values, indices = torch.log_softmax(random(ROWS, COLUMNS), -1).float().topk(9)

    def loss() -> Outcome:
        leaves = [heads[name].detach().requires_grad_() for name in "hwb"]
        value = fd.linear_topk_logit_loss(*leaves[:2], values, indices, student_bias=leaves[2], vocab_map=vocab_map)
        return Outcome(value.detach(), torch.autograd.grad(value, leaves))

    clean = loss()
    for name in ("w", "b"):
        heads[name][vocab_map < 0] = torch.nan
    judge_exact(loss(), clean, torch.float32)
