"""What a transformers batch says that the terms read: which rows count, and which label stands at which row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.models.capture import transformers_models

IGNORED = -100
SHIFTED = ("ForCausalLM", "LMHeadModel")
ALIGNED = ("ForTokenClassification", "ForMaskedLM", "ForSequenceClassification")


def _named(model: nn.Module, endings: tuple[str, ...]) -> bool:
    inner = transformers_models(model)[0]
    return any(found.__name__.endswith(endings) for found in type(inner).__mro__)


def shifts(model: nn.Module, said: bool | None) -> bool:
    """Whether the logits at position i are those of the label at i + 1; `said` wins.

    Raises ValueError where the class does not tell.
    """
    if said is not None:
        return said
    for endings, answer in ((ALIGNED, False), (SHIFTED, True)):
        if _named(model, endings):
            return answer
    name = type(transformers_models(model)[0]).__name__
    raise ValueError(
        f"DistillationTrainer: model is {name}, expected a class whose name ends with one of "
        f"{', '.join((*ALIGNED, *SHIFTED))}, or args.shift_labels: whether row i has the label of token i + 1"
    )


def of_sequences(model: nn.Module) -> bool:
    """Whether the model has one row of logits per example."""
    return _named(model, ("ForSequenceClassification",))


def batch_of(
    inputs: Mapping[str, Any], *, shift: bool, sequences: bool, weights: Iterable[str] = (), rows: int | None = None
) -> dict[str, Tensor]:
    """The batch that the terms read, of a batch (B, S) that transformers' collators make.

    `labels` (B, S) or (B,) are moved to the rows of the logits, where `shift` (shift_labels, which are so already, take
    their place). `words` is 1 where the logits count: where there is a label, and without labels at every token (of
    shifted ones: every token but the last) or every example; a column `words` of the data is kept. `labelled_words` is
    1 where the cross entropy counts, too. Only the first `rows` examples count, by default all.
    """
    batch = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
    tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
    mask = batch.get("attention_mask")
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
    if mask.dim() != 2:
        raise ValueError(
            f"DistillationTrainer: attention_mask has shape {tuple(mask.shape)}, expected {tuple(tokens.shape[:2])}"
        )
    batch["attention_mask"] = mask
    labels = batch.pop("labels", None)
    shifted = batch.pop("shift_labels", None) if shift else None
    if shifted is not None:
        labels = shifted
    elif shift and labels is not None:
        labels = _moved(labels, IGNORED)
    known = None
    if labels is not None and not labels.is_floating_point():
        known = labels != IGNORED
        batch["labels"] = labels
        batch["labelled_words"] = batch["labelled_words"] * known if "labelled_words" in batch else known
    if "words" not in batch:
        if known is not None:
            batch["words"] = known
        elif sequences:
            batch["words"] = torch.ones_like(mask[:, 0])
        else:
            batch["words"] = _moved(mask, 0) * mask if shift else mask
    if rows is not None:
        for name in {"attention_mask", "words", "labelled_words", *weights} & batch.keys():
            batch[name] = batch[name].clone()
            batch[name][rows:] = 0
    return batch


def _moved(x: Tensor, last: int) -> Tensor:
    """(B, S): what stands at i + 1, and `last` at the end."""
    return torch.nn.functional.pad(x[:, 1:], (0, 1), value=last)
