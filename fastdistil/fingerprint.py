"""Short hashes by which a run tells its own teacher, terms and data from others, cheaply: from a few sampled values."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

_VALUES = 64  # of a tensor of the data
_WEIGHTS = 4  # of a parameter: enough to tell two trainings apart
_ROWS = 8  # of the data, the first and the last among them
# What says where a teacher came from and how it runs, but not what it answers.
_PASSING = ("_name_or_path", "transformers_version", "_attn_implementation", "dtype", "torch_dtype", "use_cache")


def bare_names(names: Iterable[str], parallel: bool = False) -> dict[str, str]:
    """{name: name without what torch.compile and, where `parallel`, data parallelism put around the module}."""
    found = {}
    for name in names:
        parts = [part for part in name.split(".") if part != "_orig_mod"]
        found[name] = ".".join(parts[1:] if parallel and parts[0] == "module" else parts)
    return found


def of_teacher(teacher: nn.Module) -> str:
    """A hash of the teacher's configuration, where it has one, and of every parameter's name, shape and some values."""
    found = hashlib.sha256()
    config: Any = getattr(teacher, "config", None)
    if hasattr(config, "to_diff_dict"):  # what is not the default: a later transformers may know more defaults
        said = {name: x for name, x in config.to_diff_dict().items() if name not in _PASSING}
        found.update(json.dumps(said, sort_keys=True, default=str).encode())
    parameters = dict(teacher.named_parameters())
    for name, bare in bare_names(parameters).items():
        found.update(f"{bare} ".encode())
        _add_tensor(found, parameters[name], _WEIGHTS)
    return found.hexdigest()[:16]


def of_data(data: Sequence[Any]) -> dict[str, Any] | None:
    """A hash of the length and of some rows' structure, texts and integers, and those rows' mean absolute values.

    The rows go from the first to the last. None where a second look finds others, as rows that are drawn when read.
    """
    count = len(data)
    rows = sorted({i * (count - 1) // (_ROWS - 1) for i in range(_ROWS)})
    first, second = ([_look(data[i]) for i in rows] for _ in range(2))
    looks = [
        {"hash": _short(repr((count, [said for said, _ in look]))), "sizes": [size for _, size in look]}
        for look in (first, second)
    ]
    return looks[0] if same_data(*looks) else None


def same_data(one: Any, other: Any) -> bool:
    """Whether two fingerprints of data are of the same data, also where they hold several results of `of_data`. What a
    teacher computed again may differ in its last bits, which no hash would forgive."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return False
        if one.keys() == {"hash", "sizes"}:
            pairs = zip(one["sizes"], other["sizes"], strict=False)
            return bool(
                one["hash"] == other["hash"] and all(math.isclose(x, y, rel_tol=1e-2, abs_tol=1e-9) for x, y in pairs)
            )
        return all(same_data(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):  # JSON makes a list of a tuple
        return len(one) == len(other) and all(same_data(x, y) for x, y in zip(one, other, strict=True))
    return bool(one == other)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _look(row: Any) -> tuple[str, float]:
    """A row's hash without its floating-point values, and the mean absolute value of some of those."""
    found, sizes = hashlib.sha256(), list[float]()
    for part in _parts(row):
        if not isinstance(part, Tensor):
            found.update(f"{part}\0".encode())
        elif part.is_floating_point():
            found.update(f"{part.dtype} {tuple(part.shape)}\0".encode())
            sizes += _picked(part, _VALUES).double().nan_to_num().abs().tolist()
        else:
            _add_tensor(found, part, _VALUES)
    return found.hexdigest(), float(f"{sum(sizes) / max(1, len(sizes)):.4g}")


def _parts(value: Any) -> Iterator[Any]:
    """What a row holds, in order: tensors and texts. Of objects of unknown kinds, their type."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, float):
        yield torch.tensor(value, dtype=torch.float64)
    elif isinstance(value, (bool, int, str, bytes, type(None))):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, Mapping):
        for key in value:
            yield f"key {key!r}"
            yield from _parts(value[key])
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} items"
        for item in value:
            yield from _parts(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield field.name
            yield from _parts(getattr(value, field.name))
    elif getattr(getattr(value, "dtype", None), "kind", "") in ("b", "i", "u", "f"):  # numpy's arrays and numbers
        yield torch.as_tensor(value)
    else:
        yield type(value).__qualname__


def _add_tensor(found: Any, tensor: Tensor, values: int) -> None:
    """Dtype, shape and `values` entries in their own bits."""
    found.update(f"{tensor.dtype} {tuple(tensor.shape)}\0".encode())
    found.update(_picked(tensor, values).view(torch.uint8).numpy().tobytes())


def _picked(tensor: Tensor, values: int) -> Tensor:
    """`values` entries of a tensor, evenly spread, (n,) on the CPU; none of one that has none or is not dense."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
        return torch.empty(0)
    places = torch.linspace(0, tensor.numel() - 1, min(values, tensor.numel()), dtype=torch.float64).long()
    index = torch.unravel_index(places.to(tensor.device), tensor.shape) if tensor.dim() else (...,)
    return tensor.detach()[index].reshape(-1).cpu().contiguous()
