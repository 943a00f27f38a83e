"""The losses for sentence-transformers: against plain formulas, against its own losses, and in its trainers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder import losses as pair_losses
from sentence_transformers.sentence_transformer import losses as theirs
from small_models import word_encoder
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div, mse_loss, normalize

from fastdistil.integrations import sentence_transformers as ours

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "red", "blue"]
QUERIES = ["the cat sat", "a dog ran under the tree", "red mat", "blue cat on a mat", "the dog", "a tree"]
TEXTS = [QUERIES, [*QUERIES[2:], *QUERIES[:2]], [*QUERIES[3:], *QUERIES[:3]]]  # of six rows: queries and two documents


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")


def encoder(path: Path, width: int = 16, seed: int = 0, words: list[str] = WORDS) -> Any:
    return SentenceTransformer(str(word_encoder(path / f"st{width}{seed}", width, seed, words)), device="cpu").double()


def scorer(path: Path, seed: int = 0) -> Any:
    model = CrossEncoder(str(word_encoder(path / f"ce{seed}", 16, seed, WORDS, head=True)), device="cpu")
    return model.double()


def features(model: Any, columns: int) -> list[dict[str, Any]]:
    return [model.preprocess(column) for column in TEXTS[:columns]]


def embeddings(model: Any, columns: int) -> list[Tensor]:
    return [model(x)["sentence_embedding"] for x in features(model, columns)]


def outcome(loss: Any, given: Any, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """(value, gradient of all parameters in one vector)."""
    loss.zero_grad()
    value = loss(given, labels)
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in loss.parameters() if p.grad is not None])


def agree(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert found[0].dtype == torch.float64 and wanted[0] > 1e-6 and wanted[1].norm() > 1e-6
    assert (found[0] - wanted[0]).abs() < 1e-10 * wanted[0].abs()
    assert (found[1] - wanted[1]).norm() < 1e-10 * wanted[1].norm()


def formula(model: Any, columns: int, of: Callable[[list[Tensor]], Tensor]) -> tuple[Tensor, Tensor]:
    """The value and gradient of a formula of the student's embeddings."""
    model.zero_grad()
    value = of(embeddings(model, columns))
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_embeddings_are_theirs(kind: str, projected: bool, columns: int, tmp_path: Path) -> None:
    """EmbedDistillLoss with labels for all columns, and for each of them."""
    model, width = encoder(tmp_path), 24 if projected else 16
    mine = ours.EmbeddingLoss(model, kind=kind, projection_dim=width if projected else None)
    other = theirs.EmbedDistillLoss(model, distance_metric=kind, projection_dim=width if projected else None).double()
    if mine.projection is not None:
        mine.projection.load_state_dict(other.projection.state_dict())
    for labels in (torch.randn(6, width, dtype=torch.float64), torch.randn(6, columns, width, dtype=torch.float64)):
        agree(*(outcome(loss, features(model, columns), labels) for loss in (mine, other)))
    if kind == "mse" and not projected:
        single = torch.randn(6, width, dtype=torch.float64)
        agree(*(outcome(x, features(model, columns), single) for x in (mine, theirs.MSELoss(model))))


@pytest.mark.parametrize("projected", [False, True])
def test_prefixes_of_embeddings(projected: bool, tmp_path: Path) -> None:
    model, teacher = encoder(tmp_path), encoder(tmp_path, 24, 1)
    prefixes, weights = [4, 8, 16], [0.5, 1.0, 2.0]
    loss = ours.EmbeddingLoss(
        model, kind="cosine", teacher=teacher, prefixes=prefixes, prefix_weights=weights,
        projection_dim=24 if projected else None,
    )  # fmt: skip
    target = torch.stack(embeddings(teacher, 2)).detach()
    found = outcome(loss, features(model, 2), None)
    loss.zero_grad()
    student = torch.stack(embeddings(model, 2))
    if loss.projection is not None:
        student = loss.projection(student)
    terms = [(1 - cosine_similarity(student[..., :d], target[..., :d], dim=-1)).mean() for d in prefixes]
    value = sum((w * x for w, x in zip(weights, terms, strict=True)), torch.zeros(()))
    value.backward()
    agree(found, (value.detach(), torch.cat([p.grad.flatten() for p in loss.parameters() if p.grad is not None])))


