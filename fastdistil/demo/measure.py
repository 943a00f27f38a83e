"""Measured facts of the demo's report: sizes, latency, and what the fused losses cost in this run.

All times are medians of contenders interleaved in one process, so that a busy machine slows all alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastdistil as fd
from fastdistil.demo.encode import pad
from fastdistil.demo.material import Material, Source
from fastdistil.systems.measure import LATENCY_ROUNDS, interleaved

LOSS_ROUNDS = 100


def sizes(source: Source, student: nn.Module, folder: Path) -> dict[str, dict[str, float]]:
    """Parameters and bytes on disk of teacher (as float32, and as the 4-bit file that it came in) and student."""
    teacher_parameters = sum(p.numel() for p in source.model.parameters())
    return {
        "teacher": {
            "parameters": teacher_parameters,
            "disk_mib": 4 * teacher_parameters / 2**20,
            "disk_4bit_mib": source.teacher_file_bytes / 2**20,
        },
        "student": {
            "parameters": sum(p.numel() for p in student.parameters()),
            "disk_mib": sum(path.stat().st_size for path in folder.iterdir()) / 2**20,
        },
    }


@torch.inference_mode()
def latency(source: Source, student: nn.Module, material: Material) -> dict[str, dict[str, float]]:
    """Forward time in milliseconds a batch of held-out sentences, by batch size; both models get the same shapes."""
    student.eval()
    rows = [row for rows in zip(*material.test.values(), strict=True) for row in rows]  # the languages in turn
    result = {}
    for size, rounds in LATENCY_ROUNDS.items():
        batch = pad(rows[:size], material.pad_id)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        result[str(size)] = interleaved(
            {
                "teacher": partial(source.model, input_ids=source.rows[ids], attention_mask=mask),
                "student": partial(student, input_ids=ids, attention_mask=mask),
            },
            rounds,
        )
    return result


def _fused_logits(student: Tensor, teacher: Tensor, weight: Tensor, items: Tensor) -> Tensor:
    return fd.logit_loss(student, teacher, weight=weight, num_items=items)


def _fused_hidden(student: Tensor, teacher: Tensor, weight: Tensor, items: Tensor) -> Tensor:
    return fd.hidden_loss(student, teacher, weight=weight, num_items=items)


def _plain_logits(student: Tensor, teacher: Tensor, weight: Tensor, items: Tensor) -> Tensor:
    keep = weight.bool()
    p, q = student[keep].log_softmax(-1), teacher[keep].log_softmax(-1)
    return functional.kl_div(p, q, log_target=True, reduction="sum") / items


def _plain_hidden(student: Tensor, teacher: Tensor, weight: Tensor, items: Tensor) -> Tensor:
    keep = weight.bool()
    return functional.mse_loss(student[keep], teacher[keep], reduction="sum") / (items * student.shape[-1])


def loss_cost(material: Material, batch_size: int) -> dict[str, dict[str, float]]:
    """Forward and backward of each fused loss against plain PyTorch on a batch of the run, milliseconds.

    The values and gradients of both are compared first; RuntimeError where they differ by more than 1e-4 relative.
    """
    batch = material.collate(material.examples[:batch_size])
    generator = torch.Generator().manual_seed(0)
    cases = {
        "logits": (_fused_logits, _plain_logits, batch["teacher_logits"], batch["words"]),
        "hidden": (_fused_hidden, _plain_hidden, batch["teacher_hidden"], batch["attention_mask"].float()),
    }
    result = {}
    for name, (fused, plain, teacher, weight) in cases.items():
        student = torch.randn(teacher.shape, generator=generator).requires_grad_()

        items = weight.sum()

        def run(
            loss: Callable[..., Tensor], s: Tensor = student, t: Tensor = teacher, w: Tensor = weight, n: Tensor = items
        ) -> Tensor:
            s.grad = None
            value = loss(s, t, w, n)
            value.backward()  # type: ignore[no-untyped-call]
            return value.detach()

        values, gradients = [], []
        for loss in (fused, plain):
            values.append(run(loss))
            gradients.append(student.grad if student.grad is not None else torch.zeros(()))
        off = max(float((a - b).norm() / b.norm()) for a, b in ((values[0], values[1]), (gradients[0], gradients[1])))
        if not off < 1e-4:
            raise RuntimeError(f"loss_cost: {name}: fused and plain differ by {off:.1e} relative, expected below 1e-4")
        times = interleaved({"fused": partial(run, fused), "plain": partial(run, plain)}, LOSS_ROUNDS)
        result[name] = {"fused_ms": times["fused"], "plain_ms": times["plain"], "relative_difference": off}
    return result
