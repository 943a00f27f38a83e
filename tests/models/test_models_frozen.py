"""Frozen word embeddings: no gradient, no optimizer state, and the same after saving, loading and another stage."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from text_cases import bert, wordpiece

from fastdistil.models.frozen import freeze_word_embeddings, restore_frozen
from fastdistil.recipes import terms
from fastdistil.recipes.stages import Stage, run_stages
from fastdistil.systems.models import new_classifier
from fastdistil.train import Options, adamw


def test_frozen_embeddings_stay_through_saving_loading_and_another_stage(tmp_path: Path) -> None:
    tokenizer = wordpiece()
    model = bert(tokenizer)
    freeze_word_embeddings(model)
    options = Options(2, lr=0.1)
    table = model.get_input_embeddings().weight
    held = [p for group in adamw(model, options).param_groups for p in group["params"]]
    assert all(p is not table for p in held), "no optimizer state"
    model.save_pretrained(tmp_path)
    for kind in (transformers.BertForMaskedLM, transformers.AutoModelForTokenClassification, transformers.AutoModel):
        loaded = kind.from_pretrained(tmp_path)
        assert loaded.get_input_embeddings().weight.requires_grad, "transformers does not know"
        assert restore_frozen(loaded) and not loaded.get_input_embeddings().weight.requires_grad
    tagger = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path)
    restore_frozen(tagger)
    before = tagger.get_input_embeddings().weight.clone()
    rows = [{"ids": [2, 5, 6, 3], "labels": [0, 1, 1, 0]}]

    def collate(found: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["ids"] for row in found])
        labels = torch.tensor([row["labels"] for row in found])
        ones = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": ones, "labels": labels, "labelled_words": ones.float()}

    run_stages(tagger, [Stage("labels", [terms.labels()], rows, options)], collate)
    assert torch.equal(tagger.get_input_embeddings().weight, before)
    assert tagger.get_input_embeddings().weight.grad is None
    assert not restore_frozen(bert(tokenizer))
    made, _ = new_classifier(str(tmp_path), "tokens", ["O", "B-X", "I-X"], 0)
    assert not made.get_input_embeddings().weight.requires_grad, "so do the commands load it"
