"""Our losses as losses of sentence-transformers (looked at: 6.2.0), for its SentenceTransformerTrainer and, where
scores are compared, for its CrossEncoderTrainer.

A teacher is either in the labels (embeddings or scores that were computed once) or a model, which is run on the batch
without gradients. It is no submodule of the loss: the trainer neither trains nor saves it, nor turns its dropout on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastdistil.contracts.attention import KINDS as RELATION_KINDS
from fastdistil.contracts.hidden import KINDS
from fastdistil.losses import _check
from fastdistil.losses.hidden import hidden_loss
from fastdistil.losses.logit import logit_loss, rule_of
from fastdistil.losses.relation import relation_loss

__all__ = ["EmbeddingLoss", "MarginMSELoss", "ScoreDivergenceLoss", "SimilarityLoss"]

SIMILARITIES = ("dot", "cosine")


class _Loss(nn.Module):
    """A student, and a teacher that is kept out of sight of parameters(), train() and state_dict()."""

    def __init__(self, model: Any, teacher: Any = None) -> None:
        super().__init__()
        self.model = model
        self._teacher: tuple[Any, ...] = ()
        if teacher is not None:
            self._teacher = (teacher.eval().requires_grad_(False),)

    @property
    def teacher(self) -> Any:
        """The teacher's model, or None where the labels are the teacher's."""
        return self._teacher[0] if self._teacher else None

    def _needs_labels(self, labels: object) -> Tensor:
        """The labels as a tensor; several columns of scores come as a list of rows."""
        if isinstance(labels, list) and labels and all(isinstance(x, Tensor) for x in labels):
            labels = torch.stack(labels)
        if not isinstance(labels, Tensor):
            raise ValueError(
                f"{type(self).__name__}: labels is {type(labels).__name__}, expected the teacher's values as a label "
                "column, or a teacher"
            )
        return labels.detach()


def _embed(model: Any, features: Sequence[dict[str, Any]]) -> list[Tensor]:
    """A (B, D) per column of text; columns that fit together share a forward pass, as in sentence-transformers."""
    from sentence_transformers.base.losses.merged_forward import embed_columns

    return list(embed_columns(model, features))


def _same_tokens(function: str, model: Any, teacher: Any) -> None:
    """A teacher of text that was tokenized for the student."""
    vocabularies: list[dict[str, int]] = [getattr(x.tokenizer, "get_vocab", dict)() for x in (model, teacher)]
    if not vocabularies[0] or vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"{function}: teacher has another tokenizer than the model, expected the same one: the batch has the "
            "model's tokens. Compute the teacher's values once and pass them as labels"
        )


class _EmbeddingLoss(_Loss):
    """Both sides' embeddings of every column, and the prefixes that are compared."""

    def __init__(
        self,
        model: Any,
        teacher: Any,
        prefixes: Sequence[int] | None,
        prefix_weights: Sequence[float] | None,
    ) -> None:
        super().__init__(model, teacher)
        name = type(self).__name__
        if teacher is not None:
            _same_tokens(name, model, teacher)
        self.prefixes = None if prefixes is None else [int(x) for x in prefixes]
        if self.prefixes is not None and (not self.prefixes or min(self.prefixes) < 1):
            raise ValueError(f"{name}: prefixes is {self.prefixes}, expected at least one width of at least 1")
        if prefix_weights is not None and len(prefix_weights) != len(self.prefixes or ()):
            raise ValueError(
                f"{name}: prefix_weights has {len(prefix_weights)} entries, expected {len(self.prefixes or ())}, one "
                "per prefix"
            )
        weights = [1.0] * len(self.prefixes or (0,)) if prefix_weights is None else prefix_weights
        self.prefix_weights = [_check.number(name, "prefix_weights", x) for x in weights]

    def _both(self, features: Sequence[dict[str, Any]], labels: object) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's (columns, B, D)."""
        features = list(features)
        given = [dict(x) for x in features]  # a model writes what it finds into the batch
        student = torch.stack(_embed(self.model, features))
        if self.teacher is not None:
            with torch.no_grad():
                return student, torch.stack(_embed(self.teacher.to(student.device), given))
        teacher = self._needs_labels(labels).to(student.device)
        columns, rows = student.shape[:2]
        if teacher.shape[:-1] == (rows,):  # one embedding for all columns
            return student, teacher.expand(columns, *teacher.shape)
        if teacher.shape[:-1] != (rows, columns):
            raise ValueError(
                f"{type(self).__name__}: labels has shape {tuple(teacher.shape)}, expected ({rows}, D) or "
                f"({rows}, {columns}, D)"
            )
        return student, teacher.transpose(0, 1)

    def _widths(self, student: int, teacher: int) -> list[int | None]:
        """The prefixes, which both sides must have; [None] for the whole embeddings."""
        for width in self.prefixes or ():
            if width > min(student, teacher):
                raise ValueError(
                    f"{type(self).__name__}: prefixes has {width}, expected at most the widths of student and teacher, "
                    f"{student} and {teacher}"
                )
        return [None] if self.prefixes is None else [*self.prefixes]


