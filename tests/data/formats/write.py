"""What wrote this folder, run at commit 5976e3a (`python tests/data/formats/write.py FOLDER`). The files stay as they are:
tests/project/test_old_files.py opens them with every later version."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
from torch import nn

from fastdistil.sparse import SparseAdamW, SparseDelta, lottery_ticket
from fastdistil.train import Options, train


class Tied(nn.Module):
    """Scores of the next of 7 tokens, by the embeddings themselves: `head.weight` is `embed.weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(7, 3), nn.Linear(3, 3), nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros(2))
        with torch.no_grad():  # without a generator, whose numbers may change
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.arange(p.numel()).reshape(p.shape).mul(0.7).add(i).sin() / 2)

    def forward(self, batch: dict[str, torch.Tensor], items: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits = self.head(self.body(self.embed(batch["tokens"][:, :-1])).tanh())
        target = batch["tokens"][:, 1:].reshape(-1)
        return {"ce": nn.functional.cross_entropy(logits.flatten(0, 1), target, reduction="sum") / items["ce"]}

    def counts(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ce": torch.tensor(batch["tokens"][:, 1:].numel())}


def collate(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return {"tokens": torch.tensor(rows)}


DATA = [[(i * j + j) % 7 for j in range(5)] for i in range(6)]
OPTIONS = Options(steps=4, lr=0.05, batch_size=2, warmup=1, save_every=2)


def phase(model: nn.Module, mask: object, out: Path | None) -> None:
    """Two steps on all the data: all that a lottery ticket's train_fn does here."""
    if mask is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    else:
        optimizer = SparseAdamW(model.named_parameters(), mask, lr=0.05)  # type: ignore[arg-type]
    for _ in range(2):
        optimizer.zero_grad()
        model(collate(DATA), {"ce": torch.tensor(24.0)})["ce"].backward()
        optimizer.step()
    model.steps += 2


def main(out: Path) -> None:
    delta = SparseDelta(
        {"embed.weight": torch.tensor([0, 5, 20], dtype=torch.int32), "body.weight": torch.tensor([3])},
        {"embed.weight": torch.tensor([0.5, -0.25, 2.0]), "body.weight": torch.tensor([0.125], dtype=torch.float64)},
        {"embed.weight": (7, 3), "body.weight": (3, 3)},
        whole={"body.bias": torch.tensor([1.0, 2.0, 3.0])},
        base_model="tied",
    )
    delta.save(out / "delta.safetensors")
    delta.mask.save(out / "mask.safetensors")
    ticket = Tied()
    lottery_ticket(ticket, phase, k=6, exclude="bias", out=out / "ticket", base_model="tied")
    torch.save(ticket.state_dict(), out / "ticket.pt")

    class Stop(Exception):
        pass

    calls = []

    def stopping(rows: list[list[int]]) -> dict[str, torch.Tensor]:
        calls.append(rows)
        if len(calls) == 3:
            raise Stop
        return collate(rows)

    with contextlib.suppress(Stop):
        train(Tied(), DATA, stopping, OPTIONS, out=out / "train")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
