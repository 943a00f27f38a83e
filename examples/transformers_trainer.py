"""Distil a token classifier with transformers' Trainer: logits, labels, hidden states and attention maps.

    python examples/transformers_trainer.py                  # small random models and data, nothing is downloaded
    python examples/transformers_trainer.py --teacher NAME   # a fine-tuned BERT, and a student of its first layers
    torchrun --nproc-per-node 2 examples/transformers_trainer.py

Put your data set in the place of `sentences()`.
"""

from __future__ import annotations

import argparse
import copy

import torch
from transformers import AutoModelForTokenClassification, BertConfig, BertForTokenClassification

from fastdistil.integrations.transformers import DistillationArguments, DistillationTrainer
from fastdistil.recipes import terms


def sentences(count: int, labels: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Random ids of 4 to 16 tokens; a token's label is the remainder of its id, -100 at padding."""
    draw, rows = torch.Generator().manual_seed(0), []
    for _ in range(count):
        ids = torch.randint(5, vocabulary, (16,), generator=draw)
        real = torch.arange(16) < torch.randint(4, 17, (), generator=draw)
        label = (ids % labels).masked_fill(~real, -100)
        rows.append({"input_ids": ids * real, "attention_mask": real.long(), "labels": label})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", help="name or folder of a BERT for token classification")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="runs/transformers_trainer")
    chosen = parser.parse_args()
    if chosen.teacher:
        teacher = AutoModelForTokenClassification.from_pretrained(chosen.teacher)
    else:
        torch.manual_seed(0)
        sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        teacher = BertForTokenClassification(BertConfig(num_hidden_layers=4, num_labels=5, **sizes))
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = max(1, config.num_hidden_layers // 2)
    student = BertForTokenClassification(config)
    student.load_state_dict(teacher.state_dict(), strict=False)  # the first layers, embeddings and head
    rows = sentences(512, config.num_labels, config.vocab_size)
    arguments = DistillationArguments(
        chosen.out,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        max_steps=chosen.steps,
        save_strategy="no",
        report_to="none",
    )
    trainer = DistillationTrainer(
        student,
        arguments,
        teacher=teacher,
        terms=[
            terms.logits(temperature=2.0),
            terms.labels(scale=0.5),
            terms.hidden(-1, -1, projection=torch.nn.Linear(config.hidden_size, teacher.config.hidden_size)),
            terms.attention(-1, -1, kind="prob_kl"),
        ],
        train_dataset=rows[:384],
        eval_dataset=rows[384:],
        compute_metrics=lambda found: {
            "accuracy": float((found.predictions.argmax(-1) == found.label_ids)[found.label_ids != -100].mean())
        },
    )
    trainer.train()
    print({name: round(x, 4) for name, x in trainer.evaluate().items() if "loss" in name or "accuracy" in name})


if __name__ == "__main__":
    main()
