"""Of terms, the loop, stages and trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from fastdistil.integrations.transformers import DistillationArguments, DistillationTrainer
from fastdistil.integrations.trl import generalized_jsd_loss
from fastdistil.recipes import bistil, lightmbert, terms, xtremedistil
from fastdistil.recipes.stages import Stage, run_stages
from fastdistil.train import Options, train
from mistakes import Mistake
from mistakes.models import encoder, masked, other, tagger

ONES = torch.ones(1, 5, dtype=torch.long)
BATCH = {"input_ids": torch.arange(5)[None], "attention_mask": ONES}
WORDS = {**BATCH, "words": ONES, "labelled_words": ONES, "labels": ONES}
OPTIONS = Options(steps=1, batch_size=1, warmup=0)
LOGITS = torch.linspace(-1, 1, 70).view(2, 5, 7)


class _Mean(nn.Module):
    """The smallest objective there is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def counts(self, batch: Any) -> Any:
        return {"mean": batch["x"].sum()}

    def forward(self, batch: Any, items: Any) -> Any:
        return {"mean": self.weight.sum() * batch["x"].sum() / items["mean"]}


def _collate(rows: list[Any]) -> Any:
    return {"x": torch.tensor(rows, dtype=torch.float32)}


def _train(
    objective: Any = None, data: Any = (1, 2), collate: Any = _collate, options: Any = OPTIONS, **more: Any
) -> Any:
    return train(_Mean() if objective is None else objective, data, collate, options, **more)


def _step(chosen: Any, batch: Any, student: Any = None, teacher: Any = None) -> Any:
    """One forward pass of the terms."""
    objective = terms.Distillation(tagger() if student is None else student, chosen, teacher)
    return objective(batch, objective.counts(batch))


def _stages(*stages: Any, **more: Any) -> Any:
    return run_stages(tagger(), stages, lambda rows: {**WORDS, "teacher_logits": LOGITS[:1, :, :2]}, **more)


def _stage(name: str = "logits", chosen: Any = None, **more: Any) -> Stage:
    return Stage(name, [terms.logits()] if chosen is None else chosen, [1], OPTIONS, **more)


def _trainer(folder: Path, student: Any = None, args: Any = None, **more: Any) -> Any:
    args = DistillationArguments(str(folder), use_cpu=True, report_to="none") if args is None else args
    return DistillationTrainer(tagger() if student is None else student, args, train_dataset=[{}], **more)


def _other_options(folder: Path) -> None:
    _train(out=folder)
    _train(out=folder, options=Options(steps=2, batch_size=2, warmup=0))


