"""Lottery-ticket sparse fine-tuning: train everything, keep the entries that moved most, go back, train those alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.losses._check import number
from fastdistil.sparse import files
from fastdistil.sparse._check import chosen_names, entries, same_bits, whole_number
from fastdistil.sparse.delta import SparseDelta
from fastdistil.sparse.mask import SparseMask
from fastdistil.sparse.names import Parameters, found_name
from fastdistil.sparse.select import kernels, select_topk
from fastdistil.writing import Folder, replacing

TrainFn = Callable[[nn.Module, SparseMask | None, Path | None], object]
_NAME = "lottery_ticket"
BASE, MASK = "base.safetensors", "mask.safetensors"
DELTA, TUNED = "delta.safetensors", "tuned.safetensors"


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
    """Train `model` twice, the second time on a sparse mask of the entries that the first training changed most.

    Between both trainings the k entries that changed most are chosen, and every parameter and buffer goes back to where
    it was, bit for bit. Afterwards the model is the tuned one. Source: Ansell et al. 2022 (arXiv 2110.07560); BiStil's
    phase 2 (arXiv 2306.01709).

    With `out` every phase can be interrupted and the same call continues: the folder keeps the start
    (base.safetensors), the mask, and the difference (delta.safetensors); inside of a phase `train_fn` continues from
    its own folder (`fastdistil.train.train` does). A finished ticket is not trained again: its difference is returned,
    and the model is the tuned one bit for bit, buffers included. Nothing but the start is kept in memory without `out`.

    **On resume, the weights saved in `out` replace those of the model you pass**, which may be half-trained or have a
    new random head. Use one folder per model and attempt. A model is refused where its `base_model`, its parameters'
    names or shapes, or a value of a parameter without requires_grad differ from the start's; any other parameter's
    difference is a warning.

    Args:
        model: the module to tune, in place.
        train_fn: `train_fn(model, mask, out)` trains the model in place: everything where `mask` is None, else with
            `SparseAdamW(model.named_parameters(), mask, ...)`; its `out` is a folder of its own for its checkpoints, or
            None.
        density, k, include, exclude: as in `select_topk`; a head is best excluded, it then stays dense.
        mask: a mask to train on, such as a random one; the first training is then left out.
        out: a folder, as above, or None.
        base_model: the name of the model that the difference is to, kept in it.

    Returns:
        A SparseDelta: the mask's entries, and as whole tensors the parameters outside of the mask that the second
        training changed.

    Raises:
        RuntimeError: where another process works on the ticket in `out`.
        ValueError: where `out` holds another ticket or a file that is damaged or another ticket's, `train_fn` changed
            what the mask does not hold, or a parameter that the mask may hold is not dense.
        TypeError, ValueError: as `select_topk`.

    Example:
        >>> import torch, fastdistil
        >>> from fastdistil.sparse import SparseAdamW
        >>> model = torch.nn.Linear(4, 3)
        >>> def train_fn(model, mask, out):
        ...     if mask is None:
        ...         optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        ...     else:
        ...         optimizer = SparseAdamW(model.named_parameters(), mask, lr=0.1)
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.eye(4)).square().sum().backward()
        ...         optimizer.step()
        ...
        >>> fastdistil.lottery_ticket(model, train_fn, density=0.5, exclude="bias")
        SparseDelta(6 entries in 1 tensors, 1 whole)
    """
    if not callable(train_fn):
        raise TypeError(
            f"{_NAME}: train_fn is {type(train_fn).__name__}, expected a function train_fn(model, mask, out)"
        )
    folder = None if out is None else Path(out)
    k = None if k is None else whole_number(_NAME, "k", k)
    share = None if density is None or k is not None else number(_NAME, "density", density)
    _check_parameters(model, k, share, include, exclude, mask)
    with contextlib.nullcontext() if folder is None else Folder(folder, _NAME):
        said = None
        if folder is not None:
            shapes = files.hash_shapes(_shapes(model, folder))
            given = None if mask is None else mask.digest()
            asked = {"density": share, "k": k, "include": include, "exclude": exclude, "mask": given}
            said = _check_settings(folder, asked | {"base_model": base_model, "shapes": shapes})
        start = _start(model, folder)
        ticket = _Ticket(folder, said, start)
        if folder is not None and (folder / DELTA).exists() and (folder / TUNED).exists():
            return _finished(model, folder, ticket)
        mask = _kept_mask(folder, ticket) if mask is None else mask
        if mask is None:
            train_fn(model, None, None if folder is None else folder / "full")
            every = model.named_parameters(remove_duplicate=False)
            trained = Parameters((name, p) for name, p in every if p.requires_grad)
            mask = select_topk(trained, start, k=k, density=share, include=include, exclude=exclude)
            if folder is not None:
                mask._save(folder / MASK, ticket.metadata)
        rewind_(model, start)
        train_fn(model, mask, None if folder is None else folder / "sparse")
        delta = SparseDelta.from_params(model, start, mask, whole=_whole(model, start, mask), base_model=base_model)
        if folder is not None:
            _save_tuned(model, delta, folder / TUNED, ticket)
            delta._save(folder / DELTA, ticket.metadata)
        return delta


class _Ticket:
    """What ties the files of one ticket to each other: a hash of its settings and of its start."""

    def __init__(self, folder: Path | None, said: dict[str, Any] | None, start: Mapping[str, Tensor]) -> None:
        begun = start.metadata.get(files.CONTENT, "") if isinstance(start, files.Checkpoint) else ""
        text = json.dumps([said, begun], sort_keys=True)
        self.metadata = {"ticket": hashlib.sha256(text.encode()).hexdigest()[:16]}

    def check(self, path: Path) -> None:
        """Raises ValueError where the file is another ticket's; those of earlier versions do not say."""
        found = files.Checkpoint(path)
        if found.metadata.get("ticket", self.metadata["ticket"]) != self.metadata["ticket"]:
            raise found.error(
                "metadata", "is of a ticket with another start or other options, expected this folder's own"
            )


