"""Run by test_data_parallel.py under torchrun: two optimiser steps of two micro-batches on each process, in four loops,
against one process with all of the batches. The batches are ragged, labels are partly known, and in the second step no
token of the last process counts."""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
warnings.simplefilter("ignore")

import lightning  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from judge import SAME_STEP, error  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import BertConfig, BertForTokenClassification  # noqa: E402

import fastdistil as fd  # noqa: E402
from fastdistil.recipes import terms  # noqa: E402
from fastdistil.recipes.terms import Distillation  # noqa: E402
from fastdistil.train import Options, train  # noqa: E402

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples/lightning_module.py"), run_name="lightning_module")
WORLD, RANK = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
STEPS, ACCUMULATE, LENGTH, VOCABULARY, LABELS = 2, 2, 7, 30, 5
LR = 0.1
Batch = dict[str, Tensor]


def batch_of(k: int) -> Batch:
    """Micro-batch `k` of all processes' stream. Nothing counts in those of the second step's last process."""
    draw = torch.Generator().manual_seed(k)
    step, index = divmod(k, ACCUMULATE * WORLD)
    empty = step == 1 and index % WORLD == WORLD - 1
    rows = 1 + k % 3
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=draw)
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (rows, 1), generator=draw)
    known = mask & (torch.rand(rows, LENGTH, generator=draw) < 0.4)
    words = torch.zeros_like(mask) if empty else mask
    labels = torch.randint(0, LABELS, (rows, LENGTH), generator=draw)
    labelled = known & words
    return {
        "input_ids": ids, "attention_mask": mask.long(), "words": words.long(), "labelled_words": labelled.long(),
        "labels": labels.masked_fill(~labelled, -100),
    }  # fmt: skip


def batches(step: int, rank: int | None) -> Iterator[Batch]:
    """The micro-batches of a step on `rank`, or those of all ranks."""
    for i in range(ACCUMULATE):
        for other in range(WORLD) if rank is None else (rank,):
            yield batch_of((step * ACCUMULATE + i) * WORLD + other)


def bert(layers: int, width: int, seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 16, "num_attention_heads": 2}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": LABELS}
    model = BertForTokenClassification(BertConfig(**sizes, **dropouts, num_hidden_layers=layers))
    with torch.no_grad():  # untrained logits are nearly uniform
        for p in model.parameters():
            p.mul_(8 if p.ndim > 1 else 1)
    return model


class Loss(nn.Module):
    """Logits, labels and hidden states: the student and the projection train."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = bert(1, 8, 0), (bert(2, 12, 1).requires_grad_(False),)
        self.projection = nn.Linear(8, 12)

    def _apply(self, function: Any, recurse: bool = True) -> Any:  # .double() of both
        self.teacher[0]._apply(function, recurse)
        return super()._apply(function, recurse)

    def forward(self, batch: Batch, items: Tensor) -> Tensor:
        """items: how many words and labelled words each process has in the whole step, as a mean."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad(), fd.capture(self.teacher[0], hidden_states=[2]) as theirs:
            target = self.teacher[0](**inputs).logits
        with fd.capture(self.student, hidden_states=[1]) as mine:
            logits = self.student(**inputs).logits
        loss = fd.logit_loss(
            logits, target, temperature=2.0, weight=batch["words"], num_items=items[0],
            labels=batch["labels"], label_weight=0.4, label_num_items=items[1],
        )  # fmt: skip
        return loss + fd.hidden_loss(
            mine.hidden_states[1], theirs.hidden_states[2], projection=self.projection.weight,
            bias=self.projection.bias, weight=batch["words"], num_items=items[0],
        )  # fmt: skip


def counts(batch: Batch) -> Tensor:
    return torch.stack([batch["words"].sum(), batch["labelled_words"].sum()]).double()


