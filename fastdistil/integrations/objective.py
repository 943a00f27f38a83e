"""The terms of recipes/terms.py on the batches and models of transformers' Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn

import fastdistil as fd
from fastdistil.integrations.heads import Head, HeadInput, recorded
from fastdistil.integrations.targets import batch_of, of_sequences
from fastdistil.models.capture import transformers_models
from fastdistil.recipes import terms as vocabulary
from fastdistil.recipes.maps import MapRule
from fastdistil.recipes.outputs import Outputs, outputs_of
from fastdistil.recipes.terms import Distillation, Term

TOPK = ("teacher_values", "teacher_indices")
# What describes packed sequences to a model's attention, beside the named arguments of its forward.
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass
class Shown(Outputs):
    """Outputs, or in the place of logits what the model's head was handed."""

    head: HeadInput | None = None


@dataclass(frozen=True)
class _Logits(vocabulary.LogitTerm):
    def loss(self, batch: Any, student: Outputs, teacher: Outputs, rule: MapRule | None, divisor: Tensor) -> Tensor:
        more: dict[str, Any] = {"divergence": self.divergence, "temperature": self.temperature}
        more |= {"scale_by_t2": self.scale_by_t2, "weight": batch[self.weight], "num_items": divisor}
        head = cast("Shown", student).head
        if TOPK[0] in batch:
            more |= {"teacher_tail": batch.get("teacher_tail")}
            known = [batch[name] for name in TOPK]
            if head is None:
                assert student.logits is not None
                return fd.topk_logit_loss(student.logits, *known, **more)
            states, weight, bias = head.tensors()
            more |= {"student_bias": bias, "student_logit_scale": head.head.scale, "student_softcap": head.head.softcap}
            return fd.linear_topk_logit_loss(states, weight, *known, **more)
        other = None if self.entry in batch else cast("Shown", teacher).head
        if head is None or other is None:
            return super().loss(batch, student, teacher, rule, divisor)
        if self.divergence == "mse":  # linear_logit_loss has the mean over the columns
            more["num_items"] = divisor * (2 / head.head.linear.out_features)
        states, weight, bias = head.tensors()
        target, target_weight, target_bias = (None if x is None else x.detach() for x in other.tensors())
        chunked: Tensor = fd.linear_logit_loss(
            states, weight, cast("Tensor", target), cast("Tensor", target_weight), student_bias=bias,
            teacher_bias=target_bias, student_logit_scale=head.head.scale, student_softcap=head.head.softcap,
            teacher_logit_scale=other.head.scale, teacher_softcap=other.head.softcap, **more,
        )  # fmt: skip
        return chunked


@dataclass(frozen=True)
class _Labels(vocabulary.LabelTerm):
    def loss(self, batch: Any, student: Outputs, teacher: Outputs, rule: MapRule | None, divisor: Tensor) -> Tensor:
        weight = batch[self.weight]
        labels = batch["labels"].masked_fill(weight == 0, -100)
        head = cast("Shown", student).head
        if head is None:
            rows = cast("Tensor", student.logits).flatten(0, -2)
            rows = rows if rows.dtype == torch.float64 else rows.float()
            losses = nn.functional.cross_entropy(rows, labels.flatten(), reduction="none")
            summed: Tensor = (losses * weight.flatten()).sum()
            return summed / divisor
        states, matrix, bias = head.tensors()
        # label_weight 1: no column of a teacher is looked at.
        nothing = states.new_zeros((*labels.shape, 1))
        return fd.linear_topk_logit_loss(
            states, matrix, nothing, nothing.int(), student_bias=bias, student_logit_scale=head.head.scale,
            student_softcap=head.head.softcap, weight=weight, labels=labels, label_weight=1.0,
            label_num_items=divisor,
        )  # fmt: skip


def _adapted(term: Term) -> Term:
    """The same term, with what a Trainer's batches and heads ask of it."""
    for kind, own in ((vocabulary.LogitTerm, _Logits), (vocabulary.LabelTerm, _Labels)):
        if type(term) is kind:
            return own(**{field.name: getattr(term, field.name) for field in fields(term)})
    return term


