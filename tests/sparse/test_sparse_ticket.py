"""lottery_ticket: two trainings from one start, exact rewinding, interruptions anywhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastdistil as fd
from fastdistil.sparse import SparseAdamW, SparseDelta, SparseMask, rewind_
from fastdistil.train import Options, train


class Objective(nn.Module):
    """Squared error of a small network with dropout and batch statistics, so that generators and buffers matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Tanh(), nn.Dropout(0.2))
        self.head = nn.Linear(40, 2)

    def forward(self, batch: dict[str, Tensor], items: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"squares": (self.head(self.body(batch["x"])) - batch["y"]).square().sum() / items["squares"]}

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"squares": torch.tensor(float(len(batch["x"])))}


GENERATOR = torch.Generator().manual_seed(0)
DATA = [(torch.randn(6, generator=GENERATOR), torch.randn(2, generator=GENERATOR)) for _ in range(40)]
OPTIONS = Options(25, lr=0.02, batch_size=8, warmup=2, save_every=4)


def collate(rows: list[Any]) -> dict[str, Tensor]:
    return {"x": torch.stack([x for x, _ in rows]), "y": torch.stack([y for _, y in rows])}


class Trainer:
    """A train_fn that counts its steps over all phases, and is cut off at one of them."""

    def __init__(self, cut: int | None = None) -> None:
        self.cut, self.steps, self.phases = cut, 0, list[str]()

    def __call__(self, model: nn.Module, mask: SparseMask | None, out: Path | None) -> None:
        self.phases.append("full" if mask is None else "sparse")
        self.last = list[int]()

        def cut_off(rows: list[Any]) -> dict[str, Tensor]:
            if [id(x) for x in rows] != self.last:  # the first batch of a call is made twice
                if self.steps == self.cut:
                    raise KeyboardInterrupt
                self.steps, self.last = self.steps + 1, [id(x) for x in rows]
            return collate(rows)

        if mask is None:
            train(model, DATA, cut_off, OPTIONS, out=out)
        else:
            train(model, DATA, cut_off, OPTIONS, optimizer=lambda m, o: SparseAdamW(m, mask, lr=o.lr), out=out)


def quick(model: nn.Module, mask: SparseMask | None, out: Path | None) -> None:
    """A training of no steps."""


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_ticket_is_sparse_and_trains_from_the_start() -> None:
    model = Objective()
    start = copy.deepcopy(model)
    seen = list[dict[str, Tensor]]()
    trainer = Trainer()

    def train_fn(module: nn.Module, mask: SparseMask | None, out: Path | None) -> None:
        seen.append(state(module))
        trainer(module, mask, out)

    delta = fd.lottery_ticket(model, train_fn, density=0.2, exclude="head")
    assert equal(seen[0], seen[1]), "the second training does not begin where the first did, buffers and head included"
    assert equal(seen[0], state(start))
    assert trainer.phases == ["full", "sparse"]
    assert set(delta.positions) == {"body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"}
    assert delta.nnz == round(0.2 * sum(start.get_parameter(n).numel() for n in delta.positions))
    assert set(delta.whole) == {"head.weight", "head.bias"}
    # The mask holds what moved most in a training of everything.
    everything = copy.deepcopy(start)
    Trainer()(everything, None, None)
    best = fd.sparse.select_topk(everything, start, density=0.2, exclude="head")
    assert best.digest() == delta.mask.digest()
    # The difference brings the start to the tuned model, and the tuned model is better than the start.
    tuned = dict(model.named_parameters())
    delta.apply_(start)
    for name, p in start.named_parameters():
        torch.testing.assert_close(p, tuned[name], rtol=1e-6, atol=1e-7)
    batch = collate(DATA)
    fresh = Objective()
    items = fresh.counts(batch)
    assert model.eval()(batch, items)["squares"] < 0.9 * fresh.eval()(batch, items)["squares"]


def test_a_given_mask_leaves_out_the_first_training() -> None:
    model, trainer = Objective(), Trainer()
    mask = fd.sparse.random_mask(model, density=0.1, exclude="head")
    delta = fd.lottery_ticket(model, trainer, mask=mask)
    assert trainer.phases == ["sparse"]
    assert delta.mask.digest() == mask.digest()


