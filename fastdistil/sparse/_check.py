"""What the sparse functions check at their doors. Messages name the function, the argument, what came and what was
wanted."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastdistil.losses._check import FLOATS, number
from fastdistil.sparse.names import Parameters, all_names
from fastdistil.suggest import meant_part

Named = nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


def named_tensors(function: str, name: str, value: Named) -> Mapping[str, Tensor]:
    """`value` as a mapping, in its own order, tied tensors once; a mapping that is no dict stays what it is, since it
    may read its tensors lazily."""
    if isinstance(value, nn.Module):
        return Parameters.of_module(value)
    if isinstance(value, dict):
        return Parameters(value.items())
    if isinstance(value, Mapping):
        return value
    found: dict[str, Tensor] = {}
    if isinstance(value, (str, os.PathLike, Tensor)):
        way = "" if isinstance(value, Tensor) else " (sparse.Checkpoint(path) is one of a safetensors file)"
        raise TypeError(
            f"{function}: {name} is {type(value).__name__}, expected a module, a mapping of names to tensors{way} or "
            "pairs"
        )
    try:
        pairs = list(value)
    except TypeError:
        raise TypeError(
            f"{function}: {name} is {type(value).__name__}, expected a module, a mapping of names to tensors or pairs"
        ) from None
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(
                f"{function}: {name} holds {type(pair).__name__}, expected pairs of a name and a tensor (as "
                "model.named_parameters() has)"
            )
        if pair[0] in found:
            raise ValueError(f"{function}: {name} holds {pair[0]!r} twice")
        found[pair[0]] = pair[1]
    return Parameters(found.items())


def float_param(function: str, argument: str, name: str, value: object) -> Tensor:
    """`value` as a detached tensor of a supported floating dtype, with memory of its own: the kernels get addresses."""
    if not isinstance(value, Tensor) or is_traceable_wrapper_subclass(value) or value.is_meta:
        came = "on the meta device" if isinstance(value, Tensor) and value.is_meta else type(value).__name__
        raise TypeError(f"{function}: {argument}[{name!r}] is {came}, expected a torch.Tensor that is there whole")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{function}: {argument}[{name!r}] has dtype {value.dtype}, expected float32, bfloat16, float16 or float64"
        )
    return value.detach()


def base_param(
    function: str, name: str, base_params: Mapping[str, Tensor], param: Tensor, names: Sequence[str] = ()
) -> Tensor:
    """θ⁰ of one parameter, dense, under `name` or another of its `names`; a lazy mapping is asked once."""
    found: object = None
    for known in dict.fromkeys((name, *names)):
        with suppress(KeyError):  # `in` would fetch a lazy mapping's tensor once more
            found = base_params[known]
            break
    else:
        raise ValueError(f"{function}: base_params has no {name!r}, which params has")
    base = float_param(function, "base_params", name, found)
    if base.shape != param.shape:
        raise ValueError(
            f"{function}: base_params[{name!r}] has shape {tuple(base.shape)}, expected {tuple(param.shape)} to match "
            "params"
        )
    return base.contiguous()


def _parts(function: str, argument: str, value: str | Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    parts = (value,) if isinstance(value, str) else tuple(value)
    for part in parts:
        if not any(part in name for name in names):
            raise ValueError(
                f"{function}: {argument} holds {part!r}, which is part of no parameter's name{meant_part(part, names)}"
            )
    return parts


def chosen_names(
    function: str,
    names: Sequence[str] | Mapping[str, Tensor],
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> list[str]:
    """The names that hold a part of `include` (None: all) and none of `exclude`; a part that fits no name is a
    ValueError, because a misspelt name would go unnoticed. Of a tied parameter any name counts."""
    known = {name: all_names(names, name) if isinstance(names, Mapping) else (name,) for name in names}
    every = [name for several in known.values() for name in several]
    wanted = None if include is None else _parts(function, "include", include, every)
    unwanted = () if exclude is None else _parts(function, "exclude", exclude, every)

    def hold(name: str, parts: Sequence[str]) -> bool:
        return any(part in alias for alias in known[name] for part in parts)

    found = [name for name in known if (wanted is None or hold(name, wanted)) and not hold(name, unwanted)]
    if not found:
        raise ValueError(f"{function}: include and exclude leave none of the {len(known)} parameters")
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes, on whatever devices: 0 is not -0, a NaN is itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.to(a.device).reshape(-1).view(torch.uint8))


def entries(function: str, k: object, density: object, total: int) -> int:
    """How many entries `k` or `density` asks for; exactly one of the two is not None."""
    if (k is None) == (density is None):
        raise ValueError(f"{function}: k is {k!r} and density is {density!r}, expected exactly one of them")
    if k is None:
        share = number(function, "density", density)
        if not 0 <= share <= 1:
            raise ValueError(f"{function}: density is {share}, expected 0 to 1")
        return round(share * total)
    count = whole_number(function, "k", k)
    if not 0 <= count <= total:
        raise ValueError(f"{function}: k is {count}, expected 0 to the {total} elements of the parameters")
    return count


def whole_number(function: str, name: str, value: Any) -> int:
    """An int, or what stands for one (numpy's integers); a bool does not."""
    if not isinstance(value, bool) and getattr(value, "dtype", None) != torch.bool:
        with suppress(TypeError):
            return operator.index(value)
    way = " (a share of all is the density)" if name == "k" and isinstance(value, float) else ""
    raise TypeError(f"{function}: {name} is {type(value).__name__}, expected an int{way}")


def position_dtype(size: int) -> torch.dtype:
    """int32, int64 for a tensor of 2^31 elements or more."""
    return torch.int32 if size < 2**31 else torch.int64


def check_positions(function: str, what: str, index: Tensor, size: int) -> None:
    """Raises unless `index` is ascending flat positions in a tensor of `size` elements, each once."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64) or index.ndim != 1:
        came = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        booleans = isinstance(index, Tensor) and index.dtype == torch.bool
        way = " (mask.flatten().nonzero().flatten() of booleans)" if booleans else ""
        raise TypeError(f"{function}: {what} is {came}, expected a vector of int32 or int64{way}")
    if len(index) and (int(index[0]) < 0 or int(index[-1]) >= size):
        raise ValueError(f"{function}: {what} goes from {index[0]} to {index[-1]}, expected 0 to {size - 1}")
    if not bool((index[1:] > index[:-1]).all()):
        raise ValueError(f"{function}: {what} is not ascending, expected sorted positions without repetition")


def check_values(function: str, name: str, value: Tensor, count: int) -> None:
    if value.dtype not in (torch.float32, torch.float64) or value.shape != (count,):
        came = f"{value.dtype} of shape {tuple(value.shape)}"
        raise ValueError(f"{function}: values[{name!r}] is {came}, expected ({count},) of float32 or float64")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{function}: values[{name!r}] holds NaN or an infinity, expected finite numbers")