def relations(x: Tensor, temperature: float, unit: bool) -> Tensor:
    x = normalize(x, dim=-1) if unit else x
    return x @ x.T / temperature


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("kind", ["prob_kl", "score_mse"])
def test_similarities(kind: str, unit: bool, tmp_path: Path) -> None:
    """Of all texts of the batch with each other, over the whole embeddings and over their prefixes."""
    model, teacher = encoder(tmp_path), encoder(tmp_path, 24, 1)
    target = torch.cat(embeddings(teacher, 2)).detach()

    def of(prefixes: list[int | None]) -> Callable[[list[Tensor]], Tensor]:
        def total(columns: list[Tensor]) -> Tensor:
            value, student = torch.zeros(()), torch.cat(columns)
            for d in prefixes:
                s, t = (relations(x[:, :d], 0.5, unit) for x in (student, target))
                whole = kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
                value = value + (whole if kind == "prob_kl" else mse_loss(s, t))
            return value

        return total

    for prefixes in ([None], [4, 16]):
        loss = ours.SimilarityLoss(
            model, kind=kind, teacher=teacher, temperature=0.5, normalize=unit,
            prefixes=None if prefixes == [None] else prefixes,
        )  # fmt: skip
        agree(outcome(loss, features(model, 2), None), formula(model, 2, of(prefixes)))
    cached = ours.SimilarityLoss(model, kind=kind, temperature=0.5, normalize=unit)
    labels = torch.stack(embeddings(teacher, 2), dim=1)
    agree(outcome(cached, features(model, 2), labels), formula(model, 2, of([None])))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_margins_are_theirs(similarity: str, tmp_path: Path) -> None:
    from sentence_transformers.util import pairwise_cos_sim, pairwise_dot_score

    model = encoder(tmp_path)
    function = pairwise_dot_score if similarity == "dot" else pairwise_cos_sim
    mine = ours.MarginMSELoss(model, similarity=similarity)
    other = theirs.MarginMSELoss(model, similarity_fct=function)
    for columns, shape in ((3, (6,)), (3, (6, 1)), (3, (6, 2))):
        labels = torch.randn(shape, dtype=torch.float64)
        agree(*(outcome(loss, features(model, columns), labels) for loss in (mine, other)))


@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(1.0, None), (2.0, None), (0.5, 3.0)])
def test_score_divergences_are_theirs(temperature: float, teacher_temperature: float | None, tmp_path: Path) -> None:
    model, labels = encoder(tmp_path), torch.randn(6, 2, dtype=torch.float64)
    mine = ours.ScoreDivergenceLoss(model, temperature=temperature, teacher_temperature=teacher_temperature)
    other = theirs.DistillKLDivLoss(model, temperature=temperature, teacher_temperature=teacher_temperature)
    agree(*(outcome(loss, features(model, 3), labels) for loss in (mine, other)))


def test_live_teachers_are_their_own_labels(tmp_path: Path) -> None:
    """A model as teacher gives what its embeddings or scores as labels give; and it is left alone."""
    model, teacher = encoder(tmp_path), encoder(tmp_path, 24, 1)
    before = copy.deepcopy(teacher.state_dict())
    query, *documents = (x.detach() for x in embeddings(teacher, 3))
    scores = torch.stack([(query * x).sum(-1) for x in documents], dim=1)
    for kind in (ours.MarginMSELoss, ours.ScoreDivergenceLoss):
        live, cached = kind(model, teacher=teacher), kind(model)
        agree(outcome(live, features(model, 3), None), outcome(cached, features(model, 3), scores))
        assert [*live.state_dict()] == [*cached.state_dict()] and not live.train().teacher.training
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_matryoshka_wraps_scores(tmp_path: Path) -> None:
    """sentence-transformers' own wrapper over our loss and over theirs."""
    model, labels = encoder(tmp_path), torch.randn(6, dtype=torch.float64)
    wrapped = [
        theirs.MatryoshkaLoss(model, loss, [16, 8, 4])
        for loss in (ours.MarginMSELoss(model), theirs.MarginMSELoss(model))
    ]
    agree(*(outcome(loss, features(model, 3), labels) for loss in wrapped))


def test_pairs_are_theirs(tmp_path: Path) -> None:
    """CrossEncoder: margins as theirs (whose labels become float32), a divergence as the formula, a live teacher."""
    model, teacher = scorer(tmp_path), scorer(tmp_path, 1)
    labels = torch.randn(6, 2).double()
    mine, other = ours.MarginMSELoss(model), pair_losses.MarginMSELoss(model)
    value, gradient = outcome(mine, TEXTS, labels)
    wanted = outcome(other, TEXTS, labels)
    assert (value - wanted[0]).abs() < 1e-6 * wanted[0] and (gradient - wanted[1]).norm() < 1e-6 * wanted[1].norm()
    both = [
        torch.stack(
            [x(x.preprocess([*zip(QUERIES, column, strict=True)]))["scores"].view(-1) for column in TEXTS[1:]], 1
        )
        for x in (model, teacher)
    ]
    found = ours.ScoreDivergenceLoss(model, teacher=teacher, divergence="reverse_kl")(TEXTS)
    p, q = (x.log_softmax(-1) for x in both)
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1).mean(), rtol=1e-10, atol=0)


