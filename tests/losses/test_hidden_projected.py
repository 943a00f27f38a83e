"""hidden_loss of lists with projections, which one launch of the rule takes a chunk of rows: against the textbook in
float64, against the layers one by one, and what is launched and multiplied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE, available
from hidden_cases import FACTORS, ROWS, SIZE_T, Launches, apart, arguments_of, draw, parts, together
from judge import judge, judge_exact
from test_hidden import KINDS, outcome, textbook, weights
from torch import Tensor

from fastdistil import hidden_loss
from fastdistil.ops import hidden as hidden_op
from fastdistil.ops import hidden_layers, products
from fastdistil.ops.hidden_layers import hidden_projected_total

if "triton" not in available("triton"):
    pytest.skip("needs triton's interpreter or a GPU", allow_module_level=True)

from fastdistil.kernels.triton import hidden as one_layer
from fastdistil.kernels.triton import hidden_layers as list_kernel

LOW = (torch.bfloat16, torch.float16)


@pytest.fixture
def three_rows_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither ROWS nor what is left of them without the masked one is a multiple."""
    for name in hidden_op.CHUNK_ELEMENTS:
        monkeypatch.setitem(hidden_op.CHUNK_ELEMENTS, name, 3 * len(FACTORS) * SIZE_T + 5)


