"""Which entries of a model are trained: sorted flat positions by parameter name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastdistil.sparse import files
from fastdistil.sparse._check import check_positions

FORMAT = "fastdistil.sparse_mask"


class SparseMask(Mapping[str, Tensor]):
    """A mapping from parameter name to sorted flat positions, int32 (int64 where a tensor has 2^31 elements or more).

    Parameters without a name in the mask are not sparse; one with an empty entry is not trained at all.

    Args:
        positions: by name, (n,), counted in the row-major order of the parameter.
        shapes: the parameters' shapes, by name.

    Raises:
        TypeError, ValueError: naming the parameter, where positions are not ascending or out of range.

    Example:
        >>> import torch
        >>> from fastdistil.sparse import SparseMask
        >>> mask = SparseMask({"weight": torch.tensor([0, 3])}, {"weight": (2, 2)})
        >>> mask, mask.density
        (SparseMask(2 of 4 entries in 1 tensors), 0.5)
    """

    def __init__(self, positions: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = {name: torch.Size(shapes[name]) for name in positions if name in shapes}
        self._positions = dict(positions)
        for name, index in self._positions.items():
            if name not in self.shapes:
                raise ValueError(f"SparseMask: shapes has no {name!r}, which positions has")
            check_positions("SparseMask", f"positions[{name!r}]", index, self.shapes[name].numel())

    @classmethod
    def _trusted(cls, positions: dict[str, Tensor], shapes: Mapping[str, torch.Size]) -> SparseMask:
        """Without the checks, which would read a selection's millions of positions once more."""
        mask = cls({}, {})
        mask._positions, mask.shapes = positions, dict(shapes)
        return mask

    def __getitem__(self, name: str) -> Tensor:
        return self._positions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def __repr__(self) -> str:
        return f"SparseMask({self.nnz:,} of {self.numel:,} entries in {len(self)} tensors)"

    @property
    def nnz(self) -> int:
        """Number of entries in the mask."""
        return sum(len(index) for index in self._positions.values())

    @property
    def numel(self) -> int:
        """Number of elements of the masked tensors."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def density(self) -> float:
        """nnz / numel, 0 for a mask of nothing."""
        return self.nnz / max(self.numel, 1)

    def digest(self) -> str:
        """16 hexadecimal digits that two masks share only if they are the same."""
        found = hashlib.sha256()
        for name, index in self._positions.items():
            found.update(f"{name}\0{tuple(self.shapes[name])}\0{len(index)}\0".encode())
            found.update(files.raw_bytes(index.to("cpu")))
        return found.hexdigest()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, through a temporary name."""
        self._save(path, {})

    def _save(self, path: str | os.PathLike[str], more: Mapping[str, str]) -> None:
        metadata = {**files.shape_metadata(FORMAT, self.shapes), "k": str(self.nnz), **more}
        files.write(path, self._positions, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseMask:
        """Read what `save` wrote. Raises ValueError naming the file and the tensor where anything is off."""
        found = files.Checkpoint(path)
        shapes = files.decode_shapes(found, FORMAT)
        positions = {name: files.read_positions(found, name, name, shapes) for name in found}
        if str(sum(map(len, positions.values()))) != found.metadata.get("k"):
            raise found.error("metadata", f"k is {found.metadata.get('k')!r}, which the tensors do not add up to")
        found.verify()
        return cls._trusted(positions, shapes)
