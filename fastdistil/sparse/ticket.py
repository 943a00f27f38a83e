"""Lottery-ticket sparse fine-tuning: train everything, keep the entries that moved most, go back, train those alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.sparse import files
from fastdistil.sparse.delta import SparseDelta
from fastdistil.sparse.mask import SparseMask
from fastdistil.sparse.select import select_topk

TrainFn = Callable[[nn.Module, SparseMask | None, Path | None], object]


def lottery_ticket(
    model: nn.Module,
    train_fn: TrainFn,
    density: float | None = 0.08,
    *,
    k: int | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    mask: SparseMask | None = None,
    out: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
) -> SparseDelta:
    """Train `model` twice, the second time on a sparse mask; returns the difference that the second training made.

    `train_fn(model, mask, out)` trains the model in place: everything where `mask` is None, else with
    `SparseAdamW(model.named_parameters(), mask, ...)`; `out` is a folder of its own for its checkpoints, or None.
    Between both trainings the k entries that changed most are chosen (`density`, `k`, `include` and `exclude` as in
    `select_topk`; a head is best excluded, it then stays dense), and every parameter and buffer goes back to where it
    was, bit for bit. With a `mask` given, such as a random one, the first training is left out.

    The difference holds the mask's entries, and as whole tensors the parameters outside of the mask that the second
    training changed. Afterwards the model is the tuned one.

    With `out` every phase can be interrupted and the same call continues: the folder keeps the start
    (base.safetensors), the mask, and the difference (delta.safetensors); inside of a phase `train_fn` continues from
    its own folder (`fastdistil.train.train` does). Nothing but the start is kept in memory without `out`.

    Raises ValueError where `out` holds another ticket, or `train_fn` changed what the mask does not hold; else as
    `select_topk`. Source: Ansell et al. 2022 (arXiv 2110.07560); BiStil's phase 2 (arXiv 2306.01709).
    """
    folder = None if out is None else Path(out)
    share = None if k is not None else density
    given = None if mask is None else mask.digest()
    asked = {"density": share, "k": k, "include": include, "exclude": exclude, "mask": given}
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        _check_settings(folder, asked)
    start = _start(model, folder)
    mask = _kept_mask(folder) if mask is None else mask
    if mask is None:
        train_fn(model, None, None if folder is None else folder / "full")
        names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        mask = select_topk(names, start, k=k, density=share, include=include, exclude=exclude)
        if folder is not None:
            mask.save(folder / "mask.safetensors")
    rewind_(model, start)
    train_fn(model, mask, None if folder is None else folder / "sparse")
    delta = SparseDelta.from_params(model, start, mask, whole=_whole(model, start, mask), base_model=base_model)
    if folder is not None:
        delta.save(folder / "delta.safetensors")
    return delta


@torch.no_grad()
def rewind_(model: nn.Module, start: Mapping[str, Tensor]) -> None:
    """Every parameter and buffer back to `start`, bit for bit. Raises ValueError, before anything is written, where
    `start` lacks one or has it in another shape or dtype."""
    tensors = _tensors(model)
    for name, tensor in tensors.items():
        if name not in start:
            raise ValueError(f"rewind_: start has no {name!r}, which model has")
        if start[name].shape != tensor.shape or start[name].dtype != tensor.dtype:
            came = f"{start[name].dtype} of shape {tuple(start[name].shape)}"
            raise ValueError(f"rewind_: start[{name!r}] is {came}, expected {tensor.dtype} of {tuple(tensor.shape)}")
    for name, tensor in tensors.items():
        tensor.copy_(start[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in (*model.named_parameters(), *model.named_buffers())}


def _start(model: nn.Module, folder: Path | None) -> Mapping[str, Tensor]:
    """The model's start: from the folder where a run was interrupted, into which it goes first of all."""
    if folder is None:
        return {name: tensor.clone() for name, tensor in _tensors(model).items()}
    path = folder / "base.safetensors"
    if path.exists():
        start = files.Checkpoint(path)
        rewind_(model, start)
        return start
    files.write(path, _tensors(model), {"format": "pt"})
    return files.Checkpoint(path)


def _kept_mask(folder: Path | None) -> SparseMask | None:
    path = None if folder is None else folder / "mask.safetensors"
    return SparseMask.load(path) if path is not None and path.exists() else None


def _check_settings(folder: Path, asked: dict[str, Any]) -> None:
    """Refuse a folder in which another ticket was begun."""
    path = folder / "ticket.json"
    wanted = json.loads(json.dumps(asked))
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != wanted:
            raise ValueError(f"lottery_ticket: out holds a ticket of {before} ({path}), this call wants {wanted}")
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _whole(model: nn.Module, start: Mapping[str, Tensor], mask: SparseMask) -> dict[str, Tensor]:
    """The parameters outside of the mask that have changed; inside, nothing but its entries may have."""
    whole = {}
    for name, param in model.named_parameters():
        now, before = param.detach().cpu(), start[name].cpu()
        if name not in mask:
            if not torch.equal(now, before):
                whole[name] = now
            continue
        expected = before.clone().view(-1)
        at = mask[name].cpu().long()
        expected[at] = now.reshape(-1)[at]
        if not torch.equal(expected.view(now.shape), now):
            raise ValueError(
                f"lottery_ticket: train_fn changed {name!r} outside of its mask, expected it to train with "
                "SparseAdamW(model.named_parameters(), mask, ...)"
            )
    return whole
