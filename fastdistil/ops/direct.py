"""The short way of a plain eager call around torch's dispatcher, whose way into Python and back costs more than a small
loss: an op's own functions as one torch.autograd.Function. Everything else (torch.compile, torch.export,
modes, functorch, tensor subclasses) sees the op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch, _len_torch_dispatch_stack, _len_torch_function_stack
from torch.nn import Parameter

_PLAIN = (Tensor, Parameter)


class Direct:
    """`op`, called by the short way where that changes nothing.

    run: what the op computes; save(ctx, arguments, output) and backward(ctx, *gradients): its autograd, which gives an
    entry for each argument. The first `tensors` arguments are tensors, None, or (with `lists`) lists of tensors. Of the
    outputs the first `shown` are returned (None: all), and only the first has a gradient.
    """

    def __init__(
        self,
        op: Callable[..., Any],
        name: str,
        run: Callable[..., Any],
        save: Callable[[Any, Sequence[Any], Any], None],
        backward: Callable[..., tuple[Any, ...]],
        tensors: int,
        lists: bool,
        shown: int | None,
    ) -> None:
        def forward(ctx: Any, arguments: Sequence[Any], more: list[Tensor], *_: Any) -> Any:
            # What else comes is for autograd to look at; what goes into `more` it need not know.
            output = run(*arguments)
            save(ctx, arguments, output)
            if isinstance(output, Tensor):
                return output
            more.extend(output[1:shown])
            return output[0]

        def back(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            needs = ctx.needs_input_grad
            ctx.needs_input_grad = _grouped(needs[2:], ctx.counts) if lists else needs[2:]
            try:
                found = backward(ctx, *gradients)[:tensors]
                return None, None, *(_flat(found) if lists else found)
            finally:
                ctx.needs_input_grad = needs

        self.op, self._run, self._tensors, self._lists, self._shown = op, run, tensors, lists, shown
        members = {"forward": staticmethod(forward), "backward": staticmethod(back)}
        self._function: Any = type(name, (torch.autograd.Function,), members)

    def __call__(self, *arguments: Any) -> Any:
        seen: Sequence[Any] = arguments[: self._tensors]
        if self._lists:
            seen = tuple(_flat(seen))
        if not is_plain(seen):
            return self.op(*arguments)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in seen):
            more: list[Tensor] = []
            first = self._function.apply(arguments, more, *seen)
            return first if self._shown is None and not more else (first, *more)
        output = self._run(*arguments)
        return output if self._shown is None else output[: self._shown]


def without_autograd(op: Callable[..., Any], run: Callable[..., Any], tensors: int) -> Callable[..., Any]:
    """`op` inside of a backward: `run` itself where that changes nothing."""

    def call(*arguments: Any) -> Any:
        return (run if is_plain(tuple(_flat(arguments[:tensors]))) else op)(*arguments)

    return call


def is_plain(tensors: Sequence[Any]) -> bool:
    """Whether nothing but autograd looks at operations on these (tensors, or None)."""
    if torch.compiler.is_compiling() or _len_torch_dispatch_stack() or _len_torch_function_stack():
        return False
    if _functorch.peek_interpreter_stack() is not None:
        return False
    return all(x is None or type(x) in _PLAIN for x in tensors)


def _flat(arguments: Sequence[Any]) -> Iterator[Any]:
    for x in arguments:
        if isinstance(x, (list, tuple)):
            yield from x
        else:
            yield x


def _grouped(flags: Sequence[bool], counts: Sequence[int | None]) -> list[Any]:
    each = iter(flags)
    return [next(each) if n is None else [next(each) for _ in range(n)] for n in counts]
