"""Heads whose rows lie on the ranks of a data-parallel group, each of which has tokens of its own (FSDP2).

The loss of a rank needs the whole head, and every rank's gradient belongs into every shard. So the shards are gathered
before the products, and nothing of the head stays until the backward pass, which reduces the gradients of all ranks
into the shards. That sum is divided as fully_shard divides those of the other parameters: by the number of ranks, or
the factor that was set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdistil.ops.direct import Direct
from fastdistil.ops.families import SCALES, multiply_, refuse_double_backward

# Bytes of the gradient that one collective takes: what is needed beyond the gradient and the shard.
REDUCED_BYTES = 64 << 20


@contextmanager
def _all_ranks() -> Iterator[None]:
    """Says of a collective that has failed what it was for: torch names a connection or a timeout."""
    try:
        yield
    except RuntimeError as error:
        error.add_note(
            "fastdistil: a head under fully_shard is gathered, and its gradient reduced, by all of its ranks together. "
            "One of them has ended, or did not call the loss or its backward: each has to, also one without tokens."
        )
        raise


@dataclass(frozen=True)
class Shard:
    """One rank's part of a head's weight (V, D) or bias (V,), as torch.chunk along `dim` gives it; it may be empty."""

    local: Tensor
    shape: torch.Size  # of the whole
    dim: int
    device: torch.device  # where the whole is needed
    group: dist.ProcessGroup | None  # of the ranks that have the other parts, None where there are none
    replicas: dist.ProcessGroup | None  # of the ranks that have this part, too, and tokens of their own
    divisor: float  # of the sum of all ranks' gradients

    @property
    def _ranks(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def _rows(self) -> int:
        """Of a part along `dim`, but for the last ones, which may be shorter."""
        return -(-self.shape[self.dim] // self._ranks)

    def gather(self) -> Tensor:
        """The whole, detached. Every rank has to call."""
        part = self.local.detach().to(self.device).movedim(self.dim, 0)
        if len(part) < self._rows:
            part = torch.cat((part, part.new_zeros(self._rows - len(part), *part.shape[1:])))
        whole = part.new_empty(self._rows * self._ranks, *part.shape[1:])
        if self.group is None:
            whole = part
        else:
            with _all_ranks():
                dist.all_gather_single(whole, part.contiguous(), group=self.group)
        return whole[: self.shape[self.dim]].movedim(0, self.dim).contiguous()

    def reduce(self, gradient: Tensor) -> Tensor:
        """This part of the ranks' gradients of the whole, added up and divided. Every rank has to call."""
        source, ranks, rows = gradient.movedim(self.dim, 0), self._ranks, self._rows
        found = source.new_empty(rows, *source.shape[1:])
        step = max(1, REDUCED_BYTES // (ranks * source[:1].nbytes))
        for start in range(0, rows, step):
            part = found[start : start + step]
            sent = source.new_zeros(ranks, *part.shape)
            for rank in range(ranks):
                of_rank = source[rank * rows + start : min(rank * rows + start + len(part), (rank + 1) * rows)]
                sent[rank, : len(of_rank)] = of_rank
            if self.group is None:
                part.copy_(sent[0])
            else:
                with _all_ranks():
                    dist.reduce_scatter_single(part, sent.flatten(0, 1), group=self.group)
        found /= self.divisor
        if self.replicas is not None:
            with _all_ranks():
                dist.all_reduce(found, group=self.replicas)
        own = found.movedim(0, self.dim).narrow(self.dim, 0, self.local.shape[self.dim])
        return own.to(self.local.device, self.local.dtype).contiguous()


def gather(shards: Iterable[Shard]) -> dict[int, Tensor]:
    """The wholes by their shards' id, each once: both sides of a loss may have one head."""
    return {key: shard.gather() for key, shard in {id(x): x for x in shards}.items()}


class Whole(torch.autograd.Function):
    """A head from its shards, for whoever needs it as a tensor of its own."""

    @staticmethod
    def forward(ctx: Any, shard: Shard, local: Tensor) -> Tensor:
        ctx.shard = shard
        return shard.gather()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, ctx.shard.reduce(gradients[0].contiguous())


@dataclass
class Call:
    """A loss of two ops of `families.family`, of whose tensors the first three may get gradients."""

    rows: Direct
    total: Direct
    names: Sequence[str]  # of the tensors, which come first among the arguments
    arguments: list[Any]
    shards: dict[int, Shard]  # of those arguments that were gathered from them
    wanted: list[bool]
    summed: bool  # whether the rows' sum is returned, or they themselves

    def gathered(self) -> list[Any]:
        shared = gather(self.shards.values())
        return [shared[id(self.shards[i])] if i in self.shards else x for i, x in enumerate(self.arguments)]

    def gradients(self, arguments: list[Any], rounded: bool) -> tuple[list[Any], list[Tensor]]:
        """What `total` returns before the gradients, and them."""
        found = list(self.total.op(*arguments, self.wanted, rounded))
        return found[:-3], found[-3:]


class FromShards(torch.autograd.Function):
    """The value of a call, whose gradients go into the shards. Its inputs are those of the call's first three tensors,
    or the shards of them."""

    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor | None) -> Any:
        ctx.kept = None
        if call.summed:
            found, ctx.kept = call.gradients(call.arguments, False)
        else:
            answer = call.rows(*call.arguments)
            found = [answer] if isinstance(answer, Tensor) else list(answer)
        # Without what was gathered, which is as large as the model's largest matrix.
        count = len(call.names)
        ctx.save_for_backward(*(None if i in call.shards else x for i, x in enumerate(call.arguments[:count])))
        call.arguments[:count] = [None] * count
        ctx.call, ctx.dtypes = call, [None if x is None else x.dtype for x in inputs]
        ctx.mark_non_differentiable(*found[1:])
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *dvalues: Tensor) -> Any:
        call: Call = ctx.call
        refuse_double_backward("a loss of sharded heads")
        gradients, ctx.kept = ctx.kept, None
        if gradients is None:  # of rows, or a second pass through a retained graph
            call.arguments[: len(call.names)] = ctx.saved_tensors
            arguments = call.gathered()
            call.arguments[: len(call.names)] = [None] * len(call.names)
            if not call.summed:
                for i in (call.names.index(x) for x in SCALES if x in call.names):
                    if arguments[i] is not None:
                        arguments[i] = torch.where(arguments[i] == 0, 0.0, arguments[i] * dvalues[0])
            gradients = call.gradients(arguments, False)[1]
        given: list[Tensor | None] = []
        for i, (gradient, want) in enumerate(zip(gradients, call.wanted, strict=True)):
            if want and call.summed:
                multiply_(gradient, dvalues[0])
            if want and i in call.shards:
                gradient = call.shards[i].reduce(gradient)
            given.append(gradient.to(ctx.dtypes[i]) if want else None)
        return None, *given


def run(call: Call) -> Any:
    """The sum or the rows, and with them what else the ops return; differentiable in the first three tensors, or in
    their shards' local parts."""
    if not any(call.wanted):
        return call.rows(*call.arguments)
    inputs = [call.shards[i].local if i in call.shards else call.arguments[i] for i in range(3)]
    found: Any = FromShards.apply(call, *inputs)  # type: ignore[no-untyped-call]
    return found if len(found) > 1 else found[0]
