"""What `Distillation` refuses: terms that are none, layers that a model does not have, entries that a batch lacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastdistil.recipes.outputs import Outputs

if TYPE_CHECKING:
    from fastdistil.recipes.terms import Term

_NAME = "Distillation"


def listed(terms: object, kind: type) -> list[Any]:
    """`terms` as a list of what `kind` is."""
    if isinstance(terms, kind) or not isinstance(terms, Iterable):
        raise TypeError(f"{_NAME}: terms is {type(terms).__name__}, expected a list of terms")
    found = list(terms)
    for term in found:
        if not isinstance(term, kind):
            raise TypeError(
                f"{_NAME}: terms holds {type(term).__name__}, expected what the functions of "
                "fastdistil.recipes.terms return, such as terms.logits()"
            )
    return found


def resolved(term: Term, student: int | None, teacher: int | None) -> Term:
    """With layers counted from 0, each of them one that its model has."""
    if not term.parts:
        return term
    first = 0 if term.parts == ("hidden_states",) else 1
    found: dict[str, Any] = {}
    for side, depth in (("student", student), ("teacher", teacher)):
        layer = getattr(term, side)
        if isinstance(layer, str) or (depth is None and (layer >= 0 or side == "student") and not first):
            continue
        if depth is None:
            why = "needs a teacher that runs along" if first else f"names layer {layer} of a teacher"
            raise ValueError(f"{_NAME}: {term.name} {why}, but none came")
        found[side] = layer if layer >= 0 else depth + 1 + layer
        if not first <= found[side] <= depth:
            expected = f"{first} to {depth}, or -1 for the last"
            raise ValueError(f"{_NAME}: {term.name} names the {side}'s layer {layer}, expected {expected}")
    return replace(term, **found)


def whole_batch(batch: Mapping[str, Any], terms: Sequence[Term]) -> None:
    """That it has what both models and all terms read; the teacher's side is asked for where it is missing."""
    needed = {"input_ids": "the models", "attention_mask": "the models"}
    for term in terms:
        for name in term.reads:
            needed.setdefault(name, f"the term {term.name}")
    if missing := [f"{name} (of {reader})" for name, reader in needed.items() if name not in batch]:
        raise ValueError(
            f"{_NAME}: the batch has {', '.join(batch)}, expected {', '.join(missing)} in it, too; a term's argument "
            "weight names the entry that says what counts"
        )


def with_logits(side: str, model: nn.Module, found: Outputs, wanted: bool) -> Outputs:
    if wanted and found.logits is None:
        raise ValueError(
            f"{_NAME}: {side} is {type(model).__name__}, whose output has no logits, expected a model with a head"
        )
    return found


def labels(logits: Tensor, batch: Mapping[str, Tensor], weight: str) -> None:
    """That labels and what counts are as the logits' rows, and, on a CPU, that labels are classes: a GPU would have to
    wait."""
    for name in (weight, "labels"):
        if batch[name].shape != logits.shape[:-1]:
            raise ValueError(
                f"terms.labels: the batch's {name} has shape {tuple(batch[name].shape)}, expected "
                f"{tuple(logits.shape[:-1])}, as the student's logits have rows"
            )
    found, classes = batch["labels"], logits.shape[-1]
    if found.device.type == "cpu":
        wrong = found[batch[weight].bool() & (((found < 0) & (found != -100)) | (found >= classes))]
        if len(wrong):
            raise ValueError(
                f"terms.labels: the batch's labels hold {int(wrong[0])}, expected 0 to {classes - 1}, or -100 for none"
            )
