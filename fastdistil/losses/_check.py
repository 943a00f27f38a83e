"""What every loss checks at its door. Messages name the function, the argument, what came and what was wanted."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


def float_tensor(function: str, name: str, value: object) -> Tensor:
    """`value` as a tensor of a supported floating dtype."""
    if not isinstance(value, Tensor):
        raise no_tensor(function, name, value)
    no_dtensor(function, name, value)
    no_zero3(function, name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{function}: {name} has dtype {value.dtype}, expected float32, bfloat16, float16 or float64")
    return usable(value)


def no_tensor(function: str, name: str, value: object, wanted: str = "a torch.Tensor") -> TypeError:
    """With what makes a tensor of that which is mostly given in the place of one."""
    way = ""
    if type(value).__module__.partition(".")[0] == "numpy":
        way = f" (torch.from_numpy({name}) is one)"
    elif isinstance(value, (list, tuple, int, float)):
        way = f" (torch.tensor({name}) is one)"
    elif isinstance(value, torch.nn.Module):
        way = f" ({name}.weight is the one of a linear layer)"
    elif hasattr(value, "logits"):
        way = f" ({name}.logits of a model's output)"
    return TypeError(f"{function}: {name} is {type(value).__name__}, expected {wanted}{way}")


def no_dtensor(function: str, name: str, value: Tensor) -> None:
    """Kernels read one rank's memory, and would take its part for the whole."""
    if not hasattr(value, "device_mesh"):
        return
    placements: object = getattr(value, "placements", None)
    raise TypeError(
        f"{function}: {name} is a DTensor placed as {placements}, expected a plain tensor: {name}.full_tensor() where "
        "all ranks have the same rows (tensor and sequence parallelism); of a parameter under fully_shard, whose ranks "
        f"have rows of their own, {name}.full_tensor(grad_placements=[Partial('avg')])"
    )


def no_zero3(function: str, name: str, value: object) -> None:
    """DeepSpeed leaves parameters that it has split without memory, and gives them attributes of its own."""
    if not hasattr(value, "ds_id") or getattr(getattr(value, "ds_status", None), "name", "") == "AVAILABLE":
        return
    raise ValueError(
        f"{function}: {name} is split by DeepSpeed's ZeRO-3 (shape {tuple(getattr(value, 'shape', ()))} of "
        f"{tuple(getattr(value, 'ds_shape', ()))} here), expected a whole parameter: call the loss and its backward "
        "inside of deepspeed.zero.GatheredParameters, or train with ZeRO-2 or FSDP2 (fully_shard)"
    )


def usable(value: Tensor) -> Tensor:
    """`value`; where it was made under torch.inference_mode, so that autograd would refuse to keep it for a backward
    pass, an ordinary tensor in the same memory. torch.compile cannot ask, and refuses such a tensor itself."""
    if torch.compiler.is_compiling() or not value.is_inference() or torch.is_inference_mode_enabled():
        return value
    ordinary = torch.empty(0, dtype=value.dtype, device=value.device)
    return ordinary.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())


def no_tangents(function: str, **tensors: object) -> None:
    """The losses have no forward-mode derivative, which torch would take for 0."""
    if forward_ad._current_level < 0:  # the usual case: outside of torch.func.jvp, jacfwd and dual_level
        return
    for name, value in tensors.items():
        for x in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(x, Tensor) and _has_tangent(x):
                raise NotImplementedError(
                    f"{function}: {name} carries a tangent of forward-mode differentiation (torch.func.jvp, jacfwd or "
                    "a dual tensor), expected none: the loss has a reverse-mode derivative alone (backward)"
                )


def _has_tangent(x: Tensor) -> bool:
    """In any of the wrappers that nested transforms of torch.func put around a tensor."""
    while True:
        if not _functorch.is_batchedtensor(x) and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]
            return True
        if not _functorch.is_functorch_wrapped_tensor(x):
            return False
        x = _functorch.get_unwrapped(x)


def one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Floating tensors as they are where their dtypes agree, else in float64 where one of them is, else in float32."""
    if len({x.dtype for x in tensors}) == 1:
        return [*tensors]
    wide = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return [x.to(wide) for x in tensors]


def way_to_integers(name: str, value: Tensor) -> str:
    return f" ({name}.long() has that)" if value.dtype in (*FLOATS, torch.bool, torch.uint8, torch.int8) else ""


def constant(function: str, name: str, value: Tensor) -> None:
    """The teacher's side never gets a gradient."""
    if value.requires_grad:
        raise ValueError(
            f"{function}: {name} requires grad, expected a constant (run the teacher under torch.no_grad() "
            f"or pass {name}.detach())"
        )


