"""Models and tokenizers from folders and names, and their labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

import fastdistil.models  # noqa: F401  registers the BiLSTM
from fastdistil.data.files import Task
from fastdistil.models.frozen import restore_frozen
from fastdistil.writing import check_sums

KEPT = ("student", "model")  # a run's folder keeps its model in one of these
_AUTO: dict[Task, Any] = {"tokens": AutoModelForTokenClassification, "text": AutoModelForSequenceClassification}
_HEADS: dict[Task, str] = {"tokens": "ForTokenClassification", "text": "ForSequenceClassification"}


def folder_of(model: str) -> str:
    """`model`, or the folder of the model in it where it is a run's folder; a name of the hub stays.

    Raises FileNotFoundError or ValueError where there is none, or a file of it is missing or altered.
    """
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        for name in KEPT:
            if (path / name / "config.json").is_file():
                check_sums(path / name)
                return str(path / name)
        raise ValueError(f"{model}: holds no model: config.json is not there, nor in {' or '.join(KEPT)}")
    if path.is_dir():
        check_sums(path)
    if not path.exists() and (path.is_absolute() or model.count("/") > 1 or model.startswith(".")):
        raise FileNotFoundError(f"{model}: no such folder, and no name of a model on the hub")
    return model


@contextmanager
def named_in_errors(model: str) -> Iterator[None]:
    """What transformers says of a model that it does not find does not always name it."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and str(error).startswith(model):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{model}: no such folder here, and the hub gives no such model: {reason}") from error


def load_config(model: str) -> Any:
    """The configuration of a model in a folder or of the hub. Raises FileNotFoundError where there is none."""
    with named_in_errors(model):
        return AutoConfig.from_pretrained(folder_of(model))


def load_tokenizer(model: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer beside a model. Raises TypeError where there is none, ValueError without a padding piece."""
    with named_in_errors(model):
        tokenizer = AutoTokenizer.from_pretrained(folder_of(model))
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"{model}: its tokenizer is a {type(tokenizer).__name__}, expected a fast one")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{model}: its tokenizer has no padding piece, expected a pad_token")
    return tokenizer


def task_of(config: Any) -> Task | None:
    """The task of the head that a checkpoint was saved with, None of any other head."""
    for name in getattr(config, "architectures", None) or ():
        for task, ending in _HEADS.items():
            if name.endswith(ending):
                return task
    return None


def labels_of(config: Any) -> list[str]:
    """A model's labels in the order of its logits. Where they have no names (LABEL_0, ...), their numbers: so are
    called the labels of data that have none."""
    names = [str(config.id2label[i]) for i in range(len(config.id2label))]
    numbers = [re.fullmatch(r"LABEL_(\d+)", name) for name in names]
    return [match[1] for match in numbers if match] if all(numbers) else names


def load_classifier(model: str, task: Task | Literal["auto"] = "auto") -> tuple[Any, Task]:
    """A model with its own head for a task, in float32 and evaluation mode, and the task.

    Raises ValueError where the checkpoint has no such head.
    """
    folder = folder_of(model)
    config = load_config(model)
    own = task_of(config)
    if own is None or task not in ("auto", own):
        wanted = " or ".join(_HEADS.values()) if task == "auto" else _HEADS[task]
        have = ", ".join(getattr(config, "architectures", None) or ["no head"])
        raise ValueError(f"{model}: is {have}, expected a model {wanted}: give it such a head with fastdistil finetune")
    return _AUTO[own].from_pretrained(folder, dtype=torch.float32).eval(), own


def new_classifier(model: str, task: Task, labels: Sequence[str], seed: int) -> tuple[Any, bool]:
    """A model for `labels` in float32, and whether its head is the checkpoint's own: so it is where that has the same
    set of labels, in whatever order; else the head is drawn by `seed`. Word embeddings that its maker froze stay so."""
    folder = folder_of(model)
    config = load_config(model)
    own = task_of(config) == task
    if own and sorted(labels_of(config)) == sorted(labels):
        made = _AUTO[task].from_pretrained(folder, dtype=torch.float32)
        restore_frozen(made)
        return made, True
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    torch.manual_seed(seed)
    with without_report():
        made = _AUTO[task].from_pretrained(folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=True)
    if own:  # a head of as many other labels was loaded into ours
        fresh = dict(_AUTO[task].from_config(config).named_parameters())
        inside = f"{made.base_model_prefix}."
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if not name.startswith(inside):
                    parameter.copy_(fresh[name])
    restore_frozen(made)
    return made, False


def blank_classifier(model: str, task: Task, count: int) -> Any:
    """The shapes of a model for `count` labels, without weights."""
    with named_in_errors(model):
        config = AutoConfig.from_pretrained(folder_of(model), num_labels=count)
    with torch.device("meta"):
        return _AUTO[task].from_config(config)


@contextmanager
def without_report() -> Any:
    """Without transformers' report of the missing head."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def head_parameters(model: Any) -> list[str]:
    """What is outside of the model without head, and its pooler, which language modelling does not train."""
    inside = f"{model.base_model_prefix}."
    return [name for name, _ in model.named_parameters() if not name.startswith(inside) or "pooler" in name]


@contextmanager
def head_alone(model: Any, head: Sequence[str] | None = None) -> Iterator[None]:
    """Of what trains only `head` does, names of parameters (None: all outside of the encoder); afterwards all is as it
    was."""
    inside = f"{model.base_model_prefix}."

    def in_head(name: str) -> bool:
        return not name.startswith(inside) if head is None else name in head

    kept = [x for name, x in model.named_parameters() if x.requires_grad and not in_head(name)]
    for parameter in kept:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in kept:
            parameter.requires_grad_(True)
