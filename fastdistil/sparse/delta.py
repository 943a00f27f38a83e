"""The difference that sparse fine-tuning made: positions and values, applied to a model, taken back, added up."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.losses._check import number
from fastdistil.sparse import composable, files
from fastdistil.sparse._check import (
    Named,
    base_param,
    check_positions,
    check_values,
    float_param,
    named_tensors,
    same_bits,
)
from fastdistil.sparse.mask import SparseMask
from fastdistil.sparse.names import Parameters, all_names, by_parameter, same_positions
from fastdistil.sparse.select import kernels
from fastdistil.sparse.sums import added, common_base, merged

FORMAT = "fastdistil.sparse_delta"
_POSITIONS, _VALUES, _WHOLE = ".positions", ".values", ".whole"  # behind the parameter's name in a file

Kept = dict[str, Tensor]  # what stood in each parameter, at the positions or, of one that is stored whole, everywhere


class SparseDelta:
    """A sparse difference between two models of the same shapes.

    Adding is in float32 and rounded once to the parameter's dtype. On its own base a delta restores the tuned values
    bit for bit wherever theirs is within a factor of two of the base's (then the difference is exact), else within one
    rounding.

    Args:
        positions: by name, (n,) int32 or int64, sorted flat positions.
        values: by name, (n,) float32 (float64 for float64 parameters), what is added there.
        shapes: of all of these parameters, by name.
        whole: by name, tensors that are stored as they are and replace the model's (a task's head).
        base_model: the name of the model that the difference is to, or None.

    Raises:
        TypeError, ValueError: naming the tensor, where positions, values and shapes do not fit each other.

    Example:
        >>> import torch
        >>> from fastdistil.sparse import SparseDelta
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> positions, values = {"weight": torch.tensor([0, 3])}, {"weight": torch.tensor([1.0, -2.0])}
        >>> delta = SparseDelta(positions, values, {"weight": (2, 2)})
        >>> _ = delta.apply_(model)
        >>> model.weight.tolist()
        [[1.0, 0.0], [0.0, -2.0]]
        >>> delta.revert_(model)
        >>> model.weight.tolist()
        [[0.0, 0.0], [0.0, 0.0]]
        >>> (delta + 0.5 * delta).values["weight"].tolist()
        [1.5, -3.0]
    """

    def __init__(
        self,
        positions: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        whole: Mapping[str, Tensor] | None = None,
        base_model: str | None = None,
    ) -> None:
        self.positions, self.values, self.whole = dict(positions), dict(values), dict(whole or {})
        self.base_model = base_model
        self.shapes = {name: torch.Size(shapes[name]) for name in (*self.positions, *self.whole) if name in shapes}
        self._kept: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()
        if self.positions.keys() != self.values.keys():
            raise ValueError("SparseDelta: positions and values have different names")
        for name, index in self.positions.items():
            if name not in self.shapes or name in self.whole:
                raise ValueError(f"SparseDelta: {name!r} has no shape, or is stored whole as well")
            check_positions("SparseDelta", f"positions[{name!r}]", index, self.shapes[name].numel())
            check_values("SparseDelta", name, self.values[name], len(index))
        for name, tensor in self.whole.items():
            float_param("SparseDelta", "whole", name, tensor)
            self.shapes[name] = tensor.shape

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what a pickle holds, is applied to no module: what was overwritten belongs to the original."""
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _kept=weakref.WeakKeyDictionary())

    @classmethod
    def from_params(
        cls,
        params: Named,
        base_params: Named,
        mask: Mapping[str, Tensor],
        *,
        whole: Mapping[str, Tensor] | None = None,
        base_model: str | None = None,
    ) -> SparseDelta:
        """params - base_params at the mask's positions. Arguments as `select_topk`; `whole` as the class's.

        A tied parameter is stored once, under its first name in `params`; `mask` and `base_params` may use another.
        """
        function = "SparseDelta.from_params"
        after = named_tensors(function, "params", params)
        before = named_tensors(function, "base_params", base_params)
        positions, values, shapes = dict[str, Tensor](), dict[str, Tensor](), dict[str, torch.Size]()
        for name in mask:
            if name not in after:
                raise ValueError(f"{function}: params has no {name!r}, which mask has")
        names = by_parameter(function, "mask", mask, after, same_positions(mask))
        for name, masked in names.items():
            index, known = mask[masked], all_names(after, name)
            param = float_param(function, "params", name, after[name]).contiguous()
            base = base_param(function, name, before, param, known).to(param.device)
            check_positions(function, f"mask[{masked!r}]", index, param.numel())
            kernel, at = kernels(param.device), index.to(param.device)
            exact = torch.float64 if torch.float64 in (param.dtype, base.dtype) else torch.float32
            difference = kernel.sparse_take(param, at).to(exact) - kernel.sparse_take(base, at).to(exact)
            positions[name], values[name], shapes[name] = index.cpu(), difference.cpu(), param.shape
        copies = {name: tensor.detach().cpu().clone() for name, tensor in Parameters((whole or {}).items()).items()}
        return cls(positions, values, shapes, whole=copies, base_model=base_model)

    @property
    def nnz(self) -> int:
        """Number of entries, without the tensors that are stored whole."""
        return sum(len(index) for index in self.positions.values())

    @property
    def density(self) -> float:
        """nnz as a share of the elements of the sparse tensors."""
        return self.nnz / max(sum(self.shapes[name].numel() for name in self.positions), 1)

    @property
    def mask(self) -> SparseMask:
        """The positions as a mask."""
        return SparseMask(self.positions, self.shapes)

    def __repr__(self) -> str:
        whole = f", {len(self.whole)} whole" if self.whole else ""
        base = f" of {self.base_model}" if self.base_model else ""
        return f"SparseDelta({self.nnz:,} entries in {len(self.positions)} tensors{whole}{base})"

    # ---- on models

    def apply_(self, module: nn.Module) -> SparseDelta:
        """Add the values to the module's parameters in place; what they overwrite is kept for `revert_`.

        A tied parameter is one: the delta may name it by any of its names, and where it holds the same under two of
        them, that is added once. Everything is checked before anything is written. Raises ValueError where a parameter
        is missing, has another shape or is not dense, is there under two names with different entries, or this delta is
        applied already.
        """
        if module in self._kept:
            raise ValueError("SparseDelta.apply_: the delta is applied to module already, expected revert_ first")
        params = self._params("SparseDelta.apply_", module)
        kept: Kept = {}
        with torch.no_grad():
            for name, param in params.items():
                kept[name] = self._read(name, param)
                self._write(name, param, self._changed(name, kept[name]))
        self._kept[module] = kept
        return self

    def revert_(self, module: nn.Module) -> None:
        """Put back, bit for bit, what `apply_` overwrote; of several deltas that share entries the last one first.

        Raises ValueError, before anything is written, where an entry is no longer what `apply_` left there: a delta
        that was applied later has to be reverted before, and a parameter that was trained since cannot be.
        """
        function = "SparseDelta.revert_"
        if module not in self._kept:
            raise ValueError(f"{function}: the delta is not applied to module, expected apply_ first")
        params, kept = self._params(function, module), self._kept[module]
        with torch.no_grad():
            for name, param in params.items():
                if not same_bits(self._read(name, param), self._changed(name, kept[name])):
                    raise ValueError(
                        f"{function}: module's {name!r} is not what apply_ left, expected deltas that were applied "
                        "later to be reverted first, and no training in between"
                    )
            for name, param in params.items():
                self._write(name, param, kept[name])
        del self._kept[module]

    def _params(self, function: str, module: nn.Module) -> dict[str, Tensor]:
        """The module's parameters that the delta changes, checked, detached."""
        params = Parameters.of_module(module)
        self.check(params, function, "module")
        names = by_parameter(function, "the delta", self.shapes, params, self._same)
        return {name: params[name].detach() for name in names.values()}

    def _same(self, a: str, b: str) -> bool:
        """Whether two names hold the same difference."""
        if a in self.whole or b in self.whole:
            return a in self.whole and b in self.whole and same_bits(self.whole[a], self.whole[b])
        return torch.equal(self.positions[a], self.positions[b]) and same_bits(self.values[a], self.values[b])

    def _read(self, name: str, param: Tensor) -> Tensor:
        if name in self.whole:
            return param.clone()
        taken: Tensor = kernels(param.device).sparse_take(param, self.positions[name].to(param.device))
        return taken

    def _changed(self, name: str, old: Tensor) -> Tensor:
        """What `apply_` makes of `old`."""
        return self.whole[name].to(old.device, old.dtype) if name in self.whole else added(old, self.values[name])

    def _write(self, name: str, param: Tensor, values: Tensor) -> None:
        if name in self.whole:
            param.copy_(values)
        else:
            at = self.positions[name].to(param.device)
            kernels(param.device).sparse_put_(param, at, values.to(param.device))

    def check(self, params: Mapping[str, Tensor], function: str, argument: str) -> None:
        """Raises ValueError unless `params` has a dense tensor of the right shape for everything in the delta."""
        for name, shape in self.shapes.items():
            if name not in params:
                raise ValueError(f"{function}: {argument} has no parameter {name!r}, which the delta has")
            if params[name].shape != shape:
                came = tuple(params[name].shape)
                raise ValueError(f"{function}: {argument}'s {name!r} has shape {came}, expected {tuple(shape)}")
            if not params[name].is_contiguous():
                raise ValueError(f"{function}: {argument}'s {name!r} is not dense, expected contiguous memory")

    # ---- with each other

    def __radd__(self, other: object) -> SparseDelta:
        """sum() begins with 0."""
        return self * 1 if type(other) is int and other == 0 else NotImplemented

    def __add__(self, other: object) -> SparseDelta:
        """Both together: a language's and a task's, say. Values at common positions add up."""
        if not isinstance(other, SparseDelta):
            return NotImplemented
        base = common_base(self.base_model, other.base_model)
        names = dict.fromkeys((*self.shapes, *other.shapes))
        for name in names:
            if name in self.shapes and name in other.shapes:
                if self.shapes[name] != other.shapes[name]:
                    shapes = tuple(self.shapes[name]), tuple(other.shapes[name])
                    raise ValueError(
                        f"SparseDelta +: {name!r} has shape {shapes[0]} in one and {shapes[1]} in the other"
                    )
                if name in self.whole or name in other.whole:
                    raise ValueError(f"SparseDelta +: both hold {name!r}, expected whole tensors in one of them alone")
        positions, values = dict(self.positions), dict(self.values)
        for name, index in other.positions.items():
            if name in positions:
                positions[name], values[name] = merged(positions[name], values[name], index, other.values[name])
            else:
                positions[name], values[name] = index, other.values[name]
        whole = {**self.whole, **other.whole}
        return SparseDelta(positions, values, {**self.shapes, **other.shapes}, whole=whole, base_model=base)

    def __mul__(self, factor: float) -> SparseDelta:
        """Every value times `factor`; whole tensors are no differences and stay as they are."""
        scale = number("SparseDelta *", "factor", factor)
        values = {name: value * scale for name, value in self.values.items()}
        return SparseDelta(self.positions, values, self.shapes, whole=self.whole, base_model=self.base_model)

    __rmul__ = __mul__

    # ---- on disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file through a temporary name: `<name>.positions`, `<name>.values`, `<name>.whole`, and
        metadata: base_model, shapes and their hash, dtype of the values, k, the sha256 of the contents.

        Raises OSError naming the file where it cannot be written (what was there stays), RuntimeError where another
        process writes it.
        """
        self._save(path, {})

    def _save(self, path: str | os.PathLike[str], more: Mapping[str, str]) -> None:
        tensors = dict[str, Tensor]()
        for name, index in self.positions.items():
            tensors[name + _POSITIONS], tensors[name + _VALUES] = index, self.values[name]
        tensors |= {name + _WHOLE: tensor for name, tensor in self.whole.items()}
        dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in self.values.values()})
        metadata = {**files.shape_metadata(FORMAT, self.shapes), "k": str(self.nnz), "dtype": ",".join(dtypes)}
        if self.base_model is not None:
            metadata["base_model"] = self.base_model
        files.write(path, tensors, {**metadata, **more})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseDelta:
        """Read what `save` wrote, or a published file of composable-sft (`pytorch_diff.bin`, or its folder).

        Raises ValueError naming the file, the tensor and the reason where it is truncated, altered, foreign or
        inconsistent.
        """
        path = Path(path)
        if composable.is_composable(path):
            content = composable.read(path)
            try:
                return cls(**content)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{composable.file_of(path)}: {error}") from error
        found = files.Checkpoint(path)
        shapes = files.decode_shapes(found, FORMAT)
        positions, values, whole = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
        for tensor in found:
            name, dot, kind = tensor.rpartition(".")
            if dot + kind == _POSITIONS:
                positions[name] = files.read_positions(found, tensor, name, shapes)
            elif dot + kind == _VALUES:
                values[name] = found[tensor].clone()
            elif dot + kind == _WHOLE and shapes.get(name) == found[tensor].shape:
                whole[name] = found[tensor].clone()
            else:
                raise found.error(tensor, "is neither positions, values nor a whole tensor of the metadata's shape")
        for name in positions.keys() | values.keys():
            missing = _POSITIONS if name not in positions else _VALUES if name not in values else None
            if missing:
                raise found.error(name + missing, "is missing")
            _named(found, name + _VALUES, check_values, "SparseDelta.load", name, values[name], len(positions[name]))
        absent = shapes.keys() - positions.keys() - whole.keys()
        if absent or found.metadata.get("k") != str(sum(map(len, positions.values()))):
            raise found.error("metadata", f"promises other tensors than there are (k, or {sorted(absent)})")
        found.verify()
        return cls(positions, values, shapes, whole=whole, base_model=found.metadata.get("base_model"))


def load_into(model: nn.Module, path: str | os.PathLike[str], *, whole: bool = True) -> SparseDelta:
    """Load a delta and apply it to `model`, which is untouched where anything fails.

    Args:
        model: the module that is changed in place.
        path: a file of `SparseDelta.save`, or one of composable-sft's.
        whole: False leaves out the tensors that the file stores whole: a language's file holds the head of its own
            task.

    Returns:
        The SparseDelta, for `revert_`.

    Raises:
        ValueError: naming the file and the reason.

    Example:
        >>> import tempfile, torch
        >>> from fastdistil.sparse import SparseDelta, load_into
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> delta = SparseDelta({"weight": torch.tensor([1])}, {"weight": torch.ones(1)}, {"weight": (2, 2)})
        >>> folder = tempfile.TemporaryDirectory()
        >>> delta.save(f"{folder.name}/task.safetensors")
        >>> load_into(model, f"{folder.name}/task.safetensors")
        SparseDelta(1 entries in 1 tensors)
        >>> model.weight.tolist()
        [[0.0, 1.0], [0.0, 0.0]]
        >>> folder.cleanup()
    """
    delta = SparseDelta.load(path)
    if not whole:
        delta = SparseDelta(delta.positions, delta.values, delta.shapes, base_model=delta.base_model)
    try:
        return delta.apply_(model)
    except ValueError as error:
        raise ValueError(f"load_into: {path}: {error}") from error


def _named(found: files.Checkpoint, tensor: str, check: Callable[..., None], *arguments: object) -> None:
    try:
        check(*arguments)
    except ValueError as error:
        raise found.error(tensor, str(error)) from error
