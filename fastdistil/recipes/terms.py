"""What every recipe is written in: terms of a loss, and the objective that adds them up.

    objective = Distillation(student, [terms.hidden(-1, -1), terms.attention(6, 12), terms.logits()], teacher)

Layers count as `fd.capture` does: 0 is the embedding output, l the output of block l, -1 the last block's, before any
norm behind it. The batch holds

| entry | shape | what |
|---|---|---|
| input_ids, attention_mask | (B, S) | pieces; 1 = real |
| token_type_ids | (B, S) | of pairs: for the models that know them |
| teacher_input_ids | (B, S) | the same pieces in the teacher's numbers, where those are others |
| teacher_hidden_<l>, teacher_logits | (B, S, D_t); (B, S, C) or (B, C) | where the teacher does not run along |
| labels | (B, S) or (B,) int64 | class |
| words | (B, S) or (B,) | 1 where logits count: a word's first piece, or an example |
| labelled_words | (B, S) or (B,) | 1 where its label is known, too |
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastdistil as fd
from fastdistil.contracts.hidden import KINDS
from fastdistil.contracts.logit import LOSSES
from fastdistil.fingerprint import of_teacher
from fastdistil.losses._check import one_of
from fastdistil.losses.logit import rule_of
from fastdistil.models.capture import depth_of, transformers_models
from fastdistil.recipes import checks
from fastdistil.recipes.maps import MapRule, map_rules, pairs_of
from fastdistil.recipes.outputs import Outputs, inputs_of, outputs_of
from fastdistil.train import Batch

_MAPS = ("prob_mse", "prob_kl", "score_mse")
_RELATIONS = ("queries", "keys", "values")


@dataclass(frozen=True)
class Term:
    """One summand: the sum of its losses over the batch, times `scale`, / the number of its items in the whole step.

    Terms are made by this module's functions. `student` and `teacher` are layers; of a term without, 0. `weight` is the
    batch's entry that says what counts.
    """

    student: int
    teacher: int | str
    scale: float
    weight: str

    def __post_init__(self) -> None:
        for side in ("student", "teacher"):
            layer = getattr(self, side)
            if isinstance(layer, bool) or not isinstance(layer, int if side == "student" else (int, str)):
                raise TypeError(f"terms: {side}_layer is {layer!r}, expected a whole number")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"terms: {self.name} has scale {self.scale}, expected a finite number above 0")

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def parts(self) -> tuple[str, ...]:
        """What is captured of the two layers."""
        return ()

    @property
    def entry(self) -> str | None:
        """The batch's entry that stands for the teacher's side; None where there is none."""
        return None

    @property
    def reads(self) -> tuple[str, ...]:
        """The batch's entries beside what the models read and the teacher's side."""
        return (self.weight,)

    def items(self, batch: Batch, rule: MapRule | None) -> Tensor:
        """Number of items of the term in the batch ()."""
        return batch[self.weight].sum()

    def loss(self, batch: Batch, student: Outputs, teacher: Outputs, rule: MapRule | None, divisor: Tensor) -> Tensor:
        """Sum over the batch / divisor ()."""
        raise NotImplementedError


@dataclass(frozen=True)
class HiddenTerm(Term):
    kind: str
    projection: nn.Module | None

    @property
    def name(self) -> str:
        return f"hidden_{self.student}" + ("" if isinstance(self.teacher, str) else f"_{self.teacher}")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("hidden_states",)

    @property
    def entry(self) -> str:
        return self.teacher if isinstance(self.teacher, str) else f"teacher_hidden_{self.teacher}"

    def loss(self, batch: Batch, student: Outputs, teacher: Outputs, rule: MapRule | None, divisor: Tensor) -> Tensor:
        states = student.captured.hidden_states[self.student]
        target = batch[self.entry] if self.entry in batch else teacher.captured.hidden_states[int(self.teacher)]
        fused = _fused(self.projection)
        if self.projection is not None and not fused:
            states = self.projection(states)
        more = {"weight": batch[self.weight], "num_items": divisor, **fused}
        return fd.hidden_loss(states, target, kind=self.kind, **more)


def _fused(projection: nn.Module | None) -> dict[str, Any]:
    """A linear layer, or one with GELU behind it, as `hidden_loss` takes it; nothing for any other projection."""
    steps = list(projection) if isinstance(projection, nn.Sequential) else [projection]
    if len(steps) not in (1, 2) or not isinstance(steps[0], nn.Linear):
        return {}
    if len(steps) == 2 and not (isinstance(steps[1], nn.GELU) and steps[1].approximate == "none"):
        return {}
    return {"projection": steps[0].weight, "bias": steps[0].bias, "activation": "gelu" if len(steps) == 2 else None}


@dataclass(frozen=True)
class _MapTerm(Term):
    kind: str

    def items(self, batch: Batch, rule: MapRule | None) -> Tensor:
        return pairs_of(batch["attention_mask"], rule, rows=self.kind == "prob_kl")


@dataclass(frozen=True)
class AttentionTerm(_MapTerm):
    heads: str

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.student}_{self.teacher}"

    @property
    def parts(self) -> tuple[str, ...]:
        return ("queries", "keys")

    def loss(self, batch: Batch, student: Outputs, teacher: Outputs, rule: MapRule | None, divisor: Tensor) -> Tensor:
        assert rule is not None
        rule.check_length(batch["attention_mask"].shape[1])
        i, j = self.student, int(self.teacher)
        return fd.attention_loss(
            student.captured.queries[i], student.captured.keys[i], teacher.captured.queries[j],
            teacher.captured.keys[j], kind=self.kind, mask=batch["attention_mask"].bool(), causal=rule.causal,
            student_scale=rule.student_scale, teacher_scale=rule.teacher_scale, heads=self.heads, num_items=divisor,
        )  # fmt: skip


@dataclass(frozen=True)
class RelationTerm(_MapTerm):
    of: str
    heads: int

    @property
    def name(self) -> str:
        return f"{self.of}_{self.student}_{self.teacher}"

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.of,)

    def loss(self, batch: Batch, student: Outputs, teacher: Outputs, rule: MapRule | None, divisor: Tensor) -> Tensor:
        assert rule is not None
        sides = getattr(student.captured, self.of)[self.student], getattr(teacher.captured, self.of)[self.teacher]
        return fd.relation_loss(
            *sides, relation_heads=self.heads, kind=self.kind, mask=batch["attention_mask"].bool(),
            causal=rule.causal, num_items=divisor,
        )  # fmt: skip


@dataclass(frozen=True)
class LogitTerm(Term):
    divergence: str
    temperature: float
    scale_by_t2: bool

    @property
    def name(self) -> str:
        return "logits"

    @property
    def entry(self) -> str:
        return "teacher_logits"

    def loss(self, batch: Batch, student: Outputs, teacher: Outputs, rule: MapRule | None, divisor: Tensor) -> Tensor:
        target = batch.get(self.entry, teacher.logits)
        assert student.logits is not None and target is not None
        if self.divergence == "mse":  # logit_loss has the mean over the classes
            divisor = divisor * (2 / target.shape[-1])
        return fd.logit_loss(
            student.logits, target, divergence=self.divergence, temperature=self.temperature,
            scale_by_t2=self.scale_by_t2, weight=batch[self.weight], num_items=divisor,
        )  # fmt: skip


@dataclass(frozen=True)
class LabelTerm(Term):
    @property
    def name(self) -> str:
        return "labels"

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.weight, "labels")

    def loss(self, batch: Batch, student: Outputs, teacher: Outputs, rule: MapRule | None, divisor: Tensor) -> Tensor:
        assert student.logits is not None
        checks.labels(student.logits, batch, self.weight)
        keep = batch[self.weight].bool()
        chosen, labels = student.logits[keep], batch["labels"][keep]
        chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
        return nn.functional.cross_entropy(chosen, labels, reduction="sum") / divisor


def hidden(
    student_layer: int,
    teacher_layer: int | str,
    *,
    kind: str = "mse",
    projection: nn.Module | None = None,
    weight: str = "attention_mask",
    scale: float = 1.0,
) -> Term:
    """The states of two layers: mean over the pieces of `hidden_loss` of `kind` ("mse", "cosine", "kl").

    `teacher_layer` may name an entry of the batch (B, S, D) in the place of a layer. `projection` maps the student's
    states to the teacher's width and trains along; nn.Linear, and nn.Sequential(nn.Linear, nn.GELU()), run inside of
    the loss. It may be a part of the student. `weight` names the batch's entry that says which pieces count.
    """
    one_of("terms.hidden", "kind", kind, KINDS)
    return HiddenTerm(student_layer, teacher_layer, scale, weight, kind, projection)


def attention(
    student_layer: int, teacher_layer: int, *, kind: str = "prob_mse", heads: str = "each", scale: float = 1.0
) -> Term:
    """The attention maps of two blocks (from 1) as the models form them: mean over the pairs of tokens that a query
    sees and over the heads of "prob_mse" or "score_mse", or over queries and heads of "prob_kl"; see `attention_loss`
    for the kinds and for `heads`.

    What attention_loss has no map for is refused: softcaps, biases and sinks before the first step, windows at the
    first batch that is longer. Needs a live teacher.
    """
    one_of("terms.attention", "kind", kind, _MAPS)
    one_of("terms.attention", "heads", heads, ("each", "mean"))
    return AttentionTerm(student_layer, teacher_layer, scale, "attention_mask", kind, heads)


def relation(
    student_layer: int, teacher_layer: int, *, of: str, heads: int, kind: str = "prob_kl", scale: float = 1.0
) -> Term:
    """MiniLMv2's relation of a block's "queries", "keys" or "values" among themselves, in `heads` relation heads: mean
    over tokens and relation heads of `relation_loss`. Needs a live teacher."""
    one_of("terms.relation", "of", of, _RELATIONS)
    one_of("terms.relation", "kind", kind, _MAPS)
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"terms.relation: heads is {heads!r}, expected a whole number of at least 1")
    return RelationTerm(student_layer, teacher_layer, scale, "attention_mask", kind, of, heads)


def logits(
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    scale_by_t2: bool = True,
    weight: str = "words",
    scale: float = 1.0,
) -> Term:
    """The logits of both models: mean over what `weight` names of `logit_loss`; but "mse" is half of the squared
    distance, ½‖z_s - z_t‖², as XtremeDistil has it. Soft cross entropy has the gradient of "forward_kl" and is larger
    by the teacher's entropy."""
    rule_of("terms.logits", divergence, 0.5, temperature, None, scale_by_t2, LOSSES)
    if divergence == "mse" and temperature != 1:
        raise ValueError(f"terms.logits: temperature is {temperature} with divergence 'mse', expected 1")
    return LogitTerm(0, 0, scale, weight, divergence, temperature, scale_by_t2)


