"""One whole training step: the teacher's forward, the student's, the layer losses, the backward.

The teacher has mBERT's size, the student half of its blocks; random weights, no dropout, B sentences of S tokens
without padding. "lightmbert" compares the last states and the last map (arXiv 2103.06418), "bistil" every student
block's with every second of the teacher's (arXiv 2306.01709), which keeps all maps alive. float32 on a CPU; on a GPU
bfloat16 under torch.autocast over float32 weights, as trainers have it.

eager                   output_attentions=True under eager attention, mse_loss between the maps and between the states
fastdistil:<backend>    SDPA under fastdistil.capture, attention_loss and hidden_loss
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from fastdistil.benchmarks.cases import Case
from fastdistil.benchmarks.work import Implementation, Outcome, Work, backend_of
from torch import Tensor

import fastdistil

# Through 12 blocks, beyond twice eager's error: of the loss, and of all gradients together.
SLACK = {"float32": 1e-4, "bfloat16": 1e-2}


class StepWork(Work):
    """The truth is the eager step in float32, than which eager's own may be off by its 16-bit rounding."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.slack = dict.fromkeys(("value_error", "gradient_error"), SLACK[case.dtype])

    def build(self, name: str) -> Step:
        if name != "eager":
            backend_of(name, self.device)
        return Step(name, self.case, self.device)

    def truth(self) -> Outcome:
        return Step("eager", replace(self.case, dtype="float32"), self.device).outcome()


class Step(Implementation):
    """Both models, and what one implementation makes of a batch; bfloat16 is that of autocast."""

    def __init__(self, name: str, case: Case, device: str) -> None:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        self.name, self.device, self.half = name, device, case.dtype == "bfloat16"
        s = case.shape
        student = s["L"] // 2
        blocks = {"lightmbert": [student], "bistil": [*range(1, student + 1)]}[case.name]
        states = blocks if case.name == "lightmbert" else [0, *blocks]
        self.attentions, self.states = ([(layer, 2 * layer) for layer in x] for x in (blocks, states))
        options: dict[str, Any] = {
            "vocab_size": s["V"], "hidden_size": s["D"], "num_attention_heads": s["H"],
            "intermediate_size": 4 * s["D"], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
            "attn_implementation": "eager" if name == "eager" else "sdpa",
        }  # fmt: skip
        with torch.device(device):
            self.teacher, self.student = (
                BertModel(BertConfig(num_hidden_layers=count, **options), add_pooling_layer=False)
                for count in (s["L"], student)
            )
        self.student.embeddings.word_embeddings.weight.requires_grad_(False)  # as LightMBERT has it
        self.tokens = torch.randint(s["V"], (s["B"], s["S"]), device=device)

    def loss(self) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.half):
            return self._eager() if self.name == "eager" else self._captured()

    def _eager(self) -> Tensor:
        shown: dict[str, Any] = {"output_attentions": True, "output_hidden_states": True}
        with torch.no_grad():
            t = self.teacher(self.tokens, **shown)
        s = self.student(self.tokens, **shown)
        maps = [F.mse_loss(s.attentions[i - 1], t.attentions[j - 1]) for i, j in self.attentions]
        states = [F.mse_loss(s.hidden_states[i], t.hidden_states[j]) for i, j in self.states]
        return torch.stack(maps).mean() + torch.stack(states).mean()

    def _captured(self) -> Tensor:
        def layers(side: int) -> dict[str, list[int]]:
            maps = [pair[side] for pair in self.attentions]
            return {"queries": maps, "keys": maps, "hidden_states": [pair[side] for pair in self.states]}

        with torch.no_grad(), fastdistil.capture(self.teacher, **layers(1)) as t:
            self.teacher(self.tokens)
        with fastdistil.capture(self.student, **layers(0)) as s:
            self.student(self.tokens)
        maps = [fastdistil.attention_loss(s.queries[i], s.keys[i], t.queries[j], t.keys[j]) for i, j in self.attentions]
        states = fastdistil.hidden_loss(*([x.hidden_states[k[n]] for k in self.states] for n, x in enumerate((s, t))))
        return torch.stack(maps).mean() + states

    def run(self) -> Tensor:
        """The loss; gradients are left in the student."""
        self.student.zero_grad()
        value = self.loss()
        value.backward()
        return value.detach()

    def outcome(self) -> Outcome:
        value = self.run().item()
        gradients = [p.grad.flatten() for p in self.student.parameters() if p.grad is not None]
        return Outcome(value, {"student": torch.cat(gradients)})
