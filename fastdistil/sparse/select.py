"""The k largest changes of a model over all of its tensors together, without ever holding them together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastdistil.backends import backends, get
from fastdistil.contracts.sparse import ALL_BUCKETS, HIGH_BUCKETS, LOW_BITS, LOW_BUCKETS
from fastdistil.sparse._check import (
    Named,
    base_param,
    chosen_names,
    entries,
    float_param,
    named_tensors,
    position_dtype,
)
from fastdistil.sparse.mask import SparseMask
from fastdistil.sparse.names import all_names

Pair = tuple[str, Tensor, Tensor]


def kernels(device: torch.device, backend: str = "auto") -> ModuleType:
    """The backend's module: C++ on a CPU; on a GPU CUDA where it was built, else Triton."""
    if backend == "auto" and device.type == "cuda" and backends()["cuda"] is True:
        backend = "cuda"
    return get("sparse", backend, device)


def select_topk(
    params: Named,
    base_params: Named,
    *,
    k: int | None = None,
    density: float | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    backend: str = "auto",
) -> SparseMask:
    """The k entries that changed most: the largest |params - base_params| over all tensors together, exactly k.

    Changes are compared in float32. Ties go to the first tensor and the lowest flat position; the result is the same on
    every backend, however many threads there are. Extra memory: 8 MiB for the histogram, as much twice while it is
    read, and less than 1 MiB per thread. Source: Ansell et al. 2022 (arXiv 2110.07560), section 3; BiStil (arXiv
    2306.01709) with density 0.08.

    A tied parameter (a head that is the embedding table) is one: of a module, a dict or pairs, tensors that are the
    same memory are counted once, under their first name; `include`, `exclude` and `base_params` may use any of them.

    Args:
        params: a module, a mapping of names to tensors, or pairs of both; float32, bfloat16, float16 and float64, also
            mixed.
        base_params: likewise, with the same shapes; what it holds beyond them is ignored. Both are read three times,
            tensor by tensor: a lazy mapping such as `fastdistil.sparse.Checkpoint` is never resident whole.
        k, density: the number of entries, or that number as a share of the elements, rounded; one of them.
        include, exclude: parts of names: only parameters with one of the former (None: all) and none of the latter
            take part.
        backend: "auto", "reference", "cpu" or "cuda".

    Returns:
        A SparseMask over the parameters that took part.

    Raises:
        TypeError, ValueError: naming the tensor, where a dtype, shape or name does not fit or a change is NaN.

    Example:
        >>> import torch
        >>> from fastdistil.sparse import select_topk
        >>> before = {"a": torch.zeros(4), "b": torch.zeros(2, 2)}
        >>> after = {"a": torch.tensor([0.1, -3.0, 0.2, 0.0]), "b": torch.tensor([[0.0, 2.0], [0.1, 0.3]])}
        >>> mask = select_topk(after, before, k=3)
        >>> mask, mask["a"].tolist(), mask["b"].tolist()
        (SparseMask(3 of 8 entries in 2 tensors), [1], [1, 3])
    """
    function = "select_topk"
    after, before = named_tensors(function, "params", params), named_tensors(function, "base_params", base_params)
    names = chosen_names(function, after, include, exclude)
    shapes, device = dict[str, torch.Size](), torch.device("cpu")
    for i, name in enumerate(names):
        tensor = float_param(function, "params", name, after[name])
        if i == 0:
            device = tensor.device
        if tensor.device != device:
            raise ValueError(f"{function}: params[{name!r}] is on {tensor.device}, expected {device} as the others")
        shapes[name] = tensor.shape
    wanted = entries(function, k, density, sum(shape.numel() for shape in shapes.values()))
    selection = _Selection(names, after, before, kernels(device, backend), device)
    threshold, ties = selection.threshold(wanted)
    return SparseMask._trusted(selection.positions(wanted, threshold, ties, shapes), shapes)