def same_device(function: str, name: str, value: Tensor, other: str, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{function}: {name} is on {value.device}, expected {device} to match {other}")


def same_shape(function: str, name: str, value: Tensor, other: str, shape: torch.Size, columns: str = "") -> None:
    """columns: the way out where the last dimension alone is another one."""
    if value.shape != shape:
        way = f" ({columns})" if columns and value.shape[:-1] == shape[:-1] and shape else ""
        raise ValueError(
            f"{function}: {name} has shape {tuple(value.shape)}, expected {tuple(shape)} to match {other}{way}"
        )


OTHER_VOCABULARY = "for two vocabularies pass a vocab_map, or see projected_logit_loss and uld_loss"


def one_of(function: str, name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{function}: {name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")


def number(function: str, name: str, value: object) -> float:
    """A finite Python number (a bool or a tensor is neither)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        way = f" ({name}.item() is one)" if isinstance(value, Tensor) else ""
        raise TypeError(f"{function}: {name} is {type(value).__name__}, expected a number{way}")
    result = float(value)
    if not abs(result) < math.inf:  # not isfinite, which torch.compile cannot trace where the number changes
        raise ValueError(f"{function}: {name} is {result}, expected a finite number")
    return result


def positive(function: str, name: str, value: object) -> float:
    result = number(function, name, value)
    if result <= 0:
        raise ValueError(f"{function}: {name} is {result}, expected more than 0")
    return result


def row_weight(function: str, weight: object, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`weight` (one entry a row; bool or number) as a flat tensor of `dtype` (float32 or float64)."""
    if not isinstance(weight, Tensor):
        raise no_tensor(function, "weight", weight)
    no_dtensor(function, "weight", weight)
    if weight.dtype.is_complex:
        raise TypeError(f"{function}: weight has dtype {weight.dtype}, expected bool, integer or floating")
    same_shape(function, "weight", weight, "the rows", shape)
    same_device(function, "weight", weight, "the rows", device)
    constant(function, "weight", weight)
    return usable(weight).reshape(-1).to(dtype)


def given_items(
    function: str,
    reduction: str,
    num_items: object,
    device: torch.device,
    dtype: torch.dtype,
    name: str = "num_items",
) -> Tensor | float | None:
    """num_items as a tensor () or a number, which is NaN for 0 (`per_item`); None where the loss counts for itself."""
    if num_items is None:
        return None
    if reduction != "mean":
        raise ValueError(f"{function}: {name} came with reduction={reduction!r}, expected reduction='mean'")
    if not isinstance(num_items, Tensor):
        found = number(function, name, num_items)
        if found < 0:
            raise ValueError(f"{function}: {name} is {found}, expected at least 0")
        return math.nan if found == 0 else found
    if num_items.numel() != 1:
        raise ValueError(
            f"{function}: {name} has shape {tuple(num_items.shape)}, expected one number ({name}.sum(), where these "
            "are the parts of a batch)"
        )
    same_device(function, name, num_items, "the rows", device)
    return num_items.detach().reshape(()).to(dtype)


def per_item(weight: Tensor, items: Tensor | float, zeros: bool) -> Tensor:
    """weight / items, and NaN for 0 items but where the weight is 0; `zeros`: whether it is anywhere."""
    share = weight / items
    if not isinstance(items, Tensor) and items == items:
        return share
    share = share.nan_to_num(math.nan, math.nan, math.nan)
    return torch.where(weight == 0, 0.0, share) if zeros else share


def row_scale(
    function: str,
    rows: int,
    weight: Tensor | None,
    reduction: str,
    num_items: object,
    device: torch.device,
    dtype: torch.dtype,
    items_name: str = "num_items",
) -> Tensor:
    """The factor of each row (rows,): w/Σw or w/num_items for "mean" (0 where w = 0), w for "sum" and "none".

    `weight` is what `row_weight` returned. Nothing here waits for the device.
    """
    items = given_items(function, reduction, num_items, device, dtype, items_name)
    if weight is None and items is None:
        return torch.full((rows,), 1 / max(rows, 1) if reduction == "mean" else 1.0, device=device, dtype=dtype)
    weights = torch.ones(rows, device=device, dtype=dtype) if weight is None else weight
    if items is not None:
        return per_item(weights, items, zeros=weight is not None)
    if reduction != "mean":
        return weights
    total = weights.sum()
    return weights / torch.where(total == 0, torch.ones_like(total), total)
