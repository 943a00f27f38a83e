"""The teacher's side of the demo: a frozen encoder, a linear tagging head, and targets for the students, computed once.

Features of a piece are its states at `feature_layers`, standardised. The head is a ridge-penalised softmax fitted on
the labelled words; the target basis holds the features' leading principal components, scaled to variance 1 (whitened),
because raw states share one large direction that a squared error would learn first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import BertModel

from fastdistil.demo.encode import Encoded, pad

TARGET_SIZE = 128  # principal components; the student's width
RIDGE = 1e-2
BATCH = 32  # sentences a forward pass


@dataclass(frozen=True)
class Head:
    """Standardisation `mean`, `std` (F,), F = layers * D; `weight` (F, C), `bias` (C,); `basis` (F, TARGET_SIZE):
    standardised features times `basis` are whitened."""

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    basis: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(N, F) -> (N, C)."""
        return (features - self.mean) / self.std @ self.weight + self.bias

    def targets(self, features: Tensor) -> Tensor:
        """(N, F) -> (N, TARGET_SIZE)."""
        return (features - self.mean) / self.std @ self.basis


def feature_layers(layers: int) -> list[int]:
    """The embedding output (0) and the end of each quarter: 0, 3, 6, 9 and 12 of 12 layers."""
    return sorted({round(layers * quarter / 4) for quarter in range(5)})


@torch.no_grad()
def _states(model: BertModel, rows: Sequence[Encoded], pad_id: int) -> list[Tensor]:
    """(pieces, F) float32 of each row, from one forward pass."""
    batch = pad(rows, pad_id)
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    layers = feature_layers(model.config.num_hidden_layers)
    states = torch.cat([out.hidden_states[layer] for layer in layers], dim=-1)  # (B, S, F)
    return [states[i, : len(row.ids)].clone() for i, row in enumerate(rows)]


def features(model: BertModel, rows: Sequence[Encoded], pad_id: int, what: str) -> Iterator[tuple[int, Tensor]]:
    """(index, (pieces, F) float32) of every row; by rising length, so that little is padding.

    A batch for each core, side by side: faster than all cores on one batch, and the numbers do not depend on how many
    cores there are as long as torch is set to one thread.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    workers = os.cpu_count() or 1
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(rows), desc=what, unit="sentence", disable=None, leave=False) as bar,
    ):
        for start in range(0, len(batches), workers):  # no more states in memory than are being made
            chosen = batches[start : start + workers]
            found = pool.map(lambda batch: _states(model, [rows[i] for i in batch], pad_id), chosen)
            for batch, states in zip(chosen, found, strict=True):
                yield from zip(batch, states, strict=True)
                bar.update(len(batch))


def fit_head(states: Sequence[Tensor], rows: Sequence[Encoded], classes: int) -> Head:
    """Fit standardisation and basis on all pieces of `states` ((pieces, F) a sentence), the head on the tagged ones.

    Deterministic: L-BFGS from zero, no draw anywhere.
    """
    pieces = torch.cat(list(states))
    mean, std = pieces.mean(0), pieces.std(0).clamp(min=1e-6)
    scaled = ((pieces - mean) / std).double()
    values, vectors = torch.linalg.eigh(scaled.T @ scaled / len(scaled))  # ascending
    basis = vectors.flip(1)[:, :TARGET_SIZE] / values.flip(0)[:TARGET_SIZE].clamp(min=1e-6).sqrt()
    words = torch.cat([(state[row.first] - mean) / std for state, row in zip(states, rows, strict=True)])
    tags = torch.tensor([tag for row in rows for tag in row.tags])
    weight = torch.zeros(words.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(words @ weight + bias, tags) + RIDGE * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Head(mean, std, weight.detach(), bias.detach(), basis.float())


def accuracy(logits: Sequence[Tensor], rows: Sequence[Encoded]) -> float:
    """Percent of the rows' words whose highest logit, at the first piece, is the tag. `logits`: (pieces, C) a row."""
    right = sum(int((z[r.first].argmax(-1) == torch.tensor(r.tags)).sum()) for z, r in zip(logits, rows, strict=True))
    return 100.0 * right / sum(len(row.tags) for row in rows)
