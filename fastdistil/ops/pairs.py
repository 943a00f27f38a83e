"""Custom ops in pairs, each from one schema: the rows of a loss, and their sum together with the sum's gradients.

    X_rows    tensors, options                   -> rows, or rows and statistics
    X_total   tensors, options, wanted, rounded  -> the rows' sum (), statistics where there are any, and its gradients

The backward of X_rows computes everything again, by X_total, with the incoming gradient as a factor of the rows'
scales. X_total keeps its gradients for the backward, which multiplies them by the incoming one in place: the first
backward needs no memory of its own, a second one through a retained graph computes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistil.ops.gradients import hand_out, refuse_double_backward
from fastdistil.ops.row_statistics import ROW_STATISTICS

SCALES = ("row_scale", "label_scale")  # what the incoming gradient of a row is a factor of


class Pair(NamedTuple):
    rows: Callable[..., Any]
    total: Callable[..., Any]
    overwrite: Callable[..., Any] | None


def _names(schema: str) -> list[str]:
    return [argument.split("=")[0].split()[-1] for argument in schema.split(",")]


def pair(
    name: str,
    function: str,
    tensors: str,
    options: str,
    compute: Callable[..., tuple[Tensor, Tensor | None, Sequence[Tensor | None]]],
    gradients: Sequence[str],
    overwrites: bool = False,
) -> Pair:
    """Registers fastdistil::NAME_rows and fastdistil::NAME_total with their fakes and backwards.

    tensors, options: the arguments in torch's schema language, tensors (also Tensor? and Tensor[]) first; row_scale
    (N,) is one of them. gradients: the names of those tensors that may get one. function: what errors name.

    compute(*tensors, *options, wanted, rounded) -> rows (N,), statistics (N, ROW_STATISTICS) or None (of ops without an
    option `statistics`), and the gradients of the rows' sum, None where not `wanted`: a flag for each tensor of
    `gradients`, those of lists one by one. Their dtype is the input's where `rounded`, else row_scale's; whatever comes
    is brought to it.

    overwrites: also fastdistil::NAME_rows_overwrite_, as NAME_rows, which leaves the gradient of the rows' sum in the
    memory of the first tensor, by compute(..., overwrite=True).
    """
    kinds, taken = [x.split()[0] for x in tensors.split(",")], _names(tensors)
    count, more = len(taken), len(_names(options))
    lists = {i for i, kind in enumerate(kinds) if kind.endswith("[]")}
    wanting, scales = [taken.index(x) for x in gradients], [taken.index(x) for x in SCALES if x in taken]
    row_scale = taken.index("row_scale")
    statistics = count + _names(options).index("statistics") if "statistics" in _names(options) else None
    returned = "Tensor" if statistics is None else "Tensor, Tensor"

    # Most losses have no list among their tensors: what comes for them first saves some 20 us a call.
    def inputs_of(arguments: Sequence[Any]) -> list[Any]:
        if not lists:
            return [arguments[i] for i in wanting]
        return [x for i in wanting for x in (arguments[i] if i in lists else (arguments[i],))]

    def with_statistics(first: Tensor, each: Tensor | None, *rest: Any) -> Any:
        found = (first, *rest) if statistics is None else (first, each, *rest)
        return found if len(found) > 1 else first

    def rows_of(*arguments: Any) -> Any:
        rows, each, _ = compute(*arguments, [False] * len(inputs_of(arguments)), True)
        return with_statistics(rows, each)

    def total_of(*arguments: Any) -> Any:
        wanted, rounded = arguments[-2:]
        rows, each, found = compute(*arguments)
        given = [
            _empty(arguments[row_scale]) if not want else _cast(g, x, arguments[row_scale], rounded)
            for g, x, want in zip(found, inputs_of(arguments), wanted, strict=True)
        ]
        return with_statistics(rows.sum(), each, given)

    def fake_statistics(arguments: Sequence[Any]) -> Tensor | None:
        scale = arguments[row_scale]
        if statistics is None:
            return None
        found: Tensor = scale.new_empty(len(scale) if arguments[statistics] else 0, ROW_STATISTICS)
        return found

    def fake_rows(*arguments: Any) -> Any:
        scale = arguments[row_scale]
        return with_statistics(scale.new_empty(scale.shape), fake_statistics(arguments))

    def fake_total(*arguments: Any) -> Any:
        scale, (wanted, rounded) = arguments[row_scale], arguments[-2:]
        given = [
            scale.new_empty(x.shape, dtype=x.dtype if rounded else scale.dtype) if want else _empty(scale)
            for x, want in zip(inputs_of(arguments), wanted, strict=True)
        ]
        return with_statistics(scale.new_empty(()), fake_statistics(arguments), given)

    def save(ctx: Any, inputs: Sequence[Any]) -> None:
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        if lists:
            ctx.counts = [len(inputs[i]) if i in lists else None for i in range(count)]
            ctx.save_for_backward(*(x for i in range(count) for x in (inputs[i] if i in lists else (inputs[i],))))
        else:
            ctx.save_for_backward(*inputs[:count])
        ctx.options = list(inputs[count : count + more])
        if statistics is not None:
            ctx.options[statistics - count] = False  # a backward needs none

    def saved(ctx: Any) -> list[Any]:
        if not lists:
            return list(ctx.saved_tensors)
        flat = iter(ctx.saved_tensors)
        return [next(flat) if n is None else [next(flat) for _ in range(n)] for n in ctx.counts]

    def placed(ctx: Any, found: Sequence[Tensor | None], extra: int) -> tuple[Any, ...]:
        """One entry for each argument of an op, `extra` of them after the options."""
        if not lists:
            answer: list[Any] = [None] * (count + more + extra)
            for i, g in zip(wanting, found, strict=True):
                answer[i] = g
            return tuple(answer)
        flat, given = iter(found), list[Any]()
        for i, n in enumerate(ctx.counts):
            if i in wanting:
                given.append(next(flat) if n is None else [next(flat) for _ in range(n)])
            else:
                given.append(None if n is None else [None] * n)
        return *given, *[None] * (more + extra)

    def setup_rows(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if statistics is not None:
            ctx.mark_non_differentiable(output[1])
        save(ctx, inputs)

    def backward_rows(ctx: Any, drows: Tensor | None, *_: Any) -> tuple[Any, ...]:
        refuse_double_backward(function)
        tensors = saved(ctx)
        flags = [x for i in wanting for x in (ctx.needs_input_grad[i] if i in lists else (ctx.needs_input_grad[i],))]
        if drows is None:
            return placed(ctx, [None] * len(flags), 0)
        for i in scales:
            if tensors[i] is not None:
                tensors[i] = torch.where(tensors[i] == 0, 0.0, tensors[i] * drows)
        found = total(*tensors, *ctx.options, flags, True)[-1]
        return placed(ctx, [g if want else None for g, want in zip(found, flags, strict=True)], 0)

    def setup_total(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:-1], *output[-1])
        save(ctx, inputs)
        ctx.wanted, ctx.rounded = inputs[-2:]
        ctx.kept = tuple(output[-1])

    def backward_total(ctx: Any, dtotal: Tensor | None, *_: Any) -> tuple[Any, ...]:
        refuse_double_backward(function)
        tensors = saved(ctx)
        if dtotal is None:
            return placed(ctx, [None] * len(ctx.wanted), 2)

        def again() -> tuple[Tensor, ...]:
            return tuple(total(*tensors, *ctx.options, ctx.wanted, ctx.rounded)[-1])

        each = zip(hand_out(ctx, dtotal, again), inputs_of(tensors), ctx.wanted, strict=True)
        return placed(ctx, [g.to(x.dtype) if want else None for g, x, want in each], 2)

    def op(what: str, run: Callable[..., Any], arguments: str, gives: str, writes: tuple[str, ...] = ()) -> Any:
        schema = f"({arguments}) -> ({gives})" if "," in gives else f"({arguments}) -> {gives}"
        return torch.library.custom_op(f"fastdistil::{name}_{what}", run, mutates_args=writes, schema=schema)

    rows = op("rows", rows_of, f"{tensors}, {options}", returned)
    total = op("total", total_of, f"{tensors}, {options}, bool[] wanted, bool rounded", f"{returned}, Tensor[]")
    rows.register_fake(fake_rows)
    total.register_fake(fake_total)
    rows.register_autograd(backward_rows, setup_context=setup_rows)
    total.register_autograd(backward_total, setup_context=setup_total)
    if not overwrites:
        return Pair(rows, total, None)

    def overwrite_of(*arguments: Any) -> Any:
        return with_statistics(*compute(*arguments, [True], True, overwrite=True)[:2])

    written = tensors.replace("Tensor ", "Tensor(a!) ", 1)
    overwrite = op("rows_overwrite_", overwrite_of, f"{written}, {options}", returned, (taken[0],))
    overwrite.register_fake(fake_rows)
    return Pair(rows, total, overwrite)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _cast(gradient: Tensor | None, x: Tensor, row_scale: Tensor, rounded: bool) -> Tensor:
    assert gradient is not None  # it is wanted
    return gradient.to(x.dtype if rounded else row_scale.dtype)
