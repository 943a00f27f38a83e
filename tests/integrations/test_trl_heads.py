"""DistillationTrainer's one batch with heads of other kinds: biases, masks of tools, heads that FSDP2 has split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_trl import Given, trainer
from torch import Tensor

from fastdistil.integrations import trl as ours

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def batch(**more: Tensor) -> dict[str, Tensor]:
    """Two prompts of 3 tokens, padded left, and their completions of 5, padded right."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    prompt = torch.tensor([[1, 1, 1], [0, 1, 1]])
    draw = (torch.randint(5, 60, x.shape) for x in (prompt, mask))
    return {
        "prompt_ids": next(draw),
        "prompt_mask": prompt,
        "completion_ids": next(draw),
        "completion_mask": mask,
        **more,
    }


def phi(width: int, seed: int) -> Any:
    """A model whose head has a bias."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 1}
    model = transformers.PhiForCausalLM(
        transformers.PhiConfig(vocab_size=261, hidden_size=width, initializer_range=0.2, **shape)
    )
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def outcome(made: Any, student: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, int, list[Tensor]]:
    """(loss, sum of entropies, tokens, gradients) of `_compute_loss`."""
    student.zero_grad()
    loss, entropy, count = made._compute_loss(student, inputs, torch.tensor(7.0))
    loss.backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    return loss.detach(), entropy, int(count), [x.full_tensor() if hasattr(x, "full_tensor") else x for x in gradients]


def agree(found: Any, wanted: Any) -> None:
    assert found[2] == wanted[2] and wanted[0] > 1e-3
    torch.testing.assert_close(found[:2], wanted[:2], rtol=1e-5, atol=0)
    a, b = (torch.cat([x.flatten() for x in side[3]]) for side in (found, wanted))
    assert b.norm() > 1e-3 and (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize("tools", [False, True])
def test_biases_and_tools(tools: bool, tmp_path: Path) -> None:
    student, teacher = phi(16, 0), phi(32, 1)
    inputs = batch(**({"tool_mask": torch.tensor([[1, 0, 0, 1, 1], [1, 1, 1, 1, 1]])} if tools else {}))
    found = []
    for fused in (True, False):
        made = trainer("Distillation", fused, tmp_path, beta=0.4)
        made.teacher_model = teacher
        found.append(outcome(made, student, inputs))
    agree(*found)
    assert found[0][2] == (6 if tools else 8)


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 4}),
    ("Cohere", {"logit_scale": 0.25}),
    ("Granite", {"logits_scaling": 4.0}),
    ("Qwen3", {"head_dim": 4}),
]


@pytest.mark.parametrize(("kind", "more"), KINDS)
def test_two_heads_know_what_models_do_to_logits(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Softcaps and scales as the models themselves apply them: the loss of whole logits is that of two heads."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 261, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config, built = (getattr(transformers, f"{kind}{x}") for x in ("Config", "ForCausalLM"))
    student, teacher = (built(config(hidden_size=width, **shape, **more)) for width in (16, 32))
    made, found = trainer("GKD", True, tmp_path, beta=0.4), []
    made.teacher_model = teacher
    labels = torch.randint(5, 60, (2, 8))
    labels[:, :3] = -100
    inputs = {"input_ids": torch.randint(5, 60, (2, 8)), "attention_mask": torch.ones(2, 8).long(), "labels": labels}
    for made.two_heads in (True, False):
        student.zero_grad()
        loss = made.compute_loss(student, inputs)
        loss.backward()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        found.append((loss.detach(), torch.zeros(()), 0, gradients))
    agree(*found)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_split_heads_are_made_whole(tmp_path: Path, one_process: None) -> None:
    """Under FSDP2 the ranks have different rows: a head is gathered, not taken for a split of the vocabulary."""
    from torch.distributed.fsdp import fully_shard

    plain, whole, teacher = phi(16, 0), phi(16, 0), phi(32, 1)
    inputs = batch()
    made = trainer("Distillation", True, tmp_path)
    made.teacher_model = teacher
    wanted = outcome(made, plain, inputs)
    fully_shard(whole, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (1,)))
    assert hasattr(whole.lm_head.weight, "full_tensor")
    head = ours.head_arguments("Fused", "student", whole, torch.zeros(2, 5, 16))
    assert not hasattr(head["student_weight"], "full_tensor") and head["student_bias"].shape == (261,)
    torch.testing.assert_close(head["student_weight"], plain.lm_head.weight)
    calls = made._forward_redirection(whole, whole, lambda: made._compute_loss(whole, inputs, torch.tensor(7.0)))
    calls[0].backward()
    gradients = [p.grad.full_tensor() for p in whole.parameters() if p.grad is not None]
    agree((calls[0].detach(), calls[1], int(calls[2]), gradients), wanted)


def test_no_token_is_no_loss() -> None:
    """Where no label counts, in the whole step or in this part of it."""
    student = torch.randn(2, 3, 9, requires_grad=True)
    for items in (None, 0, torch.tensor(0), 4):
        labels = torch.full((2, 3), -100)
        loss = ours.generalized_jsd_loss(student, torch.randn(2, 3, 9), labels, num_items_in_batch=items)
        loss.backward()
        assert loss.item() == 0 and student.grad is not None and student.grad.norm() == 0
    assert ours.logit_scale(Given(model_type="llama")) == 1
