"""LightMBERT and BiStil whole, on tiny models: from files of text to a student that transformers opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from text_cases import SENTENCES, bert, sentencepiece, wordpiece, xlmr

from fastdistil.configs.bistil import BistilConfig
from fastdistil.configs.lightmbert import LightmbertConfig
from fastdistil.models.frozen import restore_frozen
from fastdistil.models.trim import trim_model_
from fastdistil.sparse import SparseDelta
from fastdistil.systems import bistil, lightmbert, measure, report


def _bare(tokenizer: Any) -> Any:
    """A BertModel without a pooler, as encoders of sentences are saved."""
    model = bert(tokenizer, "BertModel")
    model.pooler = None
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of two languages and three teachers: BERT with an MLM head, BERT bare, XLM-R with one."""
    out = tmp_path_factory.mktemp("systems")
    (out / "fr.txt").write_text("\n".join(SENTENCES[:160]), encoding="utf-8")
    (out / "sw.txt").write_text("\n".join(SENTENCES[160:260]), encoding="utf-8")
    for name, model, tokenizer in (
        ("mlm", bert, wordpiece()), ("bare", _bare, wordpiece()), ("xlmr", xlmr, sentencepiece()),
    ):  # fmt: skip
        model(tokenizer).save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    return out


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures and latencies in one test alone."""
    if "[mlm]" not in request.node.name:
        monkeypatch.setattr(report, "_plot_curves", lambda *_: None)
        monkeypatch.setattr(measure, "latency", lambda models: {})


def _options(folder: Path, teacher: str, out: Path, **changed: Any) -> dict[str, Any]:
    given = {"max_length": 24, "held_out": 0.1, "batch_size": 4, "lr": 5e-3, "steps": 12, "cache": folder / "cache"}
    given |= {"evaluate_every": 12, "held_out_blocks": 4}
    texts = (str(folder / "fr.txt"), f"sw={folder / 'sw.txt'}")
    return {"teacher": str(folder / teacher), "text": texts, "out": out, **given, **changed}


@pytest.mark.parametrize("teacher", ["mlm", "bare", "xlmr"])
def test_lightmbert_from_text_to_a_student_that_loads(folder: Path, tmp_path: Path, teacher: str) -> None:
    out = tmp_path / "run"
    config = LightmbertConfig(**_options(folder, teacher, out, maps="score_mse" if teacher == "xlmr" else "prob_mse"))
    found = lightmbert.run(config)
    assert json.loads((out / "metrics.json").read_text(encoding="utf-8")) == json.loads(json.dumps(found))
    held = found["held_out"]
    assert held[0]["step"] == 0 and held[-1]["step"] == 12
    assert held[-1]["distance"] < 0.9 * held[0]["distance"]
    assert ("mlm" in held[0]) is (teacher != "bare")
    student = transformers.AutoModel.from_pretrained(out / "student")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "student")
    theirs = transformers.AutoModel.from_pretrained(folder / teacher)
    assert student.config.num_hidden_layers == 2
    assert torch.equal(student.get_input_embeddings().weight, theirs.get_input_embeddings().weight), "frozen"
    assert student(**tokenizer("abc dexy", return_tensors="pt")).last_hidden_state.shape[-1] == 16
    weights = load_file(out / "student" / "model.safetensors")
    assert teacher != "bare" or not any("pooler" in name for name in weights), "none was saved, none is drawn"
    assert restore_frozen(student) and not student.get_input_embeddings().weight.requires_grad
    assert not restore_frozen(theirs)
    assert {path.name for path in out.iterdir()} >= {"student", "report.md", "config.yaml"}
    assert (out / "curves.png").exists() is (teacher == "mlm")
    assert not (out / "checkpoints").exists() and "fr" in found["data"]
    again = LightmbertConfig(**_options(folder, teacher, out, maps=config.maps, resume=True))
    assert lightmbert.run(again) == json.loads((out / "metrics.json").read_text(encoding="utf-8"))


def test_an_interrupted_run_continues_to_the_same_student(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"epochs": 1.0, "steps": 8, "save_every": 3, "evaluate_every": 4, "smoothing": 0.5}
    for system, kind, more in (
        (lightmbert, LightmbertConfig, options),
        (bistil, BistilConfig, {**options, "smoothing": None}),
    ):
        given = {name: x for name, x in more.items() if x is not None}
        name = kind.__name__
        system.run(kind(**_options(folder, "mlm", whole / name, **given)))
        batch, calls = system.train.__globals__["send_to_device"], []

        def stop(x: Any, device: Any, batch: Any = batch, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == 6:
                raise RuntimeError("killed")
            return batch(x, device)

        monkeypatch.setitem(system.train.__globals__, "send_to_device", stop)
        with pytest.raises(RuntimeError, match="killed"):
            system.run(kind(**_options(folder, "mlm", parts / name, **given)))
        monkeypatch.setitem(system.train.__globals__, "send_to_device", batch)
        with pytest.raises(ValueError, match="holds this run already"):
            system.run(kind(**_options(folder, "mlm", parts / name, **given)))
        system.run(kind(**_options(folder, "mlm", parts / name, resume=True, **given)))
        one, two = ((x / name / "student" / "model.safetensors").read_bytes() for x in (whole, parts))
        assert one == two, name


def test_the_baseline_learns_from_masked_pieces_alone(folder: Path, tmp_path: Path) -> None:
    options = _options(folder, "mlm", tmp_path / "run", learn_from="mlm", steps=20, freeze_embeddings=False)
    found = lightmbert.run(LightmbertConfig(**options))
    assert set(found["curves"]["training"]) == {"labels"}
    assert found["held_out"][-1]["mlm"] < found["held_out"][0]["mlm"]
    table = transformers.AutoModel.from_pretrained(tmp_path / "run" / "student").get_input_embeddings().weight
    theirs = transformers.AutoModel.from_pretrained(folder / "mlm").get_input_embeddings().weight
    assert not torch.equal(table, theirs)
    with pytest.raises(ValueError, match="BertModel without a head for masked pieces"):
        lightmbert.run(LightmbertConfig(**_options(folder, "bare", tmp_path / "b", learn_from="mlm")))


@pytest.mark.parametrize("teacher", ["mlm", "bare", "xlmr"])
def test_bistil_trims_the_vocabulary_and_its_student_loads(folder: Path, tmp_path: Path, teacher: str) -> None:
    out = tmp_path / "run"
    # Of the piece "dexy" in one language it keeps what the other language has.
    found = bistil.run(BistilConfig(**_options(folder, teacher, out, threshold=2e-3)))
    student = transformers.AutoModel.from_pretrained(out / "student")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "student")
    old = transformers.AutoTokenizer.from_pretrained(folder / teacher)
    ids = bistil.teacher_ids(out / "student", len(tokenizer))
    assert student.config.vocab_size == len(tokenizer) == len(ids) == found["vocabulary"]["student"] < len(old)
    assert tokenizer.convert_ids_to_tokens(list(range(len(ids)))) == old.convert_ids_to_tokens(ids.tolist())
    assert student.config.num_hidden_layers == 2 and student.config.hidden_dropout_prob == 0
    held = found["held_out"]
    assert held[-1]["distance"] < held[0]["distance"]
    assert set(found["segmentation"]) == {"fr", "sw"} and found["segmentation"]["fr"]["words"] > 400
    assert not torch.equal(student.get_input_embeddings().weight, _table(folder / teacher)[ids]), "it trains"


def _table(folder: Path) -> torch.Tensor:
    return transformers.AutoModel.from_pretrained(folder).get_input_embeddings().weight


def test_a_language_s_difference_is_there_in_its_batches_alone(folder: Path, tmp_path: Path) -> None:
    base = transformers.BertForMaskedLM.from_pretrained(folder / "mlm")
    tuned = transformers.BertForMaskedLM.from_pretrained(folder / "mlm")
    names = ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.3.output.dense.weight")
    with torch.no_grad():
        for name in names:
            tuned.get_parameter(name)[::2] += 0.5
    mask = {n: (tuned.get_parameter(n) != base.get_parameter(n)).flatten().nonzero()[:, 0] for n in names}
    SparseDelta.from_params(tuned, base, mask).save(tmp_path / "sw.safetensors")
    config = BistilConfig(
        **_options(folder, "mlm", tmp_path / "run", language_delta=(f"sw={tmp_path / 'sw.safetensors'}",), steps=2)
    )
    tokenizer = wordpiece()
    deltas = bistil.load_deltas(config, ["fr", "sw"], base)
    rows = torch.arange(5, len(tokenizer) - 1)
    trimmed = {k: bistil.trim_delta(x, rows, len(tokenizer)) for k, x in deltas.items()}
    for model in (base, tuned):
        trim_model_(model, rows)
    from fastdistil.recipes import bistil as recipe

    student = recipe.student(base, 2)
    objective = bistil.LanguageDistillation(student, recipe.terms(student, base), base, trimmed)
    ids = torch.randint(0, len(rows), (2, 12), generator=torch.Generator().manual_seed(3))
    before = {name: p.clone() for name, p in base.named_parameters()}
    for language, teacher in ((0, base), (1, tuned)):
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "languages": torch.tensor([language] * 2)}
        plain = recipe_loss(student, teacher, batch)
        items = objective.counts(batch)
        ours = objective(batch, items)
        assert all(torch.allclose(ours[name], plain[name]) for name in plain)
        assert all(torch.equal(before[name], p) for name, p in base.named_parameters()), "bit for bit"
    assert (
        objective.fingerprint()
        != bistil.LanguageDistillation(student, recipe.terms(student, base), base, {}).fingerprint()
    )
    bistil.run(config)
    with pytest.raises(ValueError, match="language_delta names 'xx', text has fr, sw"):
        bistil.run(BistilConfig(**_options(folder, "mlm", tmp_path / "b", language_delta=("xx=y",))))


def recipe_loss(student: Any, teacher: Any, batch: Any) -> Any:
    from fastdistil.recipes import bistil as recipe
    from fastdistil.recipes.terms import Distillation

    plain = Distillation(student, recipe.terms(student, teacher), teacher)
    return plain(batch, plain.counts(batch))


def test_a_dry_run_plans_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    for system, kind in ((lightmbert, LightmbertConfig), (bistil, BistilConfig)):
        found = system.run(kind(**_options(folder, "mlm", tmp_path / "run", dry_run=True, steps=None)))
        (stage,) = found["stages"]
        assert stage["steps"] > 1 and stage["tokens_per_step"] == 4 * 24 and stage["seconds"] > 0
        assert found["data"]["fr"].startswith("160 documents")
        assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_length is 100, expected"):
        lightmbert.run(LightmbertConfig(**_options(folder, "mlm", tmp_path / "a", max_length=100)))
    with pytest.raises(ValueError, match="reduction is 3, expected a divisor"):
        bistil.run(BistilConfig(**_options(folder, "mlm", tmp_path / "b", reduction=3)))
    with pytest.raises(ValueError, match="text is empty"):
        LightmbertConfig(teacher="x", text=(), out=tmp_path)
    with pytest.raises(ValueError, match="language_delta holds 'fr'"):
        BistilConfig(teacher="x", text=("a",), out=tmp_path, language_delta=("fr",))
