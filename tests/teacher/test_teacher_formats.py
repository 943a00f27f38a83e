"""Stores of every format that was ever written open for ever: tests/data/stores/ holds some, as version 1 wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import mpmath
import pytest
import torch
from torch import Tensor, nn

import fastdistil as fd
from fastdistil import teacher

STORES = Path(__file__).parents[1] / "data/stores"
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
            example = (
                {"hidden": hidden(i)} if kind == "hidden" else dict(zip(("values", "indices"), topk(i), strict=True))
            )
            writer.add(**example)
    store = teacher.open(path)
    store.verify()
    whole = teacher.open(STORES / ("hidden-no-bias-shards" if kind == "hidden" else "topk-shards"))
    for x, y in zip(store, whole, strict=True):
        assert x.keys() == y.keys() and all(torch.equal(x[field], y[field]) for field in y)


class Tiny(nn.Module):
    """What teacher.write runs: logits (B, S, 7) of 4 numbers a token, of which the first tokens are sure."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 7)
        self.embedding.weight.data *= torch.linspace(300.0, 0.1, 9)[:, None]

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.arange(9).reshape(3, 3)}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_write_keeps_the_mass_of_the_tail(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Tiny()
    store = teacher.write(model, batches(), tmp_path / "s", kind="topk", k=3, temperature=2.0, dtype=dtype, name="tiny", progress=False)  # fmt: skip
    assert store.index.version == 2 and store.index.tail
    store.verify()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        logits = model(batches()[0]["input_ids"]).logits.flatten(0, 1)
    batch = teacher.pad(list(store))
    values, indices, tail = (batch[name].flatten(0, 1) for name in ("values", "indices", "tail"))
    assert (values.dtype, indices.dtype, tail.dtype) == (dtype, torch.int32, wide)
    with mpmath.workdps(50):
        for z, columns, found in zip(logits.tolist(), indices.tolist(), tail.tolist(), strict=True):
            mass = [mpmath.exp(mpmath.mpf(x) / 2) for x in z]
            rest = mpmath.log(mpmath.fsum(m for i, m in enumerate(mass) if i not in columns) / mpmath.fsum(mass))
            assert found == pytest.approx(float(rest), rel=torch.finfo(wide).eps)
    assert (tail < -17).any()  # less than float32's values can tell
    student = logits + 0.1 * torch.randn(9, 7)
    found = fd.topk_logit_loss(student, values, indices, teacher_tail=tail, divergence="reverse_kl", temperature=2.0)
    assert found.isfinite()
    if dtype != torch.bfloat16:
        plain = (student.double() / 2).log_softmax(-1), (logits.double() / 2).log_softmax(-1)
        p, q = (
            torch.cat((x.gather(-1, indices.long()), x.scatter(-1, indices.long(), -torch.inf).logsumexp(-1, keepdim=True)), -1)
            for x in plain
        )  # fmt: skip
        assert found.item() == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item() * 4, rel=1e-5)


def test_write_continues_a_store_of_version_1_without_tails(tmp_path: Path) -> None:
    path = shutil.copytree(STORES / "topk-cut-off", tmp_path / "s")
    with pytest.warns(
        UserWarning, match="teacher.write: .* was begun without the tails' mass .version 1. and is continued without it"
    ):
        store = teacher.write(Tiny(), batches(), path, kind="topk", k=3, name="tiny", progress=False)
    store.verify()
    assert (len(store), store.index.version, store.index.tail) == (3, 1, False)
    assert all(x.keys() == {"values", "indices"} for x in store)
    assert torch.equal(store[0]["values"], topk(0)[0])


def test_a_writer_with_tails_does_not_continue_one_without(tmp_path: Path) -> None:
    path = shutil.copytree(STORES / "topk-cut-off", tmp_path / "s")
    with pytest.raises(ValueError, match="was begun with tail = False, this writer has True"):
        teacher.Writer(path, kind="topk", width=3, vocabulary=7, model="tiny", tail=True)
    assert teacher.open(path, incomplete=True)[0].keys() == {"values", "indices"}


def test_padding_leaves_all_mass_in_the_tail(tmp_path: Path) -> None:
    with teacher.Writer(tmp_path / "s", kind="topk", width=3, vocabulary=7, tail=True, dtype=torch.float16) as writer:
        for i in range(3):
            values, indices = topk(i)
            writer.add(values=values, indices=indices, tail=torch.full((LENGTHS[i],), 1 / 8).log())
    store = teacher.open(tmp_path / "s")
    batch = teacher.pad(list(store))
    assert batch["tail"].shape == (3, 3) and (batch["tail"][1] == 0).all()
    assert store.to_datasets()[2]["tail"].dtype == torch.float32
    options = {"teacher_tail": batch["tail"], "reduction": "none", "divergence": "reverse_kl"}
    rows = fd.topk_logit_loss(torch.randn(3, 3, 7), batch["values"], batch["indices"], **options)
    assert rows[1].abs().sum() < 1e-6 and rows[0, 2].abs() < 1e-6 and (rows[2] > 0).all()


def test_what_has_neither_tails_nor_float64_is_still_version_1(tmp_path: Path) -> None:
    for name, options, version in (("a", {}, 1), ("b", {"tail": True}, 2), ("c", {"dtype": torch.float64}, 2)):
        teacher.Writer(tmp_path / name, kind="topk", width=3, vocabulary=7, **options)
        said = json.loads((tmp_path / name / "index.json").read_text())
        assert said["version"] == version and ("tail" in said) == (version == 2)
        assert not {"layers", "logits", "teacher"} & said.keys()


V, I, T = (*topk(2), torch.full((3,), 1 / 8).log())
BAD = [
    ({"values": V, "indices": I}, TypeError, r"add: got \['indices', 'values'\], expected values, indices, tail"),
    ({"values": V, "indices": I, "tail": T[:2]}, ValueError, r"add: tail has shape \(2,\), expected \(tokens,\)"),
    ({"values": V, "indices": I, "tail": T[:, None]}, ValueError, r"add: tail has shape \(3, 1\), expected \(tokens,\)"),
    ({"values": V, "indices": I, "tail": T.half()}, TypeError, "add: tail has dtype torch.float16, expected float32 or float64"),
    ({"values": V, "indices": I, "tail": T.exp()}, ValueError, "add: values and tail have probabilities that sum to 2.008 in token 0, expected 1"),
    ({"values": V, "indices": I, "tail": T - 3}, ValueError, "add: values and tail have probabilities that sum to 0.8812 in token 0, expected 1"),
]  # fmt: skip


@pytest.mark.parametrize(("example", "kind", "message"), BAD)
def test_bad_tails(example: dict[str, Tensor], kind: type[Exception], message: str, tmp_path: Path) -> None:
    writer = teacher.Writer(tmp_path / "s", kind="topk", width=3, vocabulary=7, tail=True)
    with pytest.raises(kind, match=rf"^teacher.Writer.{message}"):
        writer.add(**example)
    with pytest.raises(ValueError, match="^teacher.Writer: tail came with kind='hidden', expected kind='topk'"):
        teacher.Writer(tmp_path / "t", kind="hidden", width=3, vocabulary=7, tail=True)
    with pytest.raises(TypeError, match="^teacher.Writer: tail is Tensor, expected a bool"):
        teacher.Writer(tmp_path / "t", kind="topk", width=3, vocabulary=7, tail=T)
