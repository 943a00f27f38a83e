"""The minimal training loop: one stage of a distillation, from a list of examples to a trained module.

An `Objective` says from a batch alone how many items each of its loss terms runs over. The loop adds up those counts
over all micro-batches and processes of a step before the first backward, and asks for each term's sum divided by its
total (`num_items` of the losses): accumulation and data parallelism then give the gradient of one big batch, however
many tokens each part holds.

Stop it at any moment and call it again: it continues from its newest checkpoint, on the CPU bit for bit.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from fastdistil.checkpoints import Checkpoints
from fastdistil.fingerprint import of_data

Example = TypeVar("Example")
Batch = Mapping[str, Tensor]


class Objective(Protocol):
    """What a stage minimises: an nn.Module that holds the student and whatever else trains with it."""

    def __call__(self, batch: Batch, items: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Each term's weighted sum over the batch, divided by items[name], 0-d, by name; the loss is their sum."""

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        """Number of items of each term in the batch, 0-d, by the same names; needs no forward pass.

        An objective may also have `fingerprint() -> {"teacher": ..., "terms": ...}`, of what JSON holds: a checkpoint
        is refused where they are not those that it was written with.
        """


@dataclass(frozen=True)
class Options:
    """One stage's optimisation. A step is one update from `accumulate` micro-batches of `batch_size` on each process.

    `lr` falls to zero by `schedule` ("cosine", "linear" or "constant") after `warmup` steps of linear rise. Parameters
    of one dimension or less (biases, LayerNorm) get no weight decay. The norm of all gradients is cut to
    `max_grad_norm`, None for none. `precision` is accelerate's mixed_precision.
    """

    steps: int
    lr: float = 1e-3
    batch_size: int = 32
    accumulate: int = 1
    warmup: int = 20
    schedule: str = "cosine"
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    seed: int = 0
    save_every: int = 100
    precision: str = "no"

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "accumulate", "save_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"Options: {field} is {getattr(self, field)}, expected at least 1")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"Options: max_grad_norm is {self.max_grad_norm}, expected more than 0, or None for none")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(f"Options: schedule is {self.schedule!r}, expected 'cosine', 'linear' or 'constant'")

    def lr_factor(self, step: int) -> float:
        """The learning rate of 0-based `step` as a fraction of `lr`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.schedule]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)  # a prime apart: seeds share no epoch
    order: list[int] = torch.randperm(n, generator=generator).tolist()
    return order


def batch_indices(seed: int, n: int, batch_size: int, k: int) -> list[int]:
    """Indices of micro-batch `k` in an endless stream of shuffled epochs over `n` examples.

    A pure function: the data order needs no state in a checkpoint, and nobody can read it from the wrong place.
    """
    positions = range(k * batch_size, (k + 1) * batch_size)
    return [_permutation(seed, position // n, n)[position % n] for position in positions]


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that a step ends and is saved; a second Ctrl-C stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(signum: int, frame: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _fingerprint(objective: Any, data: Sequence[Any], options: Options, processes: int) -> dict[str, Any]:
    """What a run must have in common with the one that it continues."""
    common = {**asdict(options), "examples": len(data), "processes": processes, "data": of_data(data)}
    own = getattr(objective, "fingerprint", dict)
    return common | {"teacher": None, "terms": None} | own()


OptimizerFactory = Callable[[nn.Module, Options], torch.optim.Optimizer]
"""(objective, options) -> the optimizer of its parameters, lr = options.lr; the loop makes and steps the schedule."""


def adamw(module: nn.Module, options: Options) -> torch.optim.Optimizer:
    """AdamW on everything that requires grad, with weight decay for matrices alone: the default optimizer."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.lr)


def _accelerator(options: Options) -> Accelerator:
    """Raises ValueError where several processes were started that would train on their own, into one folder."""
    # Parameters that a step does not reach would make the next step wait for their gradients for ever.
    parallel = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision=options.precision, kwargs_handlers=[parallel])
    world = os.environ.get("WORLD_SIZE") or "1"
    if world != str(accelerator.num_processes):
        raise ValueError(
            f"train: WORLD_SIZE is {world} in the environment, accelerate runs {accelerator.num_processes} process: on "
            "CPUs set ACCELERATE_USE_CPU=true beside torchrun, or start with `accelerate launch`"
        )
    return accelerator


def _name_unreached(module: nn.Module) -> None:
    """Say which parameters got no gradient in a step, as those of a pooler beside losses of layers."""
    names = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    if names:
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        warnings.warn(
            f"train: no term reaches {len(names)} parameters in the first step ({shown}): they stay as they are",
            stacklevel=3,
        )


