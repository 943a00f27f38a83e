"""A sparse map of probabilities from one vocabulary into another."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdistil.losses import _check
from fastdistil.ops.projected import Projection, default_chunk_bytes, mass_of

_NAME = "VocabProjection"


class VocabProjection(NamedTuple):
    """What `projected_logit_loss` brings a teacher's probabilities into the student's vocabulary with: q_s = M q_t, M a
    sparse matrix (V_s, V_t) of weights >= 0. `VocabProjection.of(matrix)` makes one, as does
    `fastdistil.tokenizer_projection` from two tokenizers.

    The fields are M in compressed rows, sorted and checked once: entry i of `columns` and `weights` belongs to the
    student's column v where offsets[v] <= i < offsets[v + 1].

    Args:
        offsets: (V_s + 1,) int64, where each student column's entries begin.
        columns: (entries,) int64, the teacher's columns, ascending in each row.
        weights: (entries,) float64, above 0.
        teacher_columns: V_t.

    Example:
        >>> import torch, fastdistil
        >>> # The teacher's piece 0 is the student's piece 1, 1 and 2 are both 0; the student's piece 2 has no partner.
        >>> matrix = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).to_sparse()
        >>> projection = fastdistil.VocabProjection.of(matrix)
        >>> projection.shape, projection.weights.tolist()
        ((3, 3), [1.0, 1.0, 1.0])
    """

    offsets: Tensor
    columns: Tensor
    weights: Tensor
    teacher_columns: int

    @classmethod
    def of(cls, matrix: Tensor) -> VocabProjection:
        """From a matrix (V_s, V_t), sparse in coordinates (COO) or compressed rows (CSR), of weights >= 0 in a floating
        dtype; entries given twice are added up, those of weight 0 left out.

        Raises:
            TypeError, ValueError: naming what came and what was wanted.
        """
        if not isinstance(matrix, Tensor):
            raise _check.no_tensor(_NAME, "matrix", matrix)
        if matrix.layout not in (torch.sparse_coo, torch.sparse_csr):
            raise ValueError(
                f"{_NAME}: matrix has layout {matrix.layout}, expected torch.sparse_coo or torch.sparse_csr "
                "(a dense matrix has matrix.to_sparse())"
            )
        if matrix.dtype not in _check.FLOATS:
            raise TypeError(f"{_NAME}: matrix has dtype {matrix.dtype}, expected float32, bfloat16, float16 or float64")
        if matrix.ndim != 2 or matrix.dense_dim() != 0:
            raise ValueError(f"{_NAME}: matrix has shape {tuple(matrix.shape)}, expected (V_s, V_t)")
        _check.constant(_NAME, "matrix", matrix)
        entries = (
            matrix if matrix.layout == torch.sparse_coo else matrix.to_sparse(layout=torch.sparse_coo)
        ).coalesce()
        (rows, columns), weights = entries.indices(), entries.values().double()
        if not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError(f"{_NAME}: matrix has weights that are negative or not finite, expected at least 0")
        kept = weights > 0
        if not bool(kept.any()):
            raise ValueError(f"{_NAME}: matrix has no weight above 0, expected at least one")
        counts = torch.bincount(rows[kept], minlength=matrix.shape[0])
        offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        return cls(offsets, columns[kept], weights[kept], matrix.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(V_s, V_t)."""
        return self.offsets.shape[0] - 1, self.teacher_columns

    def to(self, device: torch.device | str) -> VocabProjection:
        """The same on another device."""
        return VocabProjection(
            self.offsets.to(device), self.columns.to(device), self.weights.to(device), self.teacher_columns
        )

    def matrix(self) -> Tensor:
        """As a torch.sparse_coo tensor (V_s, V_t) float64."""
        rows = torch.repeat_interleave(self.offsets[1:] - self.offsets[:-1])
        return torch.sparse_coo_tensor(
            torch.stack((rows, self.columns)), self.weights, self.shape, is_coalesced=True, check_invariants=False
        )

    def mass(self, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
        """The share of the teacher's probability that arrives in the student's vocabulary, for each row: sum(M q_t). A
        small one says that the loss compares little of what the teacher predicts.

        Args:
            teacher_logits: (..., V_t) floating. temperature: T > 0.

        Returns:
            (...,) float64.
        """
        logits = _check.float_tensor("VocabProjection.mass", "teacher_logits", teacher_logits)
        if logits.ndim == 0 or logits.shape[-1] != self.teacher_columns:
            raise ValueError(
                f"VocabProjection.mass: teacher_logits has shape {tuple(logits.shape)}, expected "
                f"(..., {self.teacher_columns})"
            )
        t = _check.positive("VocabProjection.mass", "temperature", temperature)
        flat, projection = logits.reshape(-1, self.teacher_columns), Projection(*self, t)
        with torch.no_grad():
            found = mass_of(flat.__getitem__, len(flat), projection, default_chunk_bytes(flat.device))
        return found.reshape(logits.shape[:-1])
