"""How fast a device multiplies matrices in float64: where the low-rank forms may compute in it."""

from __future__ import annotations

from functools import cache

import torch

# Times as long as in float32 (without TF32): data sheets, not a record.
_CPU, _NVIDIA, _AMD, _OTHER = 2.0, {(8, 0): 1.0, (9, 0): 1.0, (10, 0): 2.0}, ("gfx90a", "gfx942", "gfx950"), 32.0


@cache
def cost(device: torch.device) -> float:
    """A float64 matrix product's time, in float32 ones."""
    if device.type == "cpu":
        return _CPU
    if device.type != "cuda":
        return _OTHER
    if torch.version.hip is not None:
        return 1.0 if torch.cuda.get_device_properties(device).gcnArchName.startswith(_AMD) else _OTHER
    return _NVIDIA.get(torch.cuda.get_device_capability(device), _OTHER)


def is_fast(device: torch.device) -> bool:
    """Whether float64 costs so little more that exactness is not worth another way."""
    return cost(device) <= 2.0
