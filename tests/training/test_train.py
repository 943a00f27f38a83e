"""The loop: accumulation by item counts, schedules, exact resume after kill -9, Ctrl-C."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import squares
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from squares import Squares, collate, examples
from torch import nn

from fastdistil.fingerprint import of_data, same_data
from fastdistil.recipes import terms
from fastdistil.recipes.stages import Stage, run_stages, set_trainable
from fastdistil.sparse import SparseAdamW
from fastdistil.train import Options, batch_indices, train


def test_accumulation_equals_one_big_batch():
    whole, parts = Squares(), Squares()
    data = examples()
    one = train(whole, data, collate, Options(5, lr=0.1, batch_size=8))
    four = train(parts, data, collate, Options(5, lr=0.1, batch_size=2, accumulate=4))
    torch.testing.assert_close(parts.layer.weight, whole.layer.weight, rtol=1e-5, atol=1e-6)
    assert [r["squares"] for r in one] == pytest.approx([r["squares"] for r in four], rel=1e-5)
    # The mean of means is another number: this data would catch a loop that averages micro-batches.
    batch = [collate([data[i] for i in batch_indices(0, len(data), 2, k)]) for k in range(4)]
    fresh = Squares()
    means = [fresh(b, fresh.counts(b))["squares"].item() for b in batch]
    assert abs(sum(means) / 4 - one[0]["squares"]) > 1e-3


def test_every_epoch_visits_every_example_once():
    seen = [i for k in range(10) for i in batch_indices(3, 20, 4, k)]
    assert sorted(seen[:20]) == sorted(seen[20:]) == list(range(20))
    assert seen[:20] != seen[20:]
    assert seen[:20] != [i for k in range(5) for i in batch_indices(4, 20, 4, k)]


def test_learning_rate():
    cosine, linear = Options(100, warmup=10), Options(100, warmup=10, schedule="linear")
    assert [cosine.lr_factor(s) for s in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert cosine.lr_factor(55) == pytest.approx(0.5)
    assert linear.lr_factor(55) == pytest.approx(0.5)
    assert linear.lr_factor(100) == pytest.approx(0.0)
    assert Options(5, warmup=0, schedule="constant").lr_factor(4) == 1.0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 0}, "Options: steps is 0, expected at least 1"),
        ({"steps": 1, "accumulate": 0}, "Options: accumulate is 0"),
        ({"steps": 1, "max_grad_norm": 0.0}, "Options: max_grad_norm is 0.0, expected more than 0, or None for none"),
        ({"steps": 1, "schedule": "step"}, "Options: schedule is 'step', expected 'cosine'"),
    ],
)
def test_bad_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Options(**kwargs)


def test_bad_calls(tmp_path):
    with pytest.raises(ValueError, match="train: data is empty"):
        train(Squares(), [], collate, Options(1))
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        train(Squares().requires_grad_(False), examples(), collate, Options(1))
    train(Squares(), examples(), collate, Options(2), out=tmp_path)
    with pytest.raises(ValueError, match=r"step-2 was written with lr = 0.001, this run has 0.5"):
        train(Squares(), examples(), collate, Options(2, lr=0.5), out=tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "options has max_grad_norm = 1.0, expected None"),
        ({"accumulate": 2}, "options has accumulate = 2, expected 1"),
    ],
)
def test_steps_in_the_backward_refuse_what_needs_all_gradients(kwargs, message):
    def optimizer(module, options):
        return SparseAdamW(module, {"layer.weight": torch.tensor([1], dtype=torch.int32)}, step_in_backward=True)

    wrong = Options(2, max_grad_norm=None, **kwargs) if kwargs else Options(2)
    with pytest.raises(ValueError, match=f"optimizer is SparseAdamW with step_in_backward=True, .*; {message}"):
        train(Squares(), examples(), collate, wrong, optimizer=optimizer)
    module = Squares()
    before = module.layer.weight.detach().clone()
    train(module, examples(), collate, Options(2, max_grad_norm=None), optimizer=optimizer)
    assert (module.layer.weight != before).flatten().tolist() == [False, True, False, False]


def test_finished_stage_only_restores(tmp_path):
    first, again = Squares(), Squares()
    history = train(first, examples(), collate, Options(7, save_every=3), out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-7"]
    assert train(again, examples(), collate, Options(7, save_every=2), out=tmp_path) == history  # no other run
    assert torch.equal(first.layer.weight, again.layer.weight)


@pytest.mark.parametrize("first", [True, False], ids=["compiled first", "compiled second"])
@pytest.mark.parametrize("whole", [True, False], ids=["the objective", "a part"])
def test_a_checkpoint_loads_with_and_without_compile(tmp_path, first, whole):
    def made(compiled):
        module = Squares()
        if compiled and not whole:
            module.layer = torch.compile(module.layer, backend="eager")
        return torch.compile(module, backend="eager") if compiled and whole else module

    options = Options(4, save_every=2)
    train(made(first), examples(), collate, options, out=tmp_path)
    assert set(load_file(tmp_path / "step-4" / "model.safetensors")) == {"layer.weight", "layer.bias"}
    again = made(not first)
    train(again, examples(), collate, options, out=tmp_path)
    other = Squares()
    train(other, examples(), collate, options)
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_checkpoint_with_an_earlier_versions_names_loads(tmp_path, prefix):
    module, again = Squares(), Squares()
    train(module, examples(), collate, Options(2), out=tmp_path)
    path = tmp_path / "step-2" / "model.safetensors"
    save_file({prefix + name: x for name, x in load_file(path).items()}, path)
    edit_state(tmp_path / "step-2", lambda state: state.pop("files"))
    train(again, examples(), collate, Options(2), out=tmp_path)
    assert torch.equal(module.layer.weight, again.layer.weight)


def edit_state(folder, change):
    state = json.loads((folder / "state.json").read_text())
    state.pop("digest"), state.pop("sha256")  # an earlier version's
    change(state)
    (folder / "state.json").write_text(json.dumps(state))


def test_a_checkpoint_that_is_not_whole_is_an_error(tmp_path):
    train(Squares(), examples(), collate, Options(2), out=tmp_path)
    folder = tmp_path / "step-2"
    other = Squares()
    other.bias = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"holds another module's weights: .* has no \[\], the file no \['bias.bias'"):
        train(other, examples(), collate, Options(2), out=tmp_path)
    generators = folder / "random_states_0.pkl"
    kept = generators.read_bytes()
    generators.write_bytes(kept[:-1])
    with pytest.raises(ValueError, match=r"random_states_0.pkl has \d+ bytes, expected"):
        train(Squares(), examples(), collate, Options(2), out=tmp_path)
    generators.unlink()
    with pytest.raises(FileNotFoundError, match="random_states_0.pkl is missing, expected it in a complete checkpoint"):
        train(Squares(), examples(), collate, Options(2), out=tmp_path)


def test_a_checkpoint_that_holds_code_is_refused(tmp_path):
    """accelerate itself would run it."""

    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    train(Squares(), examples(), collate, Options(2), out=tmp_path / "out")
    path = tmp_path / "out/step-2/custom_checkpoint_0.pkl"
    torch.save(Code(), path)
    edit_state(path.parent, lambda state: state["files"].update({path.name: path.stat().st_size}))
    with pytest.raises(ValueError, match=r"custom_checkpoint_0.pkl holds more than tensors and numbers"):
        train(Squares(), examples(), collate, Options(2), out=tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_other_data_of_the_same_length_is_refused(tmp_path):
    data = examples()
    train(Squares(), data, collate, Options(2), out=tmp_path)
    near = [(x * (1 + 1e-6), y) for x, y in data]  # as a teacher's second run
    train(Squares(), near, collate, Options(2), out=tmp_path)
    for other in ([(x, 2 * y) for x, y in data], data[::-1]):
        with pytest.raises(ValueError, match=r"step-2 was written with data = {'hash': .*}, this run has {"):
            train(Squares(), other, collate, Options(2), out=tmp_path)
    edit_state(tmp_path / "step-2", lambda state: [state["run"].pop("data"), state.pop("files")])
    train(Squares(), data[::-1], collate, Options(2), out=tmp_path)  # an earlier version's, which did not know


def test_other_terms_are_refused(tmp_path):
    data = [[i, (i + 3) % 10, 0] for i in range(10)]
    for scale in (1.0, 0.5):
        stage = Stage("all", [terms.labels(weight="words", scale=scale)], data, Options(1, batch_size=5))
        if scale == 1.0:
            run_stages(Tagger(), [stage], tagging, out=tmp_path)
        else:
            with pytest.raises(ValueError, match=r"was written with terms = .*labels: scale 1.0.* has .*scale 0.5"):
                run_stages(Tagger(), [stage], tagging, out=tmp_path)


def test_a_fingerprint_of_data_knows_its_kinds():
    @dataclass
    class Row:
        text: str
        values: object
        other: object = None

    def rows(change):
        values = {"ids": np.arange(3), "at": torch.tensor(2), "mask": [True, None], "share": 0.5, "none": torch.ones(0)}
        return [Row(f"row {i}", {**values, **change}, object()) for i in range(20)]

    seen = [of_data(rows(x)) for x in ({}, {"ids": np.arange(1, 4)}, {"mask": [False, None]}, {"share": 0.6}, {})]
    assert same_data(seen[0], seen[-1]) and not any(same_data(seen[0], x) for x in seen[1:-1])

    class Drawn(list):
        def __getitem__(self, i):
            return torch.rand(3)

    assert of_data(Drawn([0] * 20)) is None  # rows that are drawn anew are not held against a run


# Dropout makes the generator's state matter; print after every step so that the parent can kill in the middle.
CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import squares
import torch
from fastdistil.train import Options, train
torch.set_num_threads(1)
module = squares.Squares(dropout=0.3)
def collate(rows):
    print("step", flush=True)
    time.sleep(0.01)
    return squares.collate(rows)
train(module, squares.examples(), collate, Options(40, lr=0.05, save_every=3), out=Path({out!r}))
"""


