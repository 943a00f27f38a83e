"""SparseDelta and its files: apply, revert, add up; safetensors both ways; composable-sft; hostile files."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from sparse_cases import DTYPES, equal, network, state
from torch import Tensor, nn

import fastdistil as fd
from fastdistil.sparse import Checkpoint, SparseDelta, SparseMask, files, load_into


def tuned(base: nn.Module, density: float, seed: int = 1) -> tuple[nn.Module, SparseMask]:
    """The base with small changes at a random mask of the first layer."""
    model = copy.deepcopy(base)
    mask = fd.sparse.random_mask(model, density=density, include="0.", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, index in mask.items():
            flat = model.get_parameter(name).view(-1)
            factor = 1 + 0.4 * torch.rand(len(index), generator=generator)  # within a factor of two: exact
            flat[index.long()] = (flat[index.long()].float() * factor).to(flat.dtype)
    return model, mask


def change(base: nn.Module, density: float, seed: int) -> SparseDelta:
    model, mask = tuned(base, density, seed)
    return SparseDelta.from_params(model, base, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_and_revert_are_exact(dtype: torch.dtype) -> None:
    base = network(dtype)
    model, mask = tuned(base, 0.3)
    before, after = state(base), state(model)
    delta = SparseDelta.from_params(model, base, mask, base_model="net")
    assert (delta.nnz, delta.density) == (mask.nnz, pytest.approx(0.3, abs=1e-3))
    assert delta.apply_(base) is delta
    assert equal(state(base), after)
    with pytest.raises(ValueError, match="is applied to module already"):
        delta.apply_(base)
    delta.revert_(base)
    assert equal(state(base), before)
    with pytest.raises(ValueError, match="is not applied to module"):
        delta.revert_(base)


def test_revert_is_exact_where_the_sum_was_rounded() -> None:
    layer = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1e-8], [-0.0], [3.0]]))
    before = layer.weight.detach().clone()
    at = torch.tensor([0, 1, 2], dtype=torch.int32)
    delta = SparseDelta({"weight": at}, {"weight": torch.tensor([1e8, 0.0, 1e-12])}, {"weight": (3, 1)})
    delta.apply_(layer)
    assert layer.weight[0].item() == 1e8
    delta.revert_(layer)
    assert torch.equal(layer.weight.detach().view(torch.int32), before.view(torch.int32))  # the sign of zero as well


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_is_applied_to_nothing(copied: Any) -> None:
    base = network()
    model, mask = tuned(base, 0.2)
    delta = SparseDelta.from_params(model, base, mask, base_model="mbert").apply_(base)
    other = copied(delta)
    assert repr(other) == repr(delta)
    with pytest.raises(ValueError, match="the delta is not applied to module"):
        other.revert_(base)
    delta.revert_(base)
    other.apply_(base)
    assert equal(state(base), state(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deltas_that_share_entries_are_reverted_last_one_first(dtype: torch.dtype) -> None:
    base = network(dtype)
    before, whole = state(base), {"2.bias": torch.ones(3, dtype=dtype)}
    one, two = (change(base, 0.3, seed) for seed in (1, 2))
    three = SparseDelta({}, {}, {}, whole=whole)
    one.apply_(base)
    first = state(base)
    two.apply_(base)
    three.apply_(base)
    applied = state(base)
    with pytest.raises(
        ValueError, match=r"revert_: module's '0\.\w+' is not what apply_ left, expected deltas that were"
    ):
        one.revert_(base)
    assert equal(state(base), applied)
    two.revert_(base)  # the whole tensor that came later is another one
    with torch.no_grad():
        base[2].bias[1] = -0.0
    with pytest.raises(ValueError, match="revert_: module's '2.bias' is not what apply_ left"):
        three.revert_(base)
    with torch.no_grad():
        base[2].bias[1] = 1.0
    three.revert_(base)
    assert equal(state(base), first)
    one.revert_(base)
    assert equal(state(base), before)


def test_deltas_without_common_entries_are_reverted_in_any_order() -> None:
    base = network()
    before, half = state(base), {"0.bias": torch.arange(20), "2.bias": torch.tensor([1])}
    rest = {"0.bias": torch.arange(20, 47), "2.bias": torch.tensor([0, 2])}
    shapes = {"0.bias": (47,), "2.bias": (3,)}
    one, two = (SparseDelta(at, {n: torch.rand(len(x)) for n, x in at.items()}, shapes) for at in (half, rest))
    for order in ((one, two), (two, one)):
        one.apply_(base)
        two.apply_(base)
        for delta in order:
            delta.revert_(base)
        assert equal(state(base), before)


def test_reverting_follows_a_parameter_that_was_replaced() -> None:
    """Module.to gives the parameters other memory; another dtype cannot be reverted, and nothing is written."""
    base = network()
    model, mask = tuned(base, 0.3)
    before = state(base)
    delta = SparseDelta.from_params(model, base, mask).apply_(base)
    after = state(base)
    base.double()
    with pytest.raises(ValueError, match=r"module's '0\.\w+' is not what apply_ left"):
        delta.revert_(base)
    base.float()
    assert equal(state(base), after)
    delta.revert_(base)
    assert equal(state(base), before)


def test_sum_of_a_list() -> None:
    base = network()
    deltas = [change(base, 0.1, seed) for seed in range(3)]
    total, expected = sum(deltas), deltas[0] + deltas[1] + deltas[2]
    assert isinstance(total, SparseDelta)
    assert total.mask.digest() == expected.mask.digest()
    assert all(torch.equal(x, expected.values[name]) for name, x in total.values.items())
    for wrong in (1, 0.0, False):
        with pytest.raises(TypeError):
            wrong + deltas[0]  # type: ignore[operator]


def test_sum_and_scale() -> None:
    base = network(torch.float64)
    one, mask_one = tuned(base, 0.3, seed=1)
    two, mask_two = tuned(base, 0.3, seed=2)
    a = SparseDelta.from_params(one, base, mask_one, base_model="net")
    b = SparseDelta.from_params(two, base, mask_two)
    both = a + 0.5 * b
    expected = {
        n: p + (q - p) + 0.5 * (r - p)
        for (n, p), q, r in zip(state(base).items(), state(one).values(), state(two).values(), strict=True)
    }
    assert both.base_model == "net"
    assert max(mask_one.nnz, mask_two.nnz) < both.nnz < mask_one.nnz + mask_two.nnz
    both.apply_(base)
    for name, value in state(base).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14)
    other = SparseDelta(
        {"x": torch.tensor([0])}, {"x": torch.ones(1)}, {"x": (3,)}, whole={"h": torch.ones(2)}, base_model="y"
    )
    with pytest.raises(ValueError, match="one is to 'net', the other to 'y'"):
        a + other
    wrong = SparseDelta({"0.bias": torch.tensor([0])}, {"0.bias": torch.ones(1)}, {"0.bias": (3,)})
    with pytest.raises(ValueError, match=r"'0.bias' has shape \(47,\) in one and \(3,\) in the other"):
        a + wrong
    with pytest.raises(ValueError, match="both hold 'h'"):
        other + 1 * other
    assert torch.equal((3 * other).whole["h"], torch.ones(2))
    with pytest.raises(TypeError):
        a + 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="factor is inf"):
        a * float("inf")


def test_save_and_load(tmp_path: Path) -> None:
    base = network(torch.bfloat16)
    model, mask = tuned(base, 0.2)
    with torch.no_grad():
        model[2].weight.add_(1.0)
    whole = {"2.weight": model[2].weight}
    delta = SparseDelta.from_params(model, base, mask, whole=whole, base_model="bert-base-multilingual-cased")
    delta.save(tmp_path / "d.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]
    again = SparseDelta.load(tmp_path / "d.safetensors")
    assert (again.nnz, again.base_model, again.shapes) == (delta.nnz, delta.base_model, delta.shapes)
    load_into(base, tmp_path / "d.safetensors")
    assert equal(state(base), state(model))
    # As others see it.
    theirs = safetensors.torch.load_file(tmp_path / "d.safetensors")
    assert torch.equal(theirs["0.weight.positions"], mask["0.weight"])
    with safetensors.safe_open(tmp_path / "d.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["k"] == str(mask.nnz)
    assert (metadata["dtype"], metadata["base_model"]) == ("float32", "bert-base-multilingual-cased")
    assert metadata["shapes_hash"] == files.hash_shapes(delta.shapes)


def test_whole_tensors_can_be_left_out(tmp_path: Path) -> None:
    delta = SparseDelta(
        {"0.bias": torch.tensor([1])}, {"0.bias": torch.ones(1)}, {"0.bias": (47,)}, whole={"cls.head": torch.ones(2)}
    )
    delta.save(tmp_path / "d.safetensors")
    model = network()
    before = state(model)
    with pytest.raises(
        ValueError, match=r"load_into: .*d.safetensors: SparseDelta.apply_: module has no parameter 'cls.head'"
    ):
        load_into(model, tmp_path / "d.safetensors")
    assert equal(state(model), before)
    load_into(model, tmp_path / "d.safetensors", whole=False)
    assert not equal(state(model), before)


def test_masks_on_disk(tmp_path: Path) -> None:
    mask = fd.sparse.random_mask(network(), density=0.1)
    mask.save(tmp_path / "m.safetensors")
    again = SparseMask.load(tmp_path / "m.safetensors")
    assert again.digest() == mask.digest()
    assert again.shapes == mask.shapes
    with pytest.raises(
        ValueError,
        match="m.safetensors: metadata: format is 'fastdistil.sparse_mask', expected 'fastdistil.sparse_delta'",
    ):
        SparseDelta.load(tmp_path / "m.safetensors")


# ---- checkpoints


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool], ids=str)
def test_checkpoint_reads_what_safetensors_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(5, 7).to(dtype),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "scalar": torch.ones((), dtype=dtype),
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = Checkpoint(tmp_path)
    assert found.metadata == {"format": "pt"}
    assert equal(dict(found), tensors)
    files.write(tmp_path / "ours.safetensors", tensors, {"a": "b"})
    assert equal(safetensors.torch.load_file(tmp_path / "ours.safetensors"), tensors)
    found["a"].zero_()
    assert equal(dict(Checkpoint(tmp_path / "model.safetensors")), tensors), "writing reached the file"


def test_shards(tmp_path: Path) -> None:
    parts = [{"a": torch.ones(3)}, {"b": torch.zeros(2), "c": torch.ones(1)}]
    for i, part in enumerate(parts):
        safetensors.torch.save_file(part, tmp_path / f"model-{i}.safetensors")
    places = {name: f"model-{i}.safetensors" for i, part in enumerate(parts) for name in part}
    (tmp_path / files.INDEX).write_text(json.dumps({"weight_map": places}))
    assert equal(dict(Checkpoint(tmp_path)), parts[0] | parts[1])
    (tmp_path / files.INDEX).write_text(json.dumps({"weight_map": {"z": "model-0.safetensors"}}))
    with pytest.raises(ValueError, match="model-0.safetensors: z: is missing"):
        Checkpoint(tmp_path)


def container(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


HOSTILE = [
    (b"", "is not a safetensors file, or truncated: 0 bytes"),
    (b"hello world, this is text", "is not a safetensors file, or truncated"),
    (struct.pack("<Q", 1 << 62) + b"{}", "is not a safetensors file, or truncated"),
    (container(b"{nonsense"), "is not a safetensors file: its header is not JSON"),
    (container([1, 2]), "is not a safetensors file: its header is not an object"),
    (container({"__metadata__": {"a": 1}}), "its metadata is not a mapping of strings"),
    (container(entry(), b"1234"), "x: ends at byte .*, but the file at .*: truncated"),
    (container(entry(shape=(3,)), bytes(8)), r"x: has 8 bytes, expected 12 for F32 of \[3\]"),
    (container(entry(shape=(-2,)), bytes(8)), "x: its header entry is not dtype, shape and data_offsets"),
    (container(entry(dtype="F4"), bytes(8)), "x: has dtype 'F4'"),
    (container({"x": 5}, bytes(8)), "x: its header entry is not"),
]


@pytest.mark.parametrize(("data", "message"), HOSTILE)
def test_hostile_containers(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"bad.safetensors: {message}"):
        SparseDelta.load(path)
    with pytest.raises(ValueError, match="nowhere: cannot be read: No such file"):
        Checkpoint(tmp_path / "nowhere")


def damaged(tmp_path: Path, change: Any) -> Path:
    """A good delta of two tensors, after `change(tensors, metadata)`."""
    delta = SparseDelta(
        {"0.bias": torch.tensor([1, 5], dtype=torch.int32)}, {"0.bias": torch.ones(2)}, {"0.bias": (47,)}
    )
    delta.save(tmp_path / "good.safetensors")
    found = Checkpoint(tmp_path / "good.safetensors")
    tensors, metadata = {n: t.clone() for n, t in found.items()}, dict(found.metadata)
    change(tensors, metadata)
    files.write(tmp_path / "bad.safetensors", tensors, metadata)
    return tmp_path / "bad.safetensors"


P, V = "0.bias.positions", "0.bias.values"
DAMAGE = [
    (lambda t, m: t.update({P: torch.tensor([5, 1], dtype=torch.int32)}), f"{P}: .*is not ascending"),
    (
        lambda t, m: t.update({P: torch.tensor([1, 47], dtype=torch.int32)}),
        f"{P}: .*goes from 1 to 47, expected 0 to 46",
    ),
    (lambda t, m: t.update({P: torch.ones(2)}), f"{P}: .*expected a vector of int32 or int64"),
    (lambda t, m: t.update({V: torch.ones(3)}), f"{V}: .*of shape \\(3,\\), expected \\(2,\\)"),
    (lambda t, m: t.update({V: torch.tensor([1.0, float("nan")])}), f"{V}: .*holds NaN or an infinity"),
    (lambda t, m: t.pop(V), f"{V}: is missing"),
    (lambda t, m: t.pop(P), f"{P}: is missing"),
    (lambda t, m: t.update({"stray": torch.ones(1)}), "stray: is neither positions, values nor a whole tensor"),
    (lambda t, m: m.pop("format"), "metadata: format is None, expected 'fastdistil.sparse_delta'"),
    (lambda t, m: m.update(shapes='{"0.bias":[48]}'), "metadata: shapes do not have the hash"),
    (lambda t, m: m.update(shapes="[]"), "metadata: shapes cannot be read"),
    (lambda t, m: m.update(k="3"), "metadata: promises other tensors than there are"),
    (
        lambda t, m: (t.clear(), m.update(k="0")),
        r"metadata: promises other tensors than there are \(k, or \['0.bias'\]\)",
    ),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_damaged_deltas_leave_the_model_alone(change: Any, message: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, change)
    model = network()
    before = state(model)
    with pytest.raises(ValueError, match=f"bad.safetensors: {message}"):
        load_into(model, path)
    assert equal(state(model), before)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    damaged(tmp_path, lambda t, m: None)
    data = (tmp_path / "good.safetensors").read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "cut.safetensors").write_bytes(data[:length])
        with pytest.raises(ValueError, match="cut.safetensors"):
            SparseDelta.load(tmp_path / "cut.safetensors")


def test_a_mismatching_model_is_left_alone() -> None:
    model = network()
    before = state(model)
    shapes = {"0.bias": (47,), "2.bias": (4,)}
    at, ones = {n: torch.tensor([0]) for n in shapes}, {n: torch.ones(1) for n in shapes}
    with pytest.raises(ValueError, match=r"module's '2.bias' has shape \(3,\), expected \(4,\)"):
        SparseDelta(at, ones, shapes).apply_(model)
    with pytest.raises(ValueError, match="module has no parameter 'other'"):
        SparseDelta(
            at | {"other": at["0.bias"]}, ones | {"other": ones["0.bias"]}, {**shapes, "2.bias": (3,), "other": (1,)}
        ).apply_(model)
    assert equal(state(model), before)


def test_a_failed_write_leaves_the_file_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.safetensors"
    damaged(tmp_path, lambda t, m: None).rename(path)
    before = path.read_bytes()

    def full(tensor: Tensor) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "raw_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        SparseDelta({"x": torch.tensor([0])}, {"x": torch.ones(1)}, {"x": (3,)}).save(path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.safetensors", "good.safetensors"]


def test_a_header_of_any_length_is_read(tmp_path: Path) -> None:
    """The first bytes of a header of 640, 896 or 1,152 bytes are those of a pickle, which composable-sft's files are."""
    path, at, values = tmp_path / "d.safetensors", {"x": torch.tensor([0])}, {"x": torch.ones(1)}

    def length(name: str) -> int:
        SparseDelta(at, values, {"x": (3,)}, base_model=name).save(path)
        assert SparseDelta.load(path).base_model == name
        return int(struct.unpack("<Q", path.read_bytes()[:8])[0])

    short = length("m")
    for wanted in (640, 896, 1152):
        assert length("m" * (1 + wanted - short)) == wanted
