"""The implementations of a loss: a name -> a function from the case's tensors to the loss.

eager               the textbook formula, kl_div(log_softmax, log_softmax, log_target=True) for logits, gather and
                    logsumexp for topk
eager_common        kl_div(log_softmax, softmax), as most training scripts write it
eager_upcast        eager after .float(), as careful scripts do with 16-bit logits
compile             torch.compile of eager's formula
fastdistil:<backend>[:inplace][:two_reads]
liger_kl, liger_jsd, orda, fla_kl, linear_cross_entropy   other people's, in peers.py
products            no loss: the matrix products of two heads alone, each one call of the BLAS over all rows and columns
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fastdistil.benchmarks.cases import Case
from fastdistil.benchmarks.peers import PEERS, Loss, peer
from fastdistil.benchmarks.problems import Problem, layers, make, sample, textbook, truth
from fastdistil.benchmarks.work import (
    Clock,
    Errors,
    Implementation,
    Outcome,
    Tensors,
    Unavailable,
    Work,
    backend_of,
    errors,
)
from torch import Tensor

import fastdistil

PASSES = ("forward", "forward_grad", "backward", "both")  # forward: no_grad; forward_grad: with the graph kept
NOISE, NEAR = 1.0, 1e-3  # student = teacher + noise: what is timed, and what near convergence means
# As in the tests, beyond twice the error of the eager formula in the same dtype.
VALUE_SLACK = 5e-6  # float32 sums of 25 million terms, in whatever order
GRADIENT_SLACK = {"float64": 1e-11, "float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3}


class _Output(torch.autograd.Function):
    """Makes a buffer what inplace_backward expects: a tensor that some operation computed, neither leaf nor view."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, buffer: Tensor) -> Tensor:
        ctx.mark_dirty(buffer)
        return buffer

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[None, None]:
        return None, None


@dataclass
class LossImplementation(Implementation):
    """A loss and its inputs; `inplace`: the gradient overwrites the student's tensors, which are then its own."""

    name: str
    loss: Loss
    problem: Problem
    inplace: bool = False

    def __post_init__(self) -> None:
        wanted = {name: self.problem.tensors[name] for name in self.problem.wanted}
        self.buffers: Tensors = {name: x.clone() for name, x in wanted.items()} if self.inplace else {}
        self.leaves: Tensors = {} if self.inplace else {n: x.detach().requires_grad_() for n, x in wanted.items()}
        self.inputs: Tensors = {}

    def prepare(self) -> None:
        """Fresh inputs for one forward and backward; never timed."""
        fresh = dict(self.leaves)
        for name, buffer in self.buffers.items():
            buffer.copy_(self.problem.tensors[name])
            handle = torch.zeros((), device=buffer.device, requires_grad=True)
            alias = torch.empty(0, dtype=buffer.dtype, device=buffer.device).set_(buffer)  # type: ignore[call-overload]
            fresh[name] = _Output.apply(handle, alias)
        self.inputs = {**self.problem.tensors, **fresh}

    def forward(self) -> Tensor:
        return self.loss(self.inputs)

    def backward(self, value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, [self.inputs[n] for n in self.problem.wanted])

    def run(self) -> tuple[Tensor, ...]:
        return self.backward(self.forward())

    def time_us(self, clock: Clock) -> dict[str, float]:
        """ "backward" and "both" are of the same run as "forward_grad"."""
        self.prepare()
        clock.flush()
        with torch.no_grad():
            start = clock.mark()
            self.forward()
            forward = clock.between_us(start, clock.mark())
        self.prepare()
        clock.flush()
        start = clock.mark()
        value = self.forward()
        middle = clock.mark()
        gradients = self.backward(value)
        end = clock.mark()
        times = (forward, *(clock.between_us(*ends) for ends in ((start, middle), (middle, end), (start, end))))
        del value, gradients  # outside of the timed region: the next run meets memory as fresh as this one
        return dict(zip(PASSES, times, strict=True))

    def outcome(self) -> Outcome:
        """With the gradients of the sampled items."""
        self.prepare()
        value = self.forward()
        found = dict(zip(self.problem.wanted, self.backward(value), strict=True))
        index = sample(self.problem).to(value.device)
        kept = {n: (g if n in self.problem.shared else g[index]).double() for n, g in found.items()}
        return Outcome(value.item(), kept)