class Recorded(torch.optim.SGD):
    """Keeps what gradient each step was made with, as one vector."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.gradients = module, list[Tensor]()
        super().__init__(module.parameters(), lr=LR)

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        flat = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.module.parameters()]
        self.gradients.append(torch.cat([x.flatten() for x in flat]))
        super().step()
        return loss


Run = tuple[list[Tensor], list[Tensor]]  # of each step the loss and the gradient


def alone(dtype: torch.dtype, make: Callable[[], nn.Module]) -> Run:
    """One process with the micro-batches of all."""
    module, losses = make().to(dtype), []
    optimizer = recorded = Recorded(module)
    for step in range(STEPS):
        group = list(batches(step, None))
        items = torch.stack([counts(x) for x in group]).sum(0)
        losses.append(torch.zeros((), dtype=dtype))
        for batch in group:
            loss = module(batch, items)
            loss.backward()
            losses[-1] += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
    return losses, recorded.gradients


def plain(dtype: torch.dtype) -> Run:
    """DistributedDataParallel around a module that returns the loss."""
    module, losses = Loss().to(dtype), []
    parallel = nn.parallel.DistributedDataParallel(module, find_unused_parameters=False)
    optimizer = recorded = Recorded(module)
    for step in range(STEPS):
        group = list(batches(step, RANK))
        items = torch.stack([counts(x) for x in group]).sum(0)
        dist.all_reduce(items)
        items /= WORLD
        losses.append(torch.zeros((), dtype=dtype))
        for number, batch in enumerate(group):
            with nullcontext() if number == len(group) - 1 else parallel.no_sync():
                loss = parallel(batch, items)
                loss.backward()
            losses[-1] += loss.detach() / WORLD
        dist.all_reduce(losses[-1])
        optimizer.step()
        optimizer.zero_grad()
    return losses, recorded.gradients


def accelerated(dtype: torch.dtype) -> Run:
    """accelerate by hand."""
    AcceleratorState._reset_state(False)
    accelerator, module, losses = Accelerator(), Loss().to(dtype), []
    optimizer = recorded = Recorded(module)
    model, optimizer = accelerator.prepare(module, optimizer)
    for step in range(STEPS):
        group = list(batches(step, RANK))
        items = accelerator.reduce(torch.stack([counts(x) for x in group]).sum(0), "mean")
        losses.append(torch.zeros((), dtype=dtype))
        for number, batch in enumerate(group):
            with nullcontext() if number == len(group) - 1 else accelerator.no_sync(model):
                loss = model(batch, items)
                accelerator.backward(loss)
            losses[-1] += loss.detach()
        losses[-1] = accelerator.reduce(losses[-1], "mean")
        optimizer.step()
        optimizer.zero_grad()
    return losses, recorded.gradients


class Grouped(lightning.LightningModule):
    """One of Lightning's batches is the micro-batches of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.losses = Loss(), list[Tensor]()
        self.automatic_optimization = False

    def training_step(self, group: list[Batch], _: int) -> None:
        items = self.all_gather(torch.stack([counts(x) for x in group]).sum(0)).reshape(-1, 2).mean(0)
        optimizer, total = self.optimizers(), torch.zeros((), dtype=self.dtype)
        for batch in group:
            loss = self.loss(batch, items)
            self.manual_backward(loss)
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        self.losses.append(self.all_gather(total).mean())

    def configure_optimizers(self) -> Any:
        self.recorded = Recorded(self.loss)
        return self.recorded


QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


def lit(module: Any, data: list[Any], dtype: torch.dtype) -> None:
    lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=WORLD, strategy="ddp", use_distributed_sampler=False,
        precision="64-true" if dtype == torch.float64 else "32-true", **QUIET,
    ).fit(module, torch.utils.data.DataLoader(data, batch_size=None))  # fmt: skip


def grouped(dtype: torch.dtype) -> Run:
    module = Grouped().to(dtype)
    lit(module, [list(batches(step, RANK)) for step in range(STEPS)], dtype)
    return module.losses, module.recorded.gradients


class Steps(Distillation):
    """The objective of `fastdistil.train` on micro-batch k."""

    def __init__(self) -> None:
        made = [terms.hidden(1, 2, projection=nn.Linear(8, 12), weight="words"), terms.logits(temperature=2.0)]
        torch.manual_seed(5)
        nn.init.normal_(made[0].projection.weight)  # type: ignore[attr-defined]
        nn.init.normal_(made[0].projection.bias)  # type: ignore[attr-defined]
        super().__init__(bert(1, 8, 0), [*made, terms.labels(scale=0.5)], bert(2, 12, 1))

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        self._teacher[0]._apply(function, recurse)
        return super()._apply(function, recurse)


