"""Validation while a stage trains (train.py): when to stop, and the weights that were best."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from torch import Tensor, nn

from fastdistil.batches import Batch, kept_generators
from fastdistil.fingerprint import bare_names

if TYPE_CHECKING:
    from fastdistil.train import Options

Evaluate = Callable[[nn.Module], Mapping[str, float]]
"""(module in evaluation mode) -> figures by name; a figure that cannot be had is nan."""


def mean_losses(objective: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """Each term's mean over held-out batches, by name, and their sum "loss". Each batch is read twice.

    `objective` is an `Objective` of train.py, run as it is: call `eval()` before. `batches` can be gone through again.
    """
    counted: Any = objective
    device = next((p.device for p in objective.parameters()), torch.device("cpu"))
    with torch.no_grad():
        totals: dict[str, Tensor] = {}
        for batch in batches:
            for name, count in counted.counts(batch).items():
                totals[name] = totals.get(name, torch.zeros((), dtype=torch.float64)) + count.double().cpu()
        items = {name: total.clamp(min=1).float().to(device) for name, total in totals.items()}
        sums = dict.fromkeys(totals, 0.0)
        for batch in batches:
            for name, value in objective(send_to_device(batch, device), items).items():
                sums[name] += float(value)
    return {**sums, "loss": math.fsum(sums.values())}


class Validation:
    """What `evaluate` finds of `objective`: the best of `metric`, its weights, and for how many evaluations nothing was
    better. A checkpoint holds all of it (`state_dict`)."""

    def __init__(self, objective: nn.Module, evaluate: Evaluate, accelerator: Accelerator, options: Options) -> None:
        self.objective, self.evaluate, self.accelerator = objective, evaluate, accelerator
        self.metric, self.patience = options.metric, options.patience
        self.sign = 1 if options.greater_is_better else -1
        self.best: float | None = None
        self.best_step, self.waited = 0, 0
        self.weights: dict[str, Tensor] = {}

    @property
    def exhausted(self) -> bool:
        """Whether `patience` evaluations in a row were no better than the best one."""
        return self.patience is not None and self.waited >= self.patience

    def run(self, step: int) -> dict[str, float]:
        """Evaluate after `step` steps: the figures by name, the same on every process. The main one evaluates; torch's,
        NumPy's and Python's generators stay as they were.

        Raises TypeError or ValueError where `evaluate` does not return numbers, or not `metric`.
        """
        found, failure = list[Any]([None]), None
        if self.accelerator.is_main_process:
            modes = [(module, module.training) for module in self.objective.modules()]
            self.objective.eval()
            try:
                with torch.no_grad(), kept_generators():
                    found = [self._figures(self.evaluate(self.objective))]
            except Exception as error:  # the other processes wait for figures
                found, failure = [f"{type(error).__name__}: {error}"], error
            finally:
                for module, training in modes:
                    module.training = training
        broadcast_object_list(found)
        if failure is not None:
            raise failure
        if isinstance(found[0], str):
            raise RuntimeError(f"train: evaluate failed on the main process: {found[0]}")
        figures: dict[str, float] = found[0]
        if self.metric is not None:
            self._compare(step, figures[self.metric])
        return figures

    def _figures(self, found: object) -> dict[str, float]:
        if not isinstance(found, Mapping):
            raise TypeError(f"train: evaluate returned {type(found).__name__}, expected figures by name")
        if self.metric is not None and self.metric not in found:
            raise ValueError(f"train: evaluate returned {list(found)}, expected {self.metric!r} among them, the metric")
        return {str(name): float(value) for name, value in found.items()}

    def _compare(self, step: int, value: float) -> None:
        if not math.isnan(value) and (self.best is None or self.sign * value > self.sign * self.best):
            self.best, self.best_step, self.waited = value, step, 0
            self.weights = {name: x.detach().to("cpu", copy=True) for name, x in self._changing().items()}
        else:
            self.waited += 1

    def _changing(self) -> dict[str, Tensor]:
        """What training changes, by the bare module's names: tied tensors once."""
        kept = self.objective.state_dict(keep_vars=True).keys()
        found: dict[str, Tensor] = {name: p for name, p in self.objective.named_parameters() if p.requires_grad}
        found |= {name: x for name, x in self.objective.named_buffers() if name in kept}
        names = bare_names(found)
        return {names[name]: x for name, x in found.items()}

    def restore(self) -> None:
        """Give the objective its best weights, if any evaluation found some, and warn where they have learned
        nothing."""
        if self.weights:
            with torch.no_grad():
                for name, x in self._changing().items():
                    x.copy_(self.weights[name])
        if self.metric is None or not self.accelerator.is_main_process:
            return
        if self.best is None:
            warnings.warn(f"train: {self.metric} was nan in every evaluation: the last weights stay", stacklevel=3)
        elif self.sign > 0 and self.best <= 0:
            warnings.warn(
                f"train: the best {self.metric} is {self.best:g}: the student has learned nothing that it measures; "
                "try a lower learning rate or more steps",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]
        self.weights = dict(state["weights"])
