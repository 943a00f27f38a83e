"""The demo's encoder, head and report, and the whole run on a tiny teacher, without a network."""

import json

import e5s1
import pytest
import torch
from demo_cases import corpus, sentences, tokenizer
from rich.console import Console
from transformers import AutoModel, AutoTokenizer

from fastdistil.demo import corpora, material, report, run, sparse, tagger, teacher
from fastdistil.demo.encode import IGNORE, WordEncoder, pad
from fastdistil.models.vocab import trim_vocabulary


def load(data):
    return teacher.read_teacher(data, "tiny.bin")


# ---- pieces, head, report


def test_encoder_places_words():
    made = tokenizer(load(e5s1.write()[0]))
    sentence = corpora.Sentence(("lambalar", "ana", "."), (True, True, False), (0, 1, 11), False)
    encoded = WordEncoder(made).sentence(sentence, 48)
    assert encoded.ids == made("lambalar ana.").input_ids
    assert (encoded.first, encoded.tags) == ([1, 3, 4], [0, 1, 11])
    cut = WordEncoder(made).sentence(sentence, 5)  # bos, two pieces, one piece, eos
    assert (len(cut.ids), cut.tags) == (5, [0, 1])
    batch = pad([encoded, cut], made.pad_token_id)
    assert batch["labels"].tolist() == [[IGNORE, 0, IGNORE, 1, 11, IGNORE], [IGNORE, 0, IGNORE, 1, IGNORE, IGNORE]]
    assert batch["attention_mask"].sum(1).tolist() == [6, 5]
    assert batch["input_ids"][1, 5] == made.pad_token_id


def test_head_learns_whitens_and_counts():
    draw = torch.Generator().manual_seed(0)
    made = tokenizer(load(e5s1.write()[0]))
    rows = [WordEncoder(made).sentence(s, 48) for s in sentences(40, 0)]
    mix = torch.randn(160, 160, generator=draw) + 30  # one large common direction, as e5's states have
    states = [torch.nn.functional.one_hot(torch.tensor(r.ids), 160).float() @ mix for r in rows]
    states = [s + 0.1 * torch.randn(s.shape, generator=draw) for s in states]
    head = tagger.fit_head(states, rows, len(corpora.TAGS))
    assert tagger.accuracy([head.logits(s) for s in states], rows) > 99
    targets = head.targets(torch.cat(states))
    assert targets.shape[1] == tagger.TARGET_SIZE
    torch.testing.assert_close(targets.T @ targets / len(targets), torch.eye(tagger.TARGET_SIZE), atol=0.03, rtol=0)
    wrong = [torch.zeros(len(r.ids), 13) for r in rows]  # argmax 0: right only where the tag is 0
    share = 100 * sum(t == 0 for r in rows for t in r.tags) / sum(len(r.tags) for r in rows)
    assert tagger.accuracy(wrong, rows) == pytest.approx(share)


def test_summary_and_gain():
    seeds = [
        {"teacher": {"A": 90.0, "B": 80.0}, "arms": {"one": {"accuracy": {"A": 60.0, "B": 50.0}}, "two": {"accuracy": {"A": 70.0, "B": 56.0}}}},
        {"teacher": {"A": 92.0, "B": 80.0}, "arms": {"one": {"accuracy": {"A": 62.0, "B": 50.0}}, "two": {"accuracy": {"A": 72.0, "B": 58.0}}}},
    ]  # fmt: skip
    summary = report.summarise(seeds)
    assert summary["two"]["mean"] == {"mean": 64.0, "low": 63.0, "high": 65.0}
    table = report.accuracy_table(summary, several=True)
    assert table[0] == ["accuracy %", "A", "B", "mean", "gain"]
    assert table[1] == ["teacher", "91.0 (90.0 to 92.0)", "80.0 (80.0 to 80.0)", "85.5 (85.0 to 86.0)", ""]
    assert table[3][-1] == "+8.5"


# ---- the whole run on a tiny teacher


@pytest.fixture
def tiny(monkeypatch):
    data, _ = e5s1.write()
    parsed = load(data)
    made = tokenizer(parsed)
    texts = [corpus("Turkish"), corpus("Greek")]
    encoder = WordEncoder(made)
    used = {
        i for c in texts for s in c.train for w, sp in zip(s.words, s.spaces, strict=True) for i in encoder.word(w, sp)
    }
    small, rows = trim_vocabulary(made, used)
    source = material.Source(teacher.build_model(parsed), made, len(data), texts, small, rows)
    monkeypatch.setattr(run, "load_source", lambda cache, say: source)
    monkeypatch.setattr(sparse, "load_source", lambda cache, say: source)
    monkeypatch.setattr("fastdistil.demo.measure.LATENCY_ROUNDS", {1: 1, 4: 1})
    monkeypatch.setattr("fastdistil.demo.measure.LOSS_ROUNDS", 2)
    return source


SETTINGS = material.Settings(labelled=6, unlabelled=12, test=10, steps=20, batch_size=6, hidden_size=16)
QUIET = Console(quiet=True)


def accuracies(metrics):
    return {s["seed"]: {a: (v["accuracy"], v["loss"]) for a, v in s["arms"].items()} for s in metrics["seeds"]}


