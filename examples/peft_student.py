"""Self-distillation of a language model with adapters: the student is the model with LoRA, the teacher the same model
without it, so that one model is in memory. The teacher sees a hint before the text, the student learns to do without.

    python examples/peft_student.py   # a small random model and data, nothing is downloaded
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fastdistil.integrations.transformers import DistillationArguments, DistillationTrainer
from fastdistil.recipes import terms

LENGTH, HINT = 12, 3


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Texts behind three tokens: of the teacher a hint, of the student a filler. Logits count behind the hint."""
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(count):
        text = torch.randint(3, 200, (LENGTH,), generator=draw)
        real = torch.arange(HINT + LENGTH) < HINT + torch.randint(4, LENGTH + 1, (), generator=draw)
        hint, filler = torch.full((HINT,), 7), torch.full((HINT,), 1)
        found.append(
            {
                "input_ids": torch.cat([filler, text]) * real,
                "teacher_input_ids": torch.cat([hint, text]) * real,
                "attention_mask": real.long(),
                "words": real.long() * (torch.arange(HINT + LENGTH) >= HINT),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="runs/peft_student")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_key_value_heads=2, **sizes))
    with torch.no_grad():  # an untrained model's logits are nearly uniform
        base.lm_head.weight.mul_(10)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], r=8)
    student = get_peft_model(base, config)
    arguments = DistillationArguments(
        chosen.out,
        max_steps=chosen.steps,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
    )
    data = rows(288)
    trainer = DistillationTrainer(
        student,
        arguments,
        teacher="base",
        terms=[terms.logits(divergence="reverse_kl")],
        train_dataset=data[:256],
        eval_dataset=data[256:],
    )
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    print({"first": round(first, 5), "last": round(trainer.evaluate()["eval_loss"], 5)})
    trainer.save_model()  # the adapters alone


if __name__ == "__main__":
    main()