@torch.no_grad()
def rewind_(model: nn.Module, start: Mapping[str, Tensor]) -> None:
    """Put every parameter and buffer back to `start`, bit for bit.

    Args:
        model: the module that is written.
        start: tensors by name, such as a copy of model.state_dict().

    Raises:
        ValueError: before anything is written, where `start` lacks a tensor or has it in another shape or dtype.

    Example:
        >>> import torch
        >>> from fastdistil.sparse import rewind_
        >>> model = torch.nn.Linear(2, 2)
        >>> start = {name: x.clone() for name, x in model.state_dict().items()}
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> rewind_(model, start)
        >>> torch.equal(model.weight, start["weight"])
        True
    """
    _check_start(model, start)
    for tensor, before in _beside(Parameters.of_module(model, buffers=True), start):
        tensor.detach().copy_(before)


def _check_start(model: nn.Module, start: Mapping[str, Tensor]) -> None:
    tensors = Parameters.of_module(model, buffers=True)
    for name, tensor in tensors.items():
        known = found_name(start, tensors.names(name))
        if known is None:
            raise ValueError(f"rewind_: start has no {name!r}, which model has")
        if start[known].shape != tensor.shape or start[known].dtype != tensor.dtype:
            came = f"{start[known].dtype} of shape {tuple(start[known].shape)}"
            raise ValueError(f"rewind_: start[{known!r}] is {came}, expected {tensor.dtype} of {tuple(tensor.shape)}")


