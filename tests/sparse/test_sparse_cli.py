"""`fastdistil sparse` on checkpoints on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from typer.testing import CliRunner

from fastdistil import cli
from fastdistil.sparse import Checkpoint, SparseDelta, files, random_mask, select_topk

runner = CliRunner()


def run(*arguments: object, code: int = 0) -> str:
    result = runner.invoke(cli.app, ["sparse", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture
def pair(tmp_path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base in two shards and a tuned model in one file, with a head and a tensor of integers."""
    base = {
        "enc.w": torch.randn(40, 30),
        "enc.b": torch.randn(40).bfloat16(),
        "cls.w": torch.randn(3),
        "ids": torch.arange(4),
    }
    tuned = {
        n: (x * (1 + 0.3 * torch.rand(x.shape))).to(x.dtype) if x.is_floating_point() else x for n, x in base.items()
    }
    (tmp_path / "base").mkdir()
    names = list(base)
    for i, part in enumerate((names[:2], names[2:])):
        safetensors.torch.save_file(
            {n: base[n] for n in part}, tmp_path / f"base/part-{i}.safetensors", {"format": "pt"}
        )
    places = {n: f"part-{i // 2}.safetensors" for i, n in enumerate(names)}
    (tmp_path / "base" / files.INDEX).write_text(json.dumps({"weight_map": places}))
    (tmp_path / "base" / "config.json").write_text("{}")
    safetensors.torch.save_file(tuned, tmp_path / "tuned.safetensors", {"format": "pt"})
    return tuned, base


def test_select_info_apply_compose(pair: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path) -> None:
    tuned, base = pair
    delta = tmp_path / "delta.safetensors"
    text = run("select", tmp_path / "tuned.safetensors", tmp_path / "base", "--out", delta, "--density", 0.25,
               "--whole", "cls", "--base-model", "net")  # fmt: skip
    assert "SparseDelta(310 entries in 2 tensors, 1 whole of net), density 0.2500" in text
    mask = select_topk({n: tuned[n] for n in ("enc.w", "enc.b")}, base, k=310)
    assert SparseDelta.load(delta).mask.digest() == SparseDelta.from_params(tuned, base, mask).mask.digest()
    text = run("info", delta)
    assert "delta: 310 of 1,240 entries, density 0.2500, values float32 base model: net" in text
    assert f"enc.w (40, 30), {len(mask['enc.w'])} entries" in text
    assert "cls.w (3,), whole" in text

    run("apply", tmp_path / "base", delta, "--out", tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "config.json",
        files.INDEX,
        "part-0.safetensors",
        "part-1.safetensors",
    ]
    new = dict(Checkpoint(tmp_path / "new"))
    assert torch.equal(new["cls.w"], tuned["cls.w"])
    assert torch.equal(new["ids"], base["ids"])
    for name in ("enc.w", "enc.b"):
        expected = base[name].clone()
        expected.view(-1)[mask[name].long()] = tuned[name].view(-1)[mask[name].long()]
        assert torch.equal(new[name], expected)
    assert all(torch.equal(x, base[name]) for name, x in Checkpoint(tmp_path / "base").items())

    run(
        "select",
        tmp_path / "tuned.safetensors",
        tmp_path / "base",
        "--out",
        tmp_path / "few.safetensors",
        "--k",
        7,
        "--exclude",
        "cls",
    )
    both = tmp_path / "both.safetensors"
    run("compose", delta, tmp_path / "few.safetensors", "--out", both, "--scale", 1, "--scale", -1)
    assert SparseDelta.load(both).nnz == 310  # the seven are among them, now at zero
    assert sum(int((v == 0).sum()) for v in SparseDelta.load(both).values.values()) == 7
    random_mask(base, k=5, include="enc").save(tmp_path / "mask.safetensors")
    assert "mask: 5 of 1,240 entries" in run("info", tmp_path / "mask.safetensors")


def test_a_file_for_a_file(pair: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path) -> None:
    tuned, base = pair
    safetensors.torch.save_file(base, tmp_path / "base.safetensors", {"format": "pt"})
    delta = SparseDelta.from_params(tuned, base, random_mask(base, k=9, include="enc.w"))
    delta.save(tmp_path / "d.safetensors")
    run("apply", tmp_path / "base.safetensors", tmp_path / "d.safetensors", "--out", tmp_path / "new.safetensors")
    with safetensors.safe_open(tmp_path / "new.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert int((file.get_tensor("enc.w") != base["enc.w"]).sum()) == 9
    text = run(
        "apply",
        tmp_path / "base.safetensors",
        tmp_path / "d.safetensors",
        "--out",
        tmp_path / "new.safetensors",
        code=1,
    )
    assert "new.safetensors: exists already, expected a new name" in text


@pytest.mark.usefixtures("pair")
def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    tuned_path, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    assert "nowhere: cannot be read: No such file" in run("info", tmp_path / "nowhere", code=1)
    assert "density is 2.0, expected 0 to 1" in run(
        "select", tuned_path, tmp_path / "base", "--out", out, "--density", 2, code=1
    )
    assert "include holds 'x'" in run("select", tuned_path, tmp_path / "base", "--out", out, "--include", "x", code=1)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tuned_path.read_bytes()[:-9])
    assert "cut.safetensors: " in run("select", cut, tmp_path / "base", "--out", out, code=1)
    delta = SparseDelta({"enc.w": torch.tensor([0])}, {"enc.w": torch.ones(1)}, {"enc.w": (2,)})
    delta.save(tmp_path / "d.safetensors")
    text = run("apply", tmp_path / "base", tmp_path / "d.safetensors", "--out", tmp_path / "new", code=1)
    assert "enc.w is torch.float32 of shape (40, 30), expected shape (2,)" in text
    text = run("compose", tmp_path / "d.safetensors", "--out", out, "--scale", 1, "--scale", 2, code=1)
    assert "2 scales came with 1 deltas" in text
    lost = tmp_path / "nowhere" / "d.safetensors"
    assert "nowhere is not a folder" in run("select", tuned_path, tmp_path / "base", "--out", lost, code=1)
    text = run("compose", tmp_path / "d.safetensors", "--out", "/dev/null", code=1)
    assert "/dev/null: cannot be written, it exists and is not a file" in text
    assert not out.exists()
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))
