"""What every public loss promises beside its values (tests/support/contract.py has the table): reductions that agree, rows
that do not count and are never read, backward as often as one likes, any strides, one graph under torch.compile, gradcheck,
and torch.library.opcheck of every op that a call reaches."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from conftest import DEVICE
from contract import LOSSES, ROWS, Loss, Options, outcome, runs
from judge import Outcome, judge_exact
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdistil import backends

CASES = [pytest.param(loss, x, id=f"{name}: {n}") for name, loss in LOSSES.items() for n, x in loss.options.items()]
ON = [
    pytest.param(*case.values, backend, id=f"{case.id}, {backend}")
    for case in CASES
    for backend in runs(case.values[0])
]
# What does not depend on the divergence is asked of Triton's interpreter, which takes most of the time, once a loss. Every
# `kind` has loads of its own.
ONCE = [
    x
    for x in ON
    for loss, options, backend in (x.values,)
    if backend != "triton" or "kind" in options or options is next(iter(loss.options.values()))
]
FIRST = [pytest.param(loss, next(iter(loss.options.values())), id=name) for name, loss in LOSSES.items()]
REDUCTIONS = ("mean", "sum", "none")
F32 = torch.float32


@pytest.mark.parametrize(("loss", "options", "backend"), ON)
def test_reductions_agree(loss: Loss, options: Options, backend: str) -> None:
    tensors, more = loss.draw(F32), options | loss.dropped() | {"backend": backend}
    total = outcome(loss, *tensors, reduction="sum", **more)
    rows = outcome(loss, *tensors, reduction="none", **more)
    judge_exact(Outcome(rows.value.sum(), rows.gradients), total, F32)
    with torch.no_grad():
        judge_exact(
            Outcome(loss.function(**tensors[0], **tensors[1], **more, reduction="sum"), ()),
            Outcome(total.value, ()),
            F32,
        )
    for items in (5, torch.tensor(2.5, device=total.value.device)):
        mean = outcome(loss, *tensors, num_items=items, **more)
        factor = items * loss.heads
        judge_exact(Outcome(mean.value * factor, tuple(g * factor for g in mean.gradients)), total, F32)
    if not loss.mask:
        assert not rows.value[more["weight"] == 0].any()
        if "labels" not in tensors[1]:  # whose mean is over rows of its own
            mean, items = outcome(loss, *tensors, **more), more["weight"].sum()
            judge_exact(Outcome(mean.value * items, tuple(g * items for g in mean.gradients)), total, F32)


@pytest.mark.parametrize(("loss", "options", "backend"), ONCE)
def test_rows_that_do_not_count_may_hold_anything(loss: Loss, options: Options, backend: str) -> None:
    inputs, constants = loss.draw(F32)
    for reduction in ("mean", "none"):
        more = options | loss.dropped() | {"backend": backend, "reduction": reduction}
        clean = outcome(loss, inputs, constants, **more)
        found = outcome(loss, loss.spoiled(inputs), loss.spoiled(constants), **more)
        assert torch.equal(found.value, clean.value)
        for (name, x), g, wanted in zip(loss.spoiled(inputs).items(), found.gradients, clean.gradients, strict=True):
            assert torch.equal(g, wanted), name
            assert not g[x.isnan()].any(), name
    nobody = {name: torch.zeros_like(x) for name, x in loss.dropped().items()}
    inputs, constants = ({n: x * torch.nan if n in loss.by_row and x.is_floating_point() else x for n, x in y.items()} for y in (inputs, constants))  # fmt: skip
    none = outcome(loss, inputs, constants, **options, **nobody, backend=backend)
    assert none.value == 0 and not any(g.any() for g in none.gradients)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("loss", "options", "backend"), ONCE)
def test_backward_twice(loss: Loss, options: Options, backend: str, dtype: torch.dtype) -> None:
    """And with any incoming gradient, as if the value had been multiplied; but not of the gradient."""
    inputs, constants = loss.draw(dtype)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    for reduction in ("mean", "none"):
        value = loss.function(**leaves, **constants, **options, reduction=reduction, backend=backend)
        wanted = list(leaves.values())
        ones = torch.ones_like(value)
        first, second, third = (
            torch.autograd.grad(value, wanted, x, retain_graph=True) for x in (ones, ones, 0.37 * ones)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        wide = [{n: x.detach().double() if x.is_floating_point() else x for n, x in y.items()} for y in (leaves, constants)]  # fmt: skip
        exact = outcome(loss, *wide, lambda **x: 0.37 * loss.function(**x), **options, reduction=reduction, backend="reference")  # fmt: skip
        judge_exact(Outcome(0.37 * value.detach(), third), exact, dtype)
        with pytest.raises(RuntimeError, match="_loss: its gradient cannot be differentiated again"):
            torch.autograd.grad(value.sum(), wanted, create_graph=True)


def _shifts(loss: Loss) -> bool:
    return "shift" in signature(loss.function).parameters


def test_losses_with_labels_take_shift() -> None:
    assert all(_shifts(x) for x in LOSSES.values() if "labels" in signature(x.function).parameters)


@pytest.mark.parametrize(("loss", "options"), [x for x in CASES if _shifts(x.values[0])])
def test_shift_is_a_slice(loss: Loss, options: Options) -> None:
    """shift=True on (2, 3, ...) is what two rows of each, with the weights and labels of the tokens behind, are without."""
    inputs, constants = loss.draw(F32)
    weight = torch.arange(1.0, ROWS + 1, device=DEVICE).reshape(2, -1)
    names = {name for name in loss.by_row if name != "labels"}
    wholes, sliced = (
        [
            {n: cut(x.reshape(2, -1, *x.shape[1:])) if n in names else x for n, x in y.items()}
            for y in (inputs, constants)
        ]
        for cut in (lambda x: x, lambda x: x[:, :-1])
    )
    if "labels" in constants:
        labels = constants["labels"].reshape(2, -1)
        wholes[1]["labels"], sliced[1]["labels"] = labels, labels[:, 1:]
    backend = next(x for x in ("cpu", "reference") if x in runs(loss))
    for reduction in ("mean", "none"):
        for given in (weight, None):
            more = options | {"reduction": reduction, "backend": backend}
            found = outcome(loss, *wholes, **more, weight=given, shift=True)
            wanted = outcome(loss, *sliced, **more, weight=None if given is None else given[:, 1:])
            if reduction == "none":
                assert not found.value[:, -1].any()
                found.value = found.value[:, :-1]
            grown = [
                torch.nn.functional.pad(g, (0, 0) * (g.ndim - 2) + (0, 1)) if name in names else g
                for name, g in zip(inputs, wanted.gradients, strict=True)
            ]
            judge_exact(found, Outcome(wanted.value, tuple(grown)), F32)
    bad = {name: x[0, 0] if name in names else x for y in wholes for name, x in y.items()}
    with pytest.raises(ValueError, match="shift came with a single row"):
        loss.function(**bad, **options, shift=True)
    with pytest.raises(TypeError, match="shift is int, expected a bool"):
        loss.function(**wholes[0], **wholes[1], **options, shift=1)


def _misaligned(x: Tensor) -> Tensor:
    """Begins one element behind an aligned address, with a stride between rows, between sentinels."""
    if not x.is_floating_point():
        return x
    memory = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype, device=x.device)
    memory[..., 1 : x.shape[-1] + 1] = x
    return memory[..., 1 : x.shape[-1] + 1]


def _by_columns(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.ndim > 1 else x


@pytest.mark.parametrize("layout", [_misaligned, _by_columns])
@pytest.mark.parametrize(("loss", "options", "backend"), ONCE)
def test_any_strides(loss: Loss, options: Options, backend: str, layout: Any) -> None:
    inputs, constants = loss.draw(F32)
    expected = outcome(loss, inputs, constants, **options, backend=backend)
    strided = {name: layout(x) for name, x in constants.items()}

    def call(**tensors: Any) -> Tensor:
        return loss.function(**{name: layout(x) if name in inputs else x for name, x in tensors.items()})

    judge_exact(outcome(loss, inputs, strided, call, **options, backend=backend), expected, F32)


@pytest.mark.parametrize(
    ("loss", "options", "backend"),
    [
        pytest.param(loss, x, backend, id=f"{name}: {n}, {backend}")
        for name, loss in LOSSES.items()
        for n, x in (loss.options | loss.more).items()
        for backend in runs(loss, *loss.float64)
    ],
)
def test_gradcheck(loss: Loss, options: Options, backend: str) -> None:
    """Every entry of the mean's gradient; of the rows' Jacobian, a product with random vectors on both sides."""
    inputs, constants = loss.draw(torch.float64)
    more = options | loss.dropped() | {"backend": backend}
    for reduction in ("mean", "none"):

        def call(*tensors: Tensor, reduction: str = reduction) -> Tensor:
            return loss.function(**dict(zip(inputs, tensors, strict=True)), **constants, **more, reduction=reduction)

        leaves = [x.requires_grad_() for x in inputs.values()]
        assert torch.autograd.gradcheck(call, leaves, fast_mode=reduction == "none")


class _Calls(TorchFunctionMode):
    """The package's ops that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, list[tuple[Any, Any]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", None) == "fastdistil":
            self.found.setdefault(func, []).append((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("loss", "options"), FIRST)
def test_opcheck(loss: Loss, options: Options) -> None:
    calls = _Calls()
    for reduction in REDUCTIONS:
        inputs, constants = loss.draw(F32)
        with calls:
            loss.function(
                **{name: x.requires_grad_() for name, x in inputs.items()}, **constants, **options, reduction=reduction
            )
    assert calls.found, "no op was called"
    for op, arguments in calls.found.items():
        torch.library.opcheck(op, *arguments[0])


@pytest.mark.parametrize(("loss", "options"), CASES)
def test_one_graph(loss: Loss, options: Options) -> None:
    """And no other one for another number of rows or tokens."""
    inputs, constants = loss.draw(F32)

    def both(**tensors: Any) -> Tensor:
        rows = loss.function(**tensors, reduction="none")
        return rows.mean() + loss.function(**tensors, num_items=torch.tensor(3.0, device=rows.device))

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (7, 9):  # 5, 6 and 11 are sizes of something else, with which torch would take them for one
            mine, more = loss.resized(inputs, count), loss.resized(constants | loss.dropped(), count)
            expected = outcome(loss, mine, more, both, **options)
            judge_exact(outcome(loss, mine, more, compiled, **options), expected, F32)


BAD = [
    ({"reduction": "batchmean"}, "reduction is 'batchmean', expected one of 'mean', 'sum', 'none'"),
    ({"num_items": -1}, "num_items is -1.0, expected at least 0"),
    ({"num_items": 3, "reduction": "sum"}, "num_items came with reduction='sum', expected reduction='mean'"),
    ({"backend": "fast"}, "backend is 'fast', expected 'auto' or one of"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=["reduction", "num_items", "both", "backend"])
@pytest.mark.parametrize(("loss", "options"), FIRST)
def test_bad_calls(loss: Loss, options: Options, change: Options, message: str) -> None:
    """Those of arguments that all losses have; each one's own are in its file."""
    inputs, constants = loss.draw(F32)
    with pytest.raises(ValueError) as raised:
        loss.function(**inputs, **constants, **options, **change)
    assert message in str(raised.value)


def test_every_loss_is_in_the_table() -> None:
    import fastdistil

    functions = {loss.function.__name__ for loss in LOSSES.values()}
    assert {x for x in fastdistil.__all__ if x.endswith("_loss")} <= functions
    assert set(backends()) >= {x for loss in LOSSES.values() for x in loss.backends}