# Steps of each call that is cut off: in the first training, right behind it, in the second, and three times.
@pytest.mark.parametrize("cuts", [(6,), (25,), (31,), (3, 27, 20)], ids=str)
def test_interruptions_change_nothing(cuts: tuple[int, ...], tmp_path: Path) -> None:
    whole = Objective()
    fd.lottery_ticket(whole, Trainer(), density=0.2, exclude="head", out=tmp_path / "whole")
    for cut in cuts:
        with pytest.raises(KeyboardInterrupt):
            fd.lottery_ticket(Objective(), Trainer(cut), density=0.2, exclude="head", out=tmp_path / "cut")
    again, trainer = Objective(), Trainer()
    with torch.no_grad():
        again.head.weight.fill_(9.0)  # the start comes from the folder, not from whoever calls again
    with pytest.warns(UserWarning, match="model's 'head.weight' is not that of the start in .*base.safetensors"):
        delta = fd.lottery_ticket(again, trainer, density=0.2, exclude="head", out=tmp_path / "cut")
    # 25 steps each, a checkpoint every 4: what is repeated are the steps behind the last one.
    assert (trainer.phases, trainer.steps) == {
        (6,): (["full", "sparse"], 21 + 25), (25,): (["sparse"], 25), (31,): (["sparse"], 21), (3, 27, 20): (["sparse"], 5),
    }[cuts]  # fmt: skip
    assert equal(state(again), state(whole))
    files = [SparseDelta.load(tmp_path / name / "delta.safetensors") for name in ("whole", "cut")]
    for name, value in delta.values.items():
        assert torch.equal(value, files[0].values[name])
        assert torch.equal(value, files[1].values[name])


def test_a_folder_of_another_ticket_is_refused(tmp_path: Path) -> None:
    fd.lottery_ticket(Objective(), Trainer(), density=0.2, exclude="head", out=tmp_path)
    with pytest.raises(ValueError, match=r"lottery_ticket: out holds a ticket of .*0.2.* this call wants .*0.3"):
        fd.lottery_ticket(Objective(), Trainer(), density=0.3, exclude="head", out=tmp_path)
    for name in ("one", None):
        with pytest.raises(ValueError, match=rf"out holds a ticket of .*'base_model': 'two'.*, this call .*{name}"):
            out = tmp_path / "named"
            fd.lottery_ticket(Objective(), quick, density=0.2, out=out, base_model="two")
            fd.lottery_ticket(Objective(), quick, density=0.2, out=out, base_model=name)
    with pytest.raises(ValueError, match=r"lottery_ticket: out holds a ticket of .*'shapes': "):
        other = Objective()
        other.other = nn.Linear(2, 2)
        fd.lottery_ticket(other, Trainer(), density=0.2, exclude="head", out=tmp_path)


def test_another_model_of_the_same_shapes_is_not_overwritten(tmp_path: Path) -> None:
    """Where something is not trained, that tells them apart; a model that has moved from its start is no other one."""
    model = Objective()
    model.head.requires_grad_(False)
    with pytest.raises(KeyboardInterrupt):
        fd.lottery_ticket(model, Trainer(6), density=0.2, out=tmp_path)
    other = Objective()
    other.head.requires_grad_(False)
    with torch.no_grad():
        other.head.weight.mul_(1.5)
        other.body[0].weight.mul_(1.5)
    before = state(other)
    with pytest.raises(
        ValueError, match=r"lottery_ticket: model's 'head.weight', which is not trained, is not that of"
    ):
        fd.lottery_ticket(other, Trainer(), density=0.2, out=tmp_path)
    assert equal(state(other), before)
    with pytest.warns(UserWarning, match="model's 'body.0.weight' is not that of the start"):
        fd.lottery_ticket(model, Trainer(), density=0.2, out=tmp_path)
    whole = Objective()
    whole.head.requires_grad_(False)
    fd.lottery_ticket(whole, Trainer(), density=0.2)
    assert equal(state(model), state(whole))


