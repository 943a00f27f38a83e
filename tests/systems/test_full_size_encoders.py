"""LightMBERT on mBERT's size and BiStil on XLM-R base's, from random weights: a few steps, and what a run would take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.initialization import no_init_weights

from fastdistil.configs.lightmbert import LightmbertConfig
from fastdistil.models.trim import trim_model_
from fastdistil.recipes import bistil
from fastdistil.recipes.terms import Distillation
from fastdistil.systems import lightmbert
from fastdistil.systems.plan import StagePlan, cost
from fastdistil.train import Options, train


def _random(kind: Any, config: Any) -> Any:
    with no_init_weights():
        model = kind(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter.fill_(float(name.endswith("weight")))
            else:
                parameter.uniform_(-0.03, 0.03, generator=generator)
    return model.eval()


def _rows(size: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"ids": torch.randint(5, size, (24,), generator=generator)} for _ in range(2)]


def _collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = torch.stack([row["ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "languages": torch.zeros(len(ids)).long()}


def _falls(objective: Any, size: int) -> None:
    history = train(objective, _rows(size), _collate, Options(3, lr=1e-4, batch_size=2, warmup=0))
    first, *_, last = [sum(x for name, x in r.items() if name not in ("step", "lr")) for r in history]
    assert last < first


@pytest.mark.filterwarnings("ignore:train. no term reaches")
def test_lightmbert_at_mbert_s_size(tmp_path: Path) -> None:
    teacher = _random(transformers.BertModel, transformers.BertConfig(vocab_size=119_547, max_position_embeddings=512))
    config = LightmbertConfig(teacher="mbert", text=("x",), out=tmp_path)
    student = lightmbert.student_of(config, teacher)
    sizes, theirs = cost(student), cost(teacher)
    assert theirs.parameters == 177_853_440
    assert sizes.parameters - sizes.trained == 119_547 * 768, "word embeddings"
    stage = StagePlan("mBERT", 1, 8 * 512, 8 * 512, 512, sizes, theirs)
    whole = StagePlan("mBERT", 1, 8 * 512, 8 * 512, 512, cost(_trained(student)), theirs)
    assert (whole.bytes - stage.bytes) / 2**30 == pytest.approx(1.03, abs=0.01), "12 bytes an entry"
    assert 1e12 < stage.operations < 2e13
    student = lightmbert.student_of(config, teacher)
    _falls(lightmbert.objectives(config, student, teacher)["distance"], 119_547)


def _trained(model: Any) -> Any:
    model.get_input_embeddings().weight.requires_grad_(True)
    return model


@pytest.mark.filterwarnings("ignore:train. no term reaches")
def test_bistil_at_xlm_r_base_s_size() -> None:
    config = transformers.XLMRobertaConfig(
        vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1
    )
    teacher = _random(transformers.XLMRobertaModel, config)
    assert cost(teacher).parameters == 278_043_648
    rows = torch.cat([torch.arange(4), torch.arange(4, 250_002, 10)])
    table = teacher.get_input_embeddings().weight
    trim_model_(teacher, rows)
    assert torch.equal(teacher.get_input_embeddings().weight, table[rows])
    student = bistil.student(teacher, 2)
    assert cost(student).parameters == 278_043_648 - (250_002 - len(rows)) * 768 - 6 * 7_087_872
    _falls(Distillation(student, bistil.terms(student, teacher), teacher), len(rows))
