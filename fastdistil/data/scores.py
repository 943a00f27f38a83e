"""Scores in percent: entities as strict IOB2 by seqeval, accuracy, macro F1. What has no figure is None, never nan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdistil.data.tags import OUTSIDE, is_iob2


def entity_f1(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """{"f1", "precision", "recall", "entities", "predicted", "types": {type: {"f1", "precision", "recall",
    "entities"}}} of sentences of IOB2 tags, over all entities (micro average), in percent.

    Strict: an entity is right where its type, its first and its last word are, and a predicted I- that continues
    nothing begins none. Where `true` has no entity, f1, precision and recall are None: not 0, which would say that some
    were missed; "predicted" still counts those that were found. Raises ValueError where lengths differ or a tag is not
    IOB2.
    """
    from seqeval.metrics import classification_report
    from seqeval.scheme import IOB2, Entities

    _check(true, predicted)
    # Without its scheme, seqeval's strict mode is the lenient one, and says nothing.
    found = {name: Entities(list(map(list, rows)), IOB2) for name, rows in (("true", true), ("predicted", predicted))}
    counts = {name: sum(len(sentence) for sentence in entities.entities) for name, entities in found.items()}
    scores: dict[str, Any] = {"f1": None, "precision": None, "recall": None}
    result = {**scores, "entities": counts["true"], "predicted": counts["predicted"], "types": {}}
    if not counts["true"]:
        return result
    report = classification_report(
        list(map(list, true)), list(map(list, predicted)), mode="strict", scheme=IOB2, output_dict=True, zero_division=0
    )
    result |= _percent(report["micro avg"])
    kinds = sorted({tag[2:] for sentence in true for tag in sentence if tag != OUTSIDE})
    result["types"] = {kind: {**_percent(report[kind]), "entities": int(report[kind]["support"])} for kind in kinds}
    return result


def _percent(row: dict[str, Any]) -> dict[str, float]:
    names = {"f1": "f1-score", "precision": "precision", "recall": "recall"}
    return {ours: 100 * float(row[theirs]) for ours, theirs in names.items()}


def _check(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> None:
    if len(true) != len(predicted):
        raise ValueError(f"entity_f1: predicted has {len(predicted)} sentences, expected {len(true)} as true")
    for number, (a, b) in enumerate(zip(true, predicted, strict=True)):
        if len(a) != len(b):
            raise ValueError(f"entity_f1: predicted has {len(b)} tags in sentence {number}, expected {len(a)} as true")
        for tag in (*a, *b):
            if not is_iob2(tag):
                raise ValueError(f"entity_f1: sentence {number} has the tag {tag!r}, expected O, B-TYPE or I-TYPE")


def accuracy(true: Sequence[str], predicted: Sequence[str]) -> float | None:
    """Share of equal labels in percent; None of nothing. Raises ValueError where the lengths differ."""
    if len(true) != len(predicted):
        raise ValueError(f"accuracy: predicted has {len(predicted)} labels, expected {len(true)} as true")
    if not true:
        return None
    return 100 * sum(a == b for a, b in zip(true, predicted, strict=True)) / len(true)


def macro_f1(true: Sequence[str], predicted: Sequence[str]) -> float | None:
    """Mean F1 of the labels that stand in `true` or `predicted`, each alike, in percent, as scikit-learn has it; None
    of nothing."""
    from sklearn.metrics import f1_score

    if len(true) != len(predicted):
        raise ValueError(f"macro_f1: predicted has {len(predicted)} labels, expected {len(true)} as true")
    if not true:
        return None
    return 100 * float(f1_score(list(true), list(predicted), average="macro", zero_division=0))
