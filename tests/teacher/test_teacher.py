"""fastdistil.teacher: a store is what the teacher said, whatever happened while it was written."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fastdistil as fd
from fastdistil import teacher
from fastdistil.teacher import format as files

LENGTHS = (3, 1, 7, 0, 4, 9, 2, 5)
D, K, V = 6, 3, 11


def hidden_examples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, D, generator=generator) for n in LENGTHS]


def hidden_writer(path: Path, **options: object) -> teacher.Writer:
    weight, bias = torch.arange(V * D).reshape(V, D) / 10, torch.arange(V) / 10
    settings = {"head_weight": weight, "head_bias": bias, "shard_bytes": 200, "model": "tiny", **options}
    return teacher.Writer(path, kind="hidden", width=D, vocabulary=V, **settings)


def write_hidden(path: Path, **options: object) -> None:
    with hidden_writer(path, **options) as writer:
        for x in hidden_examples():
            writer.add(hidden=x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_was_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    write_hidden(tmp_path / "s", dtype=dtype)
    store = teacher.open(tmp_path / "s")
    assert len(store) == len(LENGTHS) and len(store.index.shards) > 1
    for i in (5, 0, 7, 3, -1):  # any order
        assert torch.equal(store[i]["hidden"], hidden_examples()[i].to(dtype))
    assert [store.length(i) for i in range(len(store))] == list(LENGTHS)
    assert [len(x["hidden"]) for x in store] == list(LENGTHS)
    logits = store.head(store[2]["hidden"])
    expected = (
        hidden_examples()[2].to(dtype) @ (torch.arange(V * D).reshape(V, D) / 10).T.to(dtype) + torch.arange(V) / 10
    )
    assert torch.allclose(logits.float(), expected.float(), rtol=2e-2, atol=2e-2)
    store.verify()
    with pytest.raises(IndexError, match="example 8 of .*, expected less than 8"):
        store[8]


def test_a_topk_store_is_what_topk_logit_loss_takes(tmp_path: Path) -> None:
    logits = [torch.randn(n, V) for n in LENGTHS]
    with teacher.Writer(tmp_path / "s", kind="topk", width=K, vocabulary=V, shard_bytes=100) as writer:
        for x in logits:
            values, indices = x.log_softmax(-1).topk(K)
            writer.add(values=values, indices=indices)
    store = teacher.open(tmp_path / "s")
    picked = [2, 3, 5]
    batch = teacher.pad([store[i] for i in picked])
    assert batch["values"].shape == (3, 9, K) and batch["indices"].dtype == torch.int32
    weight = torch.tensor([[s < LENGTHS[i] for s in range(9)] for i in picked])
    student = torch.randn(3, 9, V)
    found = fd.topk_logit_loss(student, batch["values"], batch["indices"], weight=weight)
    rows = torch.cat([student[j, : LENGTHS[i]] for j, i in enumerate(picked)])
    values, indices = torch.cat([logits[i] for i in picked]).log_softmax(-1).topk(K)
    assert torch.allclose(found, fd.topk_logit_loss(rows, values, indices), rtol=1e-6)
    with pytest.raises(ValueError, match="has no head"):
        _ = store.head


def test_datasets_and_data_loaders(tmp_path: Path) -> None:
    write_hidden(tmp_path / "s")
    store = teacher.open(tmp_path / "s")
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again[4]["hidden"], store[4]["hidden"])
    loader = torch.utils.data.DataLoader(store, batch_size=3, num_workers=2, collate_fn=teacher.pad)
    first = next(iter(loader))["hidden"]
    assert first.shape == (3, 7, D) and torch.equal(first[0, :3], hidden_examples()[0]) and (first[1, 1:] == 0).all()
    table = store.to_datasets()
    assert len(table) == len(LENGTHS)
    assert torch.equal(table[5]["hidden"], hidden_examples()[5])
    shuffled = table.shuffle(seed=1)[:3]
    for i, x in zip(shuffled["example"], shuffled["hidden"], strict=True):
        assert torch.equal(x, hidden_examples()[i])


def test_columns_of_datasets_stay_beside_the_store(tmp_path: Path) -> None:
    write_hidden(tmp_path / "s")
    table = teacher.open(tmp_path / "s").to_datasets()
    counted = table.map(lambda row: {"tokens": len(row["hidden"])}).add_column("label", list(range(8)))
    row = counted.shuffle(seed=1).select([2])[0]
    assert row["tokens"] == LENGTHS[row["example"]] and row["label"] == row["example"]
    assert torch.equal(row["hidden"], hidden_examples()[row["example"]])
    assert list(counted["tokens"]) == list(LENGTHS)
    assert counted.select_columns(["label"])[3] == {"label": 3}
    doubled = table.map(lambda row: {"hidden": row["hidden"] * 2})
    assert torch.equal(torch.tensor(doubled[2]["hidden"]), hidden_examples()[2] * 2)


def test_an_error_leaves_the_complete_shards_and_a_second_writer_continues(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with pytest.raises(RuntimeError, match="out of power"), hidden_writer(path) as writer:
        for x in hidden_examples()[:4]:
            writer.add(hidden=x)
        raise RuntimeError("out of power")
    with pytest.raises(ValueError, match="index.json: incomplete, 3 examples are written"):
        teacher.open(path)
    assert torch.equal(teacher.open(path, incomplete=True)[1]["hidden"], hidden_examples()[1])
    before = (path / "shard-00000.safetensors").stat().st_mtime_ns
    with hidden_writer(path) as writer:
        assert writer.examples == 3
        for x in hidden_examples()[writer.examples :]:
            writer.add(hidden=x)
    assert (path / "shard-00000.safetensors").stat().st_mtime_ns == before
    write_hidden(tmp_path / "whole")
    for x, y in zip(teacher.open(path), teacher.open(tmp_path / "whole"), strict=True):
        assert torch.equal(x["hidden"], y["hidden"])
    with pytest.raises(ValueError, match="holds a complete store, expected another folder"):
        hidden_writer(path)


SLOW_WRITER = """
import sys, time, torch
from fastdistil import teacher
w = teacher.Writer(sys.argv[1], kind="topk", width=2, vocabulary=100, shard_bytes=160)
for i in range(w.examples, 60):
    w.add(values=torch.full((5, 2), -1.0 - i), indices=torch.tensor([[i, 99]] * 5))
    time.sleep(0.02)
