"""What every loss takes at its door: any dtypes, teachers made under inference_mode, 0 items; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from judge import EXACT_GRADIENT, EXACT_VALUE, error
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastdistil as fd
from fastdistil.recipes import terms
from fastdistil.recipes.xtremedistil import representation
from fastdistil.train import Options, train

ROWS, COLUMNS = 6, 7
INDICES = torch.stack([torch.arange(3), torch.arange(2, 5), *[torch.arange(4, 7)] * 4])
LABELS = torch.tensor([0, 6, -100, 3, -100, 1])
WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 1.5])
MIXED = {"labels": LABELS, "label_weight": 0.3}


@dataclass
class Loss:
    """`call(students, teachers, **options)`; shapes of the student's tensors and of the teacher's."""

    call: Callable[..., Tensor]
    student: list[tuple[int, ...]]
    teacher: list[tuple[int, ...]]
    weight: bool = True  # has one a row
    stored: bool = False  # log-probabilities, whose dtype does not count for the loss's own

    once: bool = False  # one backward pass

    def counted(self, teachers: list[Tensor]) -> list[Tensor]:
        """Those whose dtype counts."""
        return [] if self.stored else teachers

    def draw(self, *dtypes: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Students (one dtype after the other, from the first but the last) and teachers (in the last)."""
        cycle = dtypes[:-1]
        students = [(torch.randn(s)).to(cycle[i % len(cycle)]) for i, s in enumerate(self.student)]
        teachers = [torch.randn(s) for s in self.teacher]
        return students, [(-1.2 - x.abs() if self.stored else x).to(dtypes[-1]) for x in teachers]