def test_a_finished_ticket_is_not_trained_again(tmp_path: Path) -> None:
    """However far from a sum of rounded numbers the tuned model is: everything moves by factors of about a million."""
    calls = list[bool]()

    def train_fn(model: nn.Module, mask: SparseMask | None, out: Path | None) -> None:
        calls.append(mask is None)
        with torch.no_grad():
            for name, p in model.named_parameters():
                at = torch.arange(p.numel()) if mask is None or name not in mask else mask[name].long()
                p.view(-1)[at] = p.view(-1)[at] * 1e6 + 0.3 if len(calls) == 1 else p.view(-1)[at] * 1e-6 + 1e-9
            model.body(torch.randn(8, 6))  # batch statistics

    model, options = Objective(), {"density": 0.2, "exclude": "head", "base_model": "net", "out": tmp_path}
    first = fd.lottery_ticket(model, train_fn, **options)  # type: ignore[arg-type]
    again = Objective()
    found = fd.lottery_ticket(again, train_fn, **options)  # type: ignore[arg-type]
    assert calls == [True, False]
    assert equal(state(again), state(model))
    assert not equal(state(again), state(Objective()))
    assert (found.base_model, found.mask.digest()) == ("net", first.mask.digest())
    assert all(torch.equal(x, found.values[name]) for name, x in first.values.items())
    assert equal(found.whole, first.whole)
    added = Objective()
    found.apply_(added)
    assert not equal(dict(added.named_parameters()), dict(model.named_parameters())), "there was nothing to round"
    (tmp_path / "tuned.safetensors").unlink()  # cut off before the end: the second training comes again
    fd.lottery_ticket(Objective(), train_fn, **options)  # type: ignore[arg-type]
    assert calls == [True, False, False]


def untouched(model: nn.Module, mask: SparseMask | None, out: Path | None) -> None:
    raise AssertionError("trained")


def test_what_would_fail_behind_the_training_fails_before(tmp_path: Path) -> None:
    model = Objective()
    model.body[0].weight = nn.Parameter(torch.randn(6, 40).t())
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, ValueError, r"model's 'body.0.weight' has strides \(1, 40\), expected it dense"),
        ({"density": 2.0}, ValueError, "density is 2.0, expected 0 to 1"),
        ({"k": 10**6}, ValueError, "k is 1000000, expected 0 to the"),
        ({"k": 2.0}, TypeError, "k is float, expected an int"),
        ({"exclude": "haed"}, ValueError, "exclude holds 'haed', which is part of no parameter's name"),
        ({"mask": fd.sparse.random_mask(model, k=3)}, ValueError, "model's 'body.0.weight' has strides"),
        ({"mask": fd.sparse.random_mask(nn.Linear(2, 2), k=3)}, ValueError, "model has no parameter 'weight', which"),
    ]
    for options, kind, message in bad:
        with pytest.raises(kind, match="^lottery_ticket: " + message):
            fd.lottery_ticket(model, untouched, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_parameters_that_the_mask_cannot_hold_may_have_any_strides(tmp_path: Path) -> None:
    models = Objective(), Objective()
    for model in models:
        with torch.no_grad():
            model.head.weight = nn.Parameter(model.head.weight.t().contiguous().t())

    def train_fn(model: nn.Module, mask: SparseMask | None, out: Path | None) -> None:
        with torch.no_grad():
            for p in (model.head.weight, *([] if mask is not None else [model.body[0].weight])):
                p.add_(1.0)

    options: dict[str, Any] = {"k": np.int64(7), "exclude": "head", "out": tmp_path}
    delta = fd.lottery_ticket(models[0], train_fn, **options)
    assert delta.nnz == 7
    assert torch.equal(delta.whole["head.weight"], models[0].head.weight)
    fd.lottery_ticket(models[1], untouched, **options)
    assert equal(state(models[1]), state(models[0]))


def test_training_outside_of_the_mask_is_noticed() -> None:
    def careless(model: nn.Module, mask: SparseMask | None, out: Path | None) -> None:
        train(model, DATA, collate, OPTIONS)

    with pytest.raises(ValueError, match="train_fn changed 'body.0.weight' outside of its mask"):
        fd.lottery_ticket(Objective(), careless, density=0.2, exclude="head")


def test_rewinding_is_all_or_nothing() -> None:
    model = Objective()
    before = state(model)
    start = {name: x + 1 for name, x in before.items() if "num_batches" not in name}
    with pytest.raises(ValueError, match="start has no 'body.1.num_batches_tracked'"):
        rewind_(model, start)
    start["body.1.num_batches_tracked"] = torch.tensor(3)
    start["head.bias"] = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"start\['head.bias'\] is torch.float64 of shape \(2,\), expected torch.float32"
    ):
        rewind_(model, start)
    assert equal(state(model), before)
    start["head.bias"] = before["head.bias"]
    rewind_(model, start)
    assert equal(state(model), start)
