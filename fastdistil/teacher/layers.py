"""Running a teacher for a store of kind "layers": input ids, hidden states of some layers and logits from one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.models.capture import Captured, base_model, block_list, capture
from fastdistil.teacher import format as files
from fastdistil.teacher.store import Store

_NAME = "teacher.write"


def layer_numbers(model: nn.Module, layers: Sequence[int]) -> list[int]:
    """`layers` counted from 0, ascending, each once. Raises ValueError for one that the model does not have."""
    last = len(block_list(base_model(model, _NAME), _NAME))
    found = set()
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"{_NAME}: layers holds {layer!r}, expected whole numbers")
        if not -last - 1 <= layer <= last:
            raise ValueError(
                f"{_NAME}: layers holds {layer}, expected {-last - 1} to {last}, "
                f"{type(model).__name__} has {last} blocks"
            )
        found.add(layer % (last + 1))
    return sorted(found)


def shapes(model: nn.Module, layers: Sequence[int], logits: bool) -> dict[str, Any]:
    """width, vocabulary and logits of the Writer, as the model itself shows them on one row of two tokens."""
    ids = torch.ones((1, 2), dtype=torch.long)
    example = next(iter(examples(model, {"input_ids": ids}, layers, logits)))
    states = [x for name, x in example.items() if name.startswith("hidden_")]
    widths = sorted({x.shape[-1] for x in states})
    if len(widths) > 1:
        raise ValueError(f"{_NAME}: layers {list(layers)} have widths {widths}, expected one: write them one by one")
    found = example.get(files.LOGITS)
    of = "" if found is None else "tokens" if found.dim() == 2 else "examples"
    return {
        "width": widths[0] if widths else 0,
        "vocabulary": 0 if found is None else found.shape[-1],
        "logits": of,
    }


def examples(
    model: nn.Module, batch: Mapping[str, Tensor], layers: Sequence[int], logits: bool
) -> Iterator[dict[str, Tensor]]:
    """What the store keeps of each example of a batch."""
    device = next(model.parameters()).device
    batch = {key: x.to(device) for key, x in batch.items()}
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    with capture(model, hidden_states=layers) if layers else nullcontext(Captured()) as captured:
        output = model(**batch)
    found = getattr(output, "logits", None) if logits else None
    if logits and found is None:
        raise ValueError(
            f"{_NAME}: model is {type(model).__name__}, which gives no logits, expected a classifier of tokens or "
            "sequences, or logits=False"
        )
    if found is not None and found.shape[:-1] not in (ids.shape, ids.shape[:1]):
        raise ValueError(
            f"{_NAME}: model gave logits {tuple(found.shape)} for {tuple(ids.shape)} tokens, expected one row for each "
            "token or example"
        )
    for row, keep in enumerate(mask):
        example = {files.IDS: ids[row][keep]}
        example |= {f"hidden_{layer}": captured.hidden_states[layer][row][keep] for layer in layers}
        if found is not None:
            example[files.LOGITS] = found[row][keep] if found.dim() == 3 else found[row]
        yield example


class Skipped:
    """Compares examples that are written already with those that the loader gives in their places."""

    def __init__(self, store: Store, count: int) -> None:
        self._store, self._count = store, count

    def __call__(self, batch: Mapping[str, Tensor], first: int) -> None:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for row, keep in enumerate(mask):
            ids = batch["input_ids"][row][keep].cpu()
            if not torch.equal(self._store.read(first + row, (files.IDS,))[files.IDS].long(), ids.long()):
                raise ValueError(
                    f"{_NAME}: loader gave another example {first + row} than {self._store.path} holds, expected the "
                    "same examples in the same order"
                )
