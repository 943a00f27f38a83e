"""Custom ops of a list of hidden states with projections, for the backend that takes all layers' rows in one launch a
chunk: `hidden_projected_rows`, one value a row, and `hidden_projected_total`, their sum with gradients.

As in ops/hidden.py the projected states exist for one chunk only, here of all layers together, and the total keeps its
gradients for the backward pass. A projection or bias of several layers comes once, and so does its gradient: the
layers' parts are added in float32.
"""

from __future__ import annotations

from torch import Tensor

from fastdistil.ops.hidden_chunks import compute
from fastdistil.ops.pairs import pair


def _compute(
    students: list[Tensor], teachers: list[Tensor], projections: list[Tensor], biases: list[Tensor], row_scale: Tensor,
    projection_of: list[int], bias_of: list[int], factors: list[float], kind: str, activation: str, backend: str,
    dense: bool, wanted: list[bool], rounded: bool,
) -> tuple[Tensor, None, list[Tensor]]:  # fmt: skip
    tensors = (row_scale, students, teachers, projections, biases)
    rows, gradients = compute(
        *tensors, projection_of, bias_of, factors, kind, activation, backend, dense, wanted, rounded
    )
    return rows, None, gradients


# students: L of (N, D_s) in one dtype, D_s may differ; teachers: L of (N, D_t) in one dtype; projections: (D_t, D_s) in
# one dtype; biases: (D_t,); row_scale (N,) float32, without a 0 where `dense`; projection_of, bias_of: which of them a
# layer has, -1 where there is no bias; factors: one a layer -> rows (N,), sums over the layers, times row_scale.
TENSORS = "Tensor[] students, Tensor[] teachers, Tensor[] projections, Tensor[] biases, Tensor row_scale"
OPTIONS = "int[] projection_of, int[] bias_of, float[] factors, str kind, str activation, str backend, bool dense"
hidden_projected_rows, hidden_projected_total, _ = pair(
    "hidden_projected", "hidden_loss", TENSORS, OPTIONS, _compute, gradients=("students", "projections", "biases")
)
