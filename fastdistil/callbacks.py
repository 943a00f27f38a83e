"""transformers' callbacks around the training loop (train.py), and its log to TensorBoard, which is one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

if TYPE_CHECKING:
    from fastdistil.train import Options


@dataclass
class Due:
    """What is due after a step. Callbacks see it in their TrainerControl and may change it."""

    log: bool = False
    evaluate: bool = False
    save: bool = False
    stop: bool = False


class Callbacks:
    """Calls transformers' TrainerCallback objects as its Trainer does, but for epochs, which a stage has none of.

    They get TrainingArguments with what `options` says, a TrainerState and a TrainerControl. Without any callback
    nothing of transformers is imported.
    """

    def __init__(
        self,
        callbacks: Sequence[Any],
        options: Options,
        accelerator: Accelerator,
        out: Path | None,
        epochs_per_step: float,
        **shown: Any,  # model, optimizer, lr_scheduler
    ) -> None:
        self.callbacks, self.shown, self.epochs_per_step = list(callbacks), shown, epochs_per_step
        self.options, self.out, self.main = options, out, accelerator.is_main_process
        if options.log == "tensorboard":
            if out is None:
                raise ValueError("train: options has log = 'tensorboard' and out is None, expected a folder for it")
            self.callbacks.append(_tensorboard())
        self.arguments: Any = None
        if not self.callbacks:
            return
        from transformers import TrainerControl, TrainerState

        for callback in self.callbacks:
            if not hasattr(callback, "on_step_end"):
                raise TypeError(f"train: callbacks holds {callback!r}, expected transformers.TrainerCallback objects")
        self.arguments = _arguments(options, accelerator, out)
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=options.steps,
            logging_steps=options.log_every,
            eval_steps=options.evaluate_every or options.steps,
            save_steps=options.save_every,
            train_batch_size=options.batch_size,
            is_world_process_zero=self.main,
            is_local_process_zero=accelerator.is_local_main_process,
        )

    def __bool__(self) -> bool:
        return bool(self.callbacks)

    def begin(self, start: int, saved: Sequence[Any], best: float | None, best_step: int) -> None:
        """Before the first step of this call, `start` steps in; `saved` is what `states` gave to the checkpoint."""
        if not self:
            return
        self.at(start)
        self.state.best_metric, self.state.best_global_step = best, best_step or None
        for callback, (name, attributes) in zip(self.callbacks, saved, strict=False):
            if type(callback).__name__ == name:
                for key, value in attributes.items():
                    setattr(callback, key, value)
        if self.options.log == "tensorboard" and self.main:
            from torch.utils.tensorboard import SummaryWriter

            # Points behind the checkpoint, of a run that was killed later, are hidden.
            writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=start + 1)  # type: ignore[operator]
            self.callbacks[-1].tb_writer = writer
        self.call("on_train_begin")

    def at(self, steps: int) -> None:
        if self:
            self.state.global_step, self.state.epoch = steps, steps * self.epochs_per_step

    def call(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            found = getattr(callback, event)(self.arguments, self.state, self.control, **self.shown, **more)
            if found is not None:
                self.control = found

    def step_begin(self) -> None:
        if self:
            self.control.should_log = self.control.should_evaluate = self.control.should_save = False
            self.call("on_step_begin")

    def step_end(self, steps: int, tokens: int, due: Due) -> Due:
        """After the update: what is due when the callbacks have seen it."""
        if not self:
            return due
        self.at(steps)
        self.state.num_input_tokens_seen = tokens
        self.control.should_log, self.control.should_evaluate = due.log, due.evaluate
        self.control.should_save, self.control.should_training_stop = due.save, due.stop
        self.call("on_step_end")
        control = self.control
        return Due(control.should_log, control.should_evaluate, control.should_save, control.should_training_stop)

    def log(self, figures: Mapping[str, float]) -> None:
        if self:
            logs = {**figures, "epoch": self.state.epoch}
            self.state.log_history.append({**logs, "step": self.state.global_step})
            self.call("on_log", logs=logs)

    def evaluated(self, figures: Mapping[str, float], best: float | None, best_step: int) -> bool:
        """Whether a callback wants to stop now; they see the best figure of before."""
        if not self:
            return False
        self.log(figures)
        self.call("on_evaluate", metrics=dict(figures))
        self.state.best_metric, self.state.best_global_step = best, best_step or None
        return bool(self.control.should_training_stop)

    def states(self) -> list[Any]:
        """Of each callback its class and what it keeps between steps, as JSON holds it."""
        return [
            (type(callback).__name__, callback.state().get("attributes", {}) if hasattr(callback, "state") else {})
            for callback in self.callbacks
        ]


def _tensorboard() -> Any:
    from transformers.integrations import TensorBoardCallback

    try:
        return TensorBoardCallback()
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            "train: options has log = 'tensorboard', which is not installed: pip install tensorboard"
        ) from error


def _arguments(options: Options, accelerator: Accelerator, out: Path | None) -> Any:
    """TrainingArguments as callbacks read them. Their __post_init__ would take accelerate's state away, which the
    running Accelerator needs."""
    from transformers import TrainingArguments

    found: Any = object.__new__(TrainingArguments)
    for field in fields(TrainingArguments):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        setattr(found, field.name, None if default is MISSING else default)
    ours = asdict(options)
    said = {
        "output_dir": "." if out is None else str(out),
        "max_steps": options.steps,
        "learning_rate": options.lr,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulate,
        "warmup_steps": options.warmup,
        "lr_scheduler_type": options.schedule,
        "max_grad_norm": options.max_grad_norm or 0.0,
        "logging_strategy": "steps",
        "logging_steps": options.log_every,
        "eval_strategy": "steps",
        "eval_steps": options.evaluate_every or options.steps,
        "save_strategy": "steps",
        "save_steps": options.save_every,
        "metric_for_best_model": options.metric,
        "load_best_model_at_end": options.metric is not None,
        "fp16": options.precision == "fp16",
        "bf16": options.precision == "bf16",
        "report_to": [],
        **{name: ours[name] for name in ("weight_decay", "seed", "greater_is_better")},
    }
    vars(found).update(said)
    # What would be found out by making a PartialState anew.
    vars(found).update(
        {"__cached__setup_devices": accelerator.device, "_n_gpu": int(accelerator.device.type == "cuda")}
    )
    return found
