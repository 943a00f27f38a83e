"""Vocabulary trimming and the compact student."""

import json

import e5s1
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedTokenizerFast

from fastdistil.demo import teacher
from fastdistil.models.student import compact_student, svd_basis
from fastdistil.models.vocab import trim_vocabulary

TEXT = "lambalar ana."


@pytest.fixture
def parsed():
    return teacher.read_teacher(e5s1.write()[0])


@pytest.fixture
def unigram(parsed):
    return teacher.build_tokenizer(parsed.pieces, parsed.unk, bos="<s>", eos="</s>", pad="<pad>", max_length=64)


@pytest.fixture
def wordpiece():
    pieces = ["[PAD]", "a", "[UNK]", "b", "[CLS]", "##a", "[SEP]", "##b", "ab"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    made = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.mark.parametrize(("fixture", "text"), [("unigram", TEXT), ("wordpiece", "ab abb")])
def test_kept_text_is_cut_as_before(fixture, text, request):
    full = request.getfixturevalue(fixture)
    ids = full(text).input_ids
    small, rows = trim_vocabulary(full, ids)
    assert len(small) == len(rows) < len(full)
    assert rows.tolist() == sorted(rows.tolist())
    assert rows[small(text).input_ids].tolist() == ids
    assert full.convert_ids_to_tokens(rows.tolist()) == small.convert_ids_to_tokens(list(range(len(rows))))
    assert small.special_tokens_map == full.special_tokens_map
    assert small.unk_token_id != full.unk_token_id or fixture == "unigram"


def test_lost_piece_falls_to_smaller_ones(unigram):
    keep = [i for i in range(len(unigram)) if unigram.convert_ids_to_tokens(i) != "lar"]
    small, _ = trim_vocabulary(unigram, keep)
    assert small.convert_ids_to_tokens(small(TEXT).input_ids)[1:5] == ["\u2581lamba", "l", "a", "r"]
    tiny, rows = trim_vocabulary(unigram, [])  # and a piece of the lowest score, which the mask is here
    assert {tiny.bos_token_id, tiny.unk_token_id, tiny.eos_token_id} <= set(tiny(TEXT).input_ids)
    scores = [score for _, score in json.loads(unigram.backend_tokenizer.to_str())["model"]["vocab"]]
    assert len(rows) == len(unigram.all_special_tokens) + 1 - (scores[unigram.mask_token_id] == min(scores))
    assert min(scores) in [scores[i] for i in rows]


def test_trim_refuses(unigram):
    with pytest.raises(TypeError, match="trim_vocabulary: tokenizer is a str, expected a PreTrainedTokenizerFast"):
        trim_vocabulary("xlm-r", [1])
    with pytest.raises(ValueError, match=r"trim_vocabulary: keep holds id 5000, expected 0 to"):
        trim_vocabulary(unigram, [5000])
    with pytest.raises(ValueError, match=r"trim_vocabulary: keep holds id -1, expected 0 to"):
        trim_vocabulary(unigram, [-1])
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")))
    with pytest.raises(
        ValueError, match="trim_vocabulary: tokenizer's model is WordLevel, expected Unigram, WordPiece or BPE"
    ):
        trim_vocabulary(words, [0])


def test_svd_basis_is_the_best_of_its_rank():
    table = torch.randn(200, 24) @ torch.diag(torch.linspace(3, 0.1, 24)) + 5
    mean, basis = svd_basis(table, 6)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6), atol=1e-5, rtol=0)
    rest = (table - mean) - (table - mean) @ basis @ basis.T
    singular = torch.linalg.svdvals((table - table.mean(0)).double())
    assert rest.double().square().sum().item() == pytest.approx(singular[6:].square().sum().item(), rel=1e-4)


