"""Sparse fine-tuning: choosing the entries, a step on them, and whole training steps.

select  topk                     torch.topk on the concatenation of every |change|
        composable               composable-sft's way: every |change| into a Python list, numpy.partition, then a mask
                                 per tensor; measured on a tenth of each tensor, its time multiplied by ten
step    fused                    torch.optim.AdamW(fused=True) on everything
        fused:bool, fused:float  the same behind gradients times a dense mask, as lottery-ticket trainers do it
train   fused:bool               forward, backward and step of a BERT of torch's own layers
all     fastdistil:<backend>     in "train" with ":backward" the step is taken inside of the backward
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from fastdistil.benchmarks.cases import Case
from fastdistil.benchmarks.work import MIB, Errors, Implementation, Outcome, Tensors, Work, backend_of, errors
from torch import Tensor, nn

from fastdistil.sparse import SparseAdamW, SparseMask, random_mask, select_topk

TENTH = 10
DECAY = 0.01  # of the weights in a step; none in training, where AdamW would decay the entries outside of the mask, too
FIRST = "0."  # names of the first layer's tensors
STEPS, TRAINED = 100, 3  # after which a step's and a training step's entries are compared


def work(case: Case, device: str) -> Work:
    kinds: dict[str, Callable[[Case, str], Work]] = {"select": Selection, "step": Steps, "train": Training}
    return kinds[case.options["work"]](case, device)


def bert_shapes(shape: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The 199 tensors of BERT base with its pooler, from V, D, L."""
    d, ffn = shape["D"], 4 * shape["D"]
    found: dict[str, tuple[int, ...]] = {
        "word": (shape["V"], d), "position": (512, d), "type": (2, d), "norm.w": (d,), "norm.b": (d,),
    }  # fmt: skip
    for layer in range(shape["L"]):
        for name in ("q", "k", "v", "o"):
            found |= {f"{layer}.{name}.w": (d, d), f"{layer}.{name}.b": (d,)}
        found |= {f"{layer}.i.w": (ffn, d), f"{layer}.i.b": (ffn,), f"{layer}.f.w": (d, ffn), f"{layer}.f.b": (d,)}
        found |= {f"{layer}.n{i}.{x}": (d,) for i in (1, 2) for x in "wb"}
    return found | {"pooler.w": (d, d), "pooler.b": (d,)}


def models(case: Case, device: str) -> tuple[Tensors, Tensors]:
    """What training made of a base, and the base: changes of very different size from tensor to tensor."""
    generator = torch.Generator(device).manual_seed(0)
    base, tuned = {}, {}
    for i, (name, shape) in enumerate(bert_shapes(case.shape).items()):
        base[name] = torch.randn(shape, device=device, generator=generator).mul_(0.02)
        tuned[name] = torch.randn(shape, device=device, generator=generator).mul_(1e-4 * (1 + i % 7)).add_(base[name])
    return tuned, base


# ---- selection


