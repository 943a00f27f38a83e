"""Heads that lie on several ranks: which of them are split over the vocabulary, and which are shards of FSDP.

A tensor-parallel head and an FSDP2 shard look alike: DTensors, Shard(0) over a mesh of one dimension. But under tensor
parallelism the ranks have the same tokens, and a rank's rows are its part of every token's logits; under FSDP each rank
has tokens of its own, and needs the whole head. torch keeps no mark on the tensor; FSDP's states know their parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdistil.losses._check import no_zero3
from fastdistil.ops.shards import Shard, Whole, gather

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class Heads:
    """What a loss gets, by argument: plain tensors, whole or this rank's rows of the vocabulary."""

    tensors: dict[str, Tensor | None]
    group: ProcessGroup | None  # over whose ranks the vocabulary is split
    shards: dict[str, Shard] = field(default_factory=dict)  # of those tensors that were gathered


def whole_rows(hidden: Any) -> Any:
    """Hidden states, all rows of them where sequence parallelism has split these: the vocabulary is split over the same
    ranks, so that each needs every row. Their gradient is the same on all ranks, and each takes its own rows of it."""
    return hidden.full_tensor() if _is_distributed(hidden) else hidden


def resolve(
    function: str, heads: Mapping[str, Any], hidden: Tensor, group: ProcessGroup | None, whole: bool = False
) -> Heads:
    """Weights and biases by argument as plain tensors. hidden: of the student, where they are needed. Every rank whose
    heads are shards of FSDP has to call, also one without tokens.

    whole: no part of a vocabulary will do; a tensor-parallel head is made whole on each rank."""
    for name, x in heads.items():
        _refuse_other_shards(function, name, x)
    if not any(_is_distributed(x) for x in heads.values()):
        return Heads(dict(heads), group)
    found = Heads(dict(heads), group)
    groups = dict[str, Any]()  # over which each head is split, None for a whole one
    known = dict[int, Shard]()  # by FSDP's parameter, of which two sides may share one
    for name, x in heads.items():
        if x is None:
            found.tensors[name] = None
            continue
        if not _is_distributed(x):
            found.tensors[name], groups[name] = x, None
            continue
        parameter = _fsdp_parameter(x)
        if parameter is None:
            part, groups[name] = _vocabulary_part(function, name, x, group)
            found.tensors[name] = x.full_tensor() if whole else part
            if whole:
                groups[name] = None
            continue
        shard, groups[name] = _shard(function, name, x, parameter, hidden.device)
        found.shards[name] = known.setdefault(id(parameter[0]), shard)
        if group is not None and groups[name] is None:
            raise ValueError(
                f"{function}: group came, and {name} is a shard of fully_shard, whose ranks have tokens of their own; "
                "expected no group with it"
            )
        if whole and groups[name] is not None:
            raise ValueError(
                f"{function}: {name} is split by fully_shard and over the vocabulary ({tuple(x.placements)}), expected "
                "one of them"
            )
    _one_split(function, heads, groups, found)
    if found.shards:
        shared = gather(found.shards.values())
        for name, x in found.shards.items():
            found.tensors[name] = shared[id(x)].detach().requires_grad_(bool(heads[name].requires_grad))
    return found


def whole_head(function: str, name: str, x: Any) -> Any:
    """A weight or bias as a plain tensor, made whole if need be; its gradient goes back to where the parts are."""
    _refuse_other_shards(function, name, x)
    if not _is_distributed(x):
        return x
    parameter = _fsdp_parameter(x)
    if parameter is None:
        _refuse_copies(function, name, x)
        return x.full_tensor()
    shard, group = _shard(function, name, x, parameter, x.device)
    if group is not None:
        raise ValueError(f"{function}: {name} is split over the vocabulary ({x.placements}), expected a whole head")
    return Whole.apply(shard, shard.local)  # type: ignore[no-untyped-call]


def columns_here(
    function: str, student: Any, teacher: Any, group: ProcessGroup | None
) -> tuple[Tensor, Tensor, ProcessGroup | None]:
    """This rank's columns of logits that are DTensors, and the group over whose ranks the vocabulary is split."""
    logits = {"student_logits": student, "teacher_logits": teacher}
    if not any(_is_distributed(x) for x in logits.values()):
        return student, teacher, group
    found: list[Tensor] = []
    for name, x in logits.items():
        placements: Any = getattr(x, "placements", ())
        over = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
        if len(over) > 1 or (over and not placements[over[0]].is_shard(x.ndim - 1)):
            raise ValueError(
                f"{function}: {name} is a DTensor placed as {tuple(placements)}, expected one split over the "
                f"vocabulary (Shard({x.ndim - 1}) over one dimension of its mesh), a replicated one or a plain tensor: "
                f"{name}.redistribute(...) makes it one"
            )
        own = x.device_mesh.get_group(over[0]) if over else None
        if found and (own is None) != (group is None):
            raise ValueError(
                f"{function}: {name} is {'whole' if own is None else f'placed as {tuple(placements)}'}, expected as "
                "student_logits: both split over the vocabulary, or none of them"
            )
        if own is not None and group is not None and own.group_name != group.group_name:
            raise ValueError(f"{function}: {name} is split over {own.group_name!r}, expected {group.group_name!r}")
        group = own if not found else group
        found.append(x.to_local() if _is_distributed(x) else x)
    return found[0], found[1], group


def _is_distributed(x: object) -> bool:
    return hasattr(x, "device_mesh")