class _Selection:
    """Three passes over pairs of tensors, each pair fetched anew in every pass."""

    def __init__(
        self,
        names: Sequence[str],
        after: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        kernel: ModuleType,
        device: torch.device,
    ) -> None:
        self.names, self.after, self.before, self.kernel, self.device = names, after, before, kernel, device

    def pairs(self) -> Iterator[Pair]:
        for name in self.names:
            param = float_param("select_topk", "params", name, self.after[name]).contiguous()
            yield name, param, base_param("select_topk", name, self.before, param, all_names(self.after, name))

    def groups(self) -> Iterator[list[Pair]]:
        """Pairs that are worth one launch: on a GPU all those that already lie there; on a CPU each by itself."""
        group = list[Pair]()
        for name, param, base in self.pairs():
            resident = self.device.type != "cpu" and base.device == self.device
            if not resident and group:
                yield group
                group = []
            group.append((name, param, base.to(self.device)))
            if not resident:
                yield group
                group = []
        if group:
            yield group

    def histogram(self, buckets: int, bucket: int) -> Tensor:
        counts = torch.zeros(buckets, dtype=torch.int64, device=self.device)
        for group in self.groups():
            names, params, bases = zip(*group, strict=True)
            bad = self.kernel.sparse_histogram(params, bases, counts, bucket)
            if bad >= 0:
                raise _nan_error(names[bad], params[bad], bases[bad])
        return counts

    def threshold(self, k: int) -> tuple[int, int]:
        """Bits of the k-th largest change, and how many of the changes equal to it are among the k."""
        high, above = _nth(self.histogram(HIGH_BUCKETS, ALL_BUCKETS), k)
        if k == 0:
            return 0, 0
        low, more = _nth(self.histogram(LOW_BUCKETS, high), k - above)
        return (high << LOW_BITS) | low, k - above - more

    def positions(self, k: int, threshold: int, ties: int, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """The kept positions, all int32 ones views of one tensor: its parts' sizes need not be known before."""
        if k == 0:
            empty = {name: position_dtype(shape.numel()) for name, shape in shapes.items()}
            return {name: torch.empty(0, dtype=dtype, device=self.device) for name, dtype in empty.items()}
        flat, found, at = torch.empty(k, dtype=torch.int32, device=self.device), dict[str, Tensor](), 0
        for group in self.groups():
            names, params, bases = zip(*group, strict=True)
            wide = position_dtype(max(param.numel() for param in params)) == torch.int64
            out = flat[at:]
            if wide:
                counts, _ = self.kernel.sparse_compact(params, bases, None, threshold, ties)
                out = torch.empty(sum(counts), dtype=torch.int64, device=self.device)
            counts, used = self.kernel.sparse_compact(params, bases, out, threshold, ties)
            ties -= used
            for name, part in zip(names, torch.split(out, [*counts, len(out) - sum(counts)]), strict=False):
                found[name] = part.to(position_dtype(shapes[name].numel())) if wide else part
            at += 0 if wide else sum(counts)
        if sum(map(len, found.values())) != k:
            raise RuntimeError("select_topk: params or base_params changed between the passes of the selection")
        return found


def _nth(counts: Tensor, k: int) -> tuple[int, int]:
    """The bucket of the k-th largest, and how many lie in buckets above it."""
    total = counts.flip(0).cumsum(0)
    place = min(int(torch.searchsorted(total, k)), len(counts) - 1)
    bucket = len(counts) - 1 - place
    return bucket, int(total[place] - counts[bucket])


def _nan_error(name: str, param: Tensor, base: Tensor) -> ValueError:
    for argument, tensor in (("params", param), ("base_params", base)):
        if bool(tensor.isnan().any()):
            return ValueError(f"select_topk: {argument}[{name!r}] holds NaN, expected numbers")
    return ValueError(f"select_topk: params[{name!r}] and base_params[{name!r}] hold the same infinity in one place")