def labels(*, weight: str = "labelled_words", scale: float = 1.0) -> Term:
    """Mean over what `weight` names of the cross entropy of the student's logits with the batch's labels."""
    return LabelTerm(0, 0, scale, weight)


class Distillation(nn.Module):
    """The `Objective` of train.py: one forward pass of each model, then the sum of all terms.

    `teacher` runs along, in evaluation mode and without gradient, for the terms whose side of it is not in the batch;
    it is no part of the parameters nor of checkpoints. A head whose logits no term reads is not run. A student that is
    no transformers model is called with input_ids, attention_mask and output_hidden_states=True, and its output's
    hidden_states are the layers.

    Raises ValueError for no terms, two of one name, and layers that a model does not have; for a batch without an entry
    that a term reads, and for a model whose output has no logits that one reads.
    """

    def __init__(self, student: nn.Module, terms: Iterable[Term], teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.student = student
        chosen = checks.listed(terms, Term)
        sides = (("student", student), ("teacher", teacher))
        depths = [
            None if x is None or not transformers_models(x) else depth_of(x, "Distillation", side) for side, x in sides
        ]
        self.terms = tuple(checks.resolved(term, *depths) for term in chosen)
        names = [term.name for term in self.terms]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Distillation: terms has the names {names}, expected at least one, and each once")
        self._teacher: tuple[nn.Module, ...] = () if teacher is None else (teacher.eval(),)  # hidden from parameters
        own = {id(p) for p in student.parameters()}
        projections = {term.name: term.projection for term in self.terms if isinstance(term, HiddenTerm)}
        added = {
            n: p for n, p in projections.items() if p is not None and any(id(x) not in own for x in p.parameters())
        }
        self.projections = nn.ModuleDict(added)
        self._rules: dict[str, MapRule] | None = None

    def _layers(self, chosen: Sequence[Term], side: str) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for term in chosen:
            for part in term.parts:
                if not isinstance(layer := getattr(term, side), str):
                    found.setdefault(part, []).append(layer)
        return {part: sorted(set(layers)) for part, layers in found.items()}

    def forward(self, batch: Batch, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rules = self._map_rules(batch)
        teacher = self._run_teacher(batch)
        student = self._run_student(batch)
        # The scale goes into the divisor: what follows the loss would cost its gradient another pass.
        return {
            term.name: term.loss(batch, student, teacher, rules.get(term.name), items[term.name] / term.scale)
            for term in self.terms
        }

    def _run_student(self, batch: Batch) -> Outputs:
        logits = any(isinstance(term, (LogitTerm, LabelTerm)) for term in self.terms)
        layers = self._layers(self.terms, "student")
        found = outputs_of(self.student, layers, inputs_of(self.student, batch), logits)
        return checks.with_logits("student", self.student, found, logits)

    def _run_teacher(self, batch: Batch) -> Outputs:
        live = [term for term in self.terms if not isinstance(term, LabelTerm) and term.entry not in batch]
        if not live:
            return Outputs()
        if not self._teacher or any(isinstance(term.teacher, str) for term in live):
            wanted = [term.entry or f"{term.name}'s" for term in live]
            raise ValueError(f"Distillation: the batch has no {', '.join(wanted)}, and no teacher that has them came")
        ids = batch.get("teacher_input_ids", batch["input_ids"])
        logits = any(isinstance(term, LogitTerm) for term in live)
        with torch.no_grad():
            model = self._teacher[0].to(ids.device)
            inputs = inputs_of(model, {**batch, "input_ids": ids})
            found = outputs_of(model, self._layers(live, "teacher"), inputs, logits)
            return checks.with_logits("teacher", model, found, logits)

    def _map_rules(self, batch: Batch) -> dict[str, MapRule]:
        """How the maps are formed of which terms compare them: asked of both models once, on a few tokens."""
        if self._rules is None:
            chosen = [term for term in self.terms if isinstance(term, _MapTerm)]
            layers = {x.name: (x.student, int(x.teacher), isinstance(x, AttentionTerm)) for x in chosen}
            self._rules = map_rules(self.student, self._teacher[0], layers, batch) if chosen else {}
        return self._rules

    def _check_batch(self, batch: Batch) -> None:
        checks.whole_batch(batch, self.terms)

    def counts(self, batch: Batch) -> Mapping[str, Tensor]:
        self._check_batch(batch)
        rules = self._map_rules(batch)
        return {term.name: term.items(batch, rules.get(term.name)) for term in self.terms}

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint's run must have in common with this one: the teacher, where one runs along, and the
        terms."""
        teacher = of_teacher(self._teacher[0]) if self._teacher else None
        return {"teacher": teacher, "terms": [_said(term) for term in self.terms]}


def _said(term: Term) -> str:
    """A term in one line, the same in every run."""
    shown = {name: x for name, x in vars(term).items() if name not in ("student", "teacher")}
    said = [f"{name} {type(x).__name__ if isinstance(x, nn.Module) else x}" for name, x in shown.items()]
    return f"{term.name}: {', '.join(said)}"
