"""Of captures, students and vocabularies."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification, BertModel

import fastdistil as fd
from fastdistil.models.bilstm import BiLstmConfig, bilstm_student
from fastdistil.models.student import compact_student, with_blocks
from fastdistil.models.trim import trim_model_
from fastdistil.models.vocab import trim_vocabulary
from mistakes import Mistake

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 11}
ROWS = torch.arange(11)
IDS = torch.arange(5)[None]


@cache
def encoder() -> Any:
    return BertModel(BertConfig(**SIZES)).eval()


@cache
def masked() -> Any:
    return BertForMaskedLM(BertConfig(**SIZES)).eval()


@cache
def tagger() -> Any:
    return BertForTokenClassification(BertConfig(**SIZES)).eval()


@cache
def other(labels: int = 2) -> Any:
    return BertForTokenClassification(BertConfig(**SIZES, num_labels=labels)).eval()


def _captured(model: Any, run: bool = True, **layers: Any) -> Any:
    with fd.capture(model, **layers) as captured:
        if run:
            model(IDS)
    return captured


def _compact(teacher: Any = None, rows: Any = ROWS, **options: Any) -> Any:
    given: dict[str, Any] = {"pad_token_id": 0, "hidden_size": 4, "heads": 2, "ffn_size": 4, "labels": ["O", "B-X"]}
    return compact_student(encoder() if teacher is None else teacher, rows, **given | options)


def _bilstm(rows: Any = ROWS, **options: Any) -> Any:
    given: dict[str, Any] = {"pad_token_id": 0, "embedding_size": 4, "lstm_size": 2, "labels": ["O", "B-X"]}
    return bilstm_student(encoder(), rows, **given | options)


MISTAKES = [
    # capture
    Mistake("a-layer-that-is-none", lambda _: _captured(encoder(), hidden_states=[3]), "hidden_states", "3", "0 to 2"),
    Mistake("queries-of-layer-0", lambda _: _captured(encoder(), queries=[0]), "queries", "0", "1 to 2"),
    Mistake("a-negative-layer", lambda _: _captured(encoder(), hidden_states=[-1]), "hidden_states", "-1", "0 to 2"),
    Mistake("one-layer-without-a-list", lambda _: _captured(encoder(), hidden_states=2), "hidden_states", "int", "list", "[2]"),
    Mistake("a-layers-name", lambda _: _captured(encoder(), hidden_states=["encoder.layer.0"]), "hidden_states", "'encoder.layer.0'", "whole numbers"),
    Mistake("a-model-of-ones-own", lambda _: _captured(nn.Linear(2, 2), hidden_states=[0]), "model", "Linear", "transformers model"),
    Mistake("a-models-name", lambda _: _captured("bert-base-cased", hidden_states=[0]), "model", "str", "transformers model", "from_pretrained"),
    Mistake("two-models-in-one", lambda _: _captured(nn.ModuleList([encoder(), masked()]), hidden_states=[0]), "model", "2 transformers models", "one"),
    Mistake("a-capture-without-a-run", lambda _: _captured(encoder(), run=False, hidden_states=[0]), "BertModel", "no forward pass", "at least one", "another copy"),
    Mistake("maps-that-were-not-asked-for", lambda _: _captured(encoder(), hidden_states=[0]).attention[2], "attention", "2", "[]", "queries"),
    # students
    Mistake("a-number-of-blocks", lambda _: with_blocks(encoder(), 2), "blocks", "int", "list", "range(2)"),
    Mistake("blocks-counted-from-1", lambda _: with_blocks(encoder(), [1, 2]), "blocks", "2", "0 to 1"),
    Mistake("a-block-twice", lambda _: with_blocks(encoder(), [0, 0]), "blocks", "[0, 0]", "once"),
    Mistake("no-blocks", lambda _: with_blocks(encoder(), []), "blocks", "empty", "at least one"),
    Mistake("a-student-wider-than-its-teacher", lambda _: _compact(hidden_size=16), "hidden_size", "16", "1 to 8"),
    Mistake("heads-that-do-not-divide", lambda _: _compact(heads=3), "heads", "3", "4"),
    Mistake("a-number-of-labels", lambda _: _compact(labels=2), "labels", "int", "list"),
    Mistake("no-labels", lambda _: _compact(labels=[]), "labels", "empty", "at least one"),
    Mistake("rows-of-another-vocabulary", lambda _: _compact(rows=ROWS + 1), "rows", "11", "0 to 10"),
    Mistake("a-padding-id-of-another-vocabulary", lambda _: _compact(pad_token_id=99), "pad_token_id", "99", "0 to 10"),
    Mistake("a-task-of-students", lambda _: _compact(task="ner"), "task", "'ner'", "'token'"),
    Mistake("a-bilstm-as-a-teacher", lambda _: _compact(teacher=nn.LSTM(2, 2)), "teacher", "LSTM", "transformers model"),
    Mistake("a-bilstm-wider-than-its-teacher", lambda _: _bilstm(embedding_size=99), "embedding_size", "99", "1 to 8"),
    Mistake("a-bilstm-of-rows-of-another-vocabulary", lambda _: _bilstm(rows=ROWS + 1), "rows", "11", "0 to 10"),
    Mistake("a-bilstm-of-a-number-of-labels", lambda _: _bilstm(labels=2), "labels", "int", "list"),
    Mistake("a-bilstm-of-size-0", lambda _: BiLstmConfig(lstm_size=0), "lstm_size", "0", "at least 1"),
    # vocabularies
    Mistake("a-slow-tokenizer", lambda _: trim_vocabulary(object(), [0, 1]), "tokenizer", "object", "PreTrainedTokenizerFast"),
    Mistake("rows-that-the-model-has-not", lambda _: trim_model_(masked(), ROWS + 1), "rows", "11", "0 to 10"),
    Mistake("no-rows", lambda _: trim_model_(masked(), ROWS[:0]), "rows", "none", "0 to 10"),
    Mistake("rows-in-float", lambda _: trim_model_(masked(), ROWS.float()), "rows", "torch.float32", "int64"),
    Mistake("tokenizers-by-name", lambda _: fd.tokenizer_projection("bert-base-cased", "xlm-roberta-base"), "teacher", "str", "PreTrainedTokenizerFast", "from_pretrained"),
]  # fmt: skip
