"""Small models, ragged batches and a Trainer that reads them in order, for the tests of the transformers integration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from fastdistil.integrations.transformers import DistillationArguments, DistillationTrainer

VOCABULARY, LENGTH, LABELS = 30, 6, 3
LENGTHS = (6, 2, 5, 3, 4, 6, 3, 5)
TASKS = ("token", "sequence", "masked", "causal")

_SIZES = {"vocab_size": VOCABULARY, "intermediate_size": 16, "num_attention_heads": 2}
_DROPOUTS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": LABELS}
_CLASSES: dict[str, Any] = {
    "token": BertForTokenClassification,
    "sequence": BertForSequenceClassification,
    "masked": BertForMaskedLM,
}


def model(
    task: str, *, layers: int = 1, width: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64, **more: Any
) -> Any:
    torch.manual_seed(seed)
    if task == "causal":
        made = LlamaForCausalLM(
            LlamaConfig(**{**_SIZES, "num_key_value_heads": 1, **more}, hidden_size=width, num_hidden_layers=layers)
        )
    else:
        made = _CLASSES[task](
            BertConfig(**{**_SIZES, **_DROPOUTS, **more}, hidden_size=width, num_hidden_layers=layers)
        )
    with torch.no_grad():  # untrained logits are nearly uniform
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return made.to(dtype)


def teacher(task: str, **more: Any) -> Any:
    return model(task, **{"layers": 2, "width": 12, "seed": 1, **more})


def rows(task: str) -> list[dict[str, Tensor]]:
    """Eight examples of different lengths, padded right."""
    draw = torch.Generator().manual_seed(2)
    found = []
    for length in LENGTHS:
        ids = torch.randint(3, VOCABULARY, (LENGTH,), generator=draw)
        real = torch.arange(LENGTH) < length
        if task == "sequence":
            labels = torch.randint(0, LABELS, (), generator=draw)
        elif task == "token":
            labels = torch.randint(0, LABELS, (LENGTH,), generator=draw).masked_fill(~real, -100)
            labels[1] = -100  # as the later pieces of a word
        else:
            labels = ids.masked_fill(~real, -100)
        if task == "masked":
            labels[0] = -100
        found.append({"input_ids": ids, "attention_mask": real.long(), "labels": labels})
    return found


def collate(examples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([x[name] for x in examples]) for name in examples[0]}


class InOrder(DistillationTrainer):
    """Reads its data from the first to the last."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(folder: Path | str, **more: Any) -> DistillationArguments:
    chosen: dict[str, Any] = {
        "max_steps": 1, "per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 1.0,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    return DistillationArguments(str(folder), **{**chosen, **more})


def trained(trainer: DistillationTrainer) -> dict[str, Tensor]:
    """What a run took off each parameter: with SGD at a learning rate of 1, one step's gradient."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return {name: before[name] - p.detach() for name, p in trainer.model.named_parameters()}


def gradient(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found, strict=True)}


def aligned(task: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (N, V) of logits that have a label, and their labels (N,)."""
    if task == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    keep = labels != -100
    return logits[keep], labels[keep]


def plain(
    task: str, student: Any, other: Any, batch: dict[str, Tensor], *, temperature: float = 2.0, scale: float = 0.5
) -> Tensor:
    """KL of the logits plus `scale` times the cross entropy, each a mean over the rows with a label, in plain PyTorch."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        target, _ = aligned(task, other(**inputs).logits, batch["labels"])
    logits, labels = aligned(task, student(**inputs).logits, batch["labels"])
    p, q = ((x / temperature).log_softmax(-1) for x in (logits, target))
    soft = functional.kl_div(p, q, log_target=True, reduction="sum") * temperature**2 / len(labels)
    return soft + scale * functional.cross_entropy(logits, labels)