def arguments(kind: Any, path: Path) -> Any:
    return kind(
        str(path), max_steps=3, per_device_train_batch_size=3, learning_rate=1e-2, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_steps=1, optim="sgd", lr_scheduler_type="constant",
    )  # fmt: skip


def trained(loss: Any, labels: Any, path: Path, trainer: Any, options: Any) -> tuple[Tensor, list[float]]:
    """All trained parameters after three steps, and the losses."""
    rows: dict[str, Any] = {f"text{i}": column for i, column in enumerate(TEXTS)}
    if labels is not None:
        rows["label"] = labels.tolist()
    made = trainer(loss.model, arguments(options, path), Dataset.from_dict(rows), loss=loss)
    made.train()
    return (
        torch.cat([p.detach().flatten() for p in made.model.parameters()]),
        [x["loss"] for x in made.state.log_history if "loss" in x],
    )


def test_trainer_runs_are_theirs(tmp_path: Path) -> None:
    """Three steps of SentenceTransformerTrainer and of CrossEncoderTrainer, from the same weights."""
    labels = torch.randn(6, 2)
    cases: list[Any] = [
        (lambda: encoder(tmp_path), ours.ScoreDivergenceLoss, theirs.DistillKLDivLoss,
         SentenceTransformerTrainer, SentenceTransformerTrainingArguments),
        (lambda: scorer(tmp_path), ours.MarginMSELoss, pair_losses.MarginMSELoss,
         CrossEncoderTrainer, CrossEncoderTrainingArguments),
    ]  # fmt: skip
    for model, mine, other, trainer, options in cases:
        start = torch.cat([p.detach().flatten() for p in model().parameters()])
        (found, losses), (wanted, expected) = (
            trained(kind(model()), labels, tmp_path / "run", trainer, options) for kind in (mine, other)
        )
        assert len(losses) == 3 and (wanted - start).norm() > 1e-4
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=0)
        assert (found - wanted).norm() < 1e-5 * (wanted - start).norm()


def test_trainer_trains_the_projection_and_not_the_teacher(tmp_path: Path) -> None:
    model, teacher = encoder(tmp_path), encoder(tmp_path, 24, 1)
    loss = ours.EmbeddingLoss(model, kind="cosine", teacher=teacher, projection_dim=24)
    assert loss.projection is not None
    before = loss.projection.weight.detach().clone(), copy.deepcopy(teacher.state_dict())
    kinds = SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    _, losses = trained(loss, None, tmp_path / "run", *kinds)
    assert len(losses) == 3 and (loss.projection.weight - before[0]).norm() > 1e-5
    torch.testing.assert_close(teacher.state_dict(), before[1], rtol=0, atol=0)


def test_refusals(tmp_path: Path) -> None:
    model, pairs = encoder(tmp_path), scorer(tmp_path)
    stranger = encoder(tmp_path, 24, 2, [*WORDS, "more"])
    built: list[tuple[Callable[[], Any], str]] = [
        (lambda: ours.EmbeddingLoss(model, teacher=stranger), "teacher has another tokenizer"),
        (lambda: ours.EmbeddingLoss(model, kind="l2"), "kind is 'l2'"),
        (lambda: ours.EmbeddingLoss(model, prefixes=[]), "prefixes is"),
        (
            lambda: ours.EmbeddingLoss(model, prefixes=[4], prefix_weights=[1, 2]),
            "prefix_weights has 2 entries, expected 1",
        ),
        (lambda: ours.SimilarityLoss(model, temperature=0), "temperature is 0"),
        (lambda: ours.MarginMSELoss(model, similarity="l2"), "similarity is 'l2'"),
        (
            lambda: ours.MarginMSELoss(model, teacher=pairs),
            "teacher is CrossEncoder, expected a model of the student's kind",
        ),
        (lambda: ours.ScoreDivergenceLoss(model, divergence="x"), "divergence is 'x'"),
    ]
    whole = torch.randn(6, 16)
    calls: list[tuple[Any, int, Tensor | None, str]] = [
        (ours.EmbeddingLoss(model), 1, None, "labels is NoneType"),
        (ours.EmbeddingLoss(model), 2, torch.randn(6, 3, 16), r"labels has shape \(6, 3, 16\)"),
        (ours.EmbeddingLoss(model, prefixes=[32]), 1, whole, "prefixes has 32, expected at most"),
        (ours.MarginMSELoss(model), 2, whole, "1 document columns came"),
        (ours.MarginMSELoss(model), 3, whole, r"labels has shape \(6, 16\)"),
        (ours.ScoreDivergenceLoss(model), 3, whole, r"expected \(6, 2\)"),
    ]
    for call, message in built:
        with pytest.raises(ValueError, match=message):
            call()
    for loss, columns, labels, message in calls:
        with pytest.raises(ValueError, match=message):
            loss(features(model, columns), labels)
