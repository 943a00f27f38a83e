"""Parameters by name. A tied one, such as a head that is the embedding table, is one parameter: it is counted, chosen
and trained once, under the first of its names, and found under each of them. Names are those of the bare module,
without the `_orig_mod` of torch.compile, and found with and without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastdistil.fingerprint import bare_names

_COMPILED = "_orig_mod."


class Parameters(Mapping[str, Tensor]):
    """Tensors by their first names; `in` and `[]` take every name of a tensor. Names whose tensors are the same object,
    or the same memory in the same layout, are names of one tensor."""

    def __init__(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._first: dict[str, str] = {}
        self._names: dict[str, list[str]] = {}
        seen: dict[object, str] = {}
        for given, tensor in pairs:
            name = _bare(given)
            first = seen.setdefault(_identity(tensor), name)
            self._tensors.setdefault(first, tensor)
            self._first[name] = first
            self._names.setdefault(first, []).append(name)

    @classmethod
    def of_module(cls, module: nn.Module, buffers: bool = False) -> Parameters:
        pairs = list(module.named_parameters(remove_duplicate=False))
        return cls([*pairs, *module.named_buffers(remove_duplicate=False)] if buffers else pairs)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self.first(name)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and _bare(name) in self._first

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def first(self, name: str) -> str:
        return self._first[_bare(name)]

    def names(self, name: str) -> Sequence[str]:
        return self._names[self.first(name)]


def _bare(name: str) -> str:
    return bare_names([name])[name] if _COMPILED in name else name


def _identity(tensor: Any) -> object:
    """Equal for tensors that are one. What is no dense tensor in memory is nobody else."""
    if not isinstance(tensor, Tensor) or is_traceable_wrapper_subclass(tensor) or tensor.is_meta:
        return id(tensor)
    if tensor.layout != torch.strided or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def all_names(params: Mapping[str, Any], name: str) -> Sequence[str]:
    """Every name of the parameter `name`, which `params` has."""
    return params.names(name) if isinstance(params, Parameters) else (name,)


def found_name(tensors: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of a parameter's names that `tensors` has."""
    return next((name for name in names if name in tensors), None)


def by_parameter(
    function: str, argument: str, names: Iterable[str], params: Mapping[str, Any], same: Callable[[str, str], bool]
) -> dict[str, str]:
    """`names`, which `params` has, by the first name of their parameters.

    Raises ValueError where two of them are one parameter and `argument` does not hold the `same` under both.
    """
    found: dict[str, str] = {}
    for name in names:
        first = params.first(name) if isinstance(params, Parameters) else name
        other = found.setdefault(first, name)
        if other != name and not same(other, name):
            raise ValueError(
                f"{function}: {argument} holds {other!r} and {name!r}, which are names of one parameter, and not the "
                "same under both, expected one of them"
            )
    return found


def same_positions(mask: Mapping[str, Tensor]) -> Callable[[str, str], bool]:
    return lambda a, b: torch.equal(mask[a], mask[b])