class EmbeddingLoss(_EmbeddingLoss):
    """Distance of the student's sentence embeddings from the teacher's: `hidden_loss`, a row per text.

    "mse" is sentence-transformers' MSELoss, "cosine" its EmbedDistillLoss(distance_metric="cosine").

    Args:
        model: the SentenceTransformer that learns.
        kind: "mse", "cosine" or "kl", as in `fastdistil.hidden_loss`.
        teacher: a SentenceTransformer with the same tokenizer; without one, the labels are its embeddings, (B, D_t) for
            all columns or (B, columns, D_t).
        projection_dim: D_t, for a linear projection of the student's embeddings, trained with the model. It is
            `loss.projection`: save its state_dict, which the trainer does not.
        prefixes: Matryoshka: the widths whose leading entries are compared in the place of the whole embeddings, the
            student's (after the projection) with the teacher's.
        prefix_weights: one per prefix, 1 each by default; the losses are added up.
        backend: as in `fastdistil.hidden_loss`.

    Raises:
        ValueError: naming the argument; at the first batch where labels or prefixes do not fit.
    """

    def __init__(
        self,
        model: Any,
        *,
        kind: str = "mse",
        teacher: Any = None,
        projection_dim: int | None = None,
        prefixes: Sequence[int] | None = None,
        prefix_weights: Sequence[float] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(model, teacher, prefixes, prefix_weights)
        _check.one_of(type(self).__name__, "kind", kind, KINDS)
        self.kind, self.backend = kind, backend
        self.projection: nn.Linear | None = None
        if projection_dim is not None:
            place = next(model.parameters())
            width = model.get_embedding_dimension()
            self.projection = nn.Linear(width, projection_dim, device=place.device, dtype=place.dtype)

    def forward(self, sentence_features: Sequence[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch: a scalar."""
        student, teacher = self._both(sentence_features, labels)
        head = self.projection
        widths = self._widths(student.shape[-1] if head is None else head.out_features, teacher.shape[-1])
        projected: dict[str, Any] = {}
        if head is not None:
            projected["projection"] = [head.weight[:d] for d in widths]
            projected["bias"] = [head.bias[:d] for d in widths]
        return hidden_loss(
            [student[..., :d] if head is None else student for d in widths], [teacher[..., :d] for d in widths],
            kind=self.kind, layer_weights=self.prefix_weights, backend=self.backend, **projected,
        )  # fmt: skip

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        width = None if self.projection is None else self.projection.out_features
        return {"kind": self.kind, "projection_dim": width, "prefixes": self.prefixes}


class SimilarityLoss(_EmbeddingLoss):
    """How the texts of a batch resemble each other, in the student and in the teacher: `relation_loss` over the batch.

    A = x x^T / temperature of all texts of the batch (all columns), for each side by its own embeddings, whose widths
    may differ. "prob_kl" compares the softmax of each text's row of A, "score_mse" A itself.

    Args:
        model: the SentenceTransformer that learns.
        kind: "prob_kl", "prob_mse" or "score_mse", as in `fastdistil.relation_loss`.
        teacher: as in `EmbeddingLoss`, as are prefixes and prefix_weights.
        temperature: of both sides.
        normalize: compare cosines; else inner products.
        backend: as in `fastdistil.relation_loss`.

    Raises:
        ValueError: naming the argument; at the first batch where labels or prefixes do not fit.
    """

    def __init__(
        self,
        model: Any,
        *,
        kind: str = "prob_kl",
        teacher: Any = None,
        temperature: float = 0.05,
        normalize: bool = True,
        prefixes: Sequence[int] | None = None,
        prefix_weights: Sequence[float] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(model, teacher, prefixes, prefix_weights)
        name = type(self).__name__
        _check.one_of(name, "kind", kind, RELATION_KINDS)
        self.kind, self.backend, self.normalize = kind, backend, normalize
        self.temperature = _check.positive(name, "temperature", temperature)

    def forward(self, sentence_features: Sequence[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch: a scalar."""
        sides = [x.flatten(0, 1) for x in self._both(sentence_features, labels)]
        losses = []
        for width in self._widths(*(x.shape[-1] for x in sides)):
            s, t = (x[:, :width] for x in sides)
            if self.normalize:
                s, t = normalize(s, dim=-1), normalize(t, dim=-1)
            scale = 1 / self.temperature
            losses.append(
                relation_loss(
                    s.unsqueeze(0), t.unsqueeze(0), relation_heads=1, kind=self.kind, student_scale=scale,
                    teacher_scale=scale, backend=self.backend,
                )
            )  # fmt: skip
        return torch.stack([x * w for x, w in zip(losses, self.prefix_weights, strict=True)]).sum()

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {"kind": self.kind, "temperature": self.temperature, "prefixes": self.prefixes}


class _ScoreLoss(_Loss):
    """Scores of a query (the first column) with the documents of the other columns."""

    def __init__(self, model: Any, teacher: Any, similarity: str) -> None:
        from sentence_transformers import CrossEncoder

        super().__init__(model, teacher)
        name = type(self).__name__
        _check.one_of(name, "similarity", similarity, SIMILARITIES)
        self.similarity = similarity
        self.of_pairs = isinstance(model, CrossEncoder)
        if teacher is not None:
            if isinstance(teacher, CrossEncoder) != self.of_pairs:
                raise ValueError(
                    f"{name}: teacher is {type(teacher).__name__}, expected a model of the student's kind, "
                    f"{type(model).__name__}. Compute the teacher's scores once and pass them as labels"
                )
            if not self.of_pairs:
                _same_tokens(name, model, teacher)
        if self.of_pairs and any(x.num_labels != 1 for x in (model, *self._teacher)):
            raise ValueError(f"{name}: model or teacher has several labels, expected cross encoders with num_labels=1")

    def _both(self, columns: Sequence[Any], labels: object, **preprocessing: Any) -> tuple[Tensor, Tensor]:
        """The student's scores (B, documents), and the teacher's or the labels, of any shape."""
        columns = list(columns)
        given = columns if self.of_pairs else [dict(x) for x in columns]
        student = self._scores(self.model, columns, **preprocessing)
        if self.teacher is None:
            return student, self._needs_labels(labels).to(student.device)
        with torch.no_grad():
            return student, self._scores(self.teacher.to(student.device), given, **preprocessing)

    def _scores(self, model: Any, columns: Sequence[Any], **preprocessing: Any) -> Tensor:
        if not self.of_pairs:
            query, *documents = (
                normalize(x, dim=-1) if self.similarity == "cosine" else x for x in _embed(model, columns)
            )
            return torch.stack([(query * x).sum(-1) for x in documents], dim=1)
        from sentence_transformers.util import batch_to_device

        queries, *texts = columns
        pairs = [pair for column in texts for pair in zip(queries, column, strict=True)]
        batch = batch_to_device(model.preprocess(pairs, **preprocessing), model.device)
        scores: Tensor = model(batch)["scores"]
        return scores.reshape(len(texts), len(queries)).T

    def _wrong_labels(self, labels: Tensor, expected: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: labels has shape {tuple(labels.shape)}, expected {expected}")


class MarginMSELoss(_ScoreLoss):
    """Squared difference of the margins score(query, positive) - score(query, negative), Hofstätter et al. 2020.

    The columns are (query, positive, negative, ...). Equal to sentence-transformers' MarginMSELoss for both of its
    kinds of models.

    Args:
        model: the SentenceTransformer or CrossEncoder that learns.
        teacher: a model of the same kind (SentenceTransformer: with the same tokenizer); without one, the labels are
            its margins (B,) or (B, negatives), or its scores (B, 1 + negatives).
        similarity: "dot" or "cosine", of a SentenceTransformer's embeddings.
        backend: as in `fastdistil.hidden_loss`.

    Raises:
        ValueError: naming the argument; at the first batch where the labels do not fit.
    """

    def __init__(self, model: Any, *, teacher: Any = None, similarity: str = "dot", backend: str = "auto") -> None:
        super().__init__(model, teacher, similarity)
        self.backend = backend

    def forward(
        self, sentence_features: Sequence[Any], labels: Tensor | None = None, prompt: Any = None, task: Any = None
    ) -> Tensor:
        """The loss of a batch: a scalar."""
        scores, target = self._both(sentence_features, labels, prompt=prompt, task=task)
        rows, documents = scores.shape
        if documents < 2:
            raise ValueError(f"{type(self).__name__}: {documents} document columns came, expected at least 2")
        if target.shape == (rows, documents):
            target = target[:, :1] - target[:, 1:]
        elif target.shape == (rows,):
            target = target.unsqueeze(1)
        if target.shape != (rows, documents - 1):
            raise self._wrong_labels(target, f"({rows},), ({rows}, {documents - 1}) or ({rows}, {documents})")
        return hidden_loss(scores[:, :1] - scores[:, 1:], target, kind="mse", backend=self.backend)

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {"similarity": self.similarity}


class ScoreDivergenceLoss(_ScoreLoss):
    """Divergence of the distributions over a query's documents, the softmax of their scores: `logit_loss`.

    The columns are (query, document, document, ...). "forward_kl" is sentence-transformers' DistillKLDivLoss, with its
    factor temperature².

    Args:
        model: the SentenceTransformer or CrossEncoder that learns.
        teacher: as in `MarginMSELoss`; without one, the labels are its scores (B, documents).
        divergence, beta, temperature, teacher_temperature: as in `fastdistil.logit_loss`.
        similarity: "dot" or "cosine", of a SentenceTransformer's embeddings.
        backend: as in `fastdistil.logit_loss`.

    Raises:
        ValueError: naming the argument; at the first batch where the labels do not fit.
    """

    def __init__(
        self,
        model: Any,
        *,
        teacher: Any = None,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        similarity: str = "dot",
        backend: str = "auto",
    ) -> None:
        super().__init__(model, teacher, similarity)
        rule_of(type(self).__name__, divergence, beta, temperature, teacher_temperature, False)  # checked at the door
        self.divergence, self.beta, self.backend = divergence, beta, backend
        self.temperature, self.teacher_temperature = temperature, teacher_temperature

    def forward(
        self, sentence_features: Sequence[Any], labels: Tensor | None = None, prompt: Any = None, task: Any = None
    ) -> Tensor:
        """The loss of a batch: a scalar."""
        scores, target = self._both(sentence_features, labels, prompt=prompt, task=task)
        if scores.shape[1] < 2:
            raise ValueError(f"{type(self).__name__}: {scores.shape[1]} document columns came, expected at least 2")
        if target.shape != scores.shape:
            raise self._wrong_labels(target, str(tuple(scores.shape)))
        loss: Tensor = logit_loss(
            scores, target, divergence=self.divergence, beta=self.beta, temperature=self.temperature,
            teacher_temperature=self.teacher_temperature, scale_by_t2=False, backend=self.backend,
        )  # fmt: skip
        return loss * self.temperature**2

    def get_config_dict(self) -> dict[str, Any]:
        """For the model card."""
        return {"divergence": self.divergence, "temperature": self.temperature, "similarity": self.similarity}
