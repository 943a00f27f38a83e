"""What DistillationTrainer refuses before anything runs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from fastdistil.integrations.heads import Head, head_of
from fastdistil.integrations.objective import AdapterOff
from fastdistil.models.capture import transformers_models
from fastdistil.recipes import terms as vocabulary
from fastdistil.recipes.terms import Term

_NAME = "DistillationTrainer"
_TERMS: dict[str, Callable[..., Term]] = {
    name: getattr(vocabulary, name) for name in ("hidden", "attention", "relation", "logits", "labels")
}


def made_terms(said: Any, argument: str) -> list[Term]:
    """Terms, from terms or from mappings {"term": name, ...} with the arguments of recipes.terms's function of that
    name, which may also be written as JSON."""
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except json.JSONDecodeError as error:
            raise ValueError(f"{_NAME}: {argument} is {said!r}, expected JSON, a list of terms: {error}") from None
    if isinstance(said, (Term, Mapping)) or not isinstance(said, Iterable):
        raise TypeError(f"{_NAME}: {argument} is {type(said).__name__}, expected a list of terms")
    return [_made(term, argument) for term in said]


def _made(said: Any, argument: str) -> Term:
    if isinstance(said, Term):
        return said
    if not isinstance(said, Mapping):
        raise TypeError(
            f"{_NAME}: {argument} holds {type(said).__name__}, expected what fastdistil.recipes.terms makes, or a "
            'mapping {"term": "logits", ...}'
        )
    options = dict(said)
    name = options.pop("term", None)
    if name not in _TERMS:
        raise ValueError(f"{_NAME}: {argument} holds the term {name!r}, expected one of {', '.join(_TERMS)}")
    try:
        return _TERMS[name](**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(_TERMS[name]).parameters)
        raise ValueError(f"{_NAME}: {argument} holds {dict(said)}: {error}, expected some of {known}") from None


def check_model(model: object, argument: str) -> Any:
    """The one transformers model in `model`."""
    found = {id(x): x for x in transformers_models(model)} if isinstance(model, nn.Module) else {}
    if len(found) != 1:
        raise TypeError(
            f"{_NAME}: {argument} is {type(model).__name__}, which holds {len(found)} transformers models, expected one"
        )
    inner: Any = next(iter(found.values()))
    if inner.config.is_encoder_decoder:
        raise ValueError(
            f"{_NAME}: {argument} is {type(inner).__name__}, an encoder-decoder, expected a model for token or "
            "sequence classification, masked or causal language modelling"
        )
    return inner


def teacher_of(model: nn.Module, teacher: object) -> nn.Module | None:
    """The module that runs as the teacher."""
    if teacher is None:
        return None
    if isinstance(teacher, str):
        if teacher != "base":
            raise ValueError(f"{_NAME}: teacher is {teacher!r}, expected a model, 'base' or None")
        if not hasattr(model, "disable_adapter"):
            raise ValueError(
                f"{_NAME}: teacher is 'base', the model without its adapters, and model is {type(model).__name__}, "
                "which has none, expected a PEFT model"
            )
        return AdapterOff(model)
    check_model(teacher, "teacher")
    assert isinstance(teacher, nn.Module)
    if teacher is model:
        raise ValueError(f"{_NAME}: teacher is model itself, expected another one, or 'base' for a PEFT model's base")
    training = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    shared = [training[id(p)] for p in teacher.parameters() if id(p) in training]
    if shared:
        raise ValueError(
            f"{_NAME}: teacher holds {len(shared)} parameters that train with model ({', '.join(shared[:3])}), "
            "expected a teacher that stays as it is: copy.deepcopy it first"
        )
    return teacher


def check_pair(student: Any, teacher: Any, terms: Sequence[Term], columns: Sequence[str] | None) -> None:
    """That the sides of each term fit, of two transformers models. `columns` of the data set, where they are known."""
    if any(isinstance(term, vocabulary.LogitTerm) and term.entry not in (columns or ()) for term in terms):
        _check_classes(student, teacher)
    for term in terms:
        if isinstance(term.teacher, str) or (term.entry or "") in (columns or ()):
            continue
        if isinstance(term, vocabulary.HiddenTerm) and term.projection is None:
            _equal(term, student, teacher, "hidden_size", "terms.hidden(..., projection=torch.nn.Linear(...))")
        if isinstance(term, vocabulary.AttentionTerm) and term.heads == "each":
            _equal(term, student, teacher, "num_attention_heads", "heads='mean' in the term")
    if columns is not None and "teacher_input_ids" not in columns:
        check_ids(student, teacher)


def check_ids(student: Any, teacher: Any) -> None:
    """That one row of ids is of the vocabularies of both models."""
    sizes = [x.get_input_embeddings().weight.shape[0] for x in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{_NAME}: teacher has a vocabulary of {sizes[1]} ids, model one of {sizes[0]}, expected the same, or a "
            "column teacher_input_ids"
        )


def _check_classes(student: Any, teacher: Any) -> None:
    heads = [x.get_output_embeddings() for x in (student, teacher)]
    if all(getattr(x, "weight", None) is not None for x in heads):
        sizes = [x.weight.shape[0] for x in heads]
        what = "a vocabulary of {} columns"
    else:
        sizes = [x.config.num_labels for x in (student, teacher)]
        what = "{} labels"
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{_NAME}: teacher has logits over {what.format(sizes[1])}, model over {what.format(sizes[0])}, expected "
            "the same"
        )
    if "labels" not in what:
        return
    if sizes[0] == 1:
        raise ValueError(f"{_NAME}: model has one label, a regression, whose softmax says nothing; expected classes")
    names = [x.config.id2label for x in (student, teacher)]
    given = [x != {i: f"LABEL_{i}" for i in range(len(x))} for x in names]
    if all(given) and names[0] != names[1]:
        raise ValueError(f"{_NAME}: teacher has the labels {names[1]}, model {names[0]}, expected the same")


def _equal(term: Term, student: Any, teacher: Any, name: str, otherwise: str) -> None:
    sizes = [getattr(x.config.get_text_config(), name, None) for x in (student, teacher)]
    if sizes[0] != sizes[1] and None not in sizes:
        raise ValueError(
            f"{_NAME}: teacher has {name} {sizes[1]}, model {sizes[0]}, expected the same for the term {term.name}, or "
            f"{otherwise}"
        )


def heads_of(
    student: nn.Module, teacher: nn.Module | None, terms: Sequence[Term], wanted: bool | None, why_not: str
) -> tuple[Head, Head | None] | None:
    """The heads that logits are formed from, None for whole logits. `why_not`: why they are to be whole, if so."""
    if wanted is False:
        return None
    found: list[Head | None] = []
    if not any(isinstance(term, (vocabulary.LogitTerm, vocabulary.LabelTerm)) for term in terms):
        why_not = why_not or "no term reads logits"
    for model in (student, teacher):
        head = None if model is None or why_not else head_of(model)
        if isinstance(head, str):
            why_not = head
        else:
            found.append(head)
    if why_not:
        if wanted:
            raise ValueError(f"{_NAME}: args.logits_from_heads is True, but {why_not}; expected False or None")
        return None
    student_head, teacher_head = found
    assert student_head is not None
    return student_head, teacher_head


def check_arguments(args: Any, given: Mapping[str, Any]) -> None:
    """What Trainer takes and this one cannot have."""
    refused = {
        "compute_loss_func": "the terms are the loss",
        "model_init": "the terms and the teacher belong to one model: pass model",
    }
    for name, why in refused.items():
        if given.get(name) is not None:
            raise ValueError(f"{_NAME}: {name} came, expected None: {why}")
    parallel = getattr(args, "parallelism_config", None)
    wrong = {
        "label_smoothing_factor": (args.label_smoothing_factor, bool(args.label_smoothing_factor), 0),
        "deepspeed": (args.deepspeed, args.deepspeed is not None, None),
        "n_gpu": (args.n_gpu, args.n_gpu > 1, "1 per process: start it with torchrun or accelerate launch"),
        "parallelism_config": (parallel, parallel is not None and parallel.non_data_parallel_size > 1, "data parallel"),
    }
    for name, (value, refuse, expected) in wrong.items():
        if refuse:
            raise ValueError(f"{_NAME}: args.{name} is {value!r}, expected {expected}")