class Selection(Work):
    """Every choice's changes must add up to the largest ones' sum."""

    slack = {"value_error": 1e-9}  # noqa: RUF012

    def __init__(self, case: Case, device: str) -> None:
        self.density, self.device, self.pair = case.options["density"], device, models(case, device)

    def build(self, name: str) -> Selecting:
        tuned, base = self.pair
        k = round(self.density * _count(base))
        if name == "topk":
            return Selecting(name, tuned, base, k, _topk)
        if name == "composable":
            a, b = ({n: x.reshape(-1)[: -(-x.numel() // TENTH)] for n, x in model.items()} for model in self.pair)
            return Selecting(name, a, b, round(self.density * _count(b)), _composable, _count(base) / _count(b))
        backend = backend_of(name, self.device)
        return Selecting(name, tuned, base, k, lambda x, y, k: select_topk(x, y, k=k, backend=backend))

    def truth(self) -> Outcome:
        return self.build("topk").outcome()

    def checker(self) -> Callable[[Implementation], Errors]:
        """Each against torch.topk on the inputs that it has itself."""
        true = self.truth()

        def check(found: Implementation) -> Errors:
            assert isinstance(found, Selecting)
            part = None if found.scale == 1 else replace(found, choose=_topk).outcome()
            return errors(found.outcome(), part or true)

        return check


def _count(model: Tensors) -> int:
    return sum(x.numel() for x in model.values())


Chosen = Tensor | Mapping[str, Tensor]  # the changes; or, by name, positions or a bool mask


@dataclass
class Selecting(Implementation):
    name: str
    tuned: Tensors
    base: Tensors
    k: int
    choose: Callable[[Tensors, Tensors, int], Chosen]
    scale: float = 1.0

    def run(self) -> Chosen:
        return self.choose(self.tuned, self.base, self.k)

    def outcome(self) -> Outcome:
        """The sum of the chosen changes."""
        chosen = self.run()
        if not isinstance(chosen, Tensor):
            changes = {n: (self.tuned[n] - self.base[n]).abs_().reshape(-1) for n in chosen}
            chosen = torch.cat([changes[n][at if at.dtype == torch.bool else at.long()] for n, at in chosen.items()])
            if self.choose is _composable:  # whatever equals its threshold is in, beyond k
                chosen = chosen.topk(min(self.k, len(chosen))).values
        return Outcome(chosen.double().sum())


def _topk(tuned: Tensors, base: Tensors, k: int) -> Tensor:
    return torch.topk(torch.cat([(tuned[n] - base[n]).abs_().reshape(-1) for n in base]), k, sorted=False).values


def _composable(tuned: Tensors, base: Tensors, k: int) -> Tensors:
    import numpy

    changes: list[float] = []
    for name in base:
        changes.extend((tuned[name] - base[name]).view(-1).abs().tolist())
    threshold = numpy.partition(changes, len(changes) - k)[len(changes) - k]
    return {name: ((tuned[name] - base[name]).abs() >= threshold).view(-1) for name in base}


# ---- a step


class Stepper:
    """What `name` makes of gradients: SparseAdamW, or the fused AdamW behind a mask or none."""

    def __init__(self, name: str, params: dict[str, nn.Parameter], mask: SparseMask, device: str, decay: float) -> None:
        own = list(params.values())
        self.params, self.masks, self.own_bytes = own, list[Tensor](), 0
        self.optimizer: torch.optim.Optimizer
        dtypes = {"fused:bool": torch.bool, "fused:float": torch.float32}
        if name == "fused" or name in dtypes:
            self.optimizer = torch.optim.AdamW(own, fused=True, weight_decay=decay)
            self.masks = [_dense(mask[n], x).to(dtypes[name]) for n, x in params.items() if name in dtypes]
            return
        backend, inside = backend_of(name, device), name.endswith(":backward")
        self.optimizer = SparseAdamW(params, mask, weight_decay=decay, step_in_backward=inside, backend=backend)
        self.own_bytes = sum(index.nbytes for index in mask.values())

    def __call__(self) -> None:
        for param, mask in zip(self.params, self.masks, strict=False):
            if param.grad is not None:
                param.grad.mul_(mask)
        self.optimizer.step()

    def state_mib(self) -> float:
        """Moments and positions."""
        states = (x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
        return (self.own_bytes + sum(x.nbytes for x in states)) / MIB


def _dense(index: Tensor, like: Tensor) -> Tensor:
    found = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    found[index.long()] = True
    return found.view(like.shape)


def _trained(params: Mapping[str, Tensor], mask: SparseMask) -> Outcome:
    """The entries of the mask."""
    return Outcome(torch.cat([params[n].detach().reshape(-1)[index.long()] for n, index in mask.items()]))


def _moved(mask: SparseMask, device: str, names: Iterable[str] = ()) -> SparseMask:
    names = list(names) or list(mask)
    return SparseMask({n: mask[n].to(device) for n in names}, {n: mask.shapes[n] for n in names})


class Steps(Work):
    """After 100 steps the first layer's chosen entries must be dense AdamW's in float64."""

    slack = {"value_error": 1e-5}  # noqa: RUF012

    def __init__(self, case: Case, device: str) -> None:
        self.device = device
        self.values, self.gradients = models(case, device)
        self.mask = _moved(random_mask(self.values, density=case.options["density"]), device)

    def build(self, name: str) -> Stepping:
        return Stepping(name, self.values, self.gradients, self.mask, self.device)

    def truth(self) -> Outcome:
        a, b = ({n: x.double() for n, x in m.items() if n.startswith(FIRST)} for m in (self.values, self.gradients))
        return Stepping("fused", a, b, self.mask, self.device).outcome()


class Stepping(Implementation):
    """Steps with the same gradients again and again; all implementations share the parameters."""

    def __init__(self, name: str, values: Tensors, gradients: Tensors, mask: SparseMask, device: str) -> None:
        self.name, self.gradients, self.mask, self.device = name, gradients, mask, device
        self.params = {n: nn.Parameter(x) for n, x in values.items()}
        self.step: Stepper | None = None

    def prepare(self) -> None:
        for name, param in self.params.items():
            param.grad = self.gradients[name]

    def run(self) -> None:
        if self.step is None:
            self.step = Stepper(self.name, self.params, self.mask, self.device, DECAY)
        self.step()

    def before_peak(self) -> None:
        """Its state is what it needs beyond parameters and gradients, so the first step is measured; torch.optim loads
        100 MiB of code at the first step of a process."""
        self.outcome()
        self.step = None

    def outcome(self) -> Outcome:
        names = [n for n in self.params if n.startswith(FIRST)]
        mask = _moved(self.mask, self.device, names)
        values = {n: self.params[n].detach().clone() for n in names}
        few = Stepping(self.name, values, self.gradients, mask, self.device)
        for number in range(STEPS):
            for name, param in few.params.items():
                param.grad = self.gradients[name] * (1 + number % 5) * (-1) ** number
            few.run()
        return _trained(few.params, mask)

    def fields(self) -> dict[str, float]:
        return {} if self.step is None else {"state_mib": self.step.state_mib()}


# ---- forward, backward and step


class Training(Work):
    """After 3 steps of one batch the chosen entries must be those of masked gradients and AdamW in float64."""

    slack = {"value_error": 1e-5}  # noqa: RUF012

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device

    def build(self, name: str) -> TrainingStep:
        return TrainingStep(name, self.case, self.device)

    def truth(self) -> Outcome:
        return TrainingStep("fused:bool", self.case, self.device, torch.float64).outcome()


class TrainingStep(Implementation):
    def __init__(self, name: str, case: Case, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.name, self.arguments = name, (case, device, dtype)
        s = case.shape
        torch.manual_seed(0)
        heads, ffn = max(1, s["D"] // 64), 4 * s["D"]
        # BERT's gelu: a relu that flips by rounding would make three steps' entries differ by 1e-5.
        layer = nn.TransformerEncoderLayer(s["D"], heads, ffn, dropout=0.0, activation="gelu", batch_first=True)
        stack = nn.TransformerEncoder(layer, s["L"], enable_nested_tensor=False)
        self.model = nn.Sequential(nn.Embedding(s["V"], s["D"]), stack).to(device, dtype)
        self.batch = torch.randint(s["V"], (s["B"], s["S"]), device=device)
        self.target = torch.randn(s["B"], s["S"], s["D"]).to(device, dtype)
        self.mask = _moved(random_mask(self.model, density=case.options["density"]), device)
        self.step = Stepper(name, dict(self.model.named_parameters()), self.mask, device, 0.0)

    def run(self) -> None:
        F.mse_loss(self.model(self.batch), self.target).backward()
        self.step()
        self.model.zero_grad()

    def outcome(self) -> Outcome:
        fresh = TrainingStep(self.name, *self.arguments)
        for _ in range(TRAINED):
            fresh.run()
        return _trained(dict(fresh.model.named_parameters()), fresh.mask)

    def fields(self) -> dict[str, float]:
        return {"state_mib": self.step.state_mib()}