def _check_in_backward(updates: torch.optim.Optimizer, options: Options, processes: int) -> None:
    """An optimizer that uses up each gradient inside of the backward leaves none for what needs all of them later."""
    if not getattr(updates, "step_in_backward", False):
        return
    if options.max_grad_norm is not None:
        against = f"options has max_grad_norm = {options.max_grad_norm}, expected None"
    elif options.accumulate > 1:
        against = f"options has accumulate = {options.accumulate}, expected 1"
    elif options.precision == "fp16":
        against = "options has precision = 'fp16', which scales gradients, expected 'no' or 'bf16'"
    elif processes > 1:
        against = f"{processes} processes run, whose gradients are not added up before, expected 1"
    else:
        return
    name = type(updates).__name__
    raise ValueError(f"train: optimizer is {name} with step_in_backward=True, which frees each gradient; {against}")


def _step(module: nn.Module, group: list[Batch], counts: list[Mapping[str, Tensor]], accelerator: Accelerator) -> Any:
    """Gradients of one step, added up over the group's micro-batches; returns {term: mean over all processes}."""
    totals = {name: accelerator.reduce(torch.stack([c[name].float() for c in counts]).sum()) for name in counts[0]}
    items = {name: total.clamp(min=1) for name, total in totals.items()}
    logged = {name: torch.zeros((), device=accelerator.device) for name in totals}
    for index, batch in enumerate(group):
        last = index == len(group) - 1
        with nullcontext() if last else accelerator.no_sync(module):  # processes exchange gradients once a step
            terms = module(batch, items)
            # Data parallelism averages gradients over processes; the totals already run over all of them.
            accelerator.backward(torch.stack(list(terms.values())).sum() * accelerator.num_processes)
        for name, value in terms.items():
            logged[name] += value.detach()
    return {name: accelerator.reduce(value) for name, value in logged.items()}


def train(
    objective: nn.Module,
    data: Sequence[Example],
    collate: Callable[[list[Example]], Batch],
    options: Options,
    *,
    optimizer: OptimizerFactory = adamw,
    out: Path | None = None,
    name: str = "train",
) -> list[dict[str, float]]:
    """Train `objective` (an nn.Module that is an `Objective`) in place for one stage.

    `collate` makes a batch from a list of examples. With `out`, checkpoints are kept there and a second call continues
    from the newest one; after the last step it only restores the trained weights. Returns the loss of every step from
    the first: {"step", "lr", one entry a term}.

    Raises ValueError where `data` is empty, nothing trains, `optimizer` steps inside of the backward under options that
    need all gradients, `out` holds a checkpoint of other options, data, terms or another teacher, or processes were
    started of which accelerate knows nothing, and KeyboardInterrupt after Ctrl-C, once the current step is saved. Warns
    of parameters that require grad and get none in the first step.
    """
    if len(data) == 0:
        raise ValueError("train: data is empty")
    if not any(p.requires_grad for p in objective.parameters()):
        raise ValueError("train: objective has no parameter that requires grad")
    accelerator = _accelerator(options)
    updates = optimizer(objective, options)
    _check_in_backward(updates, options, accelerator.num_processes)
    gradients_stay = not getattr(updates, "step_in_backward", False)
    scheduler = LambdaLR(updates, options.lr_factor)
    common = {} if out is None else _fingerprint(objective, data, options, accelerator.num_processes)
    torch.manual_seed(options.seed)  # dropout; after a resume the checkpoint's generators replace it
    module, updates = accelerator.prepare(objective, updates)
    accelerator.register_for_checkpointing(scheduler)
    start, history = 0, list[dict[str, float]]()
    checkpoints = None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(out, accelerator, common)
        start, history = checkpoints.load()
    counted: Any = objective
    module.train()
    bar = tqdm(total=options.steps, initial=start, desc=name, unit="step", disable=None, leave=False)
    with bar, _interrupts() as asked:
        for step in range(start, options.steps):
            first = step * options.accumulate * accelerator.num_processes + accelerator.process_index
            micro = [first + i * accelerator.num_processes for i in range(options.accumulate)]
            picked = [batch_indices(options.seed, len(data), options.batch_size, k) for k in micro]
            group = [send_to_device(collate([data[i] for i in rows]), accelerator.device) for rows in picked]
            losses = _step(module, group, [counted.counts(batch) for batch in group], accelerator)
            if step == start and accelerator.is_main_process and gradients_stay:
                _name_unreached(objective)
            if options.max_grad_norm is not None:
                accelerator.clip_grad_norm_(module.parameters(), options.max_grad_norm)
            record = {"step": float(step), "lr": float(scheduler.get_last_lr()[0])}
            updates.step()
            scheduler.step()
            updates.zero_grad()
            history.append(record | {key: float(value) for key, value in losses.items()})
            bar.update()
            if step % 10 == 0:
                bar.set_postfix({key: f"{history[-1][key]:.4f}" for key in losses})
            stop = asked.is_set()
            if checkpoints and (stop or step + 1 == options.steps or (step + 1) % options.save_every == 0):
                checkpoints.save(step + 1, history)
            if stop:
                saved = f"saved after step {step + 1} in {out}" if checkpoints else "nothing saved"
                raise KeyboardInterrupt(f"{name}: interrupted, {saved}")
    return history