def child(out):
    code = CHILD.format(tests=str(Path(squares.__file__).parent), out=str(out))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_to_step(process, steps):
    for _ in range(steps):
        assert process.stdout.readline().strip() == "step", process.stderr.read()


def whole(out=None):
    module = Squares(dropout=0.3)
    return train(module, examples(), collate, Options(40, lr=0.05, save_every=3), out=out), module.layer.weight


def test_killed_twice_continues_bit_identically(tmp_path):
    history, weight = whole()
    for steps in (11, 12):
        process = child(tmp_path)
        run_to_step(process, steps)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    done = [int(p.name.split("-")[1]) for p in tmp_path.glob("step-*")]
    assert 9 <= max(done) < 40, "the kills came too early or too late to test a resume"
    resumed = whole(tmp_path)
    assert resumed[0] == history and torch.equal(resumed[1], weight)


def test_ctrl_c_saves_and_exits(tmp_path):
    process = child(tmp_path)
    run_to_step(process, 6)  # the first batch is made twice
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "KeyboardInterrupt: train: interrupted, saved after step" in err
    step = int(err.split("saved after step ")[1].split()[0])
    assert 5 <= step < 40
    assert [p.name for p in tmp_path.iterdir()] == [f"step-{step}"]


def test_killed_while_saving_falls_back_to_the_checkpoint_before(tmp_path, monkeypatch):
    options = Options(12, save_every=4)
    whole = train(Squares(dropout=0.3), examples(), collate, options)
    save, calls = Accelerator.save_state, [0]

    def cut(self, folder):
        calls[0] += 1
        if calls[0] < 2:
            return save(self, folder)
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("power cut")

    monkeypatch.setattr(Accelerator, "save_state", cut)
    with pytest.raises(RuntimeError, match="power cut"):
        train(Squares(dropout=0.3), examples(), collate, options, out=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"step-4", "partial-8"}
    monkeypatch.undo()
    assert train(Squares(dropout=0.3), examples(), collate, options, out=tmp_path) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["step-12"]


