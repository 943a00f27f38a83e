"""The BiLSTM student: a transformers model like any other, in which padding changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

import fastdistil as fd
from fastdistil.models.bilstm import (
    BiLstmConfig,
    BiLstmForSequenceClassification,
    BiLstmForTokenClassification,
    BiLstmModel,
    bilstm_student,
)
from fastdistil.models.student import svd_basis

WORDS = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(18))]
LABELS = ["O", "B-PER", "I-PER"]


def config(**changes: object) -> BiLstmConfig:
    sizes = {"vocab_size": len(WORDS), "embedding_size": 6, "lstm_size": 5, "projection_size": 8}
    return BiLstmConfig(**{**sizes, "id2label": dict(enumerate(LABELS)), **changes})


def token_model(**changes: object) -> BiLstmForTokenClassification:
    torch.manual_seed(0)
    model = BiLstmForTokenClassification(config(**changes)).eval()
    for parameter in model.parameters():  # so that a state of padding would be seen
        parameter.data.normal_(std=0.5)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32)


@pytest.mark.parametrize(
    ("auto", "made"),
    [
        (AutoModel, BiLstmModel),
        (AutoModelForTokenClassification, BiLstmForTokenClassification),
        (AutoModelForSequenceClassification, BiLstmForSequenceClassification),
    ],
)
@pytest.mark.parametrize("projection", [8, None])
def test_auto_classes_open_what_was_saved(tmp_path: Path, auto: type, made: type, projection: int | None) -> None:
    torch.manual_seed(1)
    model = made(config(projection_size=projection, num_hidden_layers=2)).eval()
    model.save_pretrained(tmp_path)
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is made and not any(info.values())
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()
    assert again.config.hidden_size == (8 if projection else 10) and again.config.dropout == 0.2
    batch = {"input_ids": torch.tensor([[2, 3, 4], [5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    for x, y in zip(model(**batch).to_tuple(), again.eval()(**batch).to_tuple(), strict=True):
        torch.testing.assert_close(x, y)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fastdistil-bilstm"


def test_importing_the_package_registers_the_model_and_importing_fastdistil_does_not() -> None:
    code = """
import sys, fastdistil
assert "transformers" not in sys.modules and "fastdistil.models" not in sys.modules
import fastdistil.models
from transformers import AutoConfig
print(AutoConfig.for_model("fastdistil-bilstm").lstm_size)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "600"


def test_it_runs_in_pipelines(tmp_path: Path) -> None:
    token_model().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(WORDS)
    texts = ["w1 w2 w3 w4 w5", "w7", "w9 w8 w0"]
    tag = pipeline("token-classification", model=str(tmp_path), ignore_labels=[])
    alone = [tag(text) for text in texts]
    assert [[x["word"] for x in words] for words in alone] == [text.split() for text in texts]
    together = tag(texts, batch_size=3)
    for words, batched in zip(alone, together, strict=True):
        assert [x["entity"] for x in words] == [x["entity"] for x in batched]
        assert [x["score"] for x in words] == pytest.approx([x["score"] for x in batched], abs=1e-6)
    torch.manual_seed(0)
    BiLstmForSequenceClassification(config()).save_pretrained(tmp_path)
    found = pipeline("text-classification", model=str(tmp_path))(texts)
    assert [x["label"] in LABELS for x in found] == [True] * 3


ROWS = [[2, 3, 4, 5], [6, 7], [8, 9, 10]]


def padded(where: str) -> tuple[Tensor, Tensor]:
    """ROWS in 6 columns, with padding at the end, at the start, or between the tokens."""
    ids, mask = torch.full((3, 6), 19), torch.zeros(3, 6, dtype=torch.long)
    for i, row in enumerate(ROWS):
        first = {"right": 0, "left": 6 - len(row), "between": 0}[where]
        places = torch.arange(len(row)) + first
        if where == "between":
            places[1:] += 2
        ids[i, places], mask[i, places] = torch.tensor(row), 1
    return ids, mask


