"""Every public loss as tests/losses/test_contract.py calls it: a table of functions, what is drawn for them, and options.

A new loss gets a row here: reductions, rows that do not count, backward, strides, torch.compile and torch.library's checks
are then asked of it as of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from conftest import DEVICE, available
from judge import Outcome
from topk_cases import CASES, known
from torch import Tensor

import fastdistil as fd
from fastdistil.contracts.logit import ACCEPTANCE_LOSSES, DIVERGENCES

ROWS, COLUMNS, K = 6, 11, 3
WEIGHT = torch.tensor([1.0, 2.0, 0.0, 0.5, 3.0, 0.0])
MASK = torch.tensor([[True, True, True, True, True], [True, True, True, False, False]])
Options = dict[str, Any]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Loss:
    """shapes: of what gradients are for. constants: the teacher's tensors and those of options, drawn anew. by_row: the
    names of tensors that have rows or tokens. mask: whether these are dropped by a mask of tokens (B, S), not by weights.
    heads: over which a mean is taken too, beside num_items. options: by name, those that the whole contract is asked of; `more` those of gradcheck besides, on the backends that have float64."""

    function: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    constants: Callable[[], Tensors]
    by_row: tuple[str, ...]
    options: dict[str, Options]
    more: dict[str, Options] = field(default_factory=dict)
    mask: bool = False
    heads: int = 1
    backends: tuple[str, ...] = ("reference", "cpu", "triton", "cuda")
    float64: tuple[str, ...] = ("reference", "cpu")

    def draw(self, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
        """The inputs and the constants, of which the teacher's have the inputs' dtype."""
        inputs = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in self.shapes.items()}
        constants = self.constants()
        kept = {"teacher_values", "vocab_map"}  # log-probabilities are stored in float32
        return (
            {name: x.to(DEVICE, dtype) for name, x in inputs.items()},
            {n: x.to(DEVICE, dtype if x.is_floating_point() and n not in kept else None) for n, x in constants.items()},
        )

    def dropped(self) -> Options:
        return {"mask": MASK.to(DEVICE)} if self.mask else {"weight": WEIGHT.to(DEVICE)}

    def resized(self, tensors: Options, count: int) -> Options:
        """`tensors` with `count` rows or tokens where they had ROWS, or MASK's, the first of which come again."""

        def resize(x: Tensor, dim: int) -> Tensor:
            return x.index_select(dim, torch.arange(count, device=x.device) % x.shape[dim])

        by_row = (*self.by_row, "weight")
        found = {name: resize(x, -2 if self.mask else 0) if name in by_row else x for name, x in tensors.items()}
        return found | {"mask": resize(tensors["mask"], 1)} if "mask" in tensors else found

    def spoiled(self, tensors: Tensors) -> Tensors:
        """Rows that do not count hold NaN, or columns that are nowhere."""

        def spoil(x: Tensor) -> Tensor:
            if self.mask:
                out = ~MASK.to(DEVICE)[:, None, :, None] if x.ndim == 4 else ~MASK.to(DEVICE)[..., None]
            else:
                out = (WEIGHT.to(DEVICE) == 0).reshape(-1, *[1] * (x.ndim - 1))
            return x.masked_fill(out, torch.nan if x.is_floating_point() else 2**40)

        return {name: spoil(x) if name in self.by_row else x for name, x in tensors.items()}


def outcome(loss: Loss, inputs: Tensors, constants: Tensors, call: Callable[..., Tensor] | None = None, **options: Any) -> Outcome:  # fmt: skip
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    value = (call or loss.function)(**leaves, **constants, **options)
    return Outcome(value.detach(), torch.autograd.grad(value.sum(), list(leaves.values())))


def _labels() -> Tensor:
    labels = torch.randint(COLUMNS, (ROWS,))
    labels[1] = -100
    return labels


def _top(columns: int) -> Tensors:
    values, indices = known(torch.randn(ROWS, columns), K)
    return {"teacher_values": values, "teacher_indices": indices}


