"""What DistillationTrainer refuses, with the argument's name, what came and what was wanted."""

from __future__ import annotations

import copy
import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from trainer_cases import InOrder, arguments, collate, model, rows, teacher
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration, TrainingArguments

from fastdistil.integrations.transformers import DistillationTrainer
from fastdistil.recipes import terms

T5 = {"vocab_size": 30, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
BERT = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
NAMES = {"id2label": {0: "O", 1: "B", 2: "I"}}
OTHER_NAMES = {"id2label": {0: "O", 1: "I", 2: "B"}}

BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "vocabulary": ({"model": lambda: model("causal")}, {"teacher": lambda: teacher("causal", vocab_size=40)}, r"teacher has logits over a vocabulary of 40 columns, model over a vocabulary of 30 columns"),
    "labels": ({}, {"teacher": lambda: teacher("token", num_labels=5)}, r"teacher has logits over 5 labels, model over 3 labels"),
    "names": ({"model": lambda: model("token", **NAMES)}, {"teacher": lambda: teacher("token", **OTHER_NAMES)}, r"teacher has the labels \{0: 'O', 1: 'I', 2: 'B'\}, model \{0: 'O', 1: 'B', 2: 'I'\}"),
    "width": ({}, {"terms": [terms.hidden(1, 2)]}, r"teacher has hidden_size 12, model 8, expected the same for the term hidden_1_2, or .*projection"),
    "heads": ({}, {"teacher": lambda: teacher("token", num_attention_heads=4), "terms": [terms.attention(1, 2)]}, r"teacher has num_attention_heads 4, model 2, .*heads='mean'"),
    "layer": ({}, {"terms": [terms.attention(2, 2)]}, r"prob_mse_2_2 names the student's layer 2, expected 1 to 1"),
    "no teacher": ({}, {"teacher": None, "terms": [terms.attention(1, 2)]}, r"prob_mse_1_2 needs a teacher that runs along, but none came"),
    "order": ({"model": lambda: model("causal"), "args": {"logits_from_heads": False}}, {"terms": [terms.attention(1, 2, heads="mean")]}, r"LlamaModel is causal, layer 2 of BertModel is not causal, expected both or neither"),
    "regression": ({"model": lambda: model("sequence", num_labels=1)}, {"teacher": lambda: teacher("sequence", num_labels=1)}, r"model has one label, a regression"),
    "no head": ({"args": {"logits_from_heads": True}}, {}, r"args.logits_from_heads is True, but BertForTokenClassification has no output embeddings"),
    "no adapters": ({}, {"teacher": "base"}, r"model is BertForTokenClassification, which has none, expected a PEFT model"),
    "teacher's name": ({}, {"teacher": "big"}, r"teacher is 'big', expected a model, 'base' or None"),
    "term": ({}, {"terms": [{"term": "logit"}]}, r"terms holds the term 'logit', expected one of hidden, attention, relation, logits, labels"),
    "term's argument": ({"args": {"terms": '[{"term": "logits", "heat": 2}]'}}, {}, r"args.terms holds .*heat"),
    "JSON": ({"args": {"terms": "logits"}}, {}, r"args.terms is 'logits', expected JSON"),
    "loss": ({}, {"compute_loss_func": len}, r"compute_loss_func came, expected None: the terms are the loss"),
    "smoothing": ({"args": {"label_smoothing_factor": 0.1}}, {}, r"args.label_smoothing_factor is 0.1, expected 0"),
    "encoder-decoder": ({"model": lambda: T5ForConditionalGeneration(T5Config(**T5))}, {}, r"model is T5ForConditionalGeneration, an encoder-decoder"),
    "no task": ({"model": lambda: BertModel(BertConfig(**BERT))}, {}, r"model is BertModel, expected a class whose name ends with one of ForTokenClassification.*args.shift_labels"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused(case: str, tmp_path: Path) -> None:
    own, more, message = BAD[case]
    student = own.get("model", lambda: model("token"))()
    given = {"teacher": lambda: teacher("token"), **more}
    if callable(given["teacher"]):
        given["teacher"] = given["teacher"]()
    with pytest.raises(ValueError, match=message):
        InOrder(student, arguments(tmp_path, **own.get("args", {})), collate, rows("token"), **given)


def test_refused_types(tmp_path: Path) -> None:
    student, other, args = model("token"), teacher("token"), arguments(tmp_path)
    with pytest.raises(TypeError, match=r"args is TrainingArguments, expected DistillationArguments"):
        DistillationTrainer(student, TrainingArguments(str(tmp_path), report_to="none"), teacher=other)
    with pytest.raises(TypeError, match=r"model is Linear, which holds 0 transformers models, expected one"):
        DistillationTrainer(nn.Linear(2, 2), args, teacher=other)
    with pytest.raises(TypeError, match=r"terms is LogitTerm, expected a list of terms"):
        DistillationTrainer(student, args, teacher=other, terms=terms.logits())
    with pytest.raises(TypeError, match=r"terms holds int, expected what fastdistil.recipes.terms makes"):
        DistillationTrainer(student, args, teacher=other, terms=[3])


def test_refused_teachers_of_the_same_parameters(tmp_path: Path) -> None:
    student, args = model("token"), arguments(tmp_path)
    with pytest.raises(ValueError, match=r"teacher is model itself"):
        DistillationTrainer(student, args, teacher=student)
    other = copy.deepcopy(student)
    other.bert.embeddings = student.bert.embeddings
    with pytest.raises(ValueError, match=r"teacher holds 5 parameters that train with model \(bert.embeddings"):
        DistillationTrainer(student, args, teacher=other)
    student.bert.embeddings.requires_grad_(False)
    DistillationTrainer(student, args, teacher=other)


def test_refused_batches(tmp_path: Path) -> None:
    """Columns that terms need are known at the first batch."""
    args, data = arguments(tmp_path), rows("token")
    bare = [{name: x for name, x in row.items() if name != "labels"} for row in data]
    for chosen, given, message in (
        ([terms.labels()], bare, r"lacks labelled_words \(of labels\), labels with classes"),
        ([terms.logits()], data, r"lacks teacher_logits"),
        ([terms.hidden(1, "there")], data, r"lacks there"),
        ([terms.hidden(1, "there", weight="own")], data, r"lacks own \(of hidden_1\), there"),
    ):
        with pytest.raises(ValueError, match=message):
            InOrder(model("token"), args, collate, given, terms=chosen).train()
    wide = teacher("token", vocab_size=40)
    message = r"teacher has a vocabulary of 40 ids, model one of 30, .*teacher_input_ids"
    with pytest.raises(ValueError, match=message):  # at once, where the columns are known
        InOrder(model("token"), args, train_dataset=Dataset.from_list([]).add_column("input_ids", []), teacher=wide)
    trainer = InOrder(model("token"), args, collate, data, teacher=wide)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    named = [{**row, "teacher_input_ids": row["input_ids"] + 7} for row in data]
    InOrder(model("token"), args, collate, named, teacher=wide).train()


def test_terms_of_arguments(tmp_path: Path) -> None:
    """Written as mappings or JSON they are the same terms; without any, logits alone."""
    said = '[{"term": "logits", "temperature": 2.0}, {"term": "hidden", "student_layer": 1, "teacher_layer": -1}]'
    args = arguments(tmp_path, terms=said)
    other = teacher("token", width=8)
    found = DistillationTrainer(model("token"), args, teacher=other).objective.terms
    written = [terms.logits(temperature=2.0), terms.hidden(1, -1)]
    plain = DistillationTrainer(model("token"), args, teacher=other, terms=written).objective.terms
    assert found == plain and [x.name for x in found] == ["logits", "hidden_1_2"]
    alone = DistillationTrainer(model("token"), arguments(tmp_path), teacher=other).objective.terms
    assert [x.name for x in alone] == ["logits"]
    assert torch.equal(torch.tensor(alone[0].scale), torch.tensor(1.0))


def test_docstring_example_runs() -> None:
    page = inspect.getdoc(DistillationTrainer) or ""
    found = doctest.DocTestParser().get_doctest(page, {}, "DistillationTrainer", None, None)
    assert found.examples
    said: list[str] = []
    assert doctest.DocTestRunner().run(found, out=said.append).failed == 0, "".join(said)
    assert all(name in page for name in inspect.signature(DistillationTrainer.__init__).parameters if name != "self")