@pytest.fixture
def low_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's choice of the products' dtype, on a CPU, which has no 16-bit product that returns float32."""

    def low_product(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        assert left.dtype == right.dtype and left.dtype in LOW
        found = left.to(dtype) @ right.to(dtype)
        return found if out is None else out.copy_(found)

    for module in (hidden_op, hidden_layers):
        monkeypatch.setattr(module, "multiplied_in", lambda student, projection, dtype: projection.dtype)
    if DEVICE.type == "cpu":
        for module in (products, hidden_layers):
            monkeypatch.setattr(module, "low_product", low_product)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> tuple[Launches, Launches]:
    """Of lists, and of single layers."""
    both = Launches(list_kernel.hidden_fwd_kernel), Launches(one_layer.hidden_fwd_kernel)
    for module, count in zip((list_kernel, one_layer), both, strict=True):
        monkeypatch.setattr(module, "hidden_fwd_kernel", count)
    return both


def layers_textbook(*inputs: Tensor, teacher: list[Tensor], **options: Any) -> Tensor:
    layers = zip(*parts(inputs), teacher, FACTORS, strict=True)
    return torch.stack([f * textbook(s, p, b, teacher=t, **options) for s, p, b, t, f in layers]).sum()


def judged(inputs: list[Tensor], teachers: list[Tensor], kind: str, dtype: torch.dtype) -> None:
    common: dict[str, Any] = {"kind": kind, "weight": weights(ROWS)}
    factor = 64.0  # keeps float16's gradients in its range
    wide = [x.double() for x in teachers]
    truth = outcome(lambda *x: layers_textbook(*x, teacher=wide, **common), [x.double() for x in inputs], factor)
    eager = outcome(lambda *x: layers_textbook(*x, teacher=teachers, **common), inputs, factor)
    found = outcome(lambda *x: together(*x, teacher=teachers, **common), inputs, factor)
    assert found.value.dtype == torch.float32
    judge(found, truth, eager, dtype)


@pytest.mark.usefixtures("three_rows_a_chunk")
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_against_textbook(kind: str, shared: bool, dtype: torch.dtype) -> None:
    judged(*draw(dtype, shared, (24, 24, 24) if shared else (24, 1, 13)), kind, dtype)


@pytest.mark.usefixtures("three_rows_a_chunk", "low_products")
@pytest.mark.pairs(2, "kind", "shared", "dtype")
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_16_bits(kind: str, shared: bool, dtype: torch.dtype) -> None:
    """As good as eager's, and the same as the layers' one by one."""
    inputs, teachers = draw(dtype, shared)
    judged(inputs, teachers, kind, dtype)
    common: dict[str, Any] = {"kind": kind, "teacher": teachers, "weight": weights(ROWS)}
    expected = outcome(lambda *x: apart(*x, **common), inputs, 64)
    judge_exact(outcome(lambda *x: together(*x, **common), inputs, 64), expected, dtype)


@pytest.mark.usefixtures("three_rows_a_chunk")
@pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("kind", KINDS)
def test_near_convergence(kind: str, noise: float) -> None:
    """Projections that permute the columns, so that the products are exact and the rule alone is judged."""
    size = 40
    teachers = [2 * torch.randn(ROWS, size, device=DEVICE) for _ in FACTORS]
    orders = [torch.randperm(size, device=DEVICE) for _ in FACTORS]
    students = [t[:, order] + noise * torch.randn_like(t) for t, order in zip(teachers, orders, strict=True)]
    projections = [torch.eye(size, device=DEVICE)[order].T.contiguous() for order in orders]
    inputs = [*students, *projections]

    def layers(*inputs: Tensor, backend: str, teacher: list[Tensor]) -> Tensor:
        options: dict[str, Any] = {"kind": kind, "layer_weights": FACTORS, "weight": weights(ROWS), "backend": backend}
        return hidden_loss([*inputs[:3]], teacher, projection=[*inputs[3:]], **options)

    wide = [x.double() for x in teachers]
    truth = outcome(lambda *x: layers(*x, backend="reference", teacher=wide), [x.double() for x in inputs])
    found = outcome(lambda *x: layers(*x, backend="triton", teacher=teachers), inputs)
    judge_exact(found, truth, torch.float32)


@pytest.mark.usefixtures("three_rows_a_chunk")
@pytest.mark.pairs(2, "kind", "reduction", "shared", "masked")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_list_is_its_layers(
    kind: str, reduction: str, shared: bool, masked: bool, launches: tuple[Launches, Launches]
) -> None:
    inputs, teachers = draw(torch.float32, shared)
    options: dict[str, Any] = {"teacher": teachers, "kind": kind, "reduction": reduction}
    options |= {"weight": weights(ROWS)} if masked else {}
    factors = torch.arange(1.0, ROWS + 1, device=DEVICE) if reduction == "none" else torch.ones((), device=DEVICE)
    found = outcome(lambda *x: (together(*x, **options) * factors).sum(), inputs)
    assert not launches[1].grids
    expected = outcome(lambda *x: (apart(*x, **options) * factors).sum(), inputs)
    judge_exact(found, expected, torch.float32)
    assert together(*inputs, **options).shape == ((ROWS,) if reduction == "none" else ())
    torch.testing.assert_close(together(*inputs, **options), apart(*inputs, **options))  # without gradients


@pytest.mark.usefixtures("three_rows_a_chunk")
@pytest.mark.parametrize("masked", [False, True])
def test_launches_and_products(
    masked: bool, launches: tuple[Launches, Launches], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch a chunk of the rows that count, which are looked for once; a product a layer there, two back."""
    inputs, teachers = draw(torch.float32, True)
    products, searches = [], []
    mm, nonzero = torch.mm, Tensor.nonzero
    monkeypatch.setattr(torch, "mm", lambda a, b, **out: products.append(len(a)) or mm(a, b, **out))
    monkeypatch.setattr(Tensor, "nonzero", lambda x: searches.append(len(x)) or nonzero(x))
    weight = weights(ROWS) if masked else None
    together(*(x.requires_grad_() for x in inputs), teacher=teachers, weight=weight).backward()
    last = 1 if masked else 2
    assert launches[0].grids == [(3, 3), (3, 3), (last, 3)]  # rows, layers
    assert launches[1].grids == []
    assert searches == ([ROWS] if masked else [])
    assert products == [3] * 3 * 4 + [last] * 3 * 2


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_shared_parameter_has_one_gradient_rounded_once(dtype: torch.dtype) -> None:
    inputs, teachers = draw(dtype, True)
    wide = outcome(lambda *x: together(*x, teacher=[t.float() for t in teachers]), [x.float() for x in inputs])
    found = outcome(lambda *x: together(*x, teacher=teachers), inputs)
    if DEVICE.type == "cpu":  # the same products
        for g, expected in zip(found.gradients, wide.gradients, strict=True):
            assert torch.equal(g, expected.to(dtype))
    total, gradients = hidden_projected_total.op(*arguments_of(inputs, teachers, shared=True), [True] * 5, False)
    assert [g.dtype for g in gradients] == [torch.float32] * 5 and [g.shape for g in gradients] == [
        x.shape for x in inputs
    ]
    torch.testing.assert_close(total, found.value)


