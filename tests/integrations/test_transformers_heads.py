"""Logits from heads, chunk by chunk: the models that do more than a product, and those whose logits stay whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from trainer_cases import InOrder, arguments, collate, model, rows, teacher
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from fastdistil.integrations.heads import Head, head_of
from fastdistil.integrations.targets import shifts
from fastdistil.integrations.transformers import DistillationArguments
from fastdistil.recipes import terms

BOTH = [terms.logits(temperature=2.0), terms.labels(scale=0.5)]
SIZES = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[float, float | None]]] = {
    "softcap": ("Gemma2ForCausalLM", {"head_dim": 4, "num_key_value_heads": 2, "final_logit_softcapping": 2.0}, (1.0, 2.0)),
    "scale": ("CohereForCausalLM", {"logit_scale": 0.25}, (0.25, None)),
    "divisor": ("GraniteForCausalLM", {"logits_scaling": 8.0}, (0.125, None)),
    "tied, with the older name": ("GPT2LMHeadModel", {**GPT2, "attn_pdrop": 0.0}, (1.0, None)),
    "bias": ("BertLMHeadModel", {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, (1.0, None)),
}  # fmt: skip


def family(name: str, seed: int) -> Any:
    kind, more, _ = FAMILIES[name]
    torch.manual_seed(seed)
    made = getattr(transformers, kind)
    built = made(made.config_class(**{**SIZES, **more})).double()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return built


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_are_whole_logits(name: str, tmp_path: Path) -> None:
    student, other = family(name, 0), family(name, 1)
    head = head_of(student)
    assert isinstance(head, Head) and (head.scale, head.softcap) == FAMILIES[name][2] and shifts(student, None)
    found: list[list[Tensor]] = []
    for heads in (True, False):
        args = arguments(tmp_path, logits_from_heads=heads)
        trainer = InOrder(student, args, collate, rows("causal"), teacher=other, terms=BOTH)
        loss = trainer.compute_loss(student, collate(rows("causal")))
        found.append([loss.detach(), *torch.autograd.grad(loss, list(student.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


def test_logits_are_never_whole(tmp_path: Path) -> None:
    """But where the metrics want them; no generator moves, and the head is as it was."""
    student, other = model("causal"), teacher("causal")
    before = torch.get_rng_state()
    assert isinstance(head_of(student), Head) and torch.equal(torch.get_rng_state(), before)
    seen: list[int] = []
    for x in (student, other):
        x.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    trainer = InOrder(student, arguments(tmp_path), collate, rows("causal"), teacher=other, terms=BOTH)
    seen.clear()
    trainer.train()
    assert seen == [0, 0] and "forward" not in vars(student.lm_head)
    trainer.evaluate(rows("causal"))
    assert set(seen) == {0}
    trainer.predict(rows("causal"))
    assert set(seen) == {0, 30}


class Doubled(LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


def test_unknown_heads_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = Doubled(LlamaConfig(**SIZES, num_key_value_heads=1)).double()
    assert head_of(student) == "Doubled does more to its logits than its configuration says"
    assert head_of(model("token")) == "BertForTokenClassification has no output embeddings"
    other = teacher("causal")
    trainer = InOrder(student, arguments(tmp_path), collate, rows("causal"), teacher=other, terms=BOTH)
    assert trainer.objective.heads is None
    with pytest.raises(ValueError, match="args.logits_from_heads is True, but Doubled does more to its logits"):
        args = arguments(tmp_path, logits_from_heads=True)
        InOrder(student, args, collate, rows("causal"), teacher=other, terms=BOTH)


def test_arguments_from_a_command_line(tmp_path: Path) -> None:
    line = ["--output_dir", str(tmp_path), "--terms", '[{"term": "logits", "temperature": 2.0}]', "--report_to", "none"]
    (args,) = HfArgumentParser(DistillationArguments).parse_args_into_dataclasses([*line, "--use_cpu", "True"])
    trainer = InOrder(model("causal"), args, collate, rows("causal"), teacher=teacher("causal"))
    assert [vars(x)["temperature"] for x in trainer.objective.terms] == [2.0]
    assert '"terms"' in args.to_json_string()