@pytest.mark.parametrize("where", ["right", "left", "between"])
@pytest.mark.parametrize("task", ["token", "sequence"])
def test_padding_changes_nothing(where: str, task: str) -> None:
    model = token_model(num_hidden_layers=2)
    if task == "sequence":
        whole = BiLstmForSequenceClassification(model.config).eval()
        whole.load_state_dict(model.state_dict())
    ids, mask = padded(where)
    out = (model if task == "token" else whole)(ids, mask, output_hidden_states=True)
    for i, row in enumerate(ROWS):
        alone = (model if task == "token" else whole)(torch.tensor([row]), output_hidden_states=True)
        keep = mask[i].bool()
        if task == "token":
            torch.testing.assert_close(out.logits[i][keep], alone.logits[0], atol=1e-5, rtol=1e-5)
        else:
            torch.testing.assert_close(out.logits[i], alone.logits[0], atol=1e-5, rtol=1e-5)
        for x, y in zip(out.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(x[i][keep], y[0], atol=1e-5, rtol=1e-5)
        assert (out.hidden_states[2][i][~keep] == 0).all()
    labels = torch.where(mask.bool(), 1, -100) if task == "token" else torch.tensor([0, 1, 2])
    (model if task == "token" else whole)(ids, mask, labels=labels).loss.backward()
    used = model if task == "token" else whole
    gradient = used.get_input_embeddings().weight.grad
    assert gradient[19].abs().max() == 0 and gradient[2].abs().max() > 0


def test_a_row_without_tokens_is_zero_and_changes_nothing() -> None:
    model = token_model()
    ids, mask = padded("right")
    more = torch.cat((ids, ids[:1])), torch.cat((mask, torch.zeros(1, 6, dtype=torch.long)))
    out, without = model(*more, output_hidden_states=True), model(ids, mask)
    torch.testing.assert_close(out.logits[:3], without.logits, atol=1e-5, rtol=1e-5)
    assert (out.hidden_states[1][3] == 0).all() and out.logits.isfinite().all()
    whole = BiLstmForSequenceClassification(model.config).eval()
    assert whole(*more).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"input_ids has shape \(2, 0\), expected at least one row and token"):
        model(torch.zeros(2, 0, dtype=torch.long))


@pytest.mark.parametrize("lengths", [(4, 4), (4, 2)], ids=str)
def test_one_dtype_under_autocast(lengths: tuple[int, int]) -> None:
    model = token_model()
    mask = (torch.arange(4) < torch.tensor(lengths)[:, None]).long()
    ids = torch.tensor([[2, 3, 4, 5], [6, 7, 8, 9]])
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, mask, output_hidden_states=True)
    plain = model(ids, mask, output_hidden_states=True)
    assert out.hidden_states[1].dtype == torch.float32 and out.logits.dtype == torch.bfloat16
    assert torch.equal(out.hidden_states[1], plain.hidden_states[1])
    assert model.bfloat16()(ids, mask, output_hidden_states=True).hidden_states[1].dtype == torch.bfloat16


def test_layers_are_counted_as_capture_counts_them() -> None:
    model, (ids, mask) = token_model(num_hidden_layers=2), padded("left")
    with fd.capture(model, hidden_states=[0, 1, 2]) as captured:
        out = model(ids, mask, output_hidden_states=True)
    assert [x.shape[-1] for x in out.hidden_states] == [6, 10, 10, 8]
    for layer in range(3):
        assert torch.equal(captured.hidden_states[layer], out.hidden_states[layer])
    linear = model.bilstm.projection[0]
    target, keep = torch.randn(3, 6, 8), mask.bool()
    fused = fd.hidden_loss(
        captured.hidden_states[2], target, projection=linear.weight, bias=linear.bias, activation="gelu", weight=keep
    )
    plain = (out.hidden_states[3] - target).square().mean(-1)[keep].mean()
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("projection", [8, None])
def test_groups_name_every_parameter_once_from_the_top(projection: int | None) -> None:
    model = token_model(projection_size=projection)
    groups = model.groups()
    assert list(groups) == ["head", *(["projection"] if projection else []), "lstm", "embeddings"]
    for name, _ in model.named_parameters():
        assert sum(part in name for parts in groups.values() for part in parts) == 1, name
    assert "head" not in model.bilstm.groups()