class Data:
    """Batches of `fastdistil.train`, which asks each process for its own."""

    def batch(self, k: int) -> Batch:
        return batch_of(k)

    def __len__(self) -> int:
        return STEPS * ACCUMULATE * WORLD

    def fingerprint(self) -> Any:
        return None


def looped(dtype: torch.dtype) -> Run:
    """fastdistil.train."""
    AcceleratorState._reset_state(False)
    module, made = Steps().to(dtype), list[Recorded]()

    def optimizer(objective: nn.Module, options: Options) -> torch.optim.Optimizer:
        made.append(Recorded(objective))
        return made[0]

    options = Options(STEPS, lr=LR, accumulate=ACCUMULATE, warmup=0, schedule="constant", max_grad_norm=None)
    history = train(module, Data(), None, options, optimizer=optimizer)  # type: ignore[arg-type]
    losses = [sum(x for name, x in record.items() if name not in ("step", "lr")) for record in history]
    return [torch.tensor(x, dtype=torch.float64) for x in losses], made[0].gradients


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = Steps()

    def forward(self, batch: Batch, items: Tensor) -> Tensor:
        words, labelled = items
        by_term = {term.name: labelled if term.name == "labels" else words for term in self.steps.terms}
        return torch.stack(list(self.steps(batch, by_term).values())).sum()


def example(dtype: torch.dtype) -> tuple[Run, Run]:
    """The LightningModule of examples/, whose steps have one batch each, and one process."""

    def made() -> Any:
        torch.manual_seed(3)
        module = EXAMPLE["Distillation"](EXAMPLE["causal"](16, 1), EXAMPLE["causal"](32, 2)).to(dtype)
        module.frozen[0].to(dtype)
        return module

    def tokens(k: int) -> Batch:
        return {name: batch_of(k)[name] for name in ("input_ids", "attention_mask")}

    module, one, losses = made(), made(), list[Tensor]()
    module.configure_optimizers = lambda: Recorded(module.student)
    lit(module, [tokens(RANK), tokens(WORLD + RANK)], dtype)
    optimizer, one.all_gather = Recorded(one.student), lambda x: x  # no trainer
    for step in range(2):
        parts = [tokens(step * WORLD + rank) for rank in range(WORLD)]
        loss = one.loss({name: torch.cat([x[name] for x in parts]) for name in parts[0]}, one.temperature)
        loss.backward()
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    logged = module.trainer.callback_metrics["distillation"]
    return ([logged], module.optimizers(False).gradients), (losses[-1:], optimizer.gradients)


def same(what: str, dtype: torch.dtype, found: Run, expected: Run) -> None:
    for kind, mine, wanted in zip(("loss", "gradient"), found, expected, strict=True):
        assert len(mine) == len(wanted) > 0
        for step, (x, y) in enumerate(zip(mine, wanted, strict=True)):
            apart = error(x, y)
            print(f"{what} {dtype} {kind}: {apart:.1e}", file=sys.stderr)
            assert apart <= SAME_STEP[dtype], f"{what}, {dtype}, {kind} of step {step}: {apart:.2e}"


def around_the_wrapper() -> None:
    """What docs/trainers/data-parallel.md warns of: the processes' gradients stay their own, without an error."""
    inner = nn.Linear(3, 2)
    nn.parallel.DistributedDataParallel(inner)
    inner(torch.full((1, 3), RANK + 1.0)).sum().backward()
    assert torch.equal(inner.weight.grad, torch.full((2, 3), RANK + 1.0))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    around_the_wrapper()
    for dtype in SAME_STEP:
        wanted = alone(dtype, Loss)
        for run in (plain, accelerated, grouped):
            same(run.__name__, dtype, run(dtype), wanted)
        same("train", dtype, looped(dtype), alone(dtype, Summed))
        same("example", dtype, *example(dtype))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
