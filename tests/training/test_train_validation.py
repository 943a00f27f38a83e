"""The loop's evaluation, early stopping, callbacks and log, batches by number, and that a kill changes none of it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from squares import Squares, collate, examples
from torch import nn

from fastdistil.batches import Shuffled, generator_of, stream
from fastdistil.fingerprint import of_data, same_data
from fastdistil.train import Batch, Options, train
from fastdistil.validation import mean_losses

transformers = pytest.importorskip("transformers")


class Killed(BaseException):
    pass


def weights_of(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


class Scores:
    """An evaluation that peaks at the third call, and draws from every generator."""

    def __init__(self, figures: tuple[float, ...] = (0.1, 0.5, 0.9, 0.4, 0.8, 0.3, 0.9, 0.2)) -> None:
        self.figures, self.seen = figures, list[list[torch.Tensor]]()

    def __call__(self, module: Any) -> dict[str, float]:
        assert not module.training and not torch.is_grad_enabled()
        torch.rand(3), random.random()
        step = int(module.steps)
        self.seen.append(weights_of(module))
        return {"f1": self.figures[step // 5 - 1]}


class Counted(Squares):
    """Knows how many batches it trained on, in a buffer."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, batch: Batch, items: Any) -> Any:
        self.steps += self.training
        return super().forward(batch, items)


EARLY = Options(40, lr=0.05, save_every=3, evaluate_every=5, metric="f1", patience=3)


@pytest.fixture(scope="module")
def early() -> Any:
    module, scores = Counted(), Scores()
    history = train(module, examples(), collate, EARLY, evaluate=scores)
    return module, scores, history


def test_early_stopping_keeps_the_best_weights(early: Any) -> None:
    module, scores, history = early
    assert len(history) == 30 and [r["eval_f1"] for r in history if "eval_f1" in r] == [0.1, 0.5, 0.9, 0.4, 0.8, 0.3]
    assert equal(weights_of(module), scores.seen[2]) and not equal(weights_of(module), scores.seen[-1])
    assert module.steps == 15
    plain = Counted()  # evaluation changes nothing of the training
    losses = train(plain, examples(), collate, Options(40, lr=0.05))
    assert [r["squares"] for r in losses[:30]] == [r["squares"] for r in history]


@pytest.mark.parametrize("kills", [(4, 17), (15, 29), (28, 30)])
def test_killed_between_evaluations_the_same_weights_are_best(early: Any, tmp_path: Path, kills: Any) -> None:
    whole, _, history = early
    for at in kills:
        module = Counted()

        def killing(rows: Any, module: Any = module, at: int = at) -> Any:
            if module.steps == at - 1:
                raise Killed
            return collate(rows)

        with pytest.raises(Killed):
            train(module, examples(), killing, EARLY, evaluate=Scores(), out=tmp_path)
    for _ in range(2):  # the second call only restores
        module, scores = Counted(), Scores()
        assert train(module, examples(), collate, EARLY, evaluate=scores, out=tmp_path) == history
        assert equal(weights_of(module), weights_of(whole)) and module.steps == 15
    assert not scores.seen


def test_the_best_is_the_least_where_that_is_better_and_nan_is_never_best() -> None:
    nan = float("nan")
    options = Options(25, evaluate_every=5, metric="f1", greater_is_better=False)
    module, scores = Counted(), Scores((nan, 0.5, 0.2, nan, 0.3))
    train(module, examples(), collate, options, evaluate=scores)
    assert equal(weights_of(module), scores.seen[2])
    module, scores = Counted(), Scores((nan,))
    with pytest.warns(UserWarning, match="f1 was nan in every evaluation: the last weights stay"):
        train(module, examples(), collate, Options(5, metric="f1"), evaluate=scores)
    assert equal(weights_of(module), scores.seen[0])


def test_a_student_that_learned_nothing_is_told() -> None:
    with pytest.warns(UserWarning, match="the best f1 is 0: the student has learned nothing.*lower learning rate"):
        train(Counted(), examples(), collate, Options(5, metric="f1"), evaluate=Scores((0.0,)))


