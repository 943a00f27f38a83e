"""Memory of large results. On a CPU it is kept from one call to the next (csrc/cpu/pool.h says why)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fastdistil import _C

# Below, two huge pages would be mostly waste. The C library's allocator keeps freed memory of up to 32 MiB too, but not
# always: it gives back what lies at the end of its heap.
SMALLEST_POOLED = 4 << 20


def new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """like.new_empty(shape, dtype=dtype); large CPU tensors from the pool."""
    dtype = dtype or like.dtype
    size = prod(shape) * dtype.itemsize
    # With deterministic algorithms new_empty may be asked to fill what it returns.
    small = size < SMALLEST_POOLED or like.device.type != "cpu"
    if small or torch.are_deterministic_algorithms_enabled() or not _C.pool_available():
        return like.new_empty(shape, dtype=dtype)
    return torch.frombuffer(_C.PooledMemory(size), dtype=dtype).view(tuple(shape))


def empty_cache() -> None:
    """Return the CPU memory that past results left for the next ones to the system.

    Large gradients (4 MiB and more) of the losses keep their memory for the next call, four of any size and more of
    them up to 256 MiB together, which saves the page faults of a fresh one. The system takes it back by itself when
    memory is short. On a GPU torch.cuda.empty_cache is what does this.

    Example:
        >>> import torch, fastdistil
        >>> logits = torch.zeros(64, 30_000, requires_grad=True)
        >>> fastdistil.logit_loss(logits, torch.zeros(64, 30_000)).backward()
        >>> logits.grad = None  # its memory is kept for the next gradient
        >>> fastdistil.empty_cache()
    """
    _C.pool_release()