def check_files(folder, source):
    """The encoder and texts that the demo leaves for the commands."""
    model, tokens = AutoModel.from_pretrained(folder / "encoder"), AutoTokenizer.from_pretrained(folder / "encoder")
    kept = {*source.rows.tolist(), source.tokenizer.convert_tokens_to_ids("<mask>")}
    assert len(tokens) == len(kept) == model.config.vocab_size
    assert tokens.mask_token == "<mask>" and tokens("ana <mask>").input_ids[-2] == len(kept) - 1
    ids = torch.arange(5)[None]
    both = model(input_ids=ids).last_hidden_state, source.model(input_ids=source.rows[ids]).last_hidden_state
    assert torch.equal(*both)
    blocks = (folder / "tr.train.tsv").read_text().strip().split("\n\n")
    assert len(blocks) == len(source.corpora[0].train)
    held_out = {s.words for s in source.corpora[0].test}
    assert not {tuple(line.split("\t")[0] for line in b.splitlines()) for b in blocks} & held_out
    assert (folder / "el.txt").exists() and not list(folder.glob("*partial*"))


def test_run_demo(tiny, tmp_path):
    metrics = run.run_demo(tmp_path / "a", seed=5, seeds=2, settings=SETTINGS, console=QUIET)
    assert metrics == json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert list(metrics["summary"]) == [
        "teacher",
        "labels only",
        "logits, labelled text",
        "logits, all text",
        "whole schedule",
    ]
    for name in ("report.md", "loss.png", "accuracy.png", "student/model.safetensors", "student/tokenizer.json"):
        assert (tmp_path / "a" / name).stat().st_size > 0
    assert not list((tmp_path / "a").glob("seed-*/*/[0-9]-*")), "checkpoints of finished students are left"
    check_files(tmp_path / "a" / "files", tiny)
    steps = {
        a: sum(len(next(iter(t.values()))) for t in v["loss"].values()) for a, v in metrics["seeds"][0]["arms"].items()
    }
    assert set(steps.values()) == {SETTINGS.steps}
    assert metrics["summary"]["whole schedule"]["mean"]["mean"] > 100 / 6, "no better than guessing one of six words"
    # The same seed gives the same numbers, another one does not.
    again = run.run_demo(tmp_path / "b", seed=6, settings=SETTINGS, console=QUIET)
    assert accuracies(again)[6] == accuracies(metrics)[6]
    assert accuracies(metrics)[5] != accuracies(metrics)[6]
    with pytest.raises(ValueError, match="run_demo: out holds a demo of other settings"):
        run.run_demo(tmp_path / "b", settings=material.Settings(), console=QUIET)


def test_interrupted_demo_continues(tiny, tmp_path, monkeypatch):
    whole = run.run_demo(tmp_path / "whole", settings=SETTINGS, console=QUIET)
    collate, calls = material.Material.collate, [0]

    def cut(self, examples):
        calls[0] += 1
        if calls[0] == 45:  # in the third student
            raise KeyboardInterrupt
        return collate(self, examples)

    monkeypatch.setattr(material.Material, "collate", cut)
    with pytest.raises(KeyboardInterrupt):
        run.run_demo(tmp_path / "cut", settings=SETTINGS, console=QUIET)
    assert len(list((tmp_path / "cut").glob("seed-0/*/result.json"))) == 2
    before = calls[0]
    continued = run.run_demo(tmp_path / "cut", settings=SETTINGS, console=QUIET)
    assert accuracies(continued) == accuracies(whole)
    assert calls[0] - before < 50, "finished students were trained again"


def test_seeds_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="run_demo: seeds is 0, expected at least 1"):
        run.run_demo(tmp_path, seeds=0)


def test_sparse_demo_and_its_interruptions(tiny, tmp_path, monkeypatch):
    metrics = sparse.run_sparse(tmp_path / "whole", seed=5, settings=SETTINGS, console=QUIET)
    assert metrics == json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert list(metrics["summary"]) == ["teacher", sparse.ALONE, sparse.RANDOM, sparse.TICKET, sparse.WHOLE]
    arms = metrics["seeds"][0]["arms"]
    student = tiny.new_student(5, SETTINGS.hidden_size)
    body = sum(p.numel() for n, p in student.named_parameters() if sparse.HEAD not in n)
    assert [arms[a]["entries"] for a in (sparse.ALONE, sparse.RANDOM, sparse.TICKET)] == [0, *[round(0.08 * body)] * 2]
    assert "8% of the body" in (tmp_path / "whole" / "report.md").read_text()
    assert not list((tmp_path / "whole").glob("seed-5/*/full")), "checkpoints are left"

    collate, calls = material.Material.collate, [0]

    def cut(self, examples):
        calls[0] += 1
        if calls[0] in (30, 75, 95):  # in the first tuning; in that of everything; in the sparse one behind it
            raise KeyboardInterrupt
        return collate(self, examples)

    monkeypatch.setattr(material.Material, "collate", cut)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            sparse.run_sparse(tmp_path / "cut", seed=5, settings=SETTINGS, console=QUIET)
    assert (
        sparse.run_sparse(tmp_path / "cut", seed=5, settings=SETTINGS, console=QUIET)["summary"] == metrics["summary"]
    )
    with pytest.raises(ValueError, match="run_sparse: seeds is 0"):
        sparse.run_sparse(tmp_path, seeds=0)
