"""A tied parameter is one: counted, chosen, trained, stored and applied once, whichever of its names is used."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from sparse_cases import gradients
from torch import Tensor, nn

from fastdistil.sparse import SparseAdamW, SparseDelta, SparseMask, lottery_ticket, random_mask, rewind_, select_topk


class Model(nn.Module):
    """A language model's ends: the scores are products with the embeddings. `first` says which of both names is the
    first one."""

    def __init__(self, first: str = "embed") -> None:
        super().__init__()
        torch.manual_seed(3)
        table = nn.Parameter(torch.randn(7, 5))
        for name in ("embed", "head") if first == "embed" else ("head", "embed"):
            module = nn.Module()
            module.weight = table
            setattr(self, name, module)
        self.body = nn.Linear(5, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.embed.weight[ids]).tanh() @ self.head.weight.T


def _moved(first: str = "embed") -> tuple[Model, Model]:
    base, tuned = Model(first), Model(first)
    with torch.no_grad():
        for p in tuned.parameters():
            p += torch.randn(p.shape)
    return base, tuned


def _lists(mask: SparseMask) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in mask.items()}


FORMS = {
    "module": lambda m: m,
    "state_dict": lambda m: m.state_dict(),
    "pairs": lambda m: m.named_parameters(remove_duplicate=False),
    "first names": lambda m: m.named_parameters(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base_first", ["embed", "head"])
def test_selection_counts_it_once(form: str, base_first: str) -> None:
    base, tuned = _moved()
    other = Model(base_first)
    other.load_state_dict(base.state_dict())
    wanted = select_topk(dict(tuned.named_parameters()), dict(base.named_parameters()), density=0.5)
    assert wanted.numel == 35 + 30 and wanted.nnz == round(0.5 * 65) and len(wanted["embed.weight"]) > 5
    assert _lists(
        select_topk(FORMS[form](tuned), FORMS[form](other) if form != "first names" else other, density=0.5)
    ) == (_lists(wanted))
    assert select_topk(FORMS[form](tuned), base, k=65).nnz == 65
    with pytest.raises(ValueError, match="k is 66, expected 0 to the 65 elements"):
        select_topk(FORMS[form](tuned), base, k=66)
    assert random_mask(FORMS[form](tuned), k=65).nnz == 65


def test_either_name_includes_and_excludes() -> None:
    base, tuned = _moved()
    for name in ("embed", "head"):
        assert list(select_topk(tuned, base, k=3, include=name)) == ["embed.weight"]
        assert list(select_topk(tuned, base, k=3, exclude=name)) == ["body.weight", "body.bias"]
        assert list(random_mask(tuned, k=3, include=name)) == ["embed.weight"]
    with pytest.raises(ValueError, match="include and exclude leave none of the 3 parameters"):
        select_topk(tuned, base, k=3, include="embed", exclude="head")


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
@pytest.mark.parametrize("first", ["embed", "head"])
@pytest.mark.parametrize("form", ["module", "pairs", "groups"])
def test_the_optimizer_takes_either_name(name: str, first: str, form: str) -> None:
    index = torch.tensor([0, 8, 34], dtype=torch.int32)
    expected = Model(first)
    mask = {f"{first}.weight": index, "body.weight": torch.tensor([1, 2])}
    reference = SparseAdamW(expected.named_parameters(), mask, lr=0.1, l1=0.1)
    model = Model(first)
    every = list(model.named_parameters(remove_duplicate=False))
    groups = [{"params": every[:2]}, {"params": model.body.named_parameters(prefix="body"), "lr": 0.1}]
    given = {"module": model, "pairs": every, "groups": groups}[form]
    optimizer = SparseAdamW(given, {name: index, "body.weight": torch.tensor([1, 2])}, lr=0.1, l1=0.1)
    for step in range(3):
        for net, updates in ((expected, reference), (model, optimizer)):
            gradients(net, step)
            updates.step()
    assert torch.equal(model.embed.weight, expected.embed.weight) and torch.equal(
        model.body.weight, expected.body.weight
    )
    changed = (model.embed.weight != Model(first).embed.weight).flatten().nonzero().flatten()
    assert changed.tolist() == index.tolist()
    duplicate, _ = copy.deepcopy((optimizer, model))
    assert duplicate.mask.nnz == 5


def test_a_mask_with_both_names() -> None:
    model, index = Model(), torch.tensor([0, 8], dtype=torch.int32)
    optimizer = SparseAdamW(model, {"head.weight": index, "embed.weight": index.clone()})
    assert optimizer.mask.nnz == 2
    message = r"SparseAdamW: mask holds 'head.weight' and 'embed.weight', which are names of one parameter, and not"
    with pytest.raises(ValueError, match=message):
        SparseAdamW(model, {"head.weight": index, "embed.weight": index[:1]})
    with pytest.raises(ValueError, match=r"mask has 'head.weight', which named_params has not \(a tied parameter has"):
        SparseAdamW(model.named_parameters(), {"head.weight": index})


@pytest.mark.parametrize("stored", ["embed", "head"])
@pytest.mark.parametrize("first", ["embed", "head"])
def test_a_delta_under_either_name(stored: str, first: str, tmp_path: Path) -> None:
    base, tuned = _moved(stored)
    delta = SparseDelta.from_params(tuned, base, select_topk(tuned, base, k=30))
    assert f"{stored}.weight" in delta.positions and delta.nnz == 30
    again = SparseDelta.from_params(tuned.state_dict(), base.state_dict(), select_topk(tuned, base, k=30))
    assert again.nnz == 30 and again.shapes == delta.shapes
    delta.save(tmp_path / "delta.safetensors")
    model = Model(first)
    start = copy.deepcopy(model.state_dict())
    loaded = SparseDelta.load(tmp_path / "delta.safetensors").apply_(model)
    at = delta.positions[f"{stored}.weight"].long()
    torch.testing.assert_close(model.head.weight.flatten()[at], tuned.head.weight.flatten()[at])
    assert model.head.weight is model.embed.weight
    loaded.revert_(model)
    assert all(torch.equal(x, start[name]) for name, x in model.state_dict().items())


def test_a_delta_that_holds_both_names() -> None:
    """Of two tensors in a checkpoint, or of two deltas of models with other first names."""
    index, values = torch.tensor([4]), torch.tensor([0.5])
    shapes = {"embed.weight": (7, 5), "head.weight": (7, 5)}
    model, both = Model(), dict.fromkeys(shapes, index)
    before = model.embed.weight[0, 4].item()
    SparseDelta(both, dict.fromkeys(shapes, values), shapes).apply_(model)
    assert model.embed.weight[0, 4].item() == pytest.approx(before + 0.5)
    differs = SparseDelta(both, {"embed.weight": values, "head.weight": 2 * values}, shapes)
    kept = model.embed.weight.clone()
    with pytest.raises(
        ValueError, match=r"apply_: the delta holds 'embed.weight' and 'head.weight', which are names of"
    ):
        differs.apply_(model)
    assert torch.equal(model.embed.weight, kept)


def _train(model: Model, mask: SparseMask | None, out: Path | None) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 0.1) if mask is None else SparseAdamW(model, mask, 0.1)
    ids = torch.arange(7)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids), (3 * ids + 1) % 7).backward()
        optimizer.step()


@pytest.mark.parametrize("exclude", ["body", None])
def test_a_ticket_continues_whichever_name_is_first(exclude: str | None, tmp_path: Path) -> None:
    plain = lottery_ticket(Model(), _train, k=9, exclude=exclude)
    assert plain.nnz == 9
    first = Model()
    delta = lottery_ticket(first, _train, k=9, exclude=exclude, out=tmp_path)
    assert delta.positions.keys() == plain.positions.keys() and "head.weight" not in delta.shapes

    def never(*_: object) -> None:
        raise AssertionError("a finished ticket is not trained again")

    second = Model("head")
    again = lottery_ticket(second, never, k=9, exclude=exclude, out=tmp_path)
    assert again.shapes == delta.shapes and torch.equal(second.head.weight, first.embed.weight)
    assert torch.equal(second.body.weight, first.body.weight)
    given = SparseMask({"head.weight": torch.tensor([3])}, {"head.weight": (7, 5)})
    tuned = Model()
    of_mask = lottery_ticket(tuned, _train, mask=given)
    assert of_mask.positions["embed.weight"].tolist() == [3] and "embed.weight" not in of_mask.whole


def test_rewinding_by_either_name() -> None:
    base, tuned = _moved()
    start = {name: p.detach().clone() for name, p in Model("head").named_parameters()}
    rewind_(tuned, start)
    assert torch.equal(tuned.embed.weight, base.embed.weight)