def test_frozen_weights_are_not_kept_twice() -> None:
    module = Counted()
    module.frozen = nn.Linear(50, 50).requires_grad_(False)
    kept = list[Any]()

    class Keep(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_evaluate(self, *_: Any, **shown: Any) -> None:
            kept.append(shown["metrics"])

    train(module, examples(), collate, Options(5, metric="f1"), evaluate=Scores(), callbacks=[Keep()])
    assert kept == [{"eval_f1": 0.1}]


@pytest.mark.parametrize(
    ("options", "found", "message"),
    [
        ({"metric": "f1"}, None, "options has metric = 'f1', but no evaluate came"),
        ({"metric": "f1"}, {"f2": 1.0}, r"evaluate returned \['f2'\], expected 'f1' among them, the metric"),
        ({}, 3.0, "evaluate returned float, expected figures by name"),
    ],
)
def test_bad_evaluations(options: Any, found: Any, message: str) -> None:
    evaluate = None if found is None else lambda module: found
    with pytest.raises((TypeError, ValueError), match=message):
        train(Squares(), examples(), collate, Options(1, **options), evaluate=evaluate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 2, "metric": "f1"}, "patience is 2 with metric = 'f1' and evaluate_every = None"),
        ({"patience": 2, "evaluate_every": 1}, "patience is 2 with metric = None"),
        ({"patience": 0}, "patience is 0, expected at least 1"),
        ({"log": "wandb"}, "log is 'wandb', expected 'none' or 'tensorboard'"),
        ({"final_lr": 1.0}, "final_lr is 1.0, expected 0 to lr = 0.001"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(5, **options)


def test_a_final_learning_rate() -> None:
    options = Options(100, lr=1e-3, final_lr=1e-8, warmup=0)
    assert options.lr_factor(0) == 1 and options.lr_factor(100) == pytest.approx(1e-5)
    assert options.lr_factor(50) == pytest.approx(0.5 + 0.5e-5)


def test_another_evaluation_does_not_continue_a_run(tmp_path: Path) -> None:
    train(Counted(), examples(), collate, Options(5, metric="f1"), evaluate=Scores(), out=tmp_path)
    with pytest.raises(ValueError, match=r"written with validation = {.*'f1'.*}, this run has None"):
        train(Counted(), examples(), collate, Options(5), out=tmp_path)


def test_mean_losses_are_those_of_all_examples_together() -> None:
    module, data = Squares(), examples()
    parts = [collate(data[i : i + 5]) for i in range(0, len(data), 5)]
    whole = collate(data)
    expected = module(whole, module.counts(whole))["squares"].item()
    assert mean_losses(module, parts) == pytest.approx({"squares": expected, "loss": expected}, rel=1e-5)


class Corrupting:
    """Batches that draw their rows and a noise, all from the batch's number."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def batch(self, k: int) -> Batch:
        generator = generator_of(7, k)
        rows = torch.randint(len(self.data), (4,), generator=generator).tolist()
        batch = collate([self.data[i] for i in rows])
        return batch | {"x": batch["x"] + torch.randn(batch["x"].shape, generator=generator)}

    def __len__(self) -> int:
        return len(self.data)

    def fingerprint(self) -> Any:
        return {"kind": ("corrupting", 7), "data": of_data(self.data)}


def noisy(rows: Any, generator: torch.Generator) -> Any:
    batch = collate(rows)
    return batch | {"x": batch["x"] + torch.randn(batch["x"].shape, generator=generator)}


@pytest.mark.parametrize("kind", ["batches", "a collate that is given a generator"])
def test_what_is_drawn_for_a_batch_is_drawn_again(tmp_path: Path, kind: str) -> None:
    data = (Corrupting(examples()), None) if kind == "batches" else (examples(), noisy)
    options = Options(12, save_every=4)
    history = train(Squares(), *data, options)

    class Stop(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 6:
                raise Killed

    with pytest.raises(Killed):
        train(Squares(), *data, options, out=tmp_path, callbacks=[Stop()])
    assert [p.name for p in tmp_path.iterdir()] == ["step-4"]
    assert train(Squares(), *data, options, out=tmp_path) == history
    if kind == "batches":
        other = Corrupting(examples()[::-1])
        with pytest.raises(ValueError, match=r"was written with data = {'kind': \['corrupting', 7\], "):
            train(Squares(), other, None, options, out=tmp_path)


def own_generator() -> Any:
    generator = torch.Generator().manual_seed(0)
    return lambda rows: noisy(rows, generator)


def own_counter() -> Any:
    numbers: Iterator[int] = itertools.count()
    return lambda rows: {**collate(rows), "language": next(numbers)}


@pytest.mark.parametrize("made", [own_generator, own_counter])
def test_a_collate_with_a_state_of_its_own_is_refused_where_a_run_may_continue(tmp_path: Path, made: Any) -> None:
    train(Squares(), examples(), made(), Options(1))
    with pytest.raises(ValueError, match="two different batches for one number.*an argument `generator`"):
        train(Squares(), examples(), made(), Options(1), out=tmp_path)


def test_bad_streams() -> None:
    with pytest.raises(ValueError, match="data is Corrupting, which makes its own batches, expected collate=None"):
        train(Squares(), Corrupting(examples()), collate, Options(1))
    with pytest.raises(ValueError, match="collate is None and data is list, expected a function"):
        train(Squares(), examples(), None, Options(1))
    with pytest.raises(ValueError, match="data is empty"):
        train(Squares(), Corrupting([]), None, Options(1))


def test_generators_of_numbers_and_seeds_differ() -> None:
    first = [torch.rand(4, generator=generator_of(seed, k)) for seed in range(3) for k in range(50)]
    assert len({tuple(x.tolist()) for x in first}) == 150
    assert torch.equal(first[51], torch.rand(4, generator=generator_of(1, 1)))
    shuffled = Shuffled(list(range(10)), lambda rows: {"x": torch.tensor(rows)}, 4, 0)
    assert torch.equal(shuffled.batch(7)["x"], shuffled.batch(7)["x"])
    data = of_data([1, 2])
    assert same_data({"a": [data, 1]}, {"a": (data, 1)}) and not same_data({"a": [data, 1]}, {"a": [data, 2]})


class Log(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        self.events = list[Any]()
        self.arguments: Any = None

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda args, state, control, **shown: self.note(name, args, state, control, shown)
        return super().__getattribute__(name)

    def note(self, name: str, args: Any, state: Any, control: Any, shown: Any) -> None:
        self.events.append((name, state.global_step))
        self.arguments = args
        assert shown["model"].layer is not None and "optimizer" in shown and state.max_steps == 6
        if name == "on_step_end":
            assert control.should_evaluate == (state.global_step == 6)
            control.should_evaluate = state.global_step in (2, 6)
            control.should_save = state.global_step == 3
        if name == "on_log" and "loss" in shown["logs"]:
            assert {"loss", "squares", "learning_rate", "tokens_per_second", "epoch"} <= shown["logs"].keys()


def test_callbacks_are_called_and_obeyed(tmp_path: Path) -> None:
    log = Log()
    options = Options(6, log_every=4, batch_size=8, warmup=0)
    history = train(
        Squares(), examples(), collate, options, evaluate=lambda _: {"f1": 1.0}, callbacks=[log], out=tmp_path
    )
    assert [r["step"] for r in history if "eval_f1" in r] == [1, 5]
    assert [e for e in log.events if e[0] in ("on_train_begin", "on_log", "on_evaluate", "on_save", "on_train_end")] == [
        ("on_train_begin", 0), ("on_log", 2), ("on_evaluate", 2), ("on_save", 3), ("on_log", 4), ("on_log", 6),
        ("on_evaluate", 6), ("on_save", 6), ("on_train_end", 6),
    ]  # fmt: skip
    step = ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
    assert [name for name, _ in log.events if name in step] == step * 6
    args = log.arguments
    assert (
        isinstance(args, transformers.TrainingArguments)
        and args.max_steps == 6
        and "learning_rate" in args.to_json_string()
    )
    assert args.to_sanitized_dict()["per_device_train_batch_size"] == 8
    train(Squares(), examples(), collate, Options(2))  # accelerate's state is as it was
    with pytest.raises(TypeError, match="callbacks holds 3, expected transformers.TrainerCallback objects"):
        train(Squares(), examples(), collate, Options(2), callbacks=[3])


def test_transformers_early_stopping_ends_a_stage_for_good(tmp_path: Path) -> None:
    options = Options(40, lr=0.05, save_every=3, evaluate_every=5, metric="f1")
    module, seen = Counted(), list[int]()

    class Kill(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            seen.append(state.global_step)
            if state.global_step == 23 and seen.count(23) == 1:
                raise Killed

    def run() -> Any:
        stop = transformers.EarlyStoppingCallback(early_stopping_patience=3)
        return train(module, examples(), collate, options, evaluate=Scores(), callbacks=[stop, Kill()], out=tmp_path)

    with pytest.raises(Killed):
        run()
    module = Counted()
    assert len(run()) == 30 and module.steps == 15 and seen[-1] == 30
    assert len(run()) == 30 and seen[-1] == 30 and seen.count(30) == 1


def test_the_log_holds_losses_and_figures_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = Options(8, save_every=4, evaluate_every=4, log="tensorboard", log_every=2)

    def run(last: int) -> Any:
        module = Counted()

        def killing(rows: Any) -> Any:
            if module.steps == last:
                raise Killed
            return collate(rows)

        return train(module, examples(), killing, options, evaluate=lambda _: {"f1": 0.5}, out=tmp_path)

    with pytest.raises(Killed):
        run(7)
    history = run(9)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"train/loss", "train/squares", "train/learning_rate", "train/tokens_per_second", "eval/f1"} <= set(
        found.Tags()["scalars"]
    )
    points = [(x.step, x.value) for x in found.Scalars("train/squares")]
    means = [(history[i]["squares"] + history[i - 1]["squares"]) / 2 for i in (1, 3, 5, 7)]
    assert points == [(2 * i + 2, pytest.approx(mean)) for i, mean in enumerate(means)]
    assert [x.step for x in found.Scalars("eval/f1")] == [4, 8]
    with pytest.raises(ValueError, match="log = 'tensorboard' and out is None, expected a folder"):
        train(Squares(), examples(), collate, options, evaluate=lambda _: {})


def test_the_bar_shows_losses_tokens_and_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    from fastdistil.progress import Progress

    with Progress("stage", 2, 0, main=True) as bar:
        bar.bar.disable or bar.step({"ce": 1.23456}, 4000)
        bar.note("evaluating")
        bar.step({"ce": 0.5}, 4000)
        text = str(bar.bar)
    assert "stage: 100%" in text and "ce=0.5" in text and "tokens/s=" in text and "<00:00" in text


def test_a_dataset_is_a_sequence_although_it_has_a_method_batch() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"x": [[1.0], [2.0]]})
    shuffled = stream(data, lambda rows: {"x": torch.tensor([row["x"] for row in rows])}, 2, 0)
    assert isinstance(shuffled, Shuffled) and sorted(shuffled.batch(0)["x"].flatten().tolist()) == [1.0, 2.0]
