"""What faults.py damages: each thing that this library saves, as two versions of itself, and what loading gives."""

from __future__ import annotations

import copy
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from squares import Squares, collate, examples
from task_cases import wordpiece
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification

from fastdistil import teacher
from fastdistil.models.trim import trim_model_
from fastdistil.models.vocab import trim_vocabulary
from fastdistil.sparse import SparseAdamW, SparseDelta, lottery_ticket
from fastdistil.systems.encoders import load_encoder, save_student
from fastdistil.systems.models import load_tokenizer
from fastdistil.train import Options, train


def hash_of(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].detach().contiguous()
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode() + bytes(x.view(-1).view(torch.uint8).tolist()))
    return found.hexdigest()


@dataclass(frozen=True)
class Delta:
    """A file of SparseDelta."""

    name: str = "sparse difference"
    again: bool = True  # whether a second save takes the first one's place

    def save(self, folder: Path, version: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        at, values = torch.tensor([0, 5, 9]) + version, torch.tensor([1.0, -2.0, 3.5]) * (version + 1)
        bias = torch.tensor([0.5, float(version)])
        SparseDelta({"w": at}, {"w": values}, {"w": (4, 4), "b": (2,)}, whole={"b": bias}).save(
            folder / "d.safetensors"
        )

    def load(self, folder: Path) -> str:
        delta = SparseDelta.load(folder / "d.safetensors")
        named = {
            f"{kind} {name}": x for kind in ("positions", "values", "whole") for name, x in getattr(delta, kind).items()
        }
        return hash_of(named)


@dataclass(frozen=True)
class Outputs:
    """Cached teacher outputs: hidden states in two shards, with the head."""

    name: str = "cached teacher outputs"
    again: bool = False

    def save(self, folder: Path, version: int) -> None:
        head = torch.arange(12.0).view(4, 3) + version
        options: dict[str, Any] = {
            "kind": "hidden",
            "width": 3,
            "vocabulary": 4,
            "head_weight": head,
            "shard_bytes": 64,
        }
        with teacher.Writer(folder, **options) as writer:
            for i in range(writer.examples, 6):
                writer.add(hidden=torch.full((2 + i % 2, 3), float(i + 10 * version)))

    def load(self, folder: Path) -> str:
        store = teacher.open(folder)
        assert store.head.bias is None
        found = {f"example {i}": x["hidden"] for i, x in enumerate(store)}
        return hash_of(found | {"head": store.head.weight})


@dataclass(frozen=True)
class Checkpoint:
    """The newest checkpoint of the loop; version 1 is another run's."""

    name: str = "checkpoint of the loop"
    again: bool = False

    def options(self, version: int) -> Options:
        return Options(4 + 2 * version, save_every=1, lr=1e-2)

    def save(self, folder: Path, version: int) -> None:
        train(Squares(), examples(), collate, self.options(version), out=folder)

    def load(self, folder: Path) -> str:
        module = Squares()
        train(module, examples(), collate, self.options(0), out=folder)
        return hash_of(dict(module.state_dict()))


def _train_ticket(model: nn.Module, mask: Any, out: Path | None) -> None:
    parameters = model.named_parameters()
    optimizer: Any = (
        torch.optim.AdamW(model.parameters(), lr=0.1) if mask is None else SparseAdamW(parameters, mask, lr=0.1)
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.eye(4)).square().sum().backward()
        optimizer.step()


@dataclass(frozen=True)
class Ticket:
    """A finished lottery ticket; one that is not finished is trained again, to the same end."""

    name: str = "lottery ticket"
    again: bool = False

    def run(self, folder: Path, version: int) -> str:
        torch.manual_seed(version)
        model = nn.Linear(4, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lottery_ticket(model, _train_ticket, 0.5 - 0.25 * version, exclude="bias", out=folder)
        return hash_of(dict(model.state_dict()))

    def save(self, folder: Path, version: int) -> None:
        self.run(folder, version)

    def load(self, folder: Path) -> str:
        return self.run(folder, 0)


@dataclass(frozen=True)
class Student:
    """A student with a trimmed tokenizer, as the systems save it."""

    name: str = "student, trimmed tokenizer"
    again: bool = True

    def save(self, folder: Path, version: int) -> None:
        whole = wordpiece()
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        tokenizer, rows = trim_vocabulary(whole, whole("the cat sat" if version else "on the mat")["input_ids"])
        torch.manual_seed(version)
        model = BertForTokenClassification(BertConfig(vocab_size=len(whole), **sizes)).eval()
        trim_model_(model, rows)
        save_student(copy.deepcopy(model), tokenizer, folder / "student", "faults", check=False)

    def load(self, folder: Path) -> str:
        tokenizer, model = load_tokenizer(str(folder / "student")), load_encoder(str(folder / "student"), "faults")
        vocabulary = "\n".join(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__))
        return hashlib.sha256((hash_of(dict(model.state_dict())) + vocabulary).encode()).hexdigest()


THINGS: list[Any] = [Delta(), Outputs(), Checkpoint(), Ticket(), Student()]