class AdapterOff(nn.Module):
    """A PEFT model as its base alone answers: adapters off, in evaluation mode. It holds the very parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        adapted: Any = self.model
        modes = [(module, module.training) for module in adapted.modules()]
        adapted.eval()
        try:
            with adapted.disable_adapter():
                return adapted(**inputs)
        finally:
            for module, mode in modes:
                module.training = mode


class TrainerObjective(Distillation):
    """`Distillation` of batches as transformers' collators make them.

    Args:
        student, terms, teacher: as there.
        shift: whether row i of the logits has the label of token i + 1.
        heads: of student and teacher, where logits are to be formed from them chunk by chunk; None forms them whole.
        whole: whether a head runs even if no term reads its logits.
    """

    def __init__(
        self,
        student: nn.Module,
        terms: Iterable[Term],
        teacher: nn.Module | None,
        *,
        shift: bool,
        heads: tuple[Head, Head | None] | None,
        whole: bool = False,
    ) -> None:
        super().__init__(student, [_adapted(term) for term in terms], teacher)
        self.shift, self.sequences, self.heads, self.whole = shift, of_sequences(student), heads, whole
        sides = {"student": student, "teacher": teacher}
        self._accepts = {side: _arguments(model) for side, model in sides.items() if model is not None}
        self.weights = sorted({term.weight for term in self.terms})

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0] if self._teacher else None

    def rehearse(self, device: torch.device) -> None:
        """Asks both models on a few tokens how they form the maps that terms compare, which refuses layers whose maps
        attention_loss does not have."""
        ids = torch.ones((1, 4), dtype=torch.long, device=device)
        self._map_rules({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def batch(self, inputs: Mapping[str, Any], rows: int | None = None) -> dict[str, Tensor]:
        """What the terms read of a collator's batch; only its first `rows` examples count."""
        return batch_of(inputs, shift=self.shift, sequences=self.sequences, weights=self.weights, rows=rows)

    def missing(self, inputs: Mapping[str, Any]) -> list[str]:
        """The columns that terms need and `inputs` does not have."""
        batch = self.batch(inputs)
        found = [f"{term.weight} (of {term.name})" for term in self.terms if term.weight not in batch]
        if any(isinstance(term, _Labels) for term in self.terms) and "labels" not in batch:
            found.append("labels with classes")
        for term in self.terms:
            live = term.entry is None and not isinstance(term, _Labels)
            if term.entry is not None and term.entry not in batch and not self._cached(term, batch):
                live = True
            if live and (not self._teacher or isinstance(term.teacher, str)):
                found.append(term.entry or f"a teacher for {term.name}")
        return found

    def _check_batch(self, batch: Mapping[str, Any]) -> None:
        """The trainer has asked for what is `missing`."""

    def counts(self, batch: Mapping[str, Any], rows: int | None = None) -> dict[str, Tensor]:
        return dict(super().counts(self.batch(batch, rows)))

    def forward(self, batch: Mapping[str, Any], items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each term's sum over a collator's batch / its items."""
        return self.run(batch, items)[0]

    def run(
        self, inputs: Mapping[str, Any], items: Mapping[str, Tensor], *, rows: int | None = None, logits: bool = False
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """`forward`, and the student's logits where they were formed, as with `logits` they are."""
        batch = self.batch(inputs, rows)
        rules = self._map_rules(batch)
        teacher = self._shown_by_teacher(batch, inputs)
        student = self._shown_by_student(batch, inputs, logits)
        losses = {
            term.name: term.loss(batch, student, teacher, rules.get(term.name), items[term.name] / term.scale)
            for term in self.terms
        }
        return losses, student.logits

    def logits(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The student's, of a batch that need not have what the terms read."""
        return self._shown("student", self.student, inputs, {}, None, True, True).logits

    def _cached(self, term: Term, batch: Mapping[str, Any]) -> bool:
        return isinstance(term, _Logits) and TOPK[0] in batch

    def _shown_by_student(self, batch: Mapping[str, Tensor], inputs: Mapping[str, Any], keep: bool) -> Shown:
        read = any(isinstance(term, (_Logits, _Labels)) for term in self.terms)
        head = self.heads[0] if self.heads and read and "teacher_logits" not in batch else None
        return self._shown("student", self.student, inputs, self._layers(self.terms, "student"), head, read, keep)

    def _shown_by_teacher(self, batch: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> Shown:
        live = [
            term
            for term in self.terms
            if not isinstance(term, _Labels) and term.entry not in batch and not self._cached(term, batch)
        ]
        if not live or self.teacher is None:
            return Shown()
        inputs = {**inputs, "input_ids": inputs["teacher_input_ids"]} if "teacher_input_ids" in inputs else inputs
        read = any(isinstance(term, _Logits) for term in live)
        head = self.heads[1] if self.heads and read else None
        with torch.no_grad():
            return self._shown("teacher", self.teacher, inputs, self._layers(live, "teacher"), head, read, False)

    def _shown(
        self,
        side: str,
        model: nn.Module,
        inputs: Mapping[str, Any],
        layers: Mapping[str, list[int]],
        head: Head | None,
        logits: bool,
        keep: bool,
    ) -> Shown:
        names, more = self._accepts[side]
        given = {name: x for name, x in inputs.items() if name in names} | more
        logits = logits or keep or self.whole
        if head is None:
            out = outputs_of(model, layers, given, logits)
            return Shown(out.captured, out.logits)
        with recorded(head, keep_logits=keep) as seen:
            out = outputs_of(model, layers, given, logits)
        return Shown(out.captured, out.logits if keep else None, HeadInput(head, seen[0]))


def _arguments(model: nn.Module) -> tuple[set[str], dict[str, Any]]:
    """Which entries of a batch the model's forward pass takes, but for labels, and what it is told besides."""
    parameters = inspect.signature(transformers_models(model)[0].forward).parameters
    names = {name for name in parameters if "label" not in name}
    if any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters.values()):
        names |= set(_PACKED)
    more: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    return names - {"use_cache"}, more
