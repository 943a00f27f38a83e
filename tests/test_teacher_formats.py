"""Stores of every format that was ever written open for ever: tests/data/stores/ holds some, as version 1 wrote them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastdistil as fd
from fastdistil import teacher

STORES = Path(__file__).parent / "data" / "stores"
LENGTHS = (2, 0, 3)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def hidden(i: int) -> Tensor:
    """Example i of the stores of kind "hidden": 16 bits hold these numbers exactly."""
    return ((torch.arange(LENGTHS[i] * 4).reshape(-1, 4) + 5 * i) % 16 - 6) / 4


def topk(i: int) -> tuple[Tensor, Tensor]:
    """Example i of the stores of kind "topk": probabilities 1/2, 1/4, 1/8 of 7 columns."""
    values = torch.tensor([[0.5, 0.25, 0.125]]).log().repeat(LENGTHS[i], 1)
    return values, (torch.arange(3) * 2 + torch.arange(LENGTHS[i])[:, None] + i) % 7


NAMES = sorted(path.name for path in STORES.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_store_of_version_1_opens(name: str) -> None:
    cut_off = name.endswith("cut-off")
    if cut_off:
        with pytest.raises(ValueError, match="index.json: incomplete, 1 examples are written"):
            teacher.open(STORES / name)
    store = teacher.open(STORES / name, incomplete=cut_off)
    store.verify()
    assert [len(next(iter(x.values()))) for x in store] == list(LENGTHS[: 1 if cut_off else 3])
    kind, _, rest = name.partition("-")
    dtype = DTYPES.get(rest, torch.float32)
    assert (store.index.kind, store.index.model, store.index.vocabulary) == (kind, "tiny", 7)
    assert store.index.temperature == (2.0 if kind == "topk" and rest in DTYPES else 1.0)
    for i, x in enumerate(store):
        if kind == "hidden":
            assert x.keys() == {"hidden"} and x["hidden"].dtype == dtype and torch.equal(x["hidden"].float(), hidden(i))
        else:
            values, indices = topk(i)
            assert x.keys() == {"values", "indices"} and torch.equal(x["indices"], indices.int())
            assert torch.equal(x["values"], values.to(dtype))
    if kind == "hidden":
        head = store.head
        assert head.weight.dtype == dtype
        assert torch.equal(head.weight.float(), (torch.arange(28).reshape(7, 4) % 9 - 4) / 2)
        assert head.bias is None if "no-bias" in name else torch.equal(head.bias.float(), torch.arange(7) / 8)


def test_what_a_store_of_version_1_holds_goes_into_the_loss() -> None:
    batch = teacher.pad(list(teacher.open(STORES / "topk-float32")))
    student = torch.zeros(3, 3, 7)
    found = fd.topk_logit_loss(student, batch["values"], batch["indices"], reduction="none")
    q = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8], dtype=torch.float64)
    row = (q * (q.log() - torch.tensor([1 / 7, 1 / 7, 1 / 7, 4 / 7], dtype=torch.float64).log())).sum().item()
    assert found[0, 0].item() == pytest.approx(row, rel=1e-6) and found[0, 2] == found[1].sum() == 0


@pytest.mark.parametrize("name", ["hidden-cut-off", "topk-cut-off"])
def test_a_writer_continues_a_store_of_version_1(name: str, tmp_path: Path) -> None:
    path = shutil.copytree(STORES / name, tmp_path / "s")
    kind = name.partition("-")[0]
    options = {"width": 3}
    if kind == "hidden":
        head = {"head_weight": (torch.arange(28).reshape(7, 4) % 9 - 4) / 2, "head_bias": torch.arange(7) / 8}
        options = {"width": 4, **head}
    with teacher.Writer(path, kind=kind, vocabulary=7, model="tiny", **options) as writer:
        for i in range(writer.examples, 3):
            example = {"hidden": hidden(i)} if kind == "hidden" else dict(zip(("values", "indices"), topk(i), strict=True))
            writer.add(**example)
    store = teacher.open(path)
    store.verify()
    whole = teacher.open(STORES / ("hidden-no-bias-shards" if kind == "hidden" else "topk-shards"))
    for x, y in zip(store, whole, strict=True):
        assert x.keys() == y.keys() and all(torch.equal(x[field], y[field]) for field in y)