def _beside(tensors: Parameters, start: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor and its start, which may lie there under another of its names."""
    for name, tensor in tensors.items():
        yield tensor, start[found_name(start, tensors.names(name)) or name]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in Parameters.of_module(model, buffers=True).items()}


def _shapes(model: nn.Module, folder: Path) -> dict[str, torch.Size]:
    """Shapes of the parameters, under the names that they have in the folder where a ticket was begun."""
    params, path = Parameters.of_module(model), folder / BASE
    begun: Mapping[str, Tensor] = files.Checkpoint(path) if path.exists() else {}
    return {found_name(begun, params.names(name)) or name: p.shape for name, p in params.items()}


def _check_parameters(
    model: nn.Module,
    k: int | None,
    density: float | None,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    mask: SparseMask | None,
) -> None:
    """Raises, before hours of training, what the selection and the sparse training would raise behind them."""
    params = Parameters.of_module(model)
    if mask is None:
        names = chosen_names(_NAME, params, include, exclude)
        entries(_NAME, k, density, sum(params[name].numel() for name in names))
        names = [name for name in names if params[name].requires_grad]
    else:
        names = list(mask)
    for name in names:
        if name not in params:
            raise ValueError(f"{_NAME}: model has no parameter {name!r}, which mask has")
        if not params[name].is_contiguous():
            raise ValueError(f"{_NAME}: model's {name!r} has strides {params[name].stride()}, expected it dense")


def _check_same(model: nn.Module, start: files.Checkpoint) -> None:
    """Refuse a model that cannot have had this start; tell of one that has moved away from it, or is another."""
    moved, params = "", Parameters.of_module(model)
    for (param, before), name in zip(_beside(params, start), params, strict=True):
        if same_bits(before, param.detach()):
            continue
        if not param.requires_grad:
            raise ValueError(
                f"{_NAME}: model's {name!r}, which is not trained, is not that of the start in {start.path}, expected "
                "the model that the ticket was begun with, or another out"
            )
        moved = moved or name
    if moved:
        warnings.warn(
            f"{_NAME}: model's {moved!r} is not that of the start in {start.path}, which is taken in its place",
            stacklevel=4,  # of the caller of lottery_ticket
        )


def _start(model: nn.Module, folder: Path | None) -> Mapping[str, Tensor]:
    """The model's start: from the folder where a run was interrupted, into which it goes first of all."""
    if folder is None:
        return {name: tensor.clone() for name, tensor in _tensors(model).items()}
    path = folder / BASE
    if path.exists():
        start = files.Checkpoint(path)
        start.verify()
        try:
            _check_start(model, start)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        _check_same(model, start)
        rewind_(model, start)
        return start
    files.write(path, _tensors(model), {"format": "pt"})
    return files.Checkpoint(path)


def _save_tuned(model: nn.Module, delta: SparseDelta, path: Path, ticket: _Ticket) -> None:
    """What the difference leaves open of the tuned model: its entries as they are, without a rounding, and buffers."""
    tuned = {name: x.detach() for name, x in model.named_buffers()}
    for name, index in delta.positions.items():
        param = model.get_parameter(name).detach().contiguous()
        tuned[name] = kernels(param.device).sparse_take(param, index.to(param.device))
    files.write(path, tuned, {"format": "fastdistil.sparse_tuned", **ticket.metadata})


@torch.no_grad()
def _finished(model: nn.Module, folder: Path, ticket: _Ticket) -> SparseDelta:
    """The difference of a finished ticket; the model, which stands at the start, becomes the tuned one."""
    for path in (folder / DELTA, folder / TUNED):
        ticket.check(path)
    delta, tuned = SparseDelta.load(folder / DELTA), files.Checkpoint(folder / TUNED)
    tuned.verify()
    tensors = Parameters.of_module(model, buffers=True)
    for name, shape in delta.shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            raise ValueError(f"{_NAME}: {folder / DELTA} holds {name!r} of shape {tuple(shape)}, which model has not")
    for name, index in delta.positions.items():
        if name not in tuned or tuned[name].shape != index.shape or tuned[name].dtype != tensors[name].dtype:
            raise tuned.error(name, f"is missing or does not fit the positions in {folder / DELTA}")
    for name, index in delta.positions.items():
        tensor = tensors[name].detach()
        kernels(tensor.device).sparse_put_(tensor, index.to(tensor.device), tuned[name].to(tensor.device))
    buffers = {name: tuned[name] for name in tuned if name not in delta.positions and name in tensors}
    for name, value in {**buffers, **delta.whole}.items():
        tensors[name].detach().copy_(value)
    return delta


def _kept_mask(folder: Path | None, ticket: _Ticket) -> SparseMask | None:
    path = None if folder is None else folder / MASK
    if path is None or not path.exists():
        return None
    ticket.check(path)
    return SparseMask.load(path)


def _check_settings(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The settings as JSON has them. Refuse a folder in which another ticket was begun."""
    path = folder / "ticket.json"
    wanted: dict[str, Any] = json.loads(json.dumps(asked))
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
        if before != wanted:
            raise ValueError(f"{_NAME}: out holds a ticket of {before} ({path}), this call wants {wanted}")
        return wanted
    with replacing(path) as file:
        file.write(json.dumps(wanted).encode() + b"\n")
    return wanted


def _whole(model: nn.Module, start: Mapping[str, Tensor], mask: SparseMask) -> dict[str, Tensor]:
    """The parameters outside of the mask that have changed; inside, nothing but its entries may have."""
    whole, params = {}, Parameters.of_module(model)
    for (param, base), name in zip(_beside(params, start), params, strict=True):
        now, before, masked = param.detach().cpu(), base.cpu(), found_name(mask, params.names(name))
        if masked is None:
            if not torch.equal(now, before):
                whole[name] = now
            continue
        expected = before.reshape(-1).clone()
        at = mask[masked].cpu().long()
        expected[at] = now.reshape(-1)[at]
        if not torch.equal(expected.view(now.shape), now):
            raise ValueError(
                f"{_NAME}: train_fn changed {name!r} outside of its mask, expected it to train with "
                "SparseAdamW(model.named_parameters(), mask, ...)"
            )
    return whole