class LossWork(Work):
    """A loss whose student is NOISE from its teacher; besides, its errors where the student is NEAR."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device, self.problem = case, device, make(case, device, NOISE)
        self.slack = {"value_error": VALUE_SLACK, "gradient_error": GRADIENT_SLACK[case.dtype]}

    def build(self, name: str) -> LossImplementation:
        return build(name, self.case, self.problem)

    def truth(self) -> Outcome:
        return truth(self.case, self.problem)

    def checker(self) -> Callable[[Implementation], Errors]:
        near = make(self.case, self.device, NEAR)
        true, near_true = self.truth(), truth(self.case, near)

        def check(implementation: Implementation) -> Errors:
            assert isinstance(implementation, LossImplementation)
            if implementation.name == "products":  # no loss, so nothing to be right about
                implementation.prepare()
                implementation.run()
                return {}
            found = errors(implementation.outcome(), true)
            at_near = errors(replace(implementation, problem=near).outcome(), near_true)
            return found | {f"near_{name}": x for name, x in at_near.items()} | {"near_noise": NEAR}

        return check


def build(name: str, case: Case, problem: Problem) -> LossImplementation:
    """Raises Unavailable where `name` cannot run on the problem's device."""
    device = next(iter(problem.tensors.values())).device
    if name == "eager":
        return LossImplementation(name, textbook(case), problem)
    if name == "compile":
        return LossImplementation(name, _compiled(case), problem)
    if name == "eager_upcast":
        formula = textbook(case)
        return LossImplementation(name, lambda x: formula({n: v.float() for n, v in x.items()}), problem)
    if name == "eager_common":
        return LossImplementation(name, _common(case), problem)
    if name == "products":
        return LossImplementation(name, _products(case), problem)
    if name in PEERS:
        return LossImplementation(name, peer(name, case, device), problem)
    backend, rest = backend_of(name, device.type), name.split(":")[2:]
    inplace, loss = "inplace" in rest, _fastdistil(case, backend, "inplace" in rest)
    return LossImplementation(name, _two_reads(loss) if "two_reads" in rest else loss, problem, inplace)


def _compiled(case: Case) -> Loss:
    torch._dynamo.reset()
    compiled: Loss = torch.compile(textbook(case), dynamic=False)
    return compiled


def _common(case: Case) -> Loss:
    if case.op != "logits" or case.options["divergence"] != "forward_kl":
        raise Unavailable("this form is for the forward KL of logits alone")
    temperature = case.options["temperature"]

    def loss(x: Tensors) -> Tensor:
        p, q = F.log_softmax(x["student"] / temperature, -1), F.softmax(x["teacher"] / temperature, -1)
        found: Tensor = F.kl_div(p, q, reduction="batchmean") * temperature**2
        return found

    return loss


def _two_reads(loss: Loss) -> Loss:
    """The CUDA kernel that reads each logit twice, also where a cluster of blocks could hold the row."""

    def run(x: Tensors) -> Tensor:
        fastdistil._C.use_cuda_cluster(0)
        try:
            return loss(x)
        finally:
            fastdistil._C.use_cuda_cluster(-1)

    return run


def _fastdistil(case: Case, backend: str, inplace: bool) -> Loss:
    if case.op == "logits":
        logit: Any = partial(fastdistil.logit_loss, **case.options, inplace_backward=inplace, backend=backend)
        return lambda x: logit(x["student"], x["teacher"])
    if case.op == "topk":
        topk: Any = partial(fastdistil.topk_logit_loss, **case.options, backend=backend)
        return lambda x: topk(x["student"], x["values"], x["indices"])
    if case.op == "attention":
        attention = partial(fastdistil.attention_loss, kind=case.options["kind"], backend=backend)
        return lambda x: attention(x["student_q"], x["student_k"], x["teacher_q"], x["teacher_k"])

    if case.op == "linear":
        options = {key: value for key, value in case.options.items() if key != "frozen"}
        linear: Any = partial(fastdistil.linear_logit_loss, **options, backend=backend)
        return lambda x: linear(*(x[f"{w}_{part}"] for w in ("student", "teacher") for part in ("hidden", "weight")))

    def hidden(x: Tensors) -> Tensor:
        projection = layers(x, "projection") or None
        kind = case.options["kind"]
        return fastdistil.hidden_loss(
            layers(x, "student"), layers(x, "teacher"), kind=kind, projection=projection, backend=backend
        )

    return hidden


def _products(case: Case) -> Loss:
    """Forward products in the forward pass, products back in the backward pass, out of the student's logits."""
    if case.options["divergence"] == "mse":
        raise Unavailable("the mse of two heads needs none of these products")
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    loss: Loss = lambda x: _Products.apply(*(x[name] for name in names))  # noqa: E731
    return loss


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        ctx.save_for_backward(hidden, weight, logits)
        return logits[0, 0] + (teacher_hidden @ teacher_weight.T)[0, 0]

    @staticmethod
    def backward(ctx: Any, *dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, logits = ctx.saved_tensors
        return logits @ weight, logits.T @ hidden, None, None
