"""A small model and its data, for tests of the loop; processes of their own import it, and no more."""

import torch
from torch import nn


class Squares(nn.Module):
    """Mean over real entries of (w . x - y)^2; examples have different numbers of real entries. Dropout optional."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(4, 1)
        self.drop = nn.Dropout(dropout)

    def forward(self, batch, items):
        error = self.layer(self.drop(batch["x"])).squeeze(-1) - batch["y"]
        return {"squares": (error.square() * batch["mask"]).sum() / items["squares"]}

    def counts(self, batch):
        return {"squares": batch["mask"].sum()}


def examples(n=24):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 7, (n,), generator=generator).tolist()
    return [(torch.randn(k, 4, generator=generator), torch.randn(k, generator=generator)) for k in lengths]


def collate(rows):
    x, y, mask = torch.zeros(len(rows), 6, 4), torch.zeros(len(rows), 6), torch.zeros(len(rows), 6)
    for i, (a, b) in enumerate(rows):
        x[i, : len(a)], y[i, : len(b)], mask[i, : len(a)] = a, b, 1
    return {"x": x, "y": y, "mask": mask}
