"""hidden_loss against the textbook formulas in float64: every backend, dtype, kind, projection and weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import DEVICE, available
from judge import Outcome, judge, judge_exact
from torch import Tensor
from torch.nn import functional

from fastdistil import hidden_loss
from fastdistil.ops import hidden as hidden_op

BACKENDS = available("reference", "cpu", "triton")
KINDS = ("mse", "cosine", "kl")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# N, D_s, D_t, projected with bias and gelu: odd sizes, more columns than a block, one row, no rows.
SHAPES = {
    "plain": (5, 384, 384, False),
    "wide": (2, 2600, 2600, False),
    "odd": (3, 7, 7, False),
    "no rows": (0, 8, 8, False),
    "projected": (6, 24, 37, True),
}


def textbook(student: Tensor, *rest: Tensor, teacher: Tensor, kind: str, weight: Tensor) -> Tensor:
    """The weighted mean as losses.md defines it, by autograd; rest: projection and bias, with a GELU behind."""
    h = functional.gelu(functional.linear(student, *rest)) if rest else student
    if kind == "mse":
        rows = (h - teacher).square().mean(-1)
    elif kind == "cosine":
        rows = 1 - functional.cosine_similarity(h, teacher, dim=-1)
    else:
        rows = functional.kl_div(h.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return (weight.to(rows.dtype) * rows).sum() / max(1e-30, float(weight.sum()))


def draw(shape: tuple[int, int, int, bool], dtype: torch.dtype, noise: float = 1.0) -> tuple[list[Tensor], Tensor]:
    """student, with projection and bias where there are any, and the teacher."""
    rows, size_s, size_t, projected = shape
    teacher = 2 * torch.randn(rows, size_t, device=DEVICE)
    if not projected:
        return [(teacher + noise * torch.randn_like(teacher)).to(dtype)], teacher.to(dtype)
    parts = (torch.randn(rows, size_s), torch.randn(size_t, size_s) / size_s**0.5, torch.randn(size_t))
    return [x.to(DEVICE, dtype) for x in parts], teacher.to(dtype)


def outcome(function: Callable[..., Tensor], inputs: list[Tensor], factor: float = 1.0) -> Outcome:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    return Outcome(value, torch.autograd.grad(value, inputs, torch.full_like(value, factor)))


def ours(student: Tensor, *rest: Tensor, **options: Any) -> Tensor:
    if rest:
        options |= {"projection": rest[0], "bias": rest[1], "activation": "gelu"}
    return hidden_loss(student, **options)


def weights(rows: int) -> Tensor:
    weight = torch.arange(1.0, rows + 1, device=DEVICE)
    weight[1:2] = 0
    return weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_textbook(backend: str, kind: str, shape: Any, dtype: torch.dtype) -> None:
    inputs, teacher = draw(shape, dtype)
    weight = weights(shape[0])
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match="backend is 'triton', which has no float64 kernel"):
            ours(*inputs, teacher=teacher, backend=backend)
        return
    common: dict[str, Any] = {"kind": kind, "weight": weight}
    factor = 64.0  # keeps float16's gradients in its range
    truth = outcome(partial(textbook, teacher=teacher.double(), **common), [x.double() for x in inputs], factor)
    eager = outcome(partial(textbook, teacher=teacher, **common), inputs, factor)
    found = outcome(partial(ours, teacher=teacher, backend=backend, **common), inputs, factor)
    assert found.value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    judge(found, truth, eager, dtype)


@pytest.mark.parametrize("offset", [0.0, 5.0, -40.3])
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_near_convergence(backend: str, kind: str, noise: float, offset: float) -> None:
    """offset: a constant between student and teacher, which kl does not see."""
    inputs, teacher = draw((4, 384, 384, False), torch.float32, noise)
    inputs = [inputs[0] + offset]
    truth = outcome(
        partial(textbook, teacher=teacher.double(), kind=kind, weight=torch.ones(4, device=DEVICE)),
        [x.double() for x in inputs],
    )
    judge_exact(outcome(partial(ours, teacher=teacher, kind=kind, backend=backend), inputs), truth, torch.float32)


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", available("reference", "cpu"))
def test_computed_states_near_convergence(
    backend: str, kind: str, projected: bool, activation: str, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product and an activation are rounded where they stand. With a product, 40 rows, one of them of weight 0, are
    two chunks, the first far."""
    monkeypatch.setitem(hidden_op.CHUNK_ELEMENTS, "cpu", 32 * 96)
    parts = [torch.randn(40, 64), torch.randn(96, 64) / 8, torch.randn(96)] if projected else [torch.randn(40, 96)]
    inputs, weight = [x.to(DEVICE) for x in parts], weights(40)
    act = functional.gelu if activation == "gelu" else torch.nn.Identity()
    exact = act(functional.linear(*(x.double() for x in inputs)) if projected else inputs[0].double())
    noise_of_row = torch.where(torch.arange(40, device=DEVICE) < 33, 1.0 if projected else noise, noise)[:, None]
    teacher = (exact + noise_of_row * torch.randn_like(exact)).float()
    teacher[1] = float("nan")  # of weight 0

    def plain(*x: Tensor) -> Tensor:
        z = functional.linear(*x) if projected else x[0]
        kept = weight > 0
        return textbook(act(z[kept]), teacher=teacher.double()[kept], kind=kind, weight=weight[kept])

    options: dict[str, Any] = {"teacher": teacher, "kind": kind, "weight": weight, "activation": activation}
    names = ("projection", "bias")[: len(inputs) - 1]

    def found(*x: Tensor) -> Tensor:
        return hidden_loss(x[0], **options, **dict(zip(names, x[1:], strict=True)), backend=backend)

    truth, result = outcome(plain, [x.double() for x in inputs]), outcome(found, inputs)
    judge_exact(result, truth, torch.float32)
    # and of the near rows alone, whose error the far ones' gradients would hide
    near = [Outcome(x.value, (x.gradients[0][33:],)) for x in (result, truth)]
    judge_exact(*near, torch.float32)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_weights_and_layers(backend: str, kind: str, projected: bool) -> None:
    inputs, teacher = draw((6, 12, 12, projected), torch.float32)
    weight = weights(6)
    common: dict[str, Any] = {"teacher": teacher, "kind": kind, "backend": backend, "weight": weight}
    mean = outcome(partial(ours, **common), inputs)
    items = float(weight.sum())
    rows = ours(*inputs, reduction="none", **common)
    assert rows.shape == (6,) and rows[1] == 0
    others = [
        lambda *x: ours(*x, reduction="sum", **common) / items,
        lambda *x: (ours(*x, reduction="none", **common) / items).sum(),
        lambda *x: ours(*x, num_items=torch.tensor(items, device=DEVICE), **common),
        lambda *x: ours(*x, num_items=2 * items, **common) * 2,
        lambda *x: ours(*x, **(common | {"weight": weight.to(torch.int32)})),
    ]
    for other in others:
        judge_exact(outcome(other, inputs), mean, torch.float32)
    layers = lambda s, *rest: ours(  # noqa: E731
        [s.reshape(2, 3, 12), 2 * s.reshape(2, 3, 12)],
        *rest,
        layer_weights=[0.25, 3],
        **(common | {"teacher": [teacher.reshape(2, 3, 12)] * 2, "weight": weight.reshape(2, 3)}),
    )
    apart = lambda s, *rest: 0.25 * ours(s, *rest, **common) + 3 * ours(2 * s, *rest, **common)  # noqa: E731
    judge_exact(outcome(layers, inputs), outcome(apart, inputs), torch.float32)
    both = hidden_loss([inputs[0]] * 2, [teacher] * 2, kind=kind, backend=backend)
    torch.testing.assert_close(both, hidden_loss(inputs[0], teacher, kind=kind, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_of_layers_is_its_layers(backend: str, kind: str, dtype: torch.dtype) -> None:
    """Three layers, which a GPU takes in one launch: dense, with a stride between rows, and misaligned."""
    drawn = [draw((5, 24, 24, False), dtype) for _ in range(3)]
    students, teachers = [x[0][0] for x in drawn], [x[1] for x in drawn]
    common: dict[str, Any] = {"kind": kind, "backend": backend, "weight": weights(5)}
    for layout in (lambda x: x, _odd):
        layers = lambda *x: hidden_loss([*map(layout, x)], [*map(layout, teachers)], layer_weights=[1, 0, 2], **common)  # noqa: B023, E731
        apart = lambda *x: hidden_loss(x[0], teachers[0], **common) + 2 * hidden_loss(x[2], teachers[2], **common)  # noqa: E731
        found = outcome(layers, students)
        inputs = [x.clone().requires_grad_() for x in students]
        value = apart(*inputs)
        first, last = torch.autograd.grad(value, (inputs[0], inputs[2]))
        judge_exact(found, Outcome(value, (first, torch.zeros_like(first), last)), dtype)
    rows = hidden_loss(students, teachers, reduction="none", **common)
    assert rows.shape == (5,) and rows[1] == 0
    with pytest.raises(RuntimeError, match="hidden_loss: its gradient cannot be differentiated again"):
        inputs = [x.clone().requires_grad_() for x in students]
        torch.autograd.grad(hidden_loss(inputs, teachers, **common), inputs, create_graph=True)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_state(backend: str, layers: int) -> None:
    x, y = torch.randn(2, 7, device=DEVICE)
    for reduction in ("mean", "none"):
        value = hidden_loss([x] * layers, [y] * layers, reduction=reduction, backend=backend)
        assert value.shape == ()
        torch.testing.assert_close(value, (x - y).square().mean())


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_vectors_have_cosine_0_and_no_gradient(backend: str) -> None:
    zero, other = torch.zeros(2, 8, device=DEVICE), torch.ones(2, 8, device=DEVICE)
    for student, teacher in ((zero, other), (other, zero), (zero, zero)):
        found = outcome(partial(ours, teacher=teacher, kind="cosine", backend=backend), [student])
        assert found.value == 1 and (found.gradients[0] == 0).all()


def _odd(x: Tensor) -> Tensor:
    """Begins one element behind an aligned address, with a stride between rows, between sentinels."""
    memory = torch.full((x.shape[0], x.shape[1] + 3), torch.nan, dtype=x.dtype, device=x.device)
    view = memory[:, 1 : x.shape[1] + 1]
    view.copy_(x)
    return view


def test_dtypes_may_differ() -> None:
    inputs, teacher = draw((5, 24, 37, True), torch.float32)
    low = [inputs[0].bfloat16(), *inputs[1:]]
    wide = [low[0].float(), *inputs[1:]]
    expected = outcome(partial(ours, teacher=teacher.half().float()), wide)
    found = outcome(partial(ours, teacher=teacher.half()), low)
    assert torch.equal(found.value, expected.value)
    assert found.gradients[0].dtype == torch.bfloat16 and found.gradients[1].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_weight_take_no_part_in_the_products(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, teacher = draw((6, 12, 8, True), torch.float32)
    weight, products = weights(6), []
    kept = int((weight != 0).sum())
    assert 0 < kept < 6

    def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        products.append(len(left))
        return left @ right

    monkeypatch.setattr(hidden_op, "multiplied", product)
    ours(inputs[0].requires_grad_(), *inputs[1:], teacher=teacher, weight=weight, backend=backend).backward()
    assert products == [kept, kept]  # there, and back to the student


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_round_the_products(backend: str) -> None:
    inputs, teacher = draw((6, 24, 37, True), torch.float32)
    expected = outcome(partial(ours, teacher=teacher, backend=backend), inputs)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = outcome(partial(ours, teacher=teacher, backend=backend), inputs)
    assert torch.equal(found.value, expected.value)
    for g, wanted in zip(found.gradients, expected.gradients, strict=True):
        assert torch.equal(g, wanted)
