"""Custom ops of linear_logit_loss: the logits of two heads exist for one chunk of rows at a time.

A chunk is two products by the vendor's GEMM into float32, the row op of `logit_loss`, which overwrites the logits with
their gradient, and two products back (logit_terms.py has the loop). `linear_logit_total` computes the gradients with
the value and keeps them for the backward pass, which then needs no product again (ops/families.py);
`linear_logit_rows` has a gradient a row to honour, so its backward pass runs the chunks again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.backends import choose
from fastdistil.backends.memory import new_empty
from fastdistil.contracts.logit import DIVERGENCES, LogitRule
from fastdistil.ops import linear_mse, vocab_parallel
from fastdistil.ops.families import Found, family
from fastdistil.ops.linear_difference import NEAR, Difference, form_of
from fastdistil.ops.logit_terms import TAKES_DIFFERENCES, Terms, run, unpack
from fastdistil.ops.precision import with_exact_products
from fastdistil.ops.products import GATHERED_ROWS, add_product, product, product_back
from fastdistil.ops.row_statistics import ROW_STATISTICS

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # in student hidden, weight and bias
Flags = tuple[bool, bool, bool]
Heads = tuple[Tensor, Tensor | None, Tensor, Tensor | None]  # weight and bias, the student's first


class StudentHead:
    """Logits of the student's head: a product into float32, and two back. `scale` gives dtype and device.

    With `vocab_map` columns that have none are known to have no gradient: their rows of the weight may be anything."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        wanted: Flags,
        vocab_map: Tensor | None = None,
    ) -> None:
        self.student, self.weight, self.bias = hidden, weight, bias
        self.columns = weight.shape[0]
        self.counted: Tensor | None = None  # columns, where the others would make NaN of a gradient of 0
        if wanted[0] and vocab_map is not None:
            others = torch.split((vocab_map < 0).nonzero()[:, 0], GATHERED_ROWS)
            if not all(bool(weight[some].isfinite().all()) for some in others):
                self.counted = (vocab_map >= 0).nonzero()[:, 0]
        self.dstudent = scale.new_empty(hidden.shape) if wanted[0] else None
        self.dweight = new_empty(scale, weight.shape) if wanted[1] else None
        self.dbias = scale.new_zeros(self.columns) if wanted[2] else None
        if self.dweight is not None and len(hidden) == 0:
            self.dweight.zero_()

    @property
    def gradients(self) -> Gradients:
        return self.dstudent, self.dweight, self.dbias

    def logits(self, rows: slice, out: Tensor) -> None:
        product(self.student[rows], self.weight, out)
        if self.bias is not None:
            out += self.bias

    def back(self, rows: slice, gradient: Tensor) -> None:
        if self.dstudent is not None:
            product_back(gradient, self.weight, self.dstudent[rows], self.counted)
        if self.dweight is not None:
            add_product(gradient, self.student[rows], self.dweight, first=rows.start == 0)
        if self.dbias is not None:
            self.dbias += gradient.sum(0)


class _Source(StudentHead):
    """Logits of two heads; with a `difference` of the student's what is left without the teacher's."""

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        heads: Heads,
        scale: Tensor,
        vocab_map: Tensor | None,
        wanted: Flags,
        labelled: bool,
        renormalize: bool,
        difference: Difference | None,
    ) -> None:
        super().__init__(student, heads[0], heads[1], scale, wanted, None if labelled else vocab_map)
        self.teacher, self.teacher_weight, self.teacher_bias = teacher, *heads[2:]
        self.teacher_columns = len(self.teacher_weight)
        self.vocab_map, self.difference = vocab_map if renormalize else None, difference

    def fill(self, rows: slice, student: Tensor, teacher: Tensor) -> None:
        if self.difference is not None:
            self.difference.fill(rows, student, teacher)
            return
        self.logits(rows, student)
        product(self.teacher[rows], self.teacher_weight, teacher, self.vocab_map)
        if self.teacher_bias is not None:
            teacher += self.teacher_bias if self.vocab_map is None else self.teacher_bias[self.vocab_map.clamp(min=0)]


