"""DTensors as inputs of the losses, for processes that test_vocab_parallel.py starts."""

from __future__ import annotations

import pytest
import torch
from judge import SAME_STEP, error
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

import fastdistil as fd

COLUMNS = 42


def beside_loss_parallel(mesh: DeviceMesh) -> None:
    """torch's context for cross entropies of split logits takes the softmax out of log_softmax's gradient, where a
    kl_div does not put it back. Ours is not touched."""
    teacher, student = torch.randn(2, 6, COLUMNS, generator=torch.Generator().manual_seed(2)).double()
    leaf = student.clone().requires_grad_()
    q = teacher.softmax(-1)
    torch.nn.functional.kl_div(leaf.log_softmax(-1), q, reduction="batchmean").backward()
    with loss_parallel():
        logits = distribute_tensor(student, mesh, [Shard(1)]).requires_grad_()
        loss = fd.logit_loss(logits, distribute_tensor(teacher, mesh, [Shard(1)]))
        loss.backward()
        assert logits.grad.placements == (Shard(1),)
        assert error(logits.grad.full_tensor(), leaf.grad) <= SAME_STEP[torch.float64]
        theirs = distribute_tensor(student, mesh, [Shard(1)]).requires_grad_()
        found = torch.nn.functional.kl_div(
            theirs.log_softmax(-1), distribute_tensor(q, mesh, [Shard(1)]), reduction="batchmean"
        )
        found.backward()
        assert error(theirs.grad.full_tensor(), -q / 6) <= SAME_STEP[torch.float64]  # no p in p - q


def refused(mesh: DeviceMesh) -> None:
    rows = torch.ones(2, 8, 8)
    by_rows, by_columns = (distribute_tensor(rows, mesh, [Shard(i)]) for i in (1, 2))
    maps = rows[:, None]
    for call, told in (
        (
            lambda: fd.logit_loss(by_rows, by_rows),
            r"student_logits is a DTensor placed as \(Shard\(dim=1\),\), expected",
        ),
        (lambda: fd.logit_loss(by_columns, rows), "teacher_logits is whole, expected as student_logits"),
        (lambda: fd.logit_loss(rows, by_columns), r"teacher_logits is placed as \(Shard\(dim=2\),\), expected as"),
    ):
        with pytest.raises(ValueError, match=told):
            call()
    values, indices = rows.log_softmax(-1).topk(2)
    for call, told in (
        (lambda: fd.topk_logit_loss(by_columns, values, indices), "topk_logit_loss: student_logits is a DTensor"),
        (lambda: fd.topk_logit_loss(rows, distribute_tensor(values, mesh, [Shard(1)]), indices), "teacher_values is a"),
        (lambda: fd.topk_logit_loss(rows, values, distribute_tensor(indices, mesh, [Shard(1)])), "teacher_indices is a"),
        (lambda: fd.hidden_loss(rows, by_columns), "hidden_loss: teacher is a DTensor"),
        (lambda: fd.attention_loss(maps, distribute_tensor(maps, mesh, [Shard(2)]), maps, maps), "student_k is a DTensor"),
        (lambda: fd.relation_loss(rows, by_rows, relation_heads=2), "relation_loss: teacher is a DTensor"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=told):
            call()
