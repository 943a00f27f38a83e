"""`fastdistil sparse`: selections and differences on checkpoints on disk, tensor by tensor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fastdistil.losses._check import FLOATS
from fastdistil.sparse import composable, files
from fastdistil.sparse._check import chosen_names
from fastdistil.sparse.delta import SparseDelta
from fastdistil.sparse.files import Checkpoint
from fastdistil.sparse.mask import FORMAT as MASK_FORMAT
from fastdistil.sparse.mask import SparseMask
from fastdistil.sparse.select import kernels, select_topk
from fastdistil.sparse.sums import added
from fastdistil.writing import naming


class _Part(Mapping[str, Tensor]):
    """Some of a checkpoint's tensors, still read one by one."""

    def __init__(self, whole: Checkpoint, names: Sequence[str]) -> None:
        self.whole, self.names = whole, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.whole[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def select(
    tuned: Path,
    base: Path,
    out: Path,
    *,
    k: int | None = None,
    density: float | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    whole: Sequence[str] = (),
    base_model: str | None = None,
) -> SparseDelta:
    """Write the k largest changes from checkpoint `base` to `tuned` as a delta; tensors whose name holds a part of
    `whole` are stored as they are. Raises ValueError naming file and tensor."""
    if k is None and density is None:
        density = 0.08  # BiStil's
    files.check_target(out)
    after, before = Checkpoint(tuned), Checkpoint(base)
    floating = [name for name, entry in after.entries.items() if entry.dtype in FLOATS]
    if not floating:
        raise ValueError(f"{tuned}: holds no floating tensor")
    kept = chosen_names("sparse select", floating, whole, None) if whole else []
    sparse = chosen_names("sparse select", [n for n in floating if n not in kept], include or None, exclude or None)
    mask = select_topk(_Part(after, sparse), before, k=k, density=density)
    delta = SparseDelta.from_params(
        _Part(after, sparse), before, mask, whole={n: after[n] for n in kept}, base_model=base_model
    )
    delta.save(out)
    return delta


def info(path: Path) -> list[str]:
    """What a delta, a mask or a file of composable-sft holds, line by line."""
    kind = None if composable.is_composable(path) else files.Checkpoint(path).metadata.get("format")
    if kind == MASK_FORMAT:
        mask = SparseMask.load(path)
        rows = [_row(name, len(index), mask.shapes[name]) for name, index in mask.items()]
        return [f"mask: {mask.nnz:,} of {mask.numel:,} entries, density {mask.density:.4f}", *rows]
    delta = SparseDelta.load(path)
    total = sum(delta.shapes[name].numel() for name in delta.positions)
    dtypes = ", ".join(sorted({str(v.dtype).removeprefix("torch.") for v in delta.values.values()})) or "none"
    head = [
        f"delta: {delta.nnz:,} of {total:,} entries, density {delta.density:.4f}, values {dtypes}",
        f"base model: {delta.base_model or 'not named'}; shapes {files.hash_shapes(delta.shapes)}",
    ]
    rows = [_row(name, len(index), delta.shapes[name]) for name, index in delta.positions.items()]
    return [*head, *rows, *(f"  {name}  {tuple(tensor.shape)}, whole" for name, tensor in delta.whole.items())]


def _row(name: str, count: int, shape: Sequence[int]) -> str:
    return f"  {name}  {tuple(shape)}, {count:,} entries"


def apply(base: Path, delta_path: Path, out: Path) -> SparseDelta:
    """Write the checkpoint `base` plus the delta to `out`: a file for a file, a folder (with all that the base's holds)
    for a folder. `out` must not exist; it appears whole or not at all."""
    found, delta = Checkpoint(base), SparseDelta.load(delta_path)
    for name, shape in delta.shapes.items():
        if name not in found:
            raise ValueError(f"{base}: has no tensor {name!r}, which {delta_path} changes")
        if found.entries[name].shape != tuple(shape) or found.entries[name].dtype not in FLOATS:
            came = f"{found.entries[name].dtype} of shape {found.entries[name].shape}"
            raise ValueError(f"{base}: {name} is {came}, expected shape {tuple(shape)} as in {delta_path}")
    if out.exists():
        raise ValueError(f"{out}: exists already, expected a new name")
    files.check_target(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        with naming(out):
            if base.is_dir():
                shutil.copytree(base, partial)
            else:
                shutil.copyfile(base, partial)
            for name in delta.shapes:
                entry = found.entries[name]
                place = partial / entry.path.relative_to(base) if base.is_dir() else partial
                _write(files.map_tensor(entry._replace(path=place), write=True), delta, name)
            if not base.is_dir():
                files.refresh(partial)
            os.replace(partial, out)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
    return delta


def _write(tensor: Tensor, delta: SparseDelta, name: str) -> None:
    if name in delta.whole:
        tensor.copy_(delta.whole[name])
        return
    kernel, at = kernels(tensor.device), delta.positions[name]
    kernel.sparse_put_(tensor, at, added(kernel.sparse_take(tensor, at), delta.values[name]))


def compose(paths: Sequence[Path], out: Path, scales: Sequence[float] = ()) -> SparseDelta:
    """Write the sum of deltas, each times its scale (1 where none are given)."""
    files.check_target(out)
    if scales and len(scales) != len(paths):
        raise ValueError(f"sparse compose: {len(scales)} scales came with {len(paths)} deltas, expected one for each")
    total: SparseDelta | None = None
    for path, scale in zip(paths, scales or [1.0] * len(paths), strict=True):
        delta = SparseDelta.load(path)
        delta = delta if scale == 1 else scale * delta
        total = delta if total is None else total + delta
    if total is None:
        raise ValueError("sparse compose: no delta came, expected at least one")
    total.save(out)
    return total