@with_exact_products
def _compute(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    row_scale: Tensor,
    labels: Tensor | None,
    label_scale: Tensor | None,
    vocab_map: Tensor | None,
    constants: list[float],
    statistics: bool,
    chunk_bytes: int,
    backend: str,
    dense: bool,
    group: str,
    wanted: list[bool],
    rounded: bool,
) -> Found:
    """Rows (N,) times their scales, statistics (see `logit_terms.run`), and those gradients of the rows' sum that are
    `wanted`, in row_scale's dtype.

    Rows that count for nothing are dropped before the products, unless the caller knows that there are none (`dense`):
    finding them waits for a GPU once."""
    name = choose(backend, row_scale.device, row_scale.dtype)
    rule, caps, renormalize = unpack(constants)
    terms = Terms(labels, label_scale, vocab_map, *caps, statistics, renormalize)
    heads = (student_weight, student_bias, teacher_weight, teacher_bias)
    student, teacher, scale = student_hidden, teacher_hidden, row_scale
    kept = None if dense else terms.counts(row_scale).nonzero()[:, 0]
    if kept is not None and len(kept) < len(row_scale):
        student, teacher, scale, terms = student[kept], teacher[kept], scale[kept], terms.rows(kept)
    else:
        kept = None
    flags = (wanted[0], wanted[1], wanted[2])
    mse = rule["divergence"] == DIVERGENCES.index("mse") and terms.plain and backend != "reference" and not group
    if mse and linear_mse.pays(student, student_weight, teacher, flags):
        rows, found = linear_mse.compute(student, teacher, *heads, scale, rule, chunk_bytes, flags)
        each = scale.new_empty(0, ROW_STATISTICS)
    else:
        difference = None
        if name in TAKES_DIFFERENCES:
            difference = _difference(student, teacher, heads, scale.dtype, rule, terms, group)
        labelled = label_scale is not None
        source = _Source(student, teacher, heads, scale, vocab_map, flags, labelled, renormalize, difference)
        need = any(flags)
        rows, each = run(source, scale, rule, terms, chunk_bytes, backend, need, group, difference is not None)
        found = source.gradients
        if group and source.dstudent is not None:  # each rank has the part that went through its columns
            torch.distributed.all_reduce(source.dstudent, group=vocab_parallel.resolve(group))
    if kept is None:
        return Found(rows, found, each)

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(len(row_scale), *x.shape[1:]).index_copy_(0, kept, x)

    dstudent = None if found[0] is None else spread(found[0])
    return Found(spread(rows), (dstudent, *found[1:]), spread(each) if statistics else each)


def _difference(
    student: Tensor, teacher: Tensor, heads: Heads, dtype: torch.dtype, rule: LogitRule, terms: Terms, group: str
) -> Difference | None:
    """What forms Z_s - Z_t where the student is so near that two products would lose it."""
    far = abs(rule["student_temperature"] / rule["teacher_temperature"] - 1) > NEAR
    if far or terms.caps[:2] != terms.caps[2:] or not terms.renormalize:
        return None
    # A part of a vocabulary has no constant of its own, and a softcap or a mean square sees it.
    free = rule["divergence"] != DIVERGENCES.index("mse") and terms.student_softcap == 0 and not group
    hidden, both = (student, teacher), (heads[:2], heads[2:])
    form = form_of(hidden, both, terms.vocab_map, dtype, free)
    return None if form is None else Difference(form, hidden, both, terms.vocab_map, free)


# student_hidden (N, D_s), student_weight (V_s, D_s), student_bias (V_s,), teacher_hidden (N, D_t), teacher_weight (V_t,
# D_t), teacher_bias (V_t,), row_scale (N,) float32 (float64 for float64 inputs), labels (N,) int64, label_scale (N,) as
# row_scale, vocab_map (V_s,) int64, `constants` of logit_terms.pack -> rows (N,) times their scales, and statistics (N,
# ROW_STATISTICS), or none of them.
TENSORS = "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor teacher_hidden"
TENSORS += ", Tensor teacher_weight, Tensor? teacher_bias, Tensor row_scale, Tensor? labels, Tensor? label_scale"
TENSORS += ", Tensor? vocab_map"
TENSOR_NAMES = [x.split()[-1] for x in TENSORS.split(",")]
OPTIONS = "float[] constants, bool statistics, int chunk_bytes, str backend, bool dense, str group"
GRADIENTS = ("student_hidden", "student_weight", "student_bias")
linear_logit_rows, linear_logit_total, _ = family(
    "linear_logit", "linear_logit_loss", TENSORS, OPTIONS, _compute, GRADIENTS
)