MISTAKES = [
    # terms
    Mistake("a-kind-of-map", lambda _: terms.attention(1, 1, kind="mse"), "kind", "'mse'", "'prob_mse'"),
    Mistake("a-relation-of-nothing", lambda _: terms.relation(1, 1, of="query", heads=2), "of", "'query'", "'queries'"),
    Mistake("a-term-of-scale-0", lambda _: terms.labels(scale=0.0), "scale", "0.0", "above 0"),
    Mistake("a-divergence-of-terms", lambda _: terms.logits(divergence="kl"), "divergence", "'kl'", "'forward_kl'"),
    Mistake("a-temperature-of-terms", lambda _: terms.logits(temperature=0.0), "temperature", "0.0", "more than 0"),
    Mistake("a-temperature-with-mse", lambda _: terms.logits(divergence="mse", temperature=2.0), "temperature", "2.0", "expected 1"),
    Mistake("a-kind-of-hidden-term", lambda _: terms.hidden(1, 1, kind="l2"), "kind", "'l2'", "'mse'"),
    Mistake("a-layer-in-fractions", lambda _: terms.hidden(1.5, 1), "student_layer", "1.5", "whole number"),
    Mistake("no-terms", lambda _: _step([], BATCH), "terms", "[]", "at least one"),
    Mistake("one-term-without-a-list", lambda _: _step(terms.logits(), BATCH), "terms", "LogitTerm", "list"),
    Mistake("a-term-twice", lambda _: _step([terms.logits(), terms.logits()], BATCH), "terms", "logits", "each once"),
    Mistake("a-function-for-a-term", lambda _: _step([terms.logits], BATCH), "terms", "function", "terms.logits()"),
    Mistake("a-teachers-layer-that-is-none", lambda _: _step([terms.hidden(1, 12)], BATCH, teacher=encoder()), "teacher", "12", "0 to 2", "-1"),
    Mistake("maps-without-a-teacher", lambda _: _step([terms.attention(1, 1)], BATCH), "prob_mse_1_1", "none came", "teacher that runs along"),
    Mistake("logits-without-a-teacher", lambda _: _step([terms.logits()], WORDS), "teacher_logits", "no", "teacher"),
    Mistake("a-student-without-a-head", lambda _: _step([terms.logits()], {**WORDS, "teacher_logits": LOGITS}, encoder()), "student", "BertModel", "logits", "head"),
    Mistake("a-teacher-without-logits", lambda _: _step([terms.logits()], WORDS, masked(), encoder()), "teacher", "BertModel", "logits", "head"),
    Mistake("a-batch-without-words", lambda _: _step([terms.logits()], BATCH, teacher=tagger()), "words", "input_ids, attention_mask", "expected", "weight"),
    Mistake("a-batch-without-a-mask", lambda _: _step([terms.hidden(1, 1)], {"input_ids": BATCH["input_ids"]}, teacher=tagger()), "attention_mask", "input_ids", "batch"),
    Mistake("a-batch-without-input-ids", lambda _: _step([terms.hidden(1, 1)], {"attention_mask": ONES}, teacher=tagger()), "input_ids", "attention_mask", "batch"),
    Mistake("a-batch-without-labels", lambda _: _step([terms.labels()], {**BATCH, "labelled_words": ONES}), "labels", "input_ids", "batch"),
    Mistake("labels-beyond-the-classes", lambda _: _step([terms.labels()], {**WORDS, "labels": ONES * 2}), "labels", "2", "0 to 1"),
    Mistake("labels-of-another-shape", lambda _: _step([terms.labels()], {**WORDS, "labels": ONES[:, 1:]}), "labels", "(1, 4)", "(1, 5)"),
    Mistake("a-teacher-of-other-classes", lambda _: _step([terms.logits()], WORDS, teacher=masked()), "teacher_logits", "11", "2"),
    # the loop
    Mistake("no-steps", lambda _: Options(steps=0), "steps", "0", "at least 1"),
    Mistake("steps-in-fractions", lambda _: Options(steps=2.5), "steps", "2.5", "whole number"),
    Mistake("steps-in-words", lambda _: Options(steps="100"), "steps", "'100'", "whole number"),
    Mistake("warmup-as-a-share", lambda _: Options(steps=100, warmup=0.1), "warmup", "0.1", "whole number", "steps"),
    Mistake("a-learning-rate-below-0", lambda _: Options(steps=1, lr=-1e-3), "lr", "-0.001", "at least 0"),
    Mistake("a-schedule", lambda _: Options(steps=1, schedule="cosin"), "schedule", "'cosin'", "'cosine'"),
    Mistake("a-precision", lambda _: Options(steps=1, precision="half"), "precision", "'half'", "'bf16'"),
    Mistake("patience-without-a-metric", lambda _: Options(steps=1, patience=3), "patience", "metric = None", "both"),
    Mistake("no-data", lambda _: _train(data=[]), "data", "empty", "at least one"),
    Mistake("a-data-loader", lambda _: _train(data=torch.utils.data.DataLoader([1, 2])), "data", "DataLoader", "sequence", "dataset"),
    Mistake("a-generator-of-data", lambda _: _train(data=(x for x in (1, 2))), "data", "generator", "sequence", "list"),
    Mistake("no-collate", lambda _: _train(collate=None), "collate", "None", "function"),
    Mistake("a-collate-of-tuples", lambda _: _train(collate=lambda rows: (rows,)), "collate", "tuple", "names to tensors"),
    Mistake("options-as-a-dictionary", lambda _: _train(options={"steps": 1}), "options", "dict", "Options"),
    Mistake("a-model-for-an-objective", lambda _: _train(nn.Linear(1, 1)), "objective", "Linear", "counts", "Distillation"),
    Mistake("a-frozen-objective", lambda _: _train(_Mean().requires_grad_(False)), "objective", "no parameter", "requires grad"),
    Mistake("an-optimizer-that-is-made", lambda _: _train(optimizer=torch.optim.SGD(_Mean().parameters(), lr=1.0)), "optimizer", "SGD", "function", "lambda"),
    Mistake("a-metric-that-is-none", lambda _: _train(options=Options(steps=1, batch_size=1, metric="f1"), evaluate=lambda _: {"acc": 1.0}), "metric", "'f1'", "acc"),
    Mistake("a-folder-of-other-options", lambda x: _other_options(x), "steps", "1", "2", "another folder"),
    Mistake("a-file-for-a-folder", lambda x: _train(out=_touched(x)), "out", "a file", "folder"),
    # stages
    Mistake("stages-of-one-name", lambda _: _stages(_stage(), _stage()), "stages", "'logits', 'logits'", "each once"),
    Mistake("freezing-what-is-not-there", lambda _: _stages(_stage(frozen=("embedings",))), "frozen", "'embedings'", "part of no parameter's name", "embeddings"),
    Mistake("a-string-of-what-is-frozen", lambda _: _stages(_stage(frozen="embeddings")), "frozen", "str", "tuple"),
    Mistake("drawing-what-is-not-there", lambda _: _stages(_stage(fresh=("clasifier",))), "fresh", "'clasifier'", "part of no parameter's name", "classifier"),
    # recipes
    Mistake("a-teacher-of-5-blocks-by-name", lambda _: lightmbert.student("bert-base-multilingual-cased"), "teacher", "str", "transformers model", "from_pretrained"),
    Mistake("more-blocks-than-the-teacher-has", lambda _: lightmbert.student(encoder(), blocks=3), "blocks", "3", "2"),
    Mistake("a-reduction-of-0", lambda _: bistil.student(encoder(), reduction=0), "reduction", "0", "divisor"),
    Mistake("a-reduction-that-does-not-divide", lambda _: bistil.student(encoder(), reduction=3), "reduction", "3", "2"),
    Mistake("a-share-of-everything", lambda _: xtremedistil.split([1, 2, 3], share=1.5), "share", "1.5", "0"),
    # trainers
    Mistake("plain-training-arguments", lambda x: _trainer(x, args=TrainingArguments(str(x), use_cpu=True, report_to="none")), "args", "TrainingArguments", "DistillationArguments"),
    Mistake("a-trainer-of-one-term", lambda x: _trainer(x, teacher=tagger(), terms=terms.logits()), "terms", "LogitTerm", "list"),
    Mistake("a-trainer-of-an-unknown-term", lambda x: _trainer(x, teacher=tagger(), terms=[{"term": "logit"}]), "terms", "'logit'", "logits"),
    Mistake("a-trainer-of-an-unknown-option", lambda x: _trainer(x, teacher=tagger(), terms=[{"term": "logits", "temp": 2}]), "terms", "'temp'", "expected", "temperature", theirs=True),
    Mistake("a-trainers-teacher-by-name", lambda x: _trainer(x, teacher="bert-base-cased"), "teacher", "'bert-base-cased'", "model"),
    Mistake("a-trainers-student-by-name", lambda x: _trainer(x, student="bert-base-cased", teacher=tagger()), "model", "str", "transformers model"),
    Mistake("a-trainers-layer-that-is-none", lambda x: _trainer(x, teacher=other(), terms=[terms.hidden(1, 9)]), "teacher", "9", "0 to 2"),
    Mistake("a-trainers-teacher-of-other-classes", lambda x: _trainer(x, teacher=other(3)), "teacher", "3 labels", "2 labels"),
    Mistake("probabilities-for-trl", lambda _: generalized_jsd_loss(LOGITS.softmax(-1), LOGITS.softmax(-1), logits_are_probs=True), "logits_are_probs", "True", "False", "logits"),
    Mistake("a-beta-of-trl", lambda _: generalized_jsd_loss(LOGITS, LOGITS, beta=2.0), "beta", "2.0", "<= 1"),
]  # fmt: skip


def _touched(folder: Path) -> Path:
    (folder / "out").touch()
    return folder / "out"
