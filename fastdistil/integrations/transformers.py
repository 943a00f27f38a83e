"""transformers' Trainer with the terms of `fastdistil.recipes.terms` as its loss.

The trainer counts what each term runs over itself, over all micro-batches and processes of an optimiser step, before
the first backward: with accumulation and data parallelism the gradient is that of one big batch, however many tokens
each part holds. What Trainer counts and divides by differs between models and versions (docs/trainers.md) and is not
used.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fastdistil.integrations import door
from fastdistil.integrations.objective import TOPK, AdapterOff, TrainerObjective
from fastdistil.integrations.targets import shifts
from fastdistil.launch import check_fsdp
from fastdistil.recipes import terms as vocabulary

__all__ = ["DistillationArguments", "DistillationTrainer"]

_SAID, _PROJECTIONS = "distillation.json", "distillation.safetensors"


@dataclass
class DistillationArguments(TrainingArguments):  # type: ignore[misc] # mypy does not read transformers
    """TrainingArguments, and what the distillation adds.

    Args:
        terms: the terms as mappings, for configuration files and command lines (there as JSON): {"term": "logits",
            "temperature": 2.0}, {"term": "hidden", "student_layer": -1, "teacher_layer": -1}, ..., with the names and
            arguments of fastdistil.recipes.terms. The trainer's own argument `terms` takes their place.
        logits_from_heads: whether the logits are formed from hidden states and heads, chunk by chunk, never whole
            (`linear_logit_loss`); by default where both models have a head that allows it. Under torch_compile and
            FSDP they are formed whole.
        shift_labels: whether row i of the logits has the label of token i + 1; by default the model's class tells.
    """

    terms: list[dict[str, Any]] | str | None = field(default=None, metadata={"help": "Terms of the loss, as JSON."})
    logits_from_heads: bool | None = field(default=None, metadata={"help": "Form logits from heads, chunk by chunk."})
    shift_labels: bool | None = field(default=None, metadata={"help": "Row i has the label of token i + 1."})


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose loss is the sum of distillation terms. Its checkpoints are the student's own.

    Batches are those of transformers' collators: input_ids, attention_mask, labels with -100. The entries that terms
    read are made of them where the data has no such columns: `words`, 1 where logits are compared, is where a label is
    (without labels: every token but padding), `labelled_words` likewise; of causal models both are moved to the rows of
    the logits. The teacher's side comes from the data where that has it: teacher_hidden_<layer>, teacher_logits, or
    teacher_values and teacher_indices (B, S, K) with teacher_tail (B, S), for `topk_logit_loss`; teacher_input_ids are
    the teacher's ids where it has others. These columns stay in the data set, whatever remove_unused_columns is.

    A term's loss is the mean over all its rows in an optimiser step, on all processes: average_tokens_across_devices
    has no effect. Logs and evaluations show each term as loss_<term>; an evaluation's mean runs over the rows of the
    whole data set. Projections of terms train along and are saved beside the student, in distillation.safetensors.

    Several processes train under DistributedDataParallel. FSDP2 needs GPUs (on CPUs accelerate
    leaves it out without a word, which is an error here), was not run, and takes no projections.

    Args:
        model: the student: a transformers model with a head for token or sequence classification, masked or causal
            language modelling, or a PEFT model of one.
        args: DistillationArguments.
        teacher: a transformers model, "base" for a PEFT student's own model with its adapters off, or None where the
            data has all of its side. It is put on the device and into evaluation mode, runs without gradient and is
            never saved.
        terms: of fastdistil.recipes.terms; by default those of `args`, or logits() alone.
        rest, more: Trainer's other arguments, but for compute_loss_func and model_init.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was wanted: models, terms or arguments that do
            not go together, at once; columns that terms need and a batch does not have, at that batch; a checkpoint of
            another teacher or other terms, when it is resumed.

    Example:
        >>> import tempfile, torch
        >>> from transformers import BertConfig, BertForTokenClassification
        >>> from fastdistil.integrations.transformers import DistillationArguments, DistillationTrainer
        >>> from fastdistil.recipes import terms
        >>> sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
        >>> teacher = BertForTokenClassification(BertConfig(num_hidden_layers=2, num_labels=3, **sizes))
        >>> student = BertForTokenClassification(BertConfig(num_hidden_layers=1, num_labels=3, **sizes))
        >>> rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [0, 2, -100]}] * 4
        >>> folder = tempfile.TemporaryDirectory()
        >>> args = DistillationArguments(folder.name, max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True)
        >>> chosen = [terms.logits(temperature=2.0), terms.labels(scale=0.5), terms.hidden(-1, -1)]
        >>> trainer = DistillationTrainer(student, args, teacher=teacher, terms=chosen, train_dataset=rows)
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...
        2
        >>> folder.cleanup()
    """

    loss_is_scaled_for_ga = True  # asked from transformers 5.24 on

    def __init__(
        self,
        model: nn.Module,
        args: DistillationArguments | None = None,
        *rest: Any,
        teacher: nn.Module | str | None = None,
        terms: Any = None,
        **more: Any,
    ) -> None:
        args = DistillationArguments("tmp_trainer") if args is None else args
        if not isinstance(args, DistillationArguments):
            raise TypeError(f"DistillationTrainer: args is {type(args).__name__}, expected DistillationArguments")
        given = inspect.signature(Trainer.__init__).bind_partial(self, model, args, *rest, **more).arguments
        door.check_arguments(args, given)
        inner = door.check_model(model, "model")
        said, argument = (args.terms, "args.terms") if terms is None else (terms, "terms")
        chosen = [vocabulary.logits()] if said is None else door.made_terms(said, argument)
        shift = shifts(model, args.shift_labels)
        other = door.teacher_of(model, teacher)
        super().__init__(model, args, *rest, **more)
        if not self.is_fsdp_xla_enabled:
            check_fsdp("DistillationTrainer", self.accelerator, bool(args.fsdp))
        if isinstance(other, nn.Module) and not isinstance(other, AdapterOff):
            teacher_inner = door.check_model(other, "teacher")
            door.check_pair(inner, teacher_inner, chosen, self._columns())
            if getattr(other, "hf_device_map", None) is None and not getattr(other, "is_quantized", False):
                other.to(self.args.device)
        whole = "torch_compile is on" if args.torch_compile else "FSDP shards the heads" if args.fsdp else ""
        heads = door.heads_of(model, other, chosen, args.logits_from_heads, whole)
        self.objective = TrainerObjective(model, chosen, other, shift=shift, heads=heads, whole=bool(args.fsdp))
        if args.fsdp and len(self.objective.projections):
            raise ValueError("DistillationTrainer: terms have projections, and args.fsdp is on, expected one of them")
        self.objective.projections.to(self.args.device)
        self.objective.rehearse(self.args.device)
        self.model_accepts_loss_kwargs = True  # what says before 5.24 that the loss is divided already
        handler = getattr(self.accelerator, "ddp_handler", None)
        if handler is not None and args.ddp_find_unused_parameters is None:
            handler.find_unused_parameters = True  # of layers and heads that no term reaches
        self._totals: dict[str, Tensor] | None = None
        self._left = 0  # micro-batches of the running step
        self._logged: dict[str, Tensor] = {}
        self._steps_logged = 0
        self._sums: dict[str, Tensor] = {}

    # ---- The door ----

    def _columns(self) -> list[str] | None:
        """The training data's, where they are known before it is read."""
        names = getattr(self.train_dataset, "column_names", None)
        return list(names) if isinstance(names, (list, tuple)) else None

    def _set_signature_columns_if_needed(self) -> None:
        if vars(self)["_signature_columns"] is None:
            super()._set_signature_columns_if_needed()
            own = ["words", "labelled_words", "shift_labels", "teacher_input_ids", *TOPK, "teacher_tail"]
            own += [*self.objective.weights, *(term.entry for term in self.objective.terms if term.entry)]
            names = vars(self)["_signature_columns"]
            self._signature_columns = list(dict.fromkeys([*names, *own]))

    def _check_batch(self, inputs: Mapping[str, Any]) -> None:
        missing = self.objective.missing(inputs)
        if missing:
            raise ValueError(
                f"DistillationTrainer: a batch has the columns {', '.join(inputs)}, and lacks {', '.join(missing)}"
            )
        teacher = self.objective.teacher
        if teacher is not None and not isinstance(teacher, AdapterOff) and "teacher_input_ids" not in inputs:
            door.check_ids(door.check_model(self.model, "model"), door.check_model(teacher, "teacher"))

    # ---- Training ----

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        own = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        trained = [p for p in self.objective.projections.parameters() if p.requires_grad]
        for decay, chosen in (
            (self.args.weight_decay, [p for p in trained if p.ndim > 1]),
            (0.0, [p for p in trained if p.ndim <= 1]),
        ):
            if own and chosen:
                optimizer.add_param_group({"params": chosen, "weight_decay": decay})
        return optimizer

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        """The objective is what runs under autocast and data parallelism: its output, the losses, tells
        DistributedDataParallel which parameters the backward will reach. The model that is saved stays the student."""
        if self.is_fsdp_enabled:
            wrapped = super()._wrap_model(model, training, *args, **kwargs)
            return cast("nn.Module", wrapped)
        if not training:
            return self.objective
        if model is not self.model:  # from the call of train() before
            return model
        plugin = self.accelerator.state.dynamo_plugin
        backend = plugin.backend
        if self.args.torch_compile and self.objective.student is self.model:
            compiled: Any = torch.compile(
                self.model, backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode
            )
            self.objective.student = compiled
        try:
            plugin.backend = type(backend).NO  # the student alone is compiled, which is done above
            return cast("nn.Module", self.accelerator.prepare_model(self.objective))
        finally:
            plugin.backend = backend

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)
        if not batches:
            return batches, items
        self._check_batch(batches[0])
        self._totals = self._reduced([self.objective.counts(batch) for batch in batches])
        self._left = len(batches)
        self._steps_logged += 1
        # Not None says before 5.24 that the loss is divided already.
        return batches, torch.ones((), device=self.args.device) if items is None else items

    def _reduced(self, counts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Each term's items in all of `counts` on all processes, 0-d, 1 where there are none."""
        # float64: the sum of many counts is exact. MPS has none.
        dtype = torch.float32 if self.args.device.type == "mps" else torch.float64
        rows = [torch.stack([x.to(self.args.device, dtype) for x in count.values()]) for count in counts]
        totals = self.accelerator.reduce(torch.stack(rows).sum(0))
        return dict(zip(counts[0], torch.where(totals > 0, totals, torch.ones_like(totals)), strict=True))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of all terms over a batch / their items in the running step, times the number of processes, over
        which gradients are averaged; outside of a step, of the batch alone. With `return_outputs`, a pair of that and
        {"logits": ...}."""
        totals = self._totals
        if totals is None:
            self._check_batch(inputs)
            totals = self._reduced([self.objective.counts(inputs)])
        self._left -= 1
        if self._left <= 0:
            self._totals = None
        logits = None
        if return_outputs:
            with self.accelerator.autocast():
                losses, logits = self.objective.run(inputs, totals, logits=True)
        elif self.is_fsdp_enabled:
            self.objective.student = model
            losses = self.objective(inputs, totals)
        else:
            losses = (self.objective if model is self.model else model)(inputs, totals)
        scaled = {name: loss * self.accelerator.num_processes for name, loss in losses.items()}
        for name, loss in scaled.items():
            self._logged[name] = self._logged.get(name, 0) + loss.detach()
        loss = sum(scaled.values())
        return (loss, {"logits": logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._logged and self.control.should_log:
            found = torch.stack([x.double() for x in self._logged.values()]) / max(1, self._steps_logged)
            found = self.accelerator.reduce(found, "mean").tolist()
            logs |= {f"loss_{name}": x for name, x in zip(self._logged, found, strict=True)}
            self._logged, self._steps_logged = {}, 0
        super().log(logs, *args, **kwargs)

    # ---- Evaluation ----

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._sums = {}
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._sums:
            sums, counts = self.accelerator.reduce(torch.stack(list(self._sums.values()))).T
            means = (sums / torch.where(counts > 0, counts, torch.ones_like(counts))).tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = sum(means)
            named = {f"{metric_key_prefix}_loss_{name}": x for name, x in zip(self._sums, means, strict=True)}
            output.metrics.update(named)
        self._sums = {}
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        """The loss of the batch, None where it lacks what the terms need; the student's logits; the labels."""
        inputs = self._prepare_inputs(inputs)
        found = tuple(inputs.get(name) for name in self.label_names)
        labels = found if found and all(x is not None for x in found) else None
        loss, logits = None, None
        with torch.no_grad(), self.accelerator.autocast():
            if self.objective.missing(inputs):
                if not prediction_loss_only:
                    logits = self.objective.logits(inputs)
            else:
                loss, logits = self._evaluated(inputs, not prediction_loss_only)
        if prediction_loss_only:
            return loss, None, None
        return loss, logits, labels[0] if labels is not None and len(labels) == 1 else labels

    def _evaluated(self, inputs: dict[str, Any], logits: bool) -> tuple[Tensor, Tensor | None]:
        """The mean of each term over the batch, added up, and the logits where asked for."""
        rows = self._own_rows(inputs)
        counts = {name: x.to(self.args.device) for name, x in self.objective.counts(inputs, rows).items()}
        ones = {name: torch.ones((), device=self.args.device) for name in counts}
        sums, shown = self.objective.run(inputs, ones, rows=rows, logits=logits)
        loss = torch.zeros((), device=self.args.device)
        for name, value in sums.items():
            pair = torch.stack([value.double(), counts[name].double()])
            self._sums[name] = self._sums.get(name, torch.zeros_like(pair)) + pair
            loss = loss + value / counts[name].clamp(min=torch.finfo(torch.float32).tiny)
        return loss, shown

    def _own_rows(self, inputs: Mapping[str, Any]) -> int | None:
        """How many examples of a batch are not repetitions, by which accelerate fills the processes' last ones."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        size = next(x.shape[0] for x in inputs.values() if isinstance(x, Tensor))
        return int(min(max(state.remainder - self.accelerator.process_index * size, 0), size))

    # ---- Checkpoints ----

    def _save(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        super()._save(output_dir, *args, **kwargs)
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        (folder / _SAID).write_text(json.dumps(self._said(), indent=1), encoding="utf-8")
        if len(self.objective.projections):
            state = {name: x.contiguous() for name, x in self.objective.projections.state_dict().items()}
            save_file(state, folder / _PROJECTIONS)

    def _said(self) -> dict[str, Any]:
        """What a checkpoint's run and the one that continues it must have in common."""
        said = self.objective.fingerprint()
        return said | {"teacher": "base"} if isinstance(self.objective.teacher, AdapterOff) else said

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        said = Path(resume_from_checkpoint, _SAID)
        before = json.loads(said.read_text(encoding="utf-8")) if said.is_file() else {}
        for name, value in self._said().items():
            if name in before and before[name] != value:
                raise ValueError(
                    f"DistillationTrainer: resume_from_checkpoint is {resume_from_checkpoint}, whose {name} is "
                    f"{before[name]}, expected {value} as in this run"
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_projections(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_projections(self.state.best_model_checkpoint)

    def _load_projections(self, folder: str) -> None:
        if len(self.objective.projections):
            self.objective.projections.load_state_dict(load_file(Path(folder, _PROJECTIONS)))