class Tagger(nn.Module):
    """Looks like a transformers student: .hidden_states and .logits."""

    class Out:
        pass

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask, output_hidden_states):
        out = Tagger.Out()
        out.hidden_states = (self.embed(input_ids),)
        out.logits = self.head(out.hidden_states[-1])
        return out


def tagging(rows):
    ids = torch.tensor(rows)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids % 3,
        "words": (ids != 0).float(),
        "labelled_words": (ids > 4).float(),
    }


def test_stages_freeze_and_learn():
    student = Tagger()
    before = student.embed.weight.clone()
    term = terms.labels(weight="words")
    data = [[i, (i + 3) % 10, 0] for i in range(10)]
    options = Options(60, lr=0.1, batch_size=5)
    stages = [Stage("head", [term], data, options, frozen=("embed",)), Stage("all", [term], data, options)]
    history = run_stages(student, stages[:1], tagging)
    assert torch.equal(student.embed.weight, before)
    assert history["head"][-1]["labels"] < history["head"][0]["labels"]
    history = run_stages(student, stages[1:], tagging)
    assert not torch.equal(student.embed.weight, before)
    assert history["all"][-1]["labels"] < 0.05
    with pytest.raises(ValueError, match="frozen holds 'encoder'"):
        set_trainable(student, ["encoder"])


def test_what_came_frozen_stays_frozen():
    student = Tagger()
    student.embed.weight.requires_grad_(False)
    before = student.embed.weight.clone()
    term = terms.labels(weight="words")
    data, options = [[i, (i + 3) % 10, 0] for i in range(10)], Options(2, lr=0.1, batch_size=5)
    only_bias = Stage("bias", [term], data, options, frozen=("head.weight",))
    run_stages(student, [only_bias, Stage("head", [term], data, options)], tagging)
    assert torch.equal(student.embed.weight, before)
    assert [p.requires_grad for p in student.parameters()] == [False, True, True]
    run_stages(student, [Stage("all", [term], data, options, trained=("embed",))], tagging)
    assert not torch.equal(student.embed.weight, before)
    wrong = Stage("wrong", [term], data, options, frozen=("head",), trained=("weight",))
    with pytest.raises(ValueError, match="head.weight is in frozen by 'head' and in trained by 'weight', expected one"):
        run_stages(student, [wrong], tagging)
    with pytest.raises(ValueError, match="trained holds 'encoder', which is part of no parameter's name"):
        set_trainable(student, [], ["encoder"])
    assert [p.requires_grad for p in student.parameters()] == [False, True, True]


def test_an_objective_divides_and_counts():
    student = Tagger()
    batch = tagging([[1, 2, 0], [5, 9, 7]])
    objective = terms.Distillation(student, [terms.labels(scale=0.5)])
    logits = student(batch["input_ids"], None, True).logits
    rows = torch.nn.functional.cross_entropy(logits[1], batch["labels"][1], reduction="none")
    assert objective.counts(batch)["labels"].item() == 3
    found = objective(batch, {"labels": torch.tensor(12.0)})
    torch.testing.assert_close(found["labels"], 0.5 * rows.sum() / 12)
