"""The custom ops of a loss, a family from one schema: its rows, their sum together with the sum's gradients, and rows
whose gradient overwrites the student.

    X_rows             tensors, options                   -> rows
    X_total            tensors, options, wanted, rounded  -> the rows' sum (), and its gradients
    X_rows_overwrite_  tensors, options                   -> rows; the gradient of their sum is in the first tensor

The backward of X_rows computes everything again, by X_total, with the incoming gradient as a factor of the rows'
scales, or begins from the `state` that the forward left, where the loss has one (then by X_back). X_total keeps its
gradients for the backward, which multiplies them by the incoming one in place: the first backward needs no memory of
its own, a second one through a retained graph computes them again.

What a Family holds are the ops by their short way (ops/direct.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistil.backends import backends, get
from fastdistil.backends.memory import new_empty
from fastdistil.ops.direct import Direct, without_autograd
from fastdistil.ops.row_statistics import ROW_STATISTICS

SCALES = ("row_scale", "label_scale")  # what the incoming gradient of a row is a factor of
# Bytes from which on a GPU reading the factor in a kernel of its own, to leave the gradient alone where it is 1, beats
# torch's multiplication: its launch costs the host some 20 us more, in which a GPU moves this much.
SMALLEST_SKIPPED = 32 << 20


class Found(NamedTuple):
    """What a loss computes."""

    rows: Tensor  # (N,), times their scales
    gradients: Sequence[Tensor | None]  # of the rows' sum, None where not wanted
    statistics: Tensor | None = None  # (N, ROW_STATISTICS), or none of them, of a loss with an option `statistics`
    state: tuple[Tensor, ...] = ()


class State(NamedTuple):
    """What a forward leaves of each row, so that a backward need not begin anew; the first input has the gradient."""

    tensors: int
    fake: Callable[..., tuple[Tensor, ...]]  # (*tensors, *options) -> tensors of their shapes, the first of no rows
    # where the forward leaves nothing
    back: Callable[..., None]  # (tensors, options, state, gradient, dloss (N,), keep_unit): writes the gradient times
    # dloss; with keep_unit it holds what a dloss of 1 gives, and a 16-bit one is computed again, rounded once


class Family(NamedTuple):
    rows: Direct
    total: Direct
    overwrite: Callable[..., Any] | None


def family(
    name: str,
    function: str,
    tensors: str,
    options: str,
    compute: Callable[..., Found],
    gradients: Sequence[str],
    state: State | None = None,
    overwrites: bool = False,
) -> Family:
    """Registers fastdistil::NAME_rows and its siblings with their fakes and backwards.

    tensors, options: the arguments in torch's schema language, tensors (also Tensor? and Tensor[]) first; row_scale
    (N,) is one of them. gradients: the names of those tensors that may get one. function: what errors name.

    compute(*tensors, *options, wanted, rounded): `wanted` is a flag for each tensor of `gradients`, those of lists one
    by one. The gradients' dtype is the input's where `rounded`, else row_scale's; whatever comes is brought to it. A
    family that `overwrites` may get overwrite=True: the gradient is then to be written over the first tensor.
    """
    kinds, taken, chosen = [x.split()[0] for x in tensors.split(",")], _names(tensors), _names(options)
    count, more = len(taken), len(chosen)
    lists = {i for i, kind in enumerate(kinds) if kind.endswith("[]")}
    wanting, scales = [taken.index(x) for x in gradients], [taken.index(x) for x in SCALES if x in taken]
    row_scale = taken.index("row_scale")
    statistics = count + chosen.index("statistics") if "statistics" in chosen else None
    before = 1 + (statistics is not None)  # outputs that come before the state
    kept = state.tensors if state else 0

    # Most losses have no list among their tensors: what comes for them first saves some 20 us a call.
    def inputs_of(arguments: Sequence[Any]) -> list[Any]:
        if not lists:
            return [arguments[i] for i in wanting]
        return [x for i in wanting for x in (arguments[i] if i in lists else (arguments[i],))]

    def answer(first: Tensor, each: Tensor | None, *rest: Any) -> Any:
        found = (first, *rest) if statistics is None else (first, each, *rest)
        return found if len(found) > 1 else first

    def rows_of(*arguments: Any) -> Any:
        found = compute(*arguments, [False] * len(inputs_of(arguments)), True)
        return answer(found.rows, found.statistics, *found.state)

    def total_of(*arguments: Any) -> Any:
        wanted, rounded = arguments[-2:]
        found = compute(*arguments)
        scale, inputs = arguments[row_scale], inputs_of(arguments)
        given = [
            scale.new_empty(0) if g is None or not want else g.to(x.dtype if rounded else scale.dtype)
            for g, x, want in zip(found.gradients, inputs, wanted, strict=True)
        ]
        return answer(found.rows.sum(), found.statistics, *found.state, *([given] if lists else given))

    def fake(first: Tensor, arguments: Sequence[Any], *given: Any) -> Any:
        scale, each = arguments[row_scale], None
        if statistics is not None:
            each = scale.new_empty(scale.shape[0] if arguments[statistics] else 0, ROW_STATISTICS)
        return answer(first, each, *(state.fake(*arguments[: count + more]) if state else ()), *given)

    def fake_rows(*arguments: Any) -> Any:
        return fake(torch.empty_like(arguments[row_scale]), arguments)

    def fake_total(*arguments: Any) -> Any:
        scale, (wanted, rounded) = arguments[row_scale], arguments[-2:]
        given = [
            scale.new_empty(x.shape, dtype=x.dtype if rounded else scale.dtype) if want else scale.new_empty(0)
            for x, want in zip(inputs_of(arguments), wanted, strict=True)
        ]
        return fake(scale.new_empty(()), arguments, *([given] if lists else given))

    def save(ctx: Any, inputs: Sequence[Any], left: Sequence[Tensor]) -> None:
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        if lists:
            ctx.counts = [len(inputs[i]) if i in lists else None for i in range(count)]
            ctx.save_for_backward(*(x for i in range(count) for x in (inputs[i] if i in lists else (inputs[i],))))
        else:
            ctx.save_for_backward(*inputs[:count], *left)
        ctx.options = list(inputs[count : count + more])
        if statistics is not None:
            ctx.options[statistics - count] = False  # a backward needs none

    def saved(ctx: Any) -> tuple[list[Any], list[Tensor]]:
        """The tensors, and the state."""
        if not lists:
            flat = ctx.saved_tensors
            return list(flat[:count]), list(flat[count:])
        each = iter(ctx.saved_tensors)
        return [next(each) if n is None else [next(each) for _ in range(n)] for n in ctx.counts], []

    def placed(ctx: Any, found: Sequence[Tensor | None], extra: int) -> tuple[Any, ...]:
        """One entry for each argument of an op, `extra` of them after the options."""
        if not lists:
            entries: list[Any] = [None] * (count + more + extra)
            for i, g in zip(wanting, found, strict=True):
                entries[i] = g
            return tuple(entries)
        flat, given = iter(found), list[Any]()
        for i, n in enumerate(ctx.counts):
            if i in wanting:
                given.append(next(flat) if n is None else [next(flat) for _ in range(n)])
            else:
                given.append(None if n is None else [None] * n)
        return *given, *[None] * (more + extra)

    def setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if before + kept > 1:
            ctx.mark_non_differentiable(*output[1:])
        save_rows(ctx, inputs, output)

    def save_rows(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        save(ctx, inputs, output[before:] if kept else ())

    def backward_rows(ctx: Any, drows: Tensor | None, *_: Any) -> tuple[Any, ...]:
        refuse_double_backward(function)
        inputs, left = saved(ctx)
        flags = [x for i in wanting for x in (ctx.needs_input_grad[i] if i in lists else (ctx.needs_input_grad[i],))]
        if drows is None or not any(flags):
            return placed(ctx, [None] * len(flags), 0)
        if left and left[0].shape[0]:
            return placed(ctx, [back(*inputs, *ctx.options, *left, drows)], 0)
        for i in scales:
            if inputs[i] is not None:
                inputs[i] = torch.where(inputs[i] == 0, 0.0, inputs[i] * drows)
        found = given_of(total_again(*inputs, *ctx.options, flags, True))
        return placed(ctx, [g if want else None for g, want in zip(found, flags, strict=True)], 0)

    def given_of(output: Sequence[Any]) -> Sequence[Tensor]:
        given: Sequence[Tensor] = output[-1] if lists else output[before + kept :]
        return given

    def setup_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        given = given_of(output)
        ctx.mark_non_differentiable(*output[1 : before + kept], *given)
        save_total(ctx, inputs, output)

    def save_total(ctx: Any, inputs: Sequence[Any], output: Sequence[Any]) -> None:
        save(ctx, inputs, output[before : before + kept])
        ctx.wanted, ctx.rounded = inputs[-2:]
        ctx.kept = tuple(given_of(output))

    def backward_total(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple[Any, ...]:
        refuse_double_backward(function)
        if dtotal is None:
            return placed(ctx, [None] * len(ctx.wanted), 2)
        if ctx.rounded and ctx.kept is not None and not _traced(dtotal) and _is_one(dtotal):
            gradients, ctx.kept = ctx.kept, None
            return placed(ctx, [g if want else None for g, want in zip(gradients, ctx.wanted, strict=True)], 2)
        inputs, left = saved(ctx)
        if state is not None and left[0].shape[0] and not _traced(dtotal):
            gradients, ctx.kept = ctx.kept, None
            dloss = dtotal.expand(left[0].shape[0])
            if gradients is None:
                return placed(ctx, [back(*inputs, *ctx.options, *left, dloss)], 2)
            state.back(inputs, ctx.options, left, gradients[0], dloss.contiguous(), True)
            return placed(ctx, gradients, 2)

        def again() -> Sequence[Tensor]:
            return given_of(total_again(*inputs, *ctx.options, ctx.wanted, ctx.rounded))

        each = zip(_hand_out(ctx, dtotal, again), inputs_of(inputs), ctx.wanted, strict=True)
        return placed(ctx, [g.to(x.dtype) if want else None for g, x, want in each], 2)

    def op(what: str, run: Callable[..., Any], arguments: str, gives: list[str], writes: tuple[str, ...] = ()) -> Any:
        schema = f"({arguments}) -> ({', '.join(gives)})" if len(gives) > 1 else f"({arguments}) -> {gives[0]}"
        return torch.library.custom_op(f"fastdistil::{name}_{what}", run, mutates_args=writes, schema=schema)

    arguments, returned = f"{tensors}, {options}", ["Tensor"] * (before + kept)
    all_returned = [*returned, *(["Tensor[]"] if lists else ["Tensor"] * len(wanting))]
    rows_op = op("rows", rows_of, arguments, returned)
    total_op = op("total", total_of, f"{arguments}, bool[] wanted, bool rounded", all_returned)
    rows_op.register_fake(fake_rows)
    total_op.register_fake(fake_total)
    rows_op.register_autograd(backward_rows, setup_context=setup_rows)
    total_op.register_autograd(backward_total, setup_context=setup_total)
    rows = Direct(rows_op, f"{name}_rows", rows_of, save_rows, backward_rows, count, bool(lists), None)
    total_again = without_autograd(total_op, total_of, count)
    total = Direct(total_op, f"{name}_total", total_of, save_total, backward_total, count, bool(lists), before + kept)

    if state is not None:

        def back_of(*arguments: Any) -> Tensor:
            inputs, rest, left = arguments[:count], arguments[count : count + more], arguments[count + more : -1]
            gradient = new_empty(inputs[wanting[0]], inputs[wanting[0]].shape)
            state.back(inputs, rest, left, gradient, arguments[-1].contiguous(), False)
            return gradient

        left = "".join(f", Tensor state_{i}" for i in range(kept))
        back_op = op("back", back_of, f"{arguments}{left}, Tensor dloss", ["Tensor"])
        back_op.register_fake(lambda *arguments: torch.empty_like(arguments[wanting[0]]))
        back = without_autograd(back_op, back_of, count)

    if not overwrites:
        return Family(rows, total, None)

    def overwrite_of(*arguments: Any) -> Any:
        found = compute(*arguments, [True], True, overwrite=True)
        return answer(found.rows, found.statistics)

    def fake_overwrite(*arguments: Any) -> Any:
        found = fake_rows(*arguments)
        return found[:before] if before > 1 else found[0] if kept else found

    written = tensors.replace("Tensor ", "Tensor(a!) ", 1)
    overwrite = op("rows_overwrite_", overwrite_of, f"{written}, {options}", ["Tensor"] * before, (taken[0],))
    overwrite.register_fake(fake_overwrite)
    return Family(rows, total, overwrite)


def _names(schema: str) -> list[str]:
    return [argument.split("=")[0].split()[-1] for argument in schema.split(",")]


def _traced(dloss: Tensor) -> bool:
    return torch.compiler.is_compiling() or type(dloss) is not Tensor  # the latter where AOTAutograd traces by itself


def _is_one(factor: Tensor) -> bool:
    """Whether an incoming gradient, () or (N,), is 1, as most are; on a CPU alone, where looking costs nothing."""
    return factor.device.type == "cpu" and (factor.item() == 1 if factor.ndim == 0 else bool((factor == 1).all()))


def _hand_out(ctx: Any, dloss: Tensor, again: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
    """The kept gradients times `dloss` (), in place: the caller owns what it gets, so a second pass through a retained
    graph computes them `again`. Under torch.compile, which traces this once for all passes, out of place."""
    kept: tuple[Tensor, ...] | None = ctx.kept
    if _traced(dloss):
        assert kept is not None  # never handed out while tracing
        return tuple(g * dloss for g in kept)
    ctx.kept = None
    gradients = again() if kept is None else kept
    for gradient in gradients:
        multiply_(gradient, dloss)
    return gradients


def multiply_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor, () or one per row (N,) of a gradient (N, V), float32; only reads the factor where it is 1."""
    if _is_one(factor):
        return
    on_cpu = gradient.device.type == "cpu"
    fits = gradient.dtype != torch.float64 and (factor.ndim == 1 or gradient.is_contiguous())
    if not on_cpu and fits and gradient.nbytes >= SMALLEST_SKIPPED and backends()["triton"] is True:
        get("scale", "triton", gradient.device).scale_(gradient, factor)
    else:  # a dimension of its own keeps torch from rounding the factor to 16 bits first
        torch.mul(gradient, factor[:, None] if factor.ndim else factor.reshape(1), out=gradient)


def refuse_double_backward(function: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{function}: its gradient cannot be differentiated again (create_graph=True)")


class Overwrite(torch.autograd.Function):
    """An op that leaves the gradient of its rows' sum in `student` and returns the rows (N,) first, as a function.
    Custom ops that write to an input cannot carry autograd themselves."""

    @staticmethod
    def forward(ctx: Any, function: str, op: Callable[..., Any], student: Tensor, *rest: Any) -> Any:
        ctx.function, ctx.gradient, ctx.inputs = function, student.detach(), 3 + len(rest)
        found = op(ctx.gradient, *rest)
        if not isinstance(found, Tensor):
            ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    def backward(ctx: Any, *dloss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward(ctx.function)
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError(
                f"{ctx.function}: a second backward came through inplace_backward=True, expected one: the gradient has "
                "been given away and the logits are gone"
            )
        multiply_(gradient, dloss[0])
        return (None, None, gradient, *(None,) * (ctx.inputs - 3))