def _two_layers(first: Tensor, second: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return fd.hidden_loss([first, second], [teacher, 2 * teacher], layer_weights=[1.0, 0.5], **options)


# Student columns 2 and 7 have no entry, the others one to three, and the teacher's last column is in none.
_ENTRIES = [(v, (3 * v + i) % (COLUMNS + 3), 0.5 + i) for v in range(COLUMNS) if v % 5 != 2 for i in range(1 + v % 3)]
PROJECTION = fd.VocabProjection.of(
    torch.sparse_coo_tensor(
        torch.tensor([x[:2] for x in _ENTRIES]).T,
        torch.tensor([x[2] for x in _ENTRIES]),
        (COLUMNS, COLUMNS + 4),
        check_invariants=True,
    )
).to(DEVICE)


@wraps(fd.projected_logit_loss)
def _projected(student_logits: Tensor, teacher_logits: Tensor, **options: Any) -> Tensor:
    return fd.projected_logit_loss(student_logits, teacher_logits, PROJECTION, **options)


@wraps(fd.linear_projected_logit_loss)
def _linear_projected(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, **options: Any
) -> Tensor:
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    return fd.linear_projected_logit_loss(*heads, PROJECTION, **options)


HEADS = {"student_hidden": (ROWS, 3), "student_weight": (COLUMNS, 3), "student_bias": (COLUMNS,)}
TOP_BY_ROW = ("teacher_values", "teacher_indices")
LABELLED = {"label_weight": 0.4, "temperature": 2.0}
ATTENTION_KINDS = {kind: {"kind": kind} for kind in ("prob_kl", "prob_mse", "score_mse")}
HIDDEN_KINDS = {kind: {"kind": kind} for kind in ("mse", "cosine", "kl")}
TAILS = {f"{tail} {d}": {"tail": tail, "divergence": d, "beta": 0.3} for tail, d in CASES}
EACH = {d: {"divergence": d, "beta": 0.3, "temperature": 1.5, "teacher_temperature": 2.0} for d in DIVERGENCES}
ACCEPTANCE = {d: EACH["tvd"] | {"divergence": d} for d in ACCEPTANCE_LOSSES}
# lk_hybrid's gradient takes its weight for a constant, and with it its differences do not: gradcheck gets it as the KL.
CHECKED = EACH | ACCEPTANCE | {"lk_hybrid": ACCEPTANCE["lk_hybrid"] | {"eta": 0.0}}
DRAFT = {d: x | {"renormalize": False} for d, x in CHECKED.items() if d != "mse"}


def _some(options: dict[str, Options], *names: str) -> dict[str, Options]:
    return {name: options[name] for name in names}


LOSSES = {
    "logit": Loss(
        fd.logit_loss,
        {"student_logits": (ROWS, COLUMNS)},
        lambda: {"teacher_logits": torch.randn(ROWS, COLUMNS, dtype=torch.float64)},
        ("student_logits", "teacher_logits"),
        _some(EACH, "forward_kl", "reverse_kl", "mse"),
        CHECKED,
        float64=("reference", "cpu", "cuda"),
    ),
    "labels and a map": Loss(
        fd.logit_loss,
        {"student_logits": (ROWS, COLUMNS)},
        lambda: {
            "teacher_logits": torch.randn(ROWS, COLUMNS + 2, dtype=torch.float64),
            "vocab_map": torch.where(torch.arange(COLUMNS) % 4 == 2, -1, torch.randperm(COLUMNS + 2)[:COLUMNS]),
            "labels": _labels(),
        },
        ("student_logits", "teacher_logits", "labels"),
        {"jsd": {**EACH["jsd"], "label_weight": 0.4}},
        {d: {**x, "label_weight": 0.4} for d, x in CHECKED.items()},
    ),
    "draft vocabulary": Loss(
        fd.logit_loss,
        {"student_logits": (ROWS, COLUMNS)},
        lambda: {
            "teacher_logits": torch.randn(ROWS, COLUMNS + 5, dtype=torch.float64),
            "vocab_map": torch.where(torch.arange(COLUMNS) % 4 == 2, -1, torch.randperm(COLUMNS + 5)[:COLUMNS]),
        },
        ("student_logits", "teacher_logits"),
        # First one that is never negative: opcheck takes an absolute value, and a gradient is scaled where it is made.
        {"nla, labels": {**DRAFT["nla"], "labels": "teacher", "label_weight": 0.4}, "forward_kl": DRAFT["forward_kl"]},
        DRAFT,
        float64=("reference", "cpu", "cuda"),
    ),
    "linear": Loss(
        fd.linear_logit_loss,
        HEADS,
        lambda: {
            "teacher_hidden": torch.randn(ROWS, 5, dtype=torch.float64),
            "teacher_weight": torch.randn(COLUMNS, 5, dtype=torch.float64),
        },
        ("student_hidden", "teacher_hidden"),
        _some(EACH | ACCEPTANCE, "forward_kl", "nla"),
        CHECKED,
    ),
    "linear, draft vocabulary": Loss(
        fd.linear_logit_loss,
        HEADS,
        lambda: {
            "teacher_hidden": torch.randn(ROWS, 5, dtype=torch.float64),
            "teacher_weight": torch.randn(COLUMNS + 5, 5, dtype=torch.float64),
            "vocab_map": torch.randperm(COLUMNS + 5)[:COLUMNS],
        },
        ("student_hidden", "teacher_hidden"),
        {"nla": {**DRAFT["nla"], "labels": "teacher", "label_weight": 0.4, "student_softcap": 3.0}},
        DRAFT,
    ),
    "topk": Loss(
        fd.topk_logit_loss,
        {"student_logits": (ROWS, COLUMNS)},
        lambda: _top(COLUMNS),
        ("student_logits", *TOP_BY_ROW),
        _some(TAILS, "bucket forward_kl", "renormalize jsd", "zero forward_kl"),
        TAILS,
        backends=("reference", "cpu", "triton"),
    ),
    "topk with labels": Loss(
        fd.topk_logit_loss,
        {"student_logits": (ROWS, COLUMNS)},
        lambda: _top(COLUMNS) | {"labels": _labels()},
        ("student_logits", "labels", *TOP_BY_ROW),
        {"bucket": LABELLED},
        backends=("reference", "cpu", "triton"),
    ),
    "linear topk": Loss(
        fd.linear_topk_logit_loss,
        HEADS,
        lambda: _top(COLUMNS),
        ("student_hidden", *TOP_BY_ROW),
        _some(TAILS, "bucket forward_kl", "renormalize jsd", "zero forward_kl"),
        backends=("reference", "cpu", "triton"),
    ),
    "student topk": Loss(
        fd.student_topk_logit_loss,
        {"student_logits": (ROWS, COLUMNS)},
        lambda: {"teacher_logits": torch.randn(ROWS, COLUMNS, dtype=torch.float64)},
        ("student_logits", "teacher_logits"),
        {
            "bucket": {"k": K, "temperature": 1.5, "teacher_temperature": 2.0},
            "renormalize": {"k": K, "tail": "renormalize"},
        },
        {f"bucket {d}": {"k": K, "divergence": d, "beta": 0.3} for d in DIVERGENCES if d != "mse"},
        backends=("reference", "cpu", "triton"),
    ),
    "vocabulary projection": Loss(
        _projected,
        {"student_logits": (ROWS, COLUMNS)},
        lambda: {"teacher_logits": torch.randn(ROWS, COLUMNS + 4, dtype=torch.float64)},
        ("student_logits", "teacher_logits"),
        {"forward_kl": EACH["forward_kl"], "as it is": {"renormalize": False, "temperature": 1.5}},
        {d: x for d, x in EACH.items() if d != "mse"},
        backends=("reference", "cpu", "cuda"),
        float64=("reference", "cpu", "cuda"),
    ),
    "vocabulary projection with labels": Loss(
        _projected,
        {"student_logits": (ROWS, COLUMNS)},
        lambda: {"teacher_logits": torch.randn(ROWS, COLUMNS + 4, dtype=torch.float64), "labels": _labels()},
        ("student_logits", "teacher_logits", "labels"),
        {"jsd": EACH["jsd"] | {"label_weight": 0.4}},
        backends=("reference", "cpu", "cuda"),
        float64=("reference", "cpu", "cuda"),
    ),
    "linear vocabulary projection": Loss(
        _linear_projected,
        HEADS,
        lambda: {
            "teacher_hidden": torch.randn(ROWS, 5, dtype=torch.float64),
            "teacher_weight": torch.randn(COLUMNS + 4, 5, dtype=torch.float64),
        },
        ("student_hidden", "teacher_hidden"),
        {"softcap": {"student_softcap": 2.0, "teacher_softcap": 3.0, "chunk_bytes": 1500, "renormalize": False}},
        {"jsd": EACH["jsd"]},
        backends=("reference", "cpu", "cuda"),
        float64=("reference", "cpu", "cuda"),
    ),
    "uld": Loss(
        fd.uld_loss,
        {"student_logits": (ROWS, COLUMNS), "student_factor": (ROWS,)},
        lambda: {
            "teacher_logits": torch.randn(ROWS, COLUMNS + 3, dtype=torch.float64),
            "teacher_factor": torch.rand(ROWS),
        },
        ("student_logits", "student_factor", "teacher_logits", "teacher_factor"),
        {"two temperatures": {"temperature": 1.5, "teacher_temperature": 2.0}},
        {"one temperature": {"temperature": 0.7}},
        backends=("reference",),
        float64=("reference",),
    ),
    "linear uld": Loss(
        fd.linear_uld_loss,
        HEADS | {"student_factor": (ROWS,)},
        lambda: {
            "teacher_hidden": torch.randn(ROWS, 5, dtype=torch.float64),
            "teacher_weight": torch.randn(COLUMNS - 2, 5, dtype=torch.float64),
        },
        ("student_hidden", "student_factor", "teacher_hidden"),
        {"softcap": {"student_softcap": 2.0, "teacher_softcap": 3.0, "chunk_bytes": 200}},
        {"plain": {}},
        backends=("reference",),
        float64=("reference",),
    ),
    "hidden": Loss(
        fd.hidden_loss,
        {"student": (ROWS, 4)},
        lambda: {"teacher": torch.randn(ROWS, 4, dtype=torch.float64)},
        ("student", "teacher"),
        HIDDEN_KINDS,
    ),
    "projected": Loss(
        fd.hidden_loss,
        {"student": (ROWS, 3), "projection": (4, 3), "bias": (4,)},
        lambda: {"teacher": torch.randn(ROWS, 4, dtype=torch.float64)},
        ("student", "teacher"),
        HIDDEN_KINDS,
    ),
    "layers": Loss(
        _two_layers,
        {"first": (ROWS, 4), "second": (ROWS, 4)},
        lambda: {"teacher": torch.randn(ROWS, 4, dtype=torch.float64)},
        ("first", "second", "teacher"),
        HIDDEN_KINDS,
    ),
    "attention": Loss(
        fd.attention_loss,
        {"student_q": (2, 2, 5, 4), "student_k": (2, 2, 5, 4)},
        lambda: {f"teacher_{x}": torch.randn(2, 2, 5, 3, dtype=torch.float64) for x in "qk"},
        ("student_q", "student_k", "teacher_q", "teacher_k"),
        ATTENTION_KINDS,
        {f"{kind} causal": x | {"causal": True} for kind, x in ATTENTION_KINDS.items()},
        mask=True,
        heads=2,
    ),
    "relation": Loss(
        fd.relation_loss,
        {"student": (2, 5, 4)},
        lambda: {"teacher": torch.randn(2, 5, 6, dtype=torch.float64)},
        ("student", "teacher"),
        {kind: x | {"relation_heads": 2} for kind, x in ATTENTION_KINDS.items()},
        mask=True,
        heads=2,
    ),
}


def runs(loss: Loss, *backends: str) -> list[str]:
    """Those of the backends that the loss has and that can run here."""
    return [x for x in available(*loss.backends) if not backends or x in backends]
