"""GOLD across tokenizers, with our loss and with TRL's own: the same rows, values, gradients and updates."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from held import MIB, held_mib
from judge import Outcome, judge
from small_models import SPECIAL, byte_tokenizer, causal_model
from test_trl import CHATS, quiet  # noqa: F401 - a fixture
from torch import Tensor

from fastdistil.integrations.gold import UniversalLogitLoss
from fastdistil.integrations.trl import GOLDMixin

gold = pytest.importorskip("trl.experimental.gold")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
PAIRS = ("he", "ll", "yz", "ef", "1+", "tw")
F64 = torch.float64

# Bytes at which each side's pieces end; the third example has no answer, the fourth begins with its answer.
ENDS = {"student": [[1, 2, 3, 5, 7, 7], [2, 3, 4, 6, 6], [], [1, 2, 4, 4]],
        "teacher": [[2, 4, 5, 6, 7, 7], [1, 2, 6, 6], [3], [2, 3, 4, 4]]}  # fmt: skip
STARTS = {"student": [3, 1, 4, 0], "teacher": [2, 4, 1, 0]}
COLUMNS = {"student": 13, "teacher": 17}
LENGTH = 10


def options(**changed: Any) -> Any:
    defaults = {
        "uld_crossentropy_weight": 0.0, "uld_distillation_weight": 1.0, "uld_student_temperature": 1.0,
        "uld_teacher_temperature": 1.0, "uld_skip_student_eos": True, "uld_skip_teacher_eos": True,
        "use_extended_uld": True, "uld_token_merge_strategy": "observed", "uld_use_hybrid_loss": False,
    }  # fmt: skip
    return SimpleNamespace(**defaults | changed)


def batch() -> dict[str, Tensor]:
    found = dict[str, Tensor]()
    for side, all_ends in ENDS.items():
        ids = torch.randint(COLUMNS[side], (len(all_ends), LENGTH))
        labels, offsets = torch.full_like(ids, -100), torch.zeros(*ids.shape, 2, dtype=torch.long)
        for i, (ends, start) in enumerate(zip(all_ends, STARTS[side], strict=True)):
            where = slice(start, start + len(ends))
            labels[i, where] = ids[i, where]
            offsets[i, where] = torch.tensor([[0, *ends[:-1]], ends]).T if ends else offsets[i, where]
        found |= {f"{side}_input_ids": ids, f"{side}_labels": labels, f"{side}_byte_offsets": offsets}
    return found


def outcome(loss: Any, student: Tensor, teacher: Tensor, given: dict[str, Tensor]) -> Outcome:
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf, teacher, **given).sum()  # theirs is of one element where nothing is compared
    return Outcome(value.detach(), torch.autograd.grad(value, leaf))


@pytest.mark.parametrize(
    "changed",
    [
        {"uld_student_temperature": 1.5, "uld_teacher_temperature": 2.0},
        {"uld_crossentropy_weight": 0.3, "uld_distillation_weight": 0.6},
        {"uld_skip_student_eos": False, "uld_skip_teacher_eos": False},
        {"uld_skip_teacher_eos": False},
    ],
)
@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("strategy", ["observed", "bayesian"])
def test_the_loss_is_theirs(strategy: str, extended: bool, changed: dict[str, Any]) -> None:
    from trl.experimental.gold.gold_trainer import ULDLoss

    theirs = ULDLoss(options(uld_token_merge_strategy=strategy, use_extended_uld=extended, **changed))
    given = batch()
    student, teacher = (2 * torch.randn(4, LENGTH, COLUMNS[side], dtype=F64) for side in ("student", "teacher"))
    truth = outcome(theirs, student, teacher, given)
    assert truth.value > 0.1
    judge(outcome(UniversalLogitLoss(theirs), student, teacher, given), truth, truth, F64)
    narrow = outcome(UniversalLogitLoss(theirs), student.float(), teacher.float(), given)
    judge(narrow, truth, outcome(theirs, student.float(), teacher.float(), given), torch.float32)


def test_nothing_to_compare() -> None:
    from trl.experimental.gold.gold_trainer import ULDLoss

    given = batch()
    given["student_labels"] = torch.full_like(given["student_labels"], -100)
    student, teacher = (torch.randn(4, LENGTH, COLUMNS[side]) for side in ("student", "teacher"))
    found = outcome(UniversalLogitLoss(ULDLoss(options())), student, teacher, given)
    assert found.value == 0 and not found.gradients[0].any()


def trainer(fused: bool, path: Path, dtype: torch.dtype, members: dict[str, Any], **changed: Any) -> Any:
    tokenizer = byte_tokenizer(*PAIRS)
    tokenizer.save_pretrained(path / "teacher")
    base = gold.GOLDTrainer
    built: Any = type("FusedGOLD", (GOLDMixin, base), members) if fused else base
    arguments = gold.GOLDConfig(
        str(path), **{
            "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "optim": "sgd",
            "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none",
            "save_strategy": "no", "use_cpu": True, "bf16": False, "logging_steps": 1, "disable_tqdm": True,
            "gradient_checkpointing": False, "max_completion_length": 6, "max_length": 48, "lmbda": 0.0,
            "use_uld_loss": True, "teacher_tokenizer_name_or_path": str(path / "teacher"), **changed,
        },
    )  # fmt: skip
    return built(
        causal_model(32, 1, 2).to(dtype), args=arguments, train_dataset=Dataset.from_list(CHATS * 4),
        processing_class=byte_tokenizer(),
        teacher_model=causal_model(48, 2, 1, columns=len(SPECIAL) + 256 + len(PAIRS)).to(dtype),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "changed"),
    [
        (F64, {}),
        (F64, {"uld_token_merge_strategy": "bayesian", "uld_crossentropy_weight": 0.2, "uld_student_temperature": 2.0}),
        (torch.float32, {"use_extended_uld": False}),
    ],
)
def test_steps_are_theirs(dtype: torch.dtype, changed: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for fused in (False, True):
        made = trainer(fused, tmp_path, dtype, {}, **changed)
        before = copy.deepcopy(made.model.state_dict())
        made.train()
        losses = torch.tensor([x["loss"] for x in made.state.log_history if "loss" in x], dtype=F64)
        after = made.model.state_dict()
        update = torch.cat([(after[name] - x).double().flatten() for name, x in before.items()])
        assert len(losses) == 2 and losses.min() > 1e-4 and update.norm() > 1e-3
        found.append(Outcome(losses, (update,)))
    truth, ours = found
    limit = 1e-5 if dtype == torch.float32 else 1e-10
    assert ((ours.value - truth.value).abs() / truth.value).max() < limit
    assert (ours.gradients[0] - truth.gradients[0]).norm() / truth.gradients[0].norm() < limit


def test_memory_is_a_copy_and_the_gradients(tmp_path: Path) -> None:
    """Theirs holds both softmaxes, both sorted, the permutation and what autograd keeps of each."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    rows, columns = 48, 16_000
    student, teacher = torch.randn(1, rows, columns, requires_grad=True), torch.randn(1, rows, columns + 100)
    labels = torch.randint(columns, (1, rows))
    labels[:, 0] = -100
    given = {f"{side}_{what}": labels for side in ("student", "teacher") for what in ("labels", "input_ids")}
    theirs, found = ULDLoss(options(use_extended_uld=False)), list[float]()
    for loss in (UniversalLogitLoss(theirs), theirs):
        student.grad = None
        found.append(held_mib(lambda x=loss: x(student, teacher, **given).backward(), tmp_path / "trace.json"))
    one = student.numel() * 4 / MIB
    assert found[0] < 4 * one + 18 and found[1] > found[0]


@pytest.mark.parametrize(
    ("members", "changed", "message"),
    [
        ({}, {"uld_use_hybrid_loss": True}, "uld_use_hybrid_loss is True, expected False"),
        ({"two_heads": True}, {}, "two_heads is True with use_uld_loss, expected False"),
    ],
)
def test_refuses(members: dict[str, Any], changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(True, tmp_path, torch.float32, members, **changed)
