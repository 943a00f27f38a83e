"""Distil a language model in a plain PyTorch loop: logits of two heads, never whole, with gradient accumulation.

python examples/plain_torch.py   # small random models and data, nothing is downloaded
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import fastdistil as fd


class Tiny(nn.Module):
    """Embeddings, one causal Transformer block and a head; `forward` returns what the head gets."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocabulary, width)
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        states: torch.Tensor = self.block(self.embeddings(ids), src_mask=causal, is_causal=True)
        return states


def texts(count: int, vocabulary: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 4: ids (4, 12), and a mask (4, 12) of tokens that are no padding, on the right."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        lengths = torch.randint(3, 13, (4, 1), generator=draw)
        found.append((torch.randint(3, vocabulary, (4, 12), generator=draw), torch.arange(12) < lengths))
    return found


def next_tokens(mask: torch.Tensor) -> torch.Tensor:
    """(B, S) True where the logits predict a token: a weight of 0 costs nothing, a slice of the logits is a copy."""
    return nn.functional.pad(mask[:, 1:], (0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    steps, vocabulary, accumulate = parser.parse_args().steps, 2_000, 2
    torch.manual_seed(0)
    teacher, student = Tiny(vocabulary, 64).eval().requires_grad_(False), Tiny(vocabulary, 32)
    teacher.head.weight.mul_(10)  # an untrained teacher says nearly nothing
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    data = texts(accumulate * 16, vocabulary)
    history = []
    for step in range(steps):
        group = [data[(accumulate * step + i) % len(data)] for i in range(accumulate)]
        items = sum(next_tokens(mask).sum() for _, mask in group)  # of the whole step: batches differ in length
        total = 0.0
        for ids, mask in group:
            with torch.no_grad():
                target = teacher(ids)
            loss = fd.linear_logit_loss(
                student(ids), student.head.weight, target, teacher.head.weight,
                temperature=2.0, weight=next_tokens(mask), num_items=items,
            )  # fmt: skip
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        history.append(total)
    print({"first": round(history[0], 4), "last": round(sum(history[-10:]) / len(history[-10:]), 4)})


if __name__ == "__main__":
    main()