def bert(vocabulary: int = 30, width: int = 12) -> nn.Module:
    torch.manual_seed(2)
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForTokenClassification(BertConfig(vocab_size=vocabulary, max_position_embeddings=16, **sizes))


def test_a_student_reads_the_teachers_pieces() -> None:
    teacher, rows = bert(), torch.tensor([0, 3, 4, 7, 9, 11, 12, 15, 20, 21, 25, 28])
    student = bilstm_student(
        teacher, rows, pad_token_id=0, labels=LABELS, embedding_size=6, lstm_size=5, task="sequence"
    )
    assert isinstance(student, BiLstmForSequenceClassification) and student.training
    assert student.config.projection_size == 12 and student.config.label2id == {"O": 0, "B-PER": 1, "I-PER": 2}
    table = teacher.bert.embeddings.word_embeddings.weight.detach()[rows]
    mean, basis = svd_basis(table, 6)
    expected = (table - mean) @ basis
    found = student.get_input_embeddings().weight.detach()
    assert (found[0] == 0).all() and found[1:].square().mean().sqrt() == pytest.approx(1, rel=0.2)
    torch.testing.assert_close(found[1:] / found[1:].norm(), expected[1:] / expected[1:].norm())
    lstm = student.bilstm.layers[0].lstm
    assert (lstm.bias_ih_l0_reverse == torch.tensor([0.0] * 5 + [1.0] * 5 + [0.0] * 10)).all()
    assert (lstm.bias_hh_l0 == 0).all()
    torch.testing.assert_close(lstm.weight_hh_l0.T @ lstm.weight_hh_l0, torch.eye(5), atol=1e-5, rtol=0)


def test_it_learns_what_follows_a_word() -> None:
    """The class of a token is the next token's parity: only the backward direction can tell."""
    torch.manual_seed(3)
    model = BiLstmForTokenClassification(config(dropout=0.0, lstm_size=12, embedding_size=8, projection_size=12))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    mask = (torch.arange(7) < torch.tensor([[7], [5], [6], [4]])).long().repeat(8, 1)
    for _ in range(60):
        ids = torch.randint(2, 20, (32, 7))
        labels = torch.full((32, 7), -100)
        labels[:, :-1] = ids[:, 1:] % 2
        labels[:, :-1][mask[:, 1:] == 0] = -100
        out = model(ids, mask, labels=labels)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seen = labels != -100
    assert (out.logits.argmax(-1)[seen] == labels[seen]).float().mean() > 0.95


BAD = [
    (lambda: config(lstm_size=0), ValueError, "BiLstmConfig: lstm_size is 0, expected at least 1"),
    (lambda: config(dropout=1.0), ValueError, "BiLstmConfig: dropout is 1.0, expected 0 to less than 1"),
    (lambda: config(pad_token_id=20), ValueError, "BiLstmConfig: pad_token_id is 20, expected 0 to 19 or None"),
    (lambda: token_model()(), ValueError, "BiLstmModel: expected either input_ids or inputs_embeds"),
    (lambda: token_model()(torch.ones(1, 3).long(), torch.ones(1, 2)), ValueError, r"attention_mask has shape \(1, 2\), expected \(1, 3\)"),
    (lambda: bilstm_student(bert(), torch.arange(9), pad_token_id=0, labels=LABELS), ValueError, "embedding_size is 300, expected 1 to 12, the width"),
    (lambda: bilstm_student(bert(), torch.arange(9), pad_token_id=0, labels=LABELS, task="ner"), ValueError, "task is 'ner', expected one of"),
    (lambda: bilstm_student(nn.Linear(2, 2), torch.arange(9), pad_token_id=0, labels=LABELS), ValueError, "bilstm_student: teacher is Linear, expected a transformers model"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD)
def test_bad_calls(call: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
