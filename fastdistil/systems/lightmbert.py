"""LightMBERT (Jiao et al. 2021), whole: raw text of many languages and a teacher to a student of its bottom blocks.

    lightmbert.run(LightmbertConfig(teacher="mbert/", text=("fr.txt", "sw.txt"), out=Path("runs/light")))

The student is saved in `out`/student, with the teacher's head where it has one. Held-out text is read before the
training, during it and behind it: "distance" is the recipe's loss, "mlm" the cross entropy of masked pieces where there
is a head for it; both for the baseline, too, which learns from the masked pieces alone.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from torch import nn

from fastdistil.configs.lightmbert import LightmbertConfig
from fastdistil.data.blocks import Mixture
from fastdistil.models.frozen import freeze_word_embeddings
from fastdistil.recipes import lightmbert as recipe
from fastdistil.recipes.terms import Distillation, labels
from fastdistil.systems import plan as plans
from fastdistil.systems.encoders import check_tokenizer, empty_encoder, load_encoder
from fastdistil.systems.folder import RunFolder
from fastdistil.systems.models import load_tokenizer
from fastdistil.systems.texts import (
    Ended,
    TextData,
    cut,
    estimate,
    evaluation,
    finish,
    has_head,
    held_out_figures,
    options_of,
    planned,
    sizes_of,
    steps_of,
)
from fastdistil.train import train

NAME, PAPER = "LightMBERT", "Jiao et al. 2021, arXiv 2103.06418"


def student_of(config: LightmbertConfig, teacher: Any) -> Any:
    """The teacher's bottom blocks, its word embeddings frozen unless the configuration says otherwise."""
    student = recipe.student(teacher, config.blocks)
    student.get_input_embeddings().weight.requires_grad_(True)
    if config.freeze_embeddings:
        freeze_word_embeddings(student)
    return student


def objectives(config: LightmbertConfig, student: Any, teacher: Any) -> dict[str, nn.Module]:
    """{"distance": the recipe's loss, "mlm": the masked pieces' where there is a head}."""
    found: dict[str, nn.Module] = {"distance": Distillation(student, recipe.terms(config.maps), teacher)}
    if config.corruption and has_head(student):
        found["mlm"] = Distillation(student, [labels()])
    elif config.learn_from == "mlm":
        raise ValueError(
            f"{NAME}: learn_from is 'mlm', but the teacher is a {type(teacher).__name__} without a head for masked "
            "pieces, expected a model such as BertForMaskedLM"
        )
    return found


def run(config: LightmbertConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Distil and write the student and its report into `config.out`; returns what metrics.json holds there.

    Raises ValueError for text, a teacher or a folder that do not fit the configuration, KeyboardInterrupt after Ctrl-C,
    once the step is saved.
    """
    console, started = console or Console(), time.perf_counter()
    if config.dry_run:
        return plans.show(plan(config), console)
    folder = RunFolder(config)
    if folder.finished is not None:
        return folder.finished
    teacher, tokenizer = load_encoder(config.teacher, NAME), load_tokenizer(config.teacher)
    check_tokenizer(teacher, tokenizer, NAME)
    data = TextData.of(config, cut(config, tokenizer, folder.path), tokenizer, teacher)
    student = student_of(config, teacher)
    judges = objectives(config, student, teacher)
    batches = Mixture(data.train, data.corruption, config.batch_size, config.seed, config.smoothing)
    steps, evaluate = steps_of(config, len(batches)), evaluation(judges, data.validation(config))
    before = evaluate(student) if evaluate else {}
    history = train(
        judges["distance" if config.learn_from == "teacher" else "mlm"],
        batches,
        None,
        options_of(config, steps, evaluates=evaluate is not None),
        out=folder.path / "checkpoints",
        name=NAME,
        evaluate=evaluate,
    )
    extra = {"steps": steps, "held_out": held_out_figures(before, history)}
    sizes = sizes_of(config, teacher)
    ended = Ended(NAME, PAPER, teacher, sizes, student, tokenizer, tokenizer, history, data, extra)
    return finish(config, folder, ended, started, console)


def plan(config: LightmbertConfig) -> plans.Plan:
    """What the run would take, by formula, from the teacher's configuration and a sample of the text."""
    teacher, tokenizer = empty_encoder(config.teacher), load_tokenizer(config.teacher)
    student = student_of(config, teacher)
    found = estimate(config, tokenizer)
    pieces = sum(x["pieces"] for x in found.values())
    steps = steps_of(config, max(1, pieces // (config.max_length - 2)))
    live = teacher if config.learn_from == "teacher" else None
    return planned(NAME, config, found, steps, student, live)
