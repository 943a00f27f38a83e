"""Distillation in a LightningModule, on any number of processes: python examples/lightning_module.py [steps]

Needs the integrations extra. Both models are small and random, and so are the tokens.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import fastdistil as fd


def causal(width: int, layers: int) -> LlamaForCausalLM:
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 2 * width, "vocab_size": 300}
    return LlamaForCausalLM(LlamaConfig(hidden_size=width, num_hidden_layers=layers, initializer_range=0.1, **shape))


class Distillation(lightning.LightningModule):
    """The student learns the teacher's next-token distributions from hidden states: no logits are ever whole."""

    def __init__(self, student: LlamaForCausalLM, teacher: LlamaForCausalLM, temperature: float = 2.0) -> None:
        super().__init__()
        self.student, self.temperature = student, temperature
        self.frozen = (teacher.eval().requires_grad_(False),)  # in a tuple: neither saved nor put into train mode

    def loss(self, batch: dict[str, torch.Tensor], temperature: float) -> torch.Tensor:
        teacher = self.frozen[0].to(self.device)
        with torch.no_grad():
            targets = teacher.model(**batch).last_hidden_state
        tokens = self.all_gather(batch["attention_mask"].sum().float()).mean()  # as gradients: a mean over processes
        heads = self.student.lm_head.weight, teacher.lm_head.weight
        return fd.linear_logit_loss(
            self.student.model(**batch).last_hidden_state, heads[0], targets, heads[1],
            weight=batch["attention_mask"], num_items=tokens, temperature=temperature,
        )  # fmt: skip

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss = self.loss(batch, self.temperature)
        self.log("distillation", loss.detach(), sync_dist=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        self.log("divergence", self.loss(batch, 1.0), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.student.parameters(), lr=3e-3)


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    masks = [(torch.arange(12) < length).long() for length in torch.randint(4, 13, (count,)).tolist()]
    return [{"input_ids": torch.randint(3, 300, (12,)), "attention_mask": mask} for mask in masks]


def main(steps: int = 40) -> tuple[float, float]:
    lightning.seed_everything(0, verbose=False)
    module = Distillation(causal(32, 1), causal(64, 2))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", **quiet)
    held_out = DataLoader(rows(32), batch_size=32)
    before = trainer.validate(module, held_out, verbose=False)[0]["divergence"]
    trainer.fit(module, DataLoader(rows(512), batch_size=16, shuffle=True))
    after = trainer.validate(module, held_out, verbose=False)[0]["divergence"]
    print(f"KL(teacher || student) on held-out tokens: {before:.3f} before, {after:.3f} after {steps} steps")
    return before, after


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