w.close()
"""


def test_a_writer_that_is_killed_loses_no_complete_shard(tmp_path: Path) -> None:
    path, command = tmp_path / "s", [sys.executable, "-c", SLOW_WRITER, str(tmp_path / "s")]
    process = subprocess.Popen(command)
    try:
        while len(list(path.glob("shard-*"))) < 5:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = len(teacher.open(path, incomplete=True))
    assert 4 <= done < 60
    (path / ".partial-shard-00099.safetensors").write_bytes(b"what a killed writer leaves")
    assert subprocess.run(command, check=False).returncode == 0
    store = teacher.open(path)
    store.verify()
    assert [x["indices"][0, 0].item() for x in store] == list(range(60))
    assert not list(path.glob(".partial-*"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def foreign(path: Path) -> None:
    path.write_text(json.dumps({"format": "other", "size": 3}))


def edit(path: Path, **changes: object) -> None:
    kept = {name: x for name, x in json.loads(path.read_text()).items() if name != "digest"}
    path.write_text(json.dumps({**kept, **changes}))


DAMAGE = [
    ("shard-00001.safetensors", truncate, ValueError, "truncated, has .* bytes, expected"),
    ("shard-00001.safetensors", lambda p: p.write_bytes(p.read_bytes() + b"x"), ValueError, "too long"),
    ("shard-00001.safetensors", alter, ValueError, "altered, its sha256 is"),
    ("shard-00001.safetensors", Path.unlink, FileNotFoundError, "missing, the index lists it"),
    ("head.safetensors", alter, ValueError, "altered, its sha256 is"),
    ("head.safetensors", truncate, ValueError, "truncated"),
    ("index.json", truncate, ValueError, "cannot be read as JSON"),
    ("index.json", foreign, ValueError, "foreign, its format is 'other', expected 'fastdistil-teacher'"),
    ("index.json", lambda p: p.write_text("[]"), ValueError, "foreign, its format is 'list'"),
    ("index.json", lambda p: edit(p, version=9), ValueError, "has version 9, expected 1 to 3"),
    ("index.json", lambda p: edit(p, tokens=1), ValueError, "says .*'tokens': 1.*, its shards hold"),
    ("index.json", lambda p: edit(p, shards=[{}]), ValueError, "incomplete, .* is missing or wrong"),
    ("index.json", lambda p: edit(p, width=5), ValueError, "foreign, has shapes"),
    ("index.json", Path.unlink, FileNotFoundError, "missing, expected the index"),
]


@pytest.mark.parametrize(("name", "damage", "kind", "reason"), DAMAGE)
def test_damaged_files_are_named(
    tmp_path: Path, name: str, damage: Callable[[Path], object], kind: type[Exception], reason: str
) -> None:
    write_hidden(tmp_path / "s")
    damage(tmp_path / "s" / name)
    with pytest.raises(kind, match=reason) as caught:
        teacher.open(tmp_path / "s").verify()
    assert name in str(caught.value) or "shard-00000" in str(caught.value)


def test_a_shard_of_another_store_is_noticed(tmp_path: Path) -> None:
    write_hidden(tmp_path / "s")
    path = tmp_path / "s" / "shard-00000.safetensors"
    size = path.stat().st_size
    path.write_bytes(b"\0" * size)
    with pytest.raises(ValueError, match="shard-00000.safetensors: cannot be read as a shard"):
        _ = teacher.open(tmp_path / "s", check=False)[0]
    with pytest.raises(ValueError, match="shard-00000.safetensors: altered, its sha256 is"):
        _ = teacher.open(tmp_path / "s")[0]
    with pytest.raises(ValueError, match="altered"):
        teacher.open(tmp_path / "s").verify()


def test_another_head_of_the_same_size_is_noticed(tmp_path: Path) -> None:
    write_hidden(tmp_path / "s")
    path = tmp_path / "s" / "head.safetensors"
    head = {name: x.reshape(x.shape[::-1]) for name, x in safetensors.torch.load_file(path).items()}
    size = path.stat().st_size
    safetensors.torch.save_file(head, path)
    assert path.stat().st_size == size
    with pytest.raises(ValueError, match=r"head.safetensors: foreign, has .*weight"):
        _ = teacher.open(tmp_path / "s", check=False).head
    with pytest.raises(ValueError, match="head.safetensors: altered, its sha256 is"):
        _ = teacher.open(tmp_path / "s").head
    path.write_bytes(b"\0" * size)
    with pytest.raises(ValueError, match="head.safetensors: cannot be read as a head"):
        _ = teacher.open(tmp_path / "s", check=False).head


def test_examples_are_looked_up_by_integers(tmp_path: Path) -> None:
    write_hidden(tmp_path / "s")
    store = teacher.open(tmp_path / "s")
    assert torch.equal(store[torch.tensor(1)]["hidden"], store[1]["hidden"])
    with pytest.raises(TypeError, match=r"example is slice\(0, 2, None\), expected an integer"):
        store[0:2]


def topk_writer(path: Path) -> teacher.Writer:
    return teacher.Writer(path, kind="topk", width=2, vocabulary=9)


BAD = [
    (lambda p: teacher.Writer(p, kind="logits", width=1, vocabulary=2), ValueError, "kind is 'logits', expected 'hidden', 'topk' or 'layers'"),
    (lambda p: teacher.Writer(p, kind="topk", width=3, vocabulary=2), ValueError, "width is 3, expected at most the vocabulary, 2"),
    (lambda p: teacher.Writer(p, kind="topk", width=0, vocabulary=2), ValueError, "width is 0, expected an integer of at least 1"),
    (lambda p: teacher.Writer(p, kind="topk", width=1, vocabulary=2, dtype=torch.int8), ValueError, "dtype is torch.int8, expected torch.float32, torch.bfloat16, torch.float16 or torch.float64"),
    (lambda p: teacher.Writer(p, kind="topk", width=1, vocabulary=2, head_weight=torch.ones(2, 1)), ValueError, "head_weight came with kind='topk'"),
    (lambda p: teacher.Writer(p, kind="hidden", width=3, vocabulary=2), ValueError, r"head_weight is None, expected \(2, 3\)"),
    (lambda p: teacher.Writer(p, kind="hidden", width=3, vocabulary=2, head_weight=torch.ones(3, 2)), ValueError, r"head_weight is of shape \(3, 2\), expected \(2, 3\)"),
    (lambda p: teacher.Writer(p, kind="topk", width=1, vocabulary=2, temperature=0.0), ValueError, "temperature is 0.0, expected more than 0"),
    (lambda p: topk_writer(p).add(values=torch.ones(3, 2)), TypeError, r"got \['values'\], expected values, indices"),
    (lambda p: topk_writer(p).add(values=torch.ones(3, 2), indices=torch.ones(4, 2).long()), ValueError, r"indices has shape \(4, 2\), expected \(tokens, 2\)"),
    (lambda p: topk_writer(p).add(values=torch.ones(1, 3, 2), indices=torch.ones(1, 3, 2).long()), ValueError, "of one example"),
    (lambda p: topk_writer(p).add(values=torch.ones(3, 2), indices=torch.ones(3, 2)), TypeError, "indices has dtype torch.float32"),
    (lambda p: topk_writer(p).add(values=torch.ones(3, 2), indices=torch.full((3, 2), 9)), ValueError, "indices holds 9, expected 0 to 8"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_calls(tmp_path: Path, call: Callable[[Path], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        call(tmp_path / "s")
    assert str(caught.value).startswith("teacher.Writer")


def test_another_teacher_does_not_continue_a_store(tmp_path: Path) -> None:
    hidden_writer(tmp_path / "s")
    assert hidden_writer(tmp_path / "s").examples == 0
    for change in ({"head_weight": torch.ones(V, D)}, {"head_bias": None}, {"head_bias": torch.arange(V)}):
        with pytest.raises(ValueError, match=r"head.safetensors: (weight|bias) is not this teacher's"):
            hidden_writer(tmp_path / "s", **change)


def test_other_settings_do_not_continue_a_store(tmp_path: Path) -> None:
    topk_writer(tmp_path / "s")
    with pytest.raises(ValueError, match="was begun with width = 2, this writer has 3"):
        teacher.Writer(tmp_path / "s", kind="topk", width=3, vocabulary=9)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no store"):
        topk_writer(tmp_path / "other")
    with pytest.raises(ValueError, match="examples is empty"):
        teacher.pad([])
    with pytest.raises(ValueError, match="length is 2, expected at least 3"):
        teacher.pad([{"hidden": torch.ones(3, 2)}], 2)


def bert(seed: int, width: int = 16) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=53, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, initializer_range=0.5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for size in (4, 4, 3):
        lengths = torch.randint(2, 9, (size, 1), generator=generator)
        ids = torch.randint(1, 53, (size, 8), generator=generator)
        found.append({"input_ids": ids, "attention_mask": (torch.arange(8) < lengths).long()})
    return found


def train(student: nn.Module, teach: Callable[[int, dict[str, Tensor]], Tensor]) -> list[Tensor]:
    """Some steps of the logit loss on what `teach` returns for batch i, (B, S, V) logits."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for i, batch in enumerate(batches()):
        loss = fd.logit_loss(student(**batch).logits, teach(i, batch), temperature=2.0, weight=batch["attention_mask"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in student.parameters()]


def test_training_from_a_store_is_training_with_the_teacher(tmp_path: Path) -> None:
    model = bert(0).train()
    with torch.no_grad():
        live = [model.eval()(**batch).logits for batch in batches()]
    model.train()
    store = teacher.write(model, batches(), tmp_path / "s", shard_bytes=1000, name="tiny", progress=False)
    assert model.training and len(store) == 11 and store.index.model == "tiny" and len(store.index.shards) > 2

    def stored(i: int, batch: dict[str, Tensor]) -> Tensor:
        hidden = teacher.pad([store[j] for j in range(4 * i, 4 * i + len(batch["input_ids"]))], 8)["hidden"]
        return store.head(hidden)

    for i, batch in enumerate(batches()):
        keep = batch["attention_mask"].bool()
        assert torch.allclose(stored(i, batch)[keep], live[i][keep], atol=1e-5)
    from_store, from_teacher = train(bert(1, 8), stored), train(bert(1, 8), lambda i, _: live[i])
    start = list(bert(1, 8).parameters())
    for x, y in zip(from_store, from_teacher, strict=True):
        assert torch.allclose(x, y, atol=1e-5)
    assert any((x - y).abs().max() > 1e-2 for x, y in zip(from_store, start, strict=True)), "nothing was learned"


class Stops:
    """A loader that dies before its third batch."""

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in batches():
            if self.given == 2:
                raise KeyboardInterrupt
            self.given += 1
            yield batch


def test_write_continues_where_it_was_cut_off(tmp_path: Path) -> None:
    model = bert(0)
    with pytest.raises(KeyboardInterrupt):
        teacher.write(model, Stops(), tmp_path / "s", kind="topk", k=5, shard_bytes=500, progress=False)
    done = len(teacher.open(tmp_path / "s", incomplete=True))
    assert 0 < done <= 8
    rows = 0

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal rows
        rows += kwargs["input_ids"].shape[0]

    model.register_forward_pre_hook(count, with_kwargs=True)
    store = teacher.write(model, batches(), tmp_path / "s", kind="topk", k=5, shard_bytes=500, progress=False)
    assert rows == 11 - done, "an example was computed twice"
    whole = teacher.write(bert(0), batches(), tmp_path / "whole", kind="topk", k=5, progress=False)
    assert len(store) == len(whole) == 11
    for x, y in zip(store, whole, strict=True):
        assert torch.equal(x["indices"], y["indices"])
        assert torch.allclose(x["values"], y["values"], atol=1e-5)


def _fade_first(hidden: Tensor) -> Tensor:
    return torch.cat((hidden[:, :1] / 100, hidden[:, 1:]), 1)


def test_write_refuses_a_head_that_is_not_the_whole_story(tmp_path: Path) -> None:
    class Capped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bert(0)
            self.get_output_embeddings = self.inner.get_output_embeddings
            # Large logits at all tokens but each first one, which alone would not show the cap.
            self.get_output_embeddings().weight.data.mul_(3)
            self.get_output_embeddings().register_forward_pre_hook(lambda _, x: (_fade_first(x[0]),))

        def forward(self, **batch: Tensor) -> object:
            out = self.inner(**batch)
            out.logits = 3 * (out.logits / 3).tanh()
            return out

    with pytest.raises(ValueError, match="logits are not its head's output .* use kind='topk'"):
        teacher.write(Capped(), batches(), tmp_path / "s", name="capped", progress=False)
    with pytest.raises(ValueError, match="model is Linear, which has no output embeddings"):
        teacher.write(nn.Linear(2, 2), batches(), tmp_path / "t", progress=False)
    with pytest.raises(ValueError, match="expected input_ids among them"):
        teacher.write(bert(0), [{"ids": torch.ones(1, 2)}], tmp_path / "u", progress=False)
    with pytest.raises(TypeError, match="loader gave a batch whose text is list, expected tensors"):
        teacher.write(bert(0), [{"input_ids": torch.ones(1, 2), "text": ["a"]}], tmp_path / "v", progress=False)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_a_packed_batch_of_a_decoder_is_written_sequence_by_sequence(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, initializer_range=0.5, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    first, second = torch.randint(3, 50, (1, 5)), torch.randint(3, 50, (1, 6))
    packed = {"input_ids": torch.cat((first, second), 1)}
    packed["position_ids"] = torch.cat((torch.arange(5), torch.arange(6)))[None]
    together = teacher.write(model, [packed], tmp_path / "packed", progress=False)
    alone = teacher.write(model, [{"input_ids": second}], tmp_path / "alone", progress=False)
    torch.testing.assert_close(together[0]["hidden"][5:], alone[0]["hidden"], atol=1e-4, rtol=1e-4)
    assert model.config.use_cache


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_a_token_classifier_is_a_teacher(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = bert(0).config
    config.num_labels = 5
    model = transformers.BertForTokenClassification(config).eval()
    store = teacher.write(model, batches(), tmp_path / "s", kind=kind, k=2, progress=False)
    with torch.no_grad():
        logits = model(**batches()[0]).logits[0][: store.length(0)]
    if kind == "hidden":
        torch.testing.assert_close(store.head(store[0]["hidden"]), logits, atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(store[0]["values"], logits.log_softmax(-1).topk(2).values, atol=1e-5, rtol=1e-5)
    whole = transformers.BertForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"model gave logits \(4, 5\) for \(4, 8\) tokens"):
        teacher.write(whole, batches(), tmp_path / "t", kind=kind, k=2, progress=False)


def test_importing_fastdistil_stays_light() -> None:
    code = "import sys, fastdistil; print([m for m in ('safetensors', 'datasets', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert files.VERSION == 3