def _logit(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    return fd.logit_loss(s[0], t[0], **options)


def _in_place(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    return fd.logit_loss(s[0] * 1, t[0], inplace_backward=True, **options)


def _statistics(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    loss, found = fd.logit_loss(s[0], t[0], return_stats=True, **options)
    assert all(x.shape == (ROWS,) for x in found)
    return loss


def _linear(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    return fd.linear_logit_loss(s[0], s[1], t[0], t[1], student_bias=s[2], teacher_bias=t[2], **options)


def _topk(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    return fd.topk_logit_loss(s[0], t[0], INDICES, **options)


def _linear_topk(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    return fd.linear_topk_logit_loss(s[0], s[1], t[0], INDICES, student_bias=s[2], **options)


def _student_topk(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    return fd.student_topk_logit_loss(s[0], t[0], k=3, **options)


def _vocabulary(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    return fd.projected_logit_loss(s[0], t[0], PROJECTION, **options)


def _linear_vocabulary(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    heads = s[0], s[1], t[0], t[1]
    return fd.linear_projected_logit_loss(*heads, PROJECTION, student_bias=s[2], teacher_bias=t[2], **options)


def _uld(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    return fd.uld_loss(s[0], t[0], student_factor=s[1], teacher_factor=t[1], **options)


def _linear_uld(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    return fd.linear_uld_loss(s[0], s[1], t[0], t[1], student_bias=s[2], teacher_bias=t[2], **options)


def _hidden(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    return fd.hidden_loss(s[0], t[0], **options)


def _projected(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    return fd.hidden_loss(s[0], t[0], projection=s[1], bias=s[2], activation="gelu", **options)


def _layers(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    return fd.hidden_loss(s, t, **options)


def _attention(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    return fd.attention_loss(*s, *t, **options)


def _relation(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
    return fd.relation_loss(s[0], t[0], relation_heads=2, **options)


Pair = list[tuple[int, ...]]
LOGITS: Pair = [(ROWS, COLUMNS)]
HEAD: Pair = [(ROWS, 5), (COLUMNS, 5), (COLUMNS,)]
MAPS: Pair = [(2, 2, ROWS, 4)] * 2
MAP = torch.tensor([3, -1, 0, 1, 2, 4, 6])
PROJECTION = fd.VocabProjection.of(torch.eye(COLUMNS, COLUMNS + 2).roll(1, -1).to_sparse())
WIDER: Pair = [(ROWS, COLUMNS + 2)]
WIDER_HEAD: Pair = [(ROWS, 3), (COLUMNS + 2, 3), (COLUMNS + 2,)]
LOSSES = {
    "logit": Loss(_logit, LOGITS, LOGITS),
    "logit-labels": Loss(partial(_logit, **MIXED), LOGITS, LOGITS),
    "logit-map": Loss(partial(_logit, vocab_map=MAP, divergence="jsd"), LOGITS, LOGITS),
    "logit-in-place": Loss(_in_place, LOGITS, LOGITS, once=True),
    "logit-in-place-labels": Loss(partial(_in_place, **MIXED), LOGITS, LOGITS, once=True),
    "logit-statistics": Loss(_statistics, LOGITS, LOGITS),
    "linear": Loss(_linear, HEAD, [(ROWS, 3), (COLUMNS, 3), (COLUMNS,)]),
    "linear-labels": Loss(partial(_linear, **MIXED), HEAD, HEAD),
    "linear-mse": Loss(partial(_linear, divergence="mse"), HEAD, HEAD),
    "topk": Loss(_topk, LOGITS, [(ROWS, 3)], stored=True),
    "topk-labels": Loss(partial(_topk, **MIXED), LOGITS, [(ROWS, 3)], stored=True),
    "linear-topk": Loss(partial(_linear_topk, **MIXED), HEAD, [(ROWS, 3)], stored=True),
    "student-topk": Loss(_student_topk, LOGITS, LOGITS),
    "student-topk-renormalized": Loss(partial(_student_topk, tail="renormalize"), LOGITS, LOGITS),
    "vocabulary": Loss(partial(_vocabulary, **MIXED), LOGITS, WIDER),
    "linear-vocabulary": Loss(_linear_vocabulary, HEAD, WIDER_HEAD),
    "uld": Loss(_uld, [*LOGITS, (ROWS,)], [*WIDER, (ROWS,)]),
    "linear-uld": Loss(_linear_uld, HEAD, WIDER_HEAD),
    **{f"hidden-{kind}": Loss(partial(_hidden, kind=kind), LOGITS, LOGITS) for kind in ("mse", "cosine", "kl")},
    "hidden-projected": Loss(_projected, HEAD, LOGITS),
    "hidden-layers": Loss(_layers, LOGITS * 2, LOGITS * 2),
    **{
        f"attention-{kind}": Loss(partial(_attention, kind=kind), MAPS, MAPS, weight=False)
        for kind in ("prob_mse", "score_mse", "prob_kl")
    },
    "attention-mean": Loss(partial(_attention, heads="mean"), MAPS, MAPS, weight=False),
    "relation": Loss(_relation, [(2, ROWS, 8)], [(2, ROWS, 4)], weight=False),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def gradients(loss: Loss, students: list[Tensor], teachers: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Value and gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in students]
    value = loss.call(leaves, teachers, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    "dtypes",
    [(BRAIN, SINGLE), (SINGLE, BRAIN), (HALF, BRAIN), (BRAIN, DOUBLE), (DOUBLE, HALF), (SINGLE, BRAIN, HALF),
     (HALF, DOUBLE, SINGLE)],
    ids=lambda dtypes: "-".join(str(x)[6:] for x in dtypes),
)  # fmt: skip
@each_loss
def test_any_dtypes(loss: Loss, dtypes: tuple[torch.dtype, ...]) -> None:
    """As the same numbers in float64; the gradients are rounded once."""
    students, teachers = loss.draw(*dtypes)
    found = gradients(loss, students, teachers)
    truth = gradients(loss, *([x.double() for x in xs] for xs in (students, teachers)))
    assert found[0].dtype == (
        DOUBLE if any(x.dtype == DOUBLE for x in (*students, *loss.counted(teachers))) else SINGLE
    )
    assert error(found[0], truth[0]) <= EXACT_VALUE
    for x, g, t in zip(students, found[1:], truth[1:], strict=True):
        assert g.dtype == x.dtype
        assert error(g, t) <= max(EXACT_GRADIENT[x.dtype], EXACT_GRADIENT[SINGLE] * (found[0].dtype == SINGLE))


@each_loss
def test_a_teacher_of_inference_mode(loss: Loss) -> None:
    students, teachers = loss.draw(SINGLE, SINGLE)
    truth = gradients(loss, students, teachers)
    with torch.inference_mode():
        made = [x.clone() for x in teachers]
        inside = loss.call(students, made)
    assert torch.equal(inside, truth[0])
    for reduction in ("mean", "none"):
        leaves = [x.clone().requires_grad_() for x in students]
        value = loss.call(leaves, made, reduction=reduction).sum()
        expected = gradients(loss, students, teachers, reduction=reduction)
        for last in (True,) if loss.once else (False, True):
            found = torch.autograd.grad(value * 2, leaves, retain_graph=not last)
            assert all(error(g, 2 * t) <= EXACT_GRADIENT[SINGLE] for g, t in zip(found, expected[1:], strict=True))
    assert all(x.is_inference() for x in made)
    plain = loss.call(students, made)  # no gradient at all
    assert torch.equal(plain, truth[0])


def test_students_and_options_of_inference_mode() -> None:
    loss = LOSSES["hidden-projected"]
    students, teachers = loss.draw(SINGLE, SINGLE)
    truth = gradients(loss, students, teachers, weight=WEIGHT)
    with torch.inference_mode():
        made = students[0].clone()
        labels, weight, vocab_map, indices = (x.clone() for x in (LABELS, WEIGHT, MAP, INDICES))
    projection, bias = (x.clone().requires_grad_() for x in students[1:])
    loss.call([made, projection, bias], teachers, weight=weight).backward()
    assert torch.equal(projection.grad, truth[2]) and torch.equal(bias.grad, truth[3])  # type: ignore[arg-type]
    student = torch.randn(ROWS, COLUMNS, requires_grad=True)
    options: dict[str, Any] = {"labels": labels, "label_weight": 0.5, "weight": weight, "reduction": "sum"}
    fd.logit_loss(student, torch.randn(ROWS, COLUMNS), vocab_map=vocab_map, **options).backward()
    fd.topk_logit_loss(student, torch.randn(ROWS, 3) - 4, indices, **options).backward()


@each_loss
def test_forward_mode_is_refused(loss: Loss) -> None:
    """torch would say 0."""
    students, teachers = loss.draw(SINGLE, SINGLE)
    for i in range(len(students)):

        def of(x: Tensor, i: int = i) -> Tensor:
            return loss.call([*students[:i], x, *students[i + 1 :]], teachers)

        with pytest.raises(NotImplementedError, match="carries a tangent of forward-mode differentiation"):
            torch.func.jvp(of, (students[i],), (students[i],))
    with pytest.raises(NotImplementedError, match="carries a tangent"):
        torch.func.jacfwd(lambda x: loss.call([x, *students[1:]], teachers))(students[0])
    with pytest.raises(NotImplementedError, match="teacher.* carries a tangent"):
        torch.func.jvp(lambda x: loss.call(students, [x, *teachers[1:]]), (teachers[0],), (teachers[0],))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(students[0].clone().requires_grad_(), students[0])
        with pytest.raises(NotImplementedError, match="carries a tangent"):
            loss.call([dual, *students[1:]], teachers)
        gradients(loss, students, teachers)  # the same tensors without a tangent
    with pytest.raises(RuntimeError):  # forward over reverse
        torch.func.hessian(lambda x: loss.call([x, *students[1:]], teachers))(students[0])


def test_forward_mode_is_refused_in_nested_transforms() -> None:
    student, teacher = torch.randn(2, ROWS, COLUMNS)

    def batched(x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: fd.logit_loss(row, row * 2))(x)

    with pytest.raises(NotImplementedError, match="carries a tangent"):
        torch.func.jvp(batched, (student,), (teacher,))
    with pytest.raises(NotImplementedError, match="carries a tangent"):
        torch.compile(lambda x: torch.func.jvp(lambda y: fd.logit_loss(y, teacher), (x,), (x,)), backend="aot_eager")(
            student
        )


@each_loss
def test_num_items_0(loss: Loss) -> None:
    """Value and gradient are 0 where no row counts, and NaN where one does."""
    students, teachers = loss.draw(SINGLE, SINGLE)
    for items in (0, 0.0, torch.tensor(0), torch.tensor(0.0)):
        assert all(x.isnan().any() for x in gradients(loss, students, teachers, num_items=items))
        nothing: dict[str, Any] = {"weight": torch.zeros(ROWS)}
        if not loss.weight:
            nothing = {"mask": torch.zeros(2, ROWS, dtype=torch.bool)}
        for x in gradients(loss, students, teachers, num_items=items, **nothing):
            assert torch.equal(x, torch.zeros_like(x))
    with pytest.raises(ValueError, match="num_items is -1.0, expected at least 0"):
        loss.call(students, teachers, num_items=-1)


def test_0_pairs_of_a_map_whose_padded_queries_are_kept() -> None:
    students, teachers = LOSSES["attention-prob_mse"].draw(SINGLE, SINGLE)
    mask = torch.zeros(2, ROWS, dtype=torch.bool)
    for kind in ("prob_mse", "score_mse"):
        call = partial(_attention, kind=kind, mask=mask, mask_queries=False, num_items=0)
        for x in gradients(Loss(call, MAPS, MAPS), students, teachers):
            assert torch.equal(x, torch.zeros_like(x))


LABELLED = [name for name, loss in LOSSES.items() if "label_weight" in getattr(loss.call, "keywords", {})]


@pytest.mark.parametrize("name", LABELLED)
def test_accumulation_is_exact_with_partial_labels(name: str) -> None:
    """Uneven micro-batches with their own numbers of labels add up to the batch."""
    loss = LOSSES[name]
    students, teachers = loss.draw(DOUBLE, DOUBLE)
    by_row = [x.shape[0] == ROWS for x in students]
    whole = gradients(loss, students, teachers, weight=WEIGHT)
    rows, labelled = WEIGHT.sum(), WEIGHT[LABELS >= 0].sum()
    leaves = [x.clone().requires_grad_() for x in students]
    total = torch.zeros((), dtype=DOUBLE)
    for part in (slice(0, 1), slice(1, 3), slice(3, 6)):
        some = [x[part] if by else x for x, by in zip(leaves, by_row, strict=True)]
        there = [x[part] if x.shape[0] == ROWS else x for x in teachers]
        options = {"labels": LABELS[part], "weight": WEIGHT[part], "num_items": rows, "label_num_items": labelled}
        if "topk" in name:
            call = fd.topk_logit_loss if name.startswith("topk") else fd.linear_topk_logit_loss
            head = {} if len(some) == 1 else {"student_bias": some[2]}
            total = total + call(*some[:2], there[0], INDICES[part], label_weight=0.3, **head, **options)  # type: ignore[operator]
        else:
            total = total + loss.call(some, there, **options)
    found = (total.detach(), *torch.autograd.grad(total, leaves))
    assert all(error(x, t) <= EXACT_GRADIENT[DOUBLE] for x, t in zip(found, whole, strict=True))


@pytest.mark.parametrize("name", ["logit", "linear", "topk", "linear-topk"])
def test_labels_need_their_weight(name: str) -> None:
    loss = LOSSES[name]
    call = partial(loss.call, **{"label_weight": None})
    students, teachers = loss.draw(SINGLE, SINGLE)
    with pytest.raises(ValueError, match="_loss: labels came without label_weight, expected both"):
        call(students, teachers, labels=LABELS)
    with pytest.raises(ValueError, match="_loss: label_num_items came without labels, expected both or neither"):
        call(students, teachers, labels=None, label_num_items=3)
    with pytest.raises(ValueError, match="label_num_items is -2.0, expected at least 0"):
        call(students, teachers, labels=LABELS, label_weight=0.5, label_num_items=-2)
    with pytest.raises(ValueError, match="label_num_items came with reduction='sum', expected reduction='mean'"):
        call(students, teachers, labels=LABELS, label_weight=0.5, label_num_items=2, reduction="sum")
    explicit = call(students, teachers, labels=LABELS, label_weight=0.0)
    assert torch.equal(explicit, call(students, teachers, labels=None))


class Tagger(nn.Module):
    """A student of one layer, as the recipes call it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, output_hidden_states: bool) -> Any:
        states = self.words(input_ids)
        return SimpleNamespace(hidden_states=(states,), logits=self.head(states))


@pytest.fixture
def another_precision() -> Iterator[None]:
    """accelerate's state has one precision a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("another_precision")
def test_the_xtremedistil_recipe_in_bf16() -> None:
    """Logits in 16 bits against stored ones in float32."""
    batch = {
        "input_ids": torch.randint(20, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.long),
        "teacher_hidden": torch.randn(4, 6, 3), "teacher_logits": torch.randn(4, 6, 5),
        "labels": torch.randint(5, (4, 6)), "words": torch.ones(4, 6), "labelled_words": torch.ones(4, 6),
    }  # fmt: skip
    chosen = [representation("teacher_hidden", nn.Linear(8, 3)), terms.logits(), terms.labels(scale=0.5)]
    objective = terms.Distillation(Tagger(), chosen)
    seen = []
    objective.student.head.register_forward_hook(lambda *found: seen.append(found[-1].dtype))
    history = train(objective, range(4), lambda _: batch, Options(12, lr=0.1, batch_size=2, warmup=1, precision="bf16"))
    assert set(seen) == {torch.bfloat16}
    assert history[-1]["logits"] < 0.8 * history[0]["logits"]