def _refuse_other_shards(function: str, name: str, x: Any) -> None:
    no_zero3(function, name, x)
    if getattr(x, "_fsdp_flattened", False) and x.ndim != 2 and name.endswith("weight"):
        raise ValueError(
            f"{function}: {name} has shape {tuple(x.shape)}, a part of a flat parameter of FullyShardedDataParallel "
            "(FSDP1), expected a whole head, or one under FSDP2 (torch.distributed.fsdp.fully_shard)"
        )


def _fsdp_parameters() -> Iterator[tuple[Any, Any]]:
    """Each parameter that fully_shard manages in this process, with its group; none where it was never imported.

    torch has no public way to ask. Where a later one has other names this raises: to find nothing would be to take
    shards for a split vocabulary."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    for reference in list(_module_state_mapping.values()):
        state = reference()
        if isinstance(state, FSDPState):
            for group in state._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    yield parameter, group


def _fsdp_parameter(x: Any) -> tuple[Any, Any] | None:
    """FSDP's parameter and group of a shard: the module's own tensor, or one in the same memory, as detach gives it.
    A rank without rows has memory, too, of FSDP's padding."""
    for parameter, group in _fsdp_parameters():
        if parameter.sharded_param is x or getattr(parameter, "_sharded_post_forward_param", None) is x:
            return parameter, group
    memory, shape = x._local_tensor.untyped_storage().data_ptr(), x.shape
    for parameter, group in _fsdp_parameters():
        shard = parameter.sharded_param
        if shard.shape != shape or shard.placements != x.placements or memory == 0:
            continue
        if shard._local_tensor.untyped_storage().data_ptr() == memory:
            return parameter, group
    return None


def _shard(function: str, name: str, x: Any, known: tuple[Any, Any], device: torch.device) -> tuple[Shard, Any]:
    """The shard, and the group over which FSDP found the vocabulary split already, None for a whole head."""
    parameter, of = known
    mesh, split = parameter.mesh_info, None
    if x is not parameter.sharded_param and x.device_mesh != parameter.sharded_param.device_mesh:
        x = (
            parameter.sharded_param if x.requires_grad else parameter.sharded_param.detach()
        )  # of reshard_after_forward=2
    if parameter.is_dtensor:
        spec = parameter._unsharded_dtensor_spec
        split = _split(function, name, x, spec.mesh, spec.placements)
    replicas = getattr(mesh, "replicate_process_group", None)
    group = getattr(mesh, "shard_process_group", None)  # none where parameters are replicated and not sharded
    ranks = (1 if group is None else group.size()) * (1 if replicas is None else replicas.size())
    divisor = ranks if of.gradient_divide_factor is None else of.gradient_divide_factor
    shape, dim = torch.Size(parameter._orig_size), parameter.fsdp_placement.dim
    return Shard(x.to_local(), shape, dim, device, group, replicas, float(divisor)), split


def _split(function: str, name: str, x: Any, mesh: Any, placements: Any) -> Any:
    """The group of the one dimension of the mesh that rows are split over, None for a replicated tensor."""
    over = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if not over:
        return None
    if len(over) > 1 or not placements[over[0]].is_shard(0):
        raise ValueError(
            f"{function}: {name} is placed as {tuple(placements)}, expected a DTensor sharded by rows (Shard(0)) over "
            "one dimension of its mesh, or a shard of fully_shard"
        )
    return mesh.get_group(over[0])


def _vocabulary_part(function: str, name: str, x: Any, group: ProcessGroup | None) -> tuple[Tensor, Any]:
    """This rank's rows of a head under tensor parallelism, and the group over which they are split."""
    split = _split(function, name, x, x.device_mesh, x.placements)
    if group is None:
        _refuse_copies(function, name, x)
    if group is not None and split is not None and split.group_name != group.group_name:
        raise ValueError(
            f"{function}: group is {group.group_name!r}, expected that of {name}'s mesh, {split.group_name!r}"
        )
    if split is not None and -(-x.shape[0] // split.size()) * (split.size() - 1) >= x.shape[0]:  # on every rank alike
        raise ValueError(
            f"{function}: {name} has {x.shape[0]} rows over {split.size()} ranks, one of which has none, expected more"
        )
    return x.to_local(), split


def _refuse_copies(function: str, name: str, x: Any) -> None:
    """Of a DTensor that is no parameter of FSDP, but lies as its parameters do, it cannot be told what it is."""
    if not any(parameter.sharded_param.device_mesh == x.device_mesh for parameter, _ in _fsdp_parameters()):
        return
    raise ValueError(
        f"{function}: {name} is a DTensor placed as {tuple(x.placements)} over {x.device_mesh}, over which fully_shard "
        "has split parameters, too, but it is none of them (a copy, a cast or a sum of one?). Expected the module's "
        f"own parameter, or {name}.detach(); else, where each rank has tokens of its own, "
        f"{name}.full_tensor(grad_placements=[Partial('avg')]); where all ranks have the same ones (tensor "
        f"parallelism), group={name}.device_mesh.get_group() beside it"
    )


def _one_split(function: str, heads: Mapping[str, Any], groups: Mapping[str, Any], found: Heads) -> None:
    """That all heads are split over the vocabulary alike, or none of them."""
    split = {name: group for name, group in groups.items() if group is not None}
    if not split:
        return
    first, group = next(iter(split.items()))
    for name, other in groups.items():
        if other is None or other.group_name != group.group_name:
            x, what = heads[name], "no DTensor"
            if name in found.shards:
                what = "a shard of fully_shard"
            elif _is_distributed(x):
                what = f"placed as {tuple(x.placements)}"
            raise ValueError(
                f"{function}: {name} is {what}, expected a DTensor sharded by rows (Shard(0)) over the same ranks as "
                f"{first}, as all heads then"
            )
    found.group = group
