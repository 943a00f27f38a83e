"""logit_loss on the CPU: the C++ kernels of csrc/cpu/logit.cpp, on torch's own number of threads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastdistil import _C
from fastdistil.contracts.logit import PHASE_ALL, LogitRule


def logit_fwd(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    loss: Tensor,
    stats: Tensor,
    gradient: Tensor | None,
    phase: int = PHASE_ALL,
    labels: Tensor | None = None,
    label_scale: Tensor | None = None,
    difference: bool = False,
    **rule: Unpack[LogitRule],
) -> None:
    """Writes loss (N,), stats (N, STATS) and, where given, gradient (N, V) = d sum(loss) / d student.

    labels (N,) int64 and label_scale (N,) add the cross entropy of the student's own logits to loss and gradient, which
    is rounded once; rows of label_scale 0 have none, their label may be anything.

    With difference, student holds the student's logits less the teacher's; the temperatures are equal then.

    PHASE_STATISTICS writes stats alone (and loss 0), of these columns; PHASE_VALUE reads them: what a split vocabulary
    does, with what ops/vocab_parallel.py makes of all parts' statistics in between.
    """
    options: dict[str, Any] = {"threads": torch.get_num_threads(), "phase": phase, "difference": difference}
    if labels is not None and label_scale is not None:
        options |= {"labels": labels.contiguous(), "label_scale": label_scale.contiguous()}
    _C.logit_fwd(student, teacher, row_scale, loss, stats, gradient, **rule, **options)


def logit_bwd(
    student: Tensor,
    teacher: Tensor,
    row_scale: Tensor,
    stats: Tensor,
    gradient: Tensor,
    dloss: Tensor,
    keep_unit: bool,
    difference: bool = False,
    **rule: Unpack[LogitRule],
) -> None:
    """Writes gradient (N, V), times dloss (N,), from what logit_fwd left in stats; it may be the student's memory.

    With keep_unit, gradient holds what a dloss of 1 gives: only the other rows are touched.
    """
    options: dict[str, Any] = {"threads": torch.get_num_threads(), "difference": difference}
    _C.logit_bwd(student, teacher, row_scale, stats, gradient, dloss, keep_unit, **rule, **options)
