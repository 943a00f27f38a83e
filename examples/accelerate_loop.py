"""Distil a classifier in an accelerate loop: exact with accumulation and with any number of processes.

python examples/accelerate_loop.py   # small random models and data, nothing is downloaded
ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import fastdistil as fd


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    """Random ids of 4 to 16 tokens; the label is that of the first one."""
    draw, rows = torch.Generator().manual_seed(0), []
    for _ in range(count):
        ids, length = torch.randint(5, 100, (16,), generator=draw), torch.randint(4, 17, (), generator=draw)
        rows.append({"input_ids": ids, "attention_mask": (torch.arange(16) < length).long(), "labels": ids[0] % 5})
    return rows


def classifier(layers: int) -> BertForSequenceClassification:
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, num_labels=5, **sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps, accumulate = parser.parse_args().steps, 2
    torch.manual_seed(0)
    accelerator = Accelerator()  # its gradient_accumulation_steps stays 1: num_items does the division
    teacher, student = classifier(4).eval().requires_grad_(False), classifier(2)
    teacher.to(accelerator.device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    loader = DataLoader(examples(256), batch_size=16 // accelerator.num_processes, shuffle=True)
    model, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    history: list[float] = []
    group: list[dict[str, torch.Tensor]] = []
    while len(history) < steps:
        for batch in loader:
            group.append(batch)
            if len(group) < accumulate:
                continue
            rows = torch.tensor(float(sum(len(x["labels"]) for x in group)), device=accelerator.device)
            items = accelerator.reduce(rows)  # of all processes
            total = torch.zeros((), device=accelerator.device)
            for number, part in enumerate(group):
                last = number == len(group) - 1
                with nullcontext() if last else accelerator.no_sync(model):
                    inputs = {name: part[name] for name in ("input_ids", "attention_mask")}
                    with torch.no_grad():
                        target = teacher(**inputs).logits
                    loss = fd.logit_loss(
                        model(**inputs).logits, target, temperature=2.0, num_items=items,
                        labels=part["labels"], label_weight=0.5,
                    )  # fmt: skip
                    accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over processes
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            history.append(accelerator.reduce(total).item())
            group = []
    accelerator.print({"first": round(history[0], 4), "last": round(sum(history[-10:]) / len(history[-10:]), 4)})
    accelerator.end_training()


if __name__ == "__main__":
    main()