def test_svd_basis_refuses():
    with pytest.raises(ValueError, match=r"svd_basis: table has shape \(4,\), expected \(V, D\)"):
        svd_basis(torch.zeros(4), 1)
    with pytest.raises(ValueError, match="svd_basis: size is 9, expected 1 to 8, the width of table"):
        svd_basis(torch.zeros(4, 8), 9)


def test_student_keeps_the_geometry_and_loads_again(parsed, unigram, tmp_path):
    model = teacher.build_model(parsed)
    small, rows = trim_vocabulary(unigram, unigram(TEXT).input_ids)
    # As many dimensions as the teacher has: centred distances between word vectors must be the teacher's.
    student = compact_student(
        model, rows, pad_token_id=small.pad_token_id, hidden_size=32, heads=4, ffn_size=32, labels=["A", "B"]
    )
    ours, theirs = student.bert.embeddings.word_embeddings.weight, model.embeddings.word_embeddings.weight[rows]
    torch.testing.assert_close(torch.cdist(ours, ours), torch.cdist(theirs, theirs), atol=1e-4, rtol=1e-4)
    assert all(p.requires_grad for p in student.parameters())
    student.eval().save_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    loaded, tokenizer = (
        AutoModelForTokenClassification.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    batch = tokenizer([TEXT, "ana"], return_tensors="pt", padding=True)
    assert batch.input_ids.tolist() == small([TEXT, "ana"], return_tensors="pt", padding=True).input_ids.tolist()
    assert torch.equal(loaded(**batch).logits, student(**batch).logits)
    assert loaded.config.id2label == {0: "A", 1: "B"}


POSITIONS = {"XLMRoberta": (514, 512), "Camembert": (514, 512), "Nystromformer": (512, 512), "Bert": (512, 512)}


@pytest.mark.parametrize("family", POSITIONS)
def test_the_compact_student_has_its_teachers_positions(family):
    """The sum of the three embeddings is the teacher's in another basis, token by token; XLM-R's positions begin at 2."""
    rows, count = POSITIONS[family]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=40, max_position_embeddings=rows, pad_token_id=1, type_vocab_size=1, initializer_range=1.0, **sizes
    )
    made = transformers.AutoModelForTokenClassification.from_config(config)
    before = torch.get_rng_state()
    student = compact_student(made, torch.arange(40), pad_token_id=1, hidden_size=16, layers=1, heads=2, labels=["A"])
    assert made.training and student.config.max_position_embeddings == count
    torch.set_rng_state(before)
    again = compact_student(
        made.eval(), torch.arange(40), pad_token_id=1, hidden_size=16, layers=1, heads=2, labels=["A"]
    )
    assert torch.equal(again.classifier.weight, student.classifier.weight), "the teacher's mode changed the draw"
    ids = torch.randint(2, 40, (1, count))
    sums = []
    for model in (made, student):
        embeddings = model.base_model.embeddings
        embeddings.LayerNorm.register_forward_pre_hook(lambda _, inputs: sums.append(inputs[0][0].detach()))
        embeddings(input_ids=ids)
    for i in (0, 1, 255, count - 1):
        ours, theirs = ((x - x[i]).norm(dim=-1) for x in (sums[1], sums[0]))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_compact_student_refuses_other_embeddings():
    config = transformers.DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=1, hidden_dim=8)
    made = transformers.DistilBertModel(config)
    with pytest.raises(TypeError, match=r"teacher is DistilBertModel, which has no embeddings.token_type_embeddings"):
        compact_student(made, torch.arange(9), pad_token_id=0, labels=["A"])


def test_a_compact_student_for_sequences():
    made = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    options = {"pad_token_id": 0, "hidden_size": 8, "layers": 1, "heads": 2, "labels": ["A", "B", "C"]}
    student = compact_student(made, torch.arange(9), task="sequence", **options)
    assert student.eval()(torch.ones(2, 4, dtype=torch.long)).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="compact_student: task is 'ner', expected one of"):
        compact_student(made, torch.arange(9), task="ner", **options)