@pytest.mark.usefixtures("three_rows_a_chunk")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_has_weight_0_may_hold_anything(kind: str, reduction: str) -> None:
    """A row of weight 0, and a layer of factor 0."""
    inputs, teachers = draw(torch.float32, True)
    weight = weights(ROWS)
    common: dict[str, Any] = {"kind": kind, "weight": weight, "reduction": reduction, "layer_weights": [0.5, 0, 2]}
    clean = outcome(lambda *x: together(*x, teacher=teachers, **common).sum(), inputs)
    dirty, dirty_teachers = [x.clone() for x in inputs], [x.clone() for x in teachers]
    for student, teacher in zip(dirty, dirty_teachers, strict=False):
        student[1], teacher[1] = torch.nan, torch.inf
    dirty[1][:], dirty_teachers[1][:] = torch.inf, torch.nan
    found = outcome(lambda *x: together(*x, teacher=dirty_teachers, **common).sum(), dirty)
    assert torch.equal(found.value, clean.value)
    for g, expected in zip(found.gradients, clean.gradients, strict=True):
        assert torch.equal(g, expected)
    assert (found.gradients[1] == 0).all() and all((g[1] == 0).all() for g in found.gradients[:3])
    for change in ({"weight": 0 * weight}, {"layer_weights": [0, 0, 0]}):
        none = outcome(lambda *x: together(*x, teacher=dirty_teachers, **(common | change)).sum(), dirty)  # noqa: B023
        assert none.value == 0 and all((g == 0).all() for g in none.gradients)


@pytest.mark.parametrize("change", ["student", "projection", "teacher", "sizes"])
def test_mixed_lists_go_layer_by_layer(change: str, launches: tuple[Launches, Launches]) -> None:
    inputs, teachers = draw(torch.float32, False)
    students, projections, _ = parts(tuple(inputs))
    lists: dict[str, list[Any]] = {"student": students, "teacher": teachers, "projection": projections}
    if change == "sizes":
        lists["projection"][0], lists["teacher"][0] = projections[0][:5], teachers[0][:, :5]
    else:
        lists[change][0] = lists[change][0].bfloat16()
    options: dict[str, Any] = {"backend": "triton", "weight": weights(ROWS)}
    value = hidden_loss(**lists, **options)
    assert launches[0].grids == [] and len(launches[1].grids) == 3
    expected = [hidden_loss(s, t, projection=p, **options) for s, t, p in zip(*lists.values(), strict=True)]
    torch.testing.assert_close(value, torch.stack(expected).mean())


def test_low_students_and_wide_projections_are_one_list(launches: tuple[Launches, Launches]) -> None:
    inputs, teachers = draw(torch.float32, True)
    low = [x.bfloat16() for x in inputs[:3]]
    teachers = [x.half() for x in teachers]
    expected = outcome(lambda *x: apart(*x, teacher=teachers), [*low, *inputs[3:]])
    launches[0].grids.clear()
    found = outcome(lambda *x: together(*x, teacher=teachers), [*low, *inputs[3:]])
    assert launches[0].grids == [(ROWS, 3)]
    judge_exact(found, expected, torch.bfloat16)
    assert [g.dtype for g in found.gradients] == [torch.bfloat16] * 3 + [torch.float32] * 2
