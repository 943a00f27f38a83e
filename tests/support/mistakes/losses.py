"""Of losses."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import fastdistil as fd
from mistakes import Mistake

B, S, V, D = 2, 5, 7, 4
LOGITS = torch.linspace(-1, 1, B * S * V).view(B, S, V)
ROWS = LOGITS.view(-1, V)
LABELS = torch.arange(B * S).view(B, S) % V
HIDDEN, HEAD = LOGITS[..., :D], ROWS[:V, :D]
MAPS = LOGITS.view(B, 1, S, V)[..., :D].expand(B, 2, S, D)
VALUES, INDICES = LOGITS[..., :3] - 3, torch.arange(3).expand(B, S, 3)
MAP = torch.arange(V)
SHORT = LOGITS[:, :-1]


def _output() -> SimpleNamespace:
    return SimpleNamespace(logits=LOGITS)


def _grad() -> torch.Tensor:
    return LOGITS.clone().requires_grad_()


MISTAKES = [
    # logits
    Mistake("logits-of-two-vocabularies", lambda _: fd.logit_loss(LOGITS, LOGITS[..., :6]), "teacher_logits", "(2, 5, 6)", "(2, 5, 7)", "vocab_map"),
    Mistake("logits-of-two-lengths", lambda _: fd.logit_loss(LOGITS, SHORT), "teacher_logits", "(2, 4, 7)", "(2, 5, 7)"),
    Mistake("logits-of-numpy", lambda _: fd.logit_loss(LOGITS.numpy(), LOGITS), "student_logits", "ndarray", "torch.Tensor", "torch.from_numpy"),
    Mistake("teacher-logits-of-numpy", lambda _: fd.logit_loss(LOGITS, LOGITS.numpy()), "teacher_logits", "ndarray", "torch.Tensor", "torch.from_numpy"),
    Mistake("logits-of-lists", lambda _: fd.logit_loss(LOGITS.tolist(), LOGITS), "student_logits", "list", "torch.Tensor", "torch.tensor"),
    Mistake("a-models-output-for-logits", lambda _: fd.logit_loss(_output(), LOGITS), "student_logits", "SimpleNamespace", "torch.Tensor", ".logits"),
    Mistake("integer-logits", lambda _: fd.logit_loss(LABELS, LABELS), "student_logits", "torch.int64", "float32", ""),
    Mistake("a-scalar-for-logits", lambda _: fd.logit_loss(torch.tensor(1.0), torch.tensor(1.0)), "student_logits", "()", "(..., V)"),
    Mistake("a-teacher-with-gradient", lambda _: fd.logit_loss(LOGITS, _grad()), "teacher_logits", "requires grad", "constant", "no_grad"),
    Mistake("divergence-kl", lambda _: fd.logit_loss(LOGITS, LOGITS, divergence="kl"), "divergence", "'kl'", "'forward_kl'"),
    Mistake("a-divergence-of-another-case", lambda _: fd.logit_loss(LOGITS, LOGITS, divergence="JSD"), "divergence", "'JSD'", "'jsd'"),
    Mistake("temperature-0", lambda _: fd.logit_loss(LOGITS, LOGITS, temperature=0), "temperature", "0.0", "more than 0"),
    Mistake("a-temperature-tensor", lambda _: fd.logit_loss(LOGITS, LOGITS, temperature=torch.tensor(2.0)), "temperature", "Tensor", "number", ".item()"),
    Mistake("a-temperature-in-words", lambda _: fd.logit_loss(LOGITS, LOGITS, temperature="2"), "temperature", "str", "number"),
    Mistake("beta-above-1", lambda _: fd.logit_loss(LOGITS, LOGITS, divergence="jsd", beta=2.0), "beta", "2.0", "1"),
    Mistake("reduction-batchmean", lambda _: fd.logit_loss(LOGITS, LOGITS, reduction="batchmean"), "reduction", "'batchmean'", "'mean'"),
    Mistake("an-option-with-a-typo", lambda _: fd.logit_loss(LOGITS, LOGITS, temprature=2.0), "temprature", "unexpected keyword", "", theirs=True),
    Mistake("labels-in-the-teachers-place", lambda _: fd.logit_loss(LOGITS, LABELS), "teacher_logits", "torch.int64", "float32"),
    # labels
    Mistake("labels-without-a-weight", lambda _: fd.logit_loss(LOGITS, LOGITS, labels=LABELS), "labels", "without label_weight", "expected both"),
    Mistake("a-label-weight-without-labels", lambda _: fd.logit_loss(LOGITS, LOGITS, label_weight=0.5), "label_weight", "0.5 without labels", "both or neither"),
    Mistake("unshifted-labels", lambda _: fd.logit_loss(SHORT, SHORT, labels=LABELS, label_weight=0.5), "labels", "(2, 5)", "(2, 4)", "shift=True"),
    Mistake("unshifted-logits", lambda _: fd.logit_loss(LOGITS, LOGITS, labels=LABELS[:, 1:], label_weight=0.5), "labels", "(2, 4)", "(2, 5)", "shift=True"),
    Mistake("flat-labels", lambda _: fd.logit_loss(LOGITS, LOGITS, labels=LABELS.flatten(), label_weight=0.5), "labels", "(10,)", "(2, 5)", "reshape"),
    Mistake("one-hot-labels", lambda _: fd.logit_loss(LOGITS, LOGITS, labels=LOGITS.round().long(), label_weight=0.5), "labels", "(2, 5, 7)", "(2, 5)", "argmax(-1)"),
    Mistake("labels-in-float", lambda _: fd.logit_loss(LOGITS, LOGITS, labels=LABELS.float(), label_weight=0.5), "labels", "torch.float32", "int64", ".long()"),
    Mistake("a-label-of-another-vocabulary", lambda _: fd.logit_loss(LOGITS, LOGITS, labels=LABELS + 1, label_weight=0.5), "labels", "7", "0 to 6", "ignore_index"),
    Mistake("padding-as-minus-1", lambda _: fd.logit_loss(LOGITS, LOGITS, labels=LABELS - 1, label_weight=0.5), "labels", "-1", "0 to 6", "ignore_index"),
    Mistake("labels-of-a-list", lambda _: fd.logit_loss(LOGITS, LOGITS, labels=LABELS.tolist(), label_weight=0.5), "labels", "list", "torch.Tensor"),
    Mistake("label-weight-in-percent", lambda _: fd.logit_loss(LOGITS, LOGITS, labels=LABELS, label_weight=30), "label_weight", "30.0", "0 to 1"),
    # weights and counts
    Mistake("a-weight-of-columns", lambda _: fd.logit_loss(LOGITS, LOGITS, weight=torch.ones(V)), "weight", "(7,)", "(2, 5)"),
    Mistake("a-mask-of-a-list", lambda _: fd.logit_loss(LOGITS, LOGITS, weight=[[1] * S] * B), "weight", "list", "torch.Tensor", "torch.tensor"),
    Mistake("a-number-for-a-weight", lambda _: fd.logit_loss(LOGITS, LOGITS, weight=0.5), "weight", "float", "torch.Tensor"),
    Mistake("num-items-of-a-sum", lambda _: fd.logit_loss(LOGITS, LOGITS, reduction="sum", num_items=10), "num_items", "'sum'", "'mean'"),
    Mistake("num-items-per-row", lambda _: fd.logit_loss(LOGITS, LOGITS, num_items=torch.ones(B)), "num_items", "(2,)", "one number", ".sum()"),
    # vocabulary maps
    Mistake("a-map-to-nowhere", lambda _: fd.logit_loss(LOGITS, LOGITS, vocab_map=MAP + 1), "vocab_map", "7", "6"),
    Mistake("a-map-of-minus-100", lambda _: fd.logit_loss(LOGITS, LOGITS, vocab_map=MAP - 100), "vocab_map", "-100", "-1"),
    Mistake("a-map-of-the-teachers-length", lambda _: fd.logit_loss(LOGITS[..., :6], LOGITS, vocab_map=MAP), "vocab_map", "(7,)", "(6,)"),
    Mistake("a-map-as-a-dictionary", lambda _: fd.logit_loss(LOGITS, LOGITS, vocab_map={0: 0}), "vocab_map", "dict", "torch.Tensor"),
    Mistake("a-map-that-maps-nothing", lambda _: fd.logit_loss(LOGITS, LOGITS, vocab_map=torch.full((V,), -1)), "vocab_map", "maps no column", "at least one"),
    # backends
    Mistake("the-cuda-backend-on-a-cpu", lambda _: fd.logit_loss(LOGITS, LOGITS, backend="cuda"), "backend", "'cuda'", "", theirs=True),
    Mistake("an-unknown-backend", lambda _: fd.logit_loss(LOGITS, LOGITS, backend="gpu"), "backend", "'gpu'", "'auto'"),
    Mistake("tensors-of-two-devices", lambda _: fd.logit_loss(LOGITS, LOGITS.to("meta")), "teacher_logits", "meta", "cpu"),
    # heads, cached columns
    Mistake("a-transposed-head", lambda _: fd.linear_logit_loss(HIDDEN, HEAD.T, HIDDEN, HEAD), "student_weight", "(4, 7)", "4", "weight"),
    Mistake("a-layer-for-a-weight", lambda _: fd.linear_logit_loss(HIDDEN, torch.nn.Linear(D, V), HIDDEN, HEAD), "student_weight", "Linear", "torch.Tensor", ".weight"),
    Mistake("a-bias-of-the-width", lambda _: fd.linear_logit_loss(HIDDEN, HEAD, HIDDEN, HEAD, student_bias=torch.zeros(D)), "student_bias", "(4,)", "(7,)"),
    Mistake("top-k-probabilities", lambda _: fd.topk_logit_loss(LOGITS, VALUES.exp(), INDICES), "teacher_values", "probabilities", "log", ".log()"),
    Mistake("top-k-without-indices", lambda _: fd.topk_logit_loss(LOGITS, VALUES), "teacher_indices", "missing", "argument", theirs=True),
    Mistake("top-k-indices-in-float", lambda _: fd.topk_logit_loss(LOGITS, VALUES, INDICES.float()), "teacher_indices", "torch.float32", "int", ".long()"),
    Mistake("top-k-of-another-k", lambda _: fd.topk_logit_loss(LOGITS, VALUES, INDICES[..., :2]), "teacher_indices", "(2, 5, 2)", "(2, 5, 3)"),
    Mistake("top-k-indices-to-nowhere", lambda _: fd.topk_logit_loss(LOGITS, VALUES, INDICES + V), "teacher_indices", "7", "0 to 6"),
    Mistake("k-of-more-than-all", lambda _: fd.student_topk_logit_loss(LOGITS, LOGITS, k=99), "k", "99", "7"),
    Mistake("a-projection-as-a-tensor", lambda _: fd.projected_logit_loss(LOGITS, LOGITS, torch.eye(V)), "projection", "Tensor", "VocabProjection", "VocabProjection.of"),
    Mistake("a-dense-projection", lambda _: fd.VocabProjection.of(torch.eye(V)), "matrix", "dense", "sparse", "to_sparse"),
    # hidden states and maps
    Mistake("hidden-states-of-two-widths", lambda _: fd.hidden_loss(HIDDEN, LOGITS), "student", "(2, 5, 4)", "(2, 5, 7)", "projection"),
    Mistake("hidden-layers-of-two-numbers", lambda _: fd.hidden_loss([HIDDEN] * 2, [HIDDEN] * 3), "teacher", "3", "2"),
    Mistake("a-layer-for-a-projection", lambda _: fd.hidden_loss(HIDDEN, LOGITS, projection=torch.nn.Linear(D, V)), "projection", "Linear", "torch.Tensor", ".weight"),
    Mistake("a-transposed-projection", lambda _: fd.hidden_loss(HIDDEN, LOGITS, projection=HEAD.T), "projection", "(4, 7)", "(7, 4)"),
    Mistake("a-kind-of-hidden-loss", lambda _: fd.hidden_loss(HIDDEN, HIDDEN, kind="l2"), "kind", "'l2'", "'mse'"),
    Mistake("maps-in-the-place-of-queries", lambda _: fd.attention_loss(MAPS[0], MAPS[0], MAPS[0], MAPS[0]), "student_q", "(2, 5, 4)", "(B, H, S, d)"),
    Mistake("maps-of-two-lengths", lambda _: fd.attention_loss(MAPS, MAPS, MAPS[:, :, :3], MAPS[:, :, :3]), "teacher_q", "(2, 2, 3, 4)", "5"),
    Mistake("maps-of-two-numbers-of-heads", lambda _: fd.attention_loss(MAPS, MAPS, MAPS[:, :1], MAPS[:, :1]), "teacher_q", "1", "2", "heads='mean'"),
    Mistake("an-additive-mask", lambda _: fd.attention_loss(MAPS, MAPS, MAPS, MAPS, mask=torch.zeros(B, 1, 1, S)), "mask", "torch.float32", "bool", "bool"),
    Mistake("a-mask-of-four-dimensions", lambda _: fd.attention_loss(MAPS, MAPS, MAPS, MAPS, mask=torch.ones(B, 1, S, S).bool()), "mask", "(2, 1, 5, 5)", "(2, 5)"),
    Mistake("relation-heads-that-do-not-divide", lambda _: fd.relation_loss(MAPS, MAPS, relation_heads=3), "relation_heads", "3", "8"),
    Mistake("two-vocabularies-in-uld-of-labels", lambda _: fd.uld_loss(LOGITS, LOGITS[..., :5, :][:, :4]), "teacher_logits", "(2, 4, 7)", "(2, 5"),
]  # fmt: skip
