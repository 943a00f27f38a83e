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
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, send_to_device
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fastdistil import train_checks as checks
from fastdistil.batches import (
    Batch,
    Batches,
    Example,
    Shuffled,
    batch_indices,
    first_batch,
    generator_of,
    stream,
    tokens_of,
)
from fastdistil.callbacks import Callbacks, Due
from fastdistil.checkpoints import Checkpoints
from fastdistil.launch import check_fsdp
from fastdistil.losses._check import number
from fastdistil.progress import Progress, interrupts
from fastdistil.validation import Evaluate, Validation
from fastdistil.writing import Folder

__all__ = [
    "Batch", "Batches", "Evaluate", "Objective", "OptimizerFactory", "Options", "Shuffled", "adamw", "batch_indices",
    "generator_of", "train",
]  # fmt: skip


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

    `lr` falls to `final_lr` by `schedule` ("cosine", "linear" or "constant") after `warmup` steps of linear rise.
    Parameters of one dimension or less (biases, LayerNorm) get no weight decay. The norm of all gradients is cut to
    `max_grad_norm`, None for none. `precision` is accelerate's mixed_precision.

    Where `train` has an `evaluate`, it is called every `evaluate_every` steps (None: never before the end) and at the
    end. `metric` names which of its figures chooses the weights that stay, the greatest or the least of it; None keeps
    the last weights. After `patience` evaluations in a row that are no better than the best, training stops.
    `log` is "none" or "tensorboard" (into the folder `out`/tensorboard), every `log_every` steps.
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
    final_lr: float = 0.0
    evaluate_every: int | None = None
    metric: str | None = None
    greater_is_better: bool = True
    patience: int | None = None
    log: str = "none"
    log_every: int = 10

    def __post_init__(self) -> None:
        for field in ("steps", "batch_size", "accumulate", "save_every", "log_every", "evaluate_every", "patience"):
            value = getattr(self, field)
            if value is None and field in ("evaluate_every", "patience"):
                continue
            checks.whole_number(field, value)
            if value < 1:
                raise ValueError(f"Options: {field} is {value}, expected at least 1")
        checks.whole_number("warmup", self.warmup)
        for field in ("warmup", "lr", "weight_decay"):
            if not number("Options", field, getattr(self, field)) >= 0:
                raise ValueError(f"Options: {field} is {getattr(self, field)}, expected at least 0")
        if self.precision not in ("no", "bf16", "fp16", "fp8"):
            raise ValueError(f"Options: precision is {self.precision!r}, expected 'no', 'bf16', 'fp16' or 'fp8'")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"Options: max_grad_norm is {self.max_grad_norm}, expected more than 0, or None for none")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(f"Options: schedule is {self.schedule!r}, expected 'cosine', 'linear' or 'constant'")
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"Options: final_lr is {self.final_lr}, expected 0 to lr = {self.lr}")
        if self.log not in ("none", "tensorboard"):
            raise ValueError(f"Options: log is {self.log!r}, expected 'none' or 'tensorboard'")
        if self.patience is not None and (self.metric is None or self.evaluate_every is None):
            raise ValueError(
                f"Options: patience is {self.patience} with metric = {self.metric!r} and evaluate_every = "
                f"{self.evaluate_every}, expected both of them with it"
            )

    def lr_factor(self, step: int) -> float:
        """The learning rate of 0-based `step` as a fraction of `lr`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.schedule]
        return left if self.final_lr == 0 else left + (1 - left) * self.final_lr / self.lr


# What does not change a run's result, or only where it is evaluated.
_OUTSIDE = ("evaluate_every", "metric", "greater_is_better", "patience", "log", "log_every", "save_every")


def _fingerprint(objective: Any, batches: Batches, options: Options, processes: int, evaluates: bool) -> dict[str, Any]:
    """What a run must have in common with the one that it continues."""
    said = asdict(options)
    common = {name: value for name, value in said.items() if name not in _OUTSIDE}
    common |= {"examples": len(batches), "processes": processes, "data": batches.fingerprint()}
    common["validation"] = {name: said[name] for name in _OUTSIDE[:4]} if evaluates else None
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
    """Raises ValueError where several processes were started that would train on their own, into one folder, or FSDP
    was asked for and is not there."""
    # Parameters that a step does not reach would make the next step wait for their gradients for ever.
    parallel = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision=options.precision, kwargs_handlers=[parallel])
    check_fsdp("train", accelerator)
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
            stacklevel=4,
        )


@dataclass
class _Step:
    """One step's gradients are made: each term's mean over all processes, and their tokens."""

    losses: dict[str, float]
    tokens: int


def _gradients(module: nn.Module, counted: Any, group: list[Batch], accelerator: Accelerator) -> _Step:
    """The gradients of one step, added up over the group's micro-batches, each term divided by its number of items in
    all of them on all processes."""
    counts: list[Mapping[str, Tensor]] = [counted.counts(batch) for batch in group]
    # float64: the sum of many counts is exact, and rounded once.
    rows = [[torch.as_tensor(x) for x in (*c.values(), tokens_of(b))] for c, b in zip(counts, group, strict=True)]
    device = accelerator.device
    summed = torch.stack([torch.stack([x.to(device, torch.float64) for x in row]) for row in rows]).sum(0)
    *totals, tokens = accelerator.reduce(summed)
    items = {name: total.clamp(min=1).float() for name, total in zip(counts[0], totals, strict=True)}
    logged = {name: torch.zeros((), dtype=torch.float64, device=device) for name in items}
    for index, batch in enumerate(group):
        last = index == len(group) - 1
        with nullcontext() if last else accelerator.no_sync(module):  # processes exchange gradients once a step
            terms = module(batch, items)
            # Data parallelism averages gradients over processes; the totals already run over all of them.
            accelerator.backward(torch.stack(list(terms.values())).sum() * accelerator.num_processes)
        for name, value in terms.items():
            logged[name] += value.detach()
    losses = accelerator.reduce(torch.stack(list(logged.values()))).tolist()
    return _Step(dict(zip(logged, losses, strict=True)), int(tokens))


def _agree(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """Each flag, True where it is so on any process: all of them then do the same."""
    if accelerator.num_processes == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.float32, device=accelerator.device)
    return [bool(x) for x in accelerator.reduce(found).tolist()]


def train(
    objective: nn.Module,
    data: Sequence[Example] | Batches,
    collate: Callable[..., Batch] | None,
    options: Options,
    *,
    optimizer: OptimizerFactory = adamw,
    out: str | Path | None = None,
    name: str = "train",
    evaluate: Evaluate | None = None,
    callbacks: Sequence[Any] = (),
) -> list[dict[str, float]]:
    """Train `objective` (an nn.Module that is an `Objective`) in place for one stage.

    Args:
        objective: the module; its parameters that require grad train.
        data: a sequence of examples, from which `collate` makes a batch of a list of them (with an argument `generator`
            it gets one, which is a function of the seed and the batch's number); or `Batches`, then collate is None.
        options: how long, how fast, in which precision, and what is evaluated, logged and saved how often.
        optimizer: makes the optimizer of the objective's parameters.
        out: a folder for checkpoints. A second call continues from the newest one, on the CPU bit for bit; after the
            last step, or an early stop, it only restores the weights.
        name: of the progress bar.
        evaluate: called with the objective in evaluation mode, without gradient, on the main process; returns figures
            by name. See `Options` for when, and for what follows.
        callbacks: transformers.TrainerCallback objects, called on every process. What they set in their control
            (should_training_stop, should_save, should_evaluate, should_log) is obeyed; a stop is the stage's end.

    Returns:
        A record for every step from the first: {"step", "lr", one entry a term}, and "eval_..." for each figure where
        the step was evaluated.

    Raises RuntimeError where another process trains into `out`, ValueError where `data` is empty, nothing trains,
    `optimizer` steps inside of the backward under options that need all gradients, batches of one number differ (with
    `out`), `out` holds a damaged checkpoint or one of other options, data, terms or another teacher, processes were
    started of which accelerate knows nothing, or FSDP was asked for on CPUs, where accelerate leaves it out, and
    KeyboardInterrupt after Ctrl-C, once the current step is saved. Warns of parameters that require grad and get none
    in the first step, and of a student whose best figure is 0.
    """
    checks.arguments(objective, options, Options, optimizer)
    folder = None if out is None else Path(out)
    if folder is not None and folder.is_file():
        raise ValueError(f"train: out is {str(out)!r}, a file, expected a folder")
    alone = nullcontext() if folder is None or os.environ.get("RANK", "0") != "0" else Folder(folder, "train")
    with alone:
        return _train(objective, data, collate, options, optimizer, folder, name, evaluate, callbacks)


def _train(
    objective: nn.Module,
    data: Sequence[Example] | Batches,
    collate: Callable[..., Batch] | None,
    options: Options,
    optimizer: OptimizerFactory,
    folder: Path | None,
    name: str,
    evaluate: Evaluate | None,
    callbacks: Sequence[Any],
) -> list[dict[str, float]]:
    batches = stream(data, collate, options.batch_size, options.seed)
    if not any(p.requires_grad for p in objective.parameters()):
        raise ValueError("train: objective has no parameter that requires grad")
    checks.evaluation(options, evaluate)
    accelerator = _accelerator(options)
    updates = optimizer(objective, options)
    checks.in_backward(updates, options, accelerator.num_processes)
    gradients_stay = not getattr(updates, "step_in_backward", False)
    scheduler = LambdaLR(updates, options.lr_factor)
    processes = accelerator.num_processes
    common = {} if folder is None else _fingerprint(objective, batches, options, processes, evaluate is not None)
    torch.manual_seed(options.seed)  # dropout; after a resume the checkpoint's generators replace it
    module, updates = accelerator.prepare(objective, updates)
    accelerator.register_for_checkpointing(scheduler)
    validation = None
    if evaluate is not None:
        validation = Validation(objective, evaluate, accelerator, options)
        accelerator.register_for_checkpointing(validation)
    share = options.batch_size * options.accumulate * processes / len(batches)
    shown = {"model": objective, "optimizer": updates, "lr_scheduler": scheduler}
    events = Callbacks(callbacks, options, accelerator, folder, share, **shown)
    start, history = 0, list[dict[str, float]]()
    checkpoints, stopped, tokens, saved = None, False, 0, list[Any]()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(folder, accelerator, common)
        state = checkpoints.load()
        start, history, stopped = state["step"], state["history"], state["stopped"]
        tokens, saved = state["tokens"], state["callbacks"]
    if stopped or start >= options.steps:
        if validation is not None:
            validation.restore()
        return history
    events.begin(start, saved, *((validation.best, validation.best_step) if validation else (None, 0)))
    module.train()
    with Progress(name, options.steps, start, accelerator.is_main_process) as bar, interrupts() as asked:
        for step in range(start, options.steps):
            first = step * options.accumulate * processes + accelerator.process_index
            events.step_begin()
            group = []
            for i in range(options.accumulate):
                k = first + i * processes
                new = step == start and i == 0 and folder is not None
                batch = first_batch(batches, k) if new else batches.batch(k)
                group.append(send_to_device(batch, accelerator.device))
            done = _gradients(module, objective, group, accelerator)
            if step == start and accelerator.is_main_process and gradients_stay:
                _name_unreached(objective)
            if options.max_grad_norm is not None:
                accelerator.clip_grad_norm_(module.parameters(), options.max_grad_norm)
            record = {"step": float(step), "lr": float(scheduler.get_last_lr()[0]), **done.losses}
            events.call("on_pre_optimizer_step")
            updates.step()
            events.call("on_optimizer_step")
            scheduler.step()
            updates.zero_grad()
            history.append(record)
            tokens += done.tokens
            bar.step(done.losses, done.tokens)

            steps = step + 1
            end = steps == options.steps
            every = options.evaluate_every or options.steps
            due = Due(steps % options.log_every == 0, steps % every == 0 or end, steps % options.save_every == 0, end)
            due = events.step_end(steps, tokens, due)
            if events:
                due = Due(*_agree(accelerator, due.log, due.evaluate, due.save, due.stop))
            if due.log:
                events.log(_recent(history, options.log_every) | {"tokens_per_second": bar.tokens_per_second})
            if validation is not None and (due.evaluate or due.stop):
                bar.note("evaluating")
                found = validation.run(steps)
                record |= {f"eval_{key}": value for key, value in found.items()}
                figures = {key: value for key, value in record.items() if key.startswith("eval_")}
                due.stop |= events.evaluated(figures, validation.best, validation.best_step) or validation.exhausted
            interrupted, stop = _agree(accelerator, asked.is_set(), due.stop)
            stop |= end
            if checkpoints and (interrupted or stop or due.save):
                checkpoints.save(steps, history, stopped=stop, tokens=tokens, callbacks=events.states())
                events.call("on_save")
            if interrupted:
                where = f"saved after step {steps} in {folder}" if checkpoints else "nothing saved"
                raise KeyboardInterrupt(f"{name}: interrupted, {where}")
            if stop:
                break
    if validation is not None:
        validation.restore()
    events.call("on_train_end")
    return history


def _recent(history: list[dict[str, float]], count: int) -> dict[str, float]:
    """The mean of each term and of their sum over the last `count` steps, and the learning rate."""
    last = history[-count:]
    terms = [name for name in last[-1] if name not in ("step", "lr")]
    means = {name: sum(record[name] for record in last) / len(last) for name in terms}
    return {"loss": sum(means.values()), "learning_rate": last[-1]["lr"], **means}
