"""hidden_loss of lists with projections: what autograd, torch.compile and autocast ask of its ops; strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE, available
from hidden_cases import ROWS, arguments_of, draw, together
from judge import judge_exact
from test_hidden import KINDS, _odd, outcome, weights
from torch import Tensor

from fastdistil.losses import hidden as losses
from fastdistil.ops.hidden_layers import hidden_projected_rows, hidden_projected_total

if "triton" not in available("triton"):
    pytest.skip("needs triton's interpreter or a GPU", allow_module_level=True)


def test_gradients_where_they_are_wanted() -> None:
    inputs, teachers = draw(torch.float32, False)
    expected = outcome(lambda *x: together(*x, teacher=teachers), inputs).gradients
    for wanted in ([0], [4], [8], [1, 3, 5, 7]):
        for reduction in ("mean", "none"):
            some = [x.detach().clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
            value = together(*some, teacher=teachers, reduction=reduction)
            (value.sum() / (ROWS if reduction == "none" else 1)).backward()
            for i, x in enumerate(some):
                assert (x.grad is None) == (i not in wanted)
                if x.grad is not None:
                    torch.testing.assert_close(x.grad, expected[i])


@pytest.mark.parametrize("layout", [_odd, lambda x: x.T.contiguous().T], ids=["odd", "columns"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind: str, masked: bool, layout: Callable[[Tensor], Tensor]) -> None:
    inputs, teachers = draw(torch.float32, True)
    common: dict[str, Any] = {"kind": kind, "weight": weights(ROWS) if masked else None}
    expected = outcome(lambda *x: together(*x, teacher=teachers, **common), inputs)
    mixed = [layout(teachers[0]), *map(layout, teachers[1:])]
    for some in (mixed, [*mixed[:1], *teachers[1:]]):  # one stride, and several
        found = outcome(lambda *x: together(*map(layout, x[:3]), *x[3:], teacher=some, **common), inputs)  # noqa: B023
        judge_exact(found, expected, torch.float32)


def test_no_rows() -> None:
    inputs, teachers = draw(torch.float32, True)
    found = outcome(lambda *x: together(*(s[:0] for s in x[:3]), *x[3:], teacher=[t[:0] for t in teachers]), inputs)
    assert found.value == 0 and all((g == 0).all() for g in found.gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(reduction: str, dtype: torch.dtype) -> None:
    """A second pass, which computes again, rounds as often as the first, which was given its gradients: once."""
    inputs, teachers = draw(dtype, True)
    loss = lambda *x: together(*x, teacher=teachers, weight=weights(ROWS), reduction=reduction).sum()  # noqa: E731
    once, three_times = (outcome(loss, inputs, factor).gradients for factor in (1, 3))
    inputs = [x.requires_grad_() for x in inputs]
    value = loss(*inputs)
    for factor, expected in ((1, once), (1, once), (3, three_times)):
        found = torch.autograd.grad(factor * value, inputs, retain_graph=True)
        for g, wanted in zip(found, expected, strict=True):
            assert torch.equal(g, wanted)
    with pytest.raises(RuntimeError, match="hidden_loss: its gradient cannot be differentiated again"):
        torch.autograd.grad(value, inputs, create_graph=True)


@pytest.mark.parametrize("shared", [False, True])
def test_opcheck(shared: bool) -> None:
    inputs, teachers = draw(torch.float32, shared)
    arguments = arguments_of([x.requires_grad_() for x in inputs], teachers, shared)
    torch.library.opcheck(hidden_projected_rows.op, arguments)
    torch.library.opcheck(hidden_projected_total.op, (*arguments, [True] * len(inputs), False))
    without_bias = (*arguments[:3], [], *arguments[4:6], [-1] * 3, *arguments[7:])
    torch.library.opcheck(
        hidden_projected_total.op, (*without_bias, [False, True, True] + [True] * (1 if shared else 3), True)
    )


@pytest.mark.parametrize("shared", [False, True])
def test_compiles_without_a_graph_break(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "choose", lambda *_: "triton")  # "auto" can be traced, a name that is looked up cannot
    inputs, teachers = draw(torch.float32, shared)
    weight = weights(ROWS)

    def both(*x: Tensor) -> Tensor:
        rows = together(*x, teacher=teachers, kind="cosine", reduction="none")
        return rows.mean() + together(*x, teacher=teachers, weight=weight, num_items=weight.sum())

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    judge_exact(outcome(compiled, inputs), outcome(both, inputs), torch.float32)


def test_autocast_does_not_round_the_products() -> None:
    inputs, teachers = draw(torch.float32, True)
    weight = weights(ROWS)  # autocast leaves products with out= alone, which a list without masked rows has
    expected = outcome(lambda *x: together(*x, teacher=teachers, weight=weight), inputs)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = outcome(lambda *x: together(*x, teacher=teachers, weight=weight), inputs)
    assert torch.equal(found.value, expected.value)
    for g, wanted in zip(found.gradients, expected.gradients, strict=True):
        assert torch.equal(g, wanted)
