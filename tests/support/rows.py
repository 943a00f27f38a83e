"""Rows, heads, states and maps as training makes them: what the judge draws its cases from.

A case is a small record of names and numbers, drawn by hypothesis; its arrays come from its seed alone. So it can be
printed in one line, kept in tests/data/cases.jsonl, and drawn again anywhere.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from hypothesis import strategies as st

Array = Any  # numpy.ndarray of float64

DTYPES = ("float32", "bfloat16", "float16")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "mse")
LOSSES = (*DIVERGENCES, "nla", "lk_hybrid")  # of whole rows; the last one's beta is its eta
TAILS = ("bucket", "renormalize", "zero")
OFFSETS = (0.0, 0.3, -7.7, 40.0, -100.0, 1e3, -1e4)
NOISES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
REDUCTIONS = ("mean", "sum", "none")

# What a teacher's row looks like.
TEACHERS = ("usual", "flat", "nearly flat", "confident", "one-hot", "two tops", "rising", "wide")
# How the student's row follows from it.
STUDENTS = ("near", "same", "apart", "sure of another", "surer", "less sure", "one column off")
# Columns of -inf: of nobody, of both sides, of one.
ABSENT = ("nobody", "both", "student", "teacher")


@dataclass(frozen=True)
class Rows:
    """What all losses of distributions have in common."""

    seed: int
    rows: int
    columns: int
    teacher: str
    student: str
    spread: float  # of a usual row's logits
    confidence: float  # the mass outside of a confident row's largest column
    noise: float
    student_offset: float
    teacher_offset: float
    student_dtype: str
    teacher_dtype: str
    garbage: bool  # in rows of weight 0
    reduction: str

    @property
    def kind(self) -> str:
        return f"{self.teacher}, {self.student}"


@dataclass(frozen=True)
class LogitCase(Rows):
    divergence: str
    beta: float
    temperature: float
    teacher_temperature: float
    scale_by_t2: bool
    absent: str
    mapped: bool
    label_weight: float
    label: str = "any"  # or "top": the student's largest column

    loss = "logit"


@dataclass(frozen=True)
class TopkCase(Rows):
    divergence: str
    beta: float
    temperature: float
    scale_by_t2: bool
    mapped: bool
    label_weight: float
    tail: str
    k: int
    values_dtype: str
    given_tail: str  # the dtype of teacher_tail, "" for none
    label: str = "any"

    loss = "topk"


@dataclass(frozen=True)
class HiddenCase(Rows):
    form: str  # "mse", "cosine" or "kl"
    student_length: float
    teacher_length: float
    width: int  # of the student's state where it is projected, else 0
    bias: bool
    gelu: bool

    loss = "hidden"


@dataclass(frozen=True)
class HeadCase:
    """Hidden states and a head's weights; near convergence in the states, in the heads, or in both."""

    seed: int
    rows: int
    columns: int
    student_width: int
    teacher_width: int
    head: str  # "shared", "equal", "near" or "apart"
    states: str  # "near", "same" or "apart"
    spread: float
    noise: float
    confidence: float
    bias: bool
    frozen: bool
    softcap: float
    logit_scale: float
    student_dtype: str
    teacher_dtype: str
    garbage: bool
    reduction: str
    divergence: str
    beta: float
    temperature: float
    scale_by_t2: bool
    mapped: bool
    label_weight: float

    @property
    def kind(self) -> str:
        return f"{self.head} heads, {self.states} states"


@dataclass(frozen=True)
class LinearCase(HeadCase):
    teacher_temperature: float
    label: str = "any"

    loss = "linear"


@dataclass(frozen=True)
class LinearTopkCase(HeadCase):
    tail: str
    k: int
    values_dtype: str
    given_tail: str
    label: str = "any"

    loss = "linear_topk"


@dataclass(frozen=True)
class MapCase:
    """Attention maps, of queries and keys or of one tensor with itself."""

    seed: int
    form: str  # "prob_kl", "prob_mse" or "score_mse"
    student: str
    batch: int
    heads: int
    groups: int  # query heads that share a key head
    length: int
    student_width: int
    teacher_width: int
    spread: float
    noise: float
    sink: str  # whose first key nearly all queries look at: nobody's, both's, ...
    sink_score: float
    student_common: float  # length of a vector that all keys have in common
    teacher_common: float
    causal: bool
    padded: bool
    mask_queries: bool
    mean_of_heads: bool
    student_dtype: str
    teacher_dtype: str
    reduction: str

    @property
    def kind(self) -> str:
        return f"{self.student}, sink of {self.sink}"


@dataclass(frozen=True)
class AttentionCase(MapCase):
    loss = "attention"


@dataclass(frozen=True)
class RelationCase(MapCase):
    loss = "relation"


def as_line(case: Any) -> str:
    return json.dumps({"loss": case.loss, **asdict(case)})


def from_line(line: str) -> Any:
    record = json.loads(line)
    kind = CASES[record.pop("loss")]
    missing = {f.name for f in fields(kind)} ^ set(record)
    assert missing <= {"label"}, "another version's case"
    return kind(**record)


def size(case: Any) -> int:
    """Numbers that a kernel reads, roughly."""
    if isinstance(case, MapCase):
        return case.batch * case.heads * case.length * (case.length + case.student_width)
    return int(case.rows * case.columns)


def generator(case: Any, part: str = "") -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([case.seed, zlib.crc32(part.encode())]))


# ---- strategies

SEEDS = st.integers(0, 2**32 - 1)
COLUMNS = st.one_of(
    st.integers(1, 20), st.integers(1, 20), st.sampled_from([31, 32, 33, 100, 511, 1000]), st.integers(1, 5000)
)
DTYPE_PAIRS = st.one_of(
    st.just(("float32", "float32")), st.just(("float32", "float32")), st.sampled_from([(d, d) for d in DTYPES]),
    st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
)  # fmt: skip
CONFIDENCES = st.sampled_from([10.0**-n for n in range(1, 13)])
LABELS = st.sampled_from(["any", "top"])
SPREADS = st.sampled_from([0.1, 1.0, 4.0, 20.0])


@st.composite
def temperatures(draw: Any) -> tuple[float, float]:
    """Equal, nearly equal, different; 0.05 to 20."""
    first = draw(st.sampled_from([1.0, 1.0, 2.0, 0.7, 0.05, 20.0, 3.3]))
    how = draw(st.sampled_from(["equal", "equal", "nearly", "different"]))
    if how == "equal":
        return first, first
    if how == "nearly":
        return first, first * (1 + draw(st.sampled_from([1e-6, -7e-6, 5e-5])))
    return first, draw(st.sampled_from([0.05, 0.5, 1.5, 4.0, 20.0]))


@st.composite
def common(draw: Any, columns: Any = COLUMNS) -> dict[str, Any]:
    dtypes = draw(DTYPE_PAIRS)
    offsets = draw(st.sampled_from(["neither", "neither", "teacher", "student", "both"]))
    return {
        "seed": draw(SEEDS), "rows": draw(st.integers(1, 3)), "columns": draw(columns),
        "teacher": draw(st.sampled_from(TEACHERS)), "student": draw(st.sampled_from(("near", *STUDENTS))),
        "spread": draw(SPREADS), "confidence": draw(CONFIDENCES), "noise": draw(st.sampled_from(NOISES)),
        "student_offset": draw(st.sampled_from(OFFSETS)) if offsets in ("student", "both") else 0.0,
        "teacher_offset": draw(st.sampled_from(OFFSETS)) if offsets in ("teacher", "both") else 0.0,
        "student_dtype": dtypes[0], "teacher_dtype": dtypes[1], "garbage": draw(st.booleans()),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
    }  # fmt: skip


BETAS = {
    "jsd": (0.5, 0.1, 0.9, 0.3, 1e-4, 0.9999, 1 - 1e-6),
    "skew_kl": (0.1, 0.5, 0.0, 0.9),
    "skew_reverse_kl": (0.1, 0.5, 0.0, 0.9),
    "lk_hybrid": (3.0, 0.5, 10.0),
}


@st.composite
def logit_cases(draw: Any) -> LogitCase:
    divergence = draw(st.sampled_from(LOSSES))
    t_s, t_t = draw(temperatures())
    absent = draw(st.sampled_from(("nobody", "nobody", "nobody", *ABSENT)))
    return LogitCase(
        **draw(common()), divergence=divergence, beta=draw(st.sampled_from(BETAS.get(divergence, (0.5,)))),
        temperature=t_s, teacher_temperature=t_t, scale_by_t2=draw(st.booleans()),
        absent="both" if divergence == "mse" and absent != "nobody" else absent,
        mapped=draw(st.sampled_from([False, False, True])),
        label_weight=draw(st.sampled_from([0.0, 0.0, 0.0, 0.3, 1.0])), label=draw(LABELS),
    )  # fmt: skip


@st.composite
def of_known_columns(draw: Any) -> dict[str, Any]:
    tail = draw(st.sampled_from(["bucket", "bucket", "renormalize", "zero"]))
    divergence = "forward_kl"
    if tail != "zero":
        divergence = draw(st.sampled_from([d for d in DIVERGENCES if d not in (("mse",) if tail == "bucket" else ("mse", "reverse_kl"))]))  # fmt: skip
    betas = BETAS.get(divergence, (0.5,))
    if tail == "renormalize" and divergence == "skew_reverse_kl":
        betas = tuple(x for x in betas if x > 0)
    return {
        "divergence": divergence, "beta": draw(st.sampled_from(betas)),
        "temperature": draw(st.sampled_from([1.0, 1.0, 2.0, 0.7, 0.05, 20.0])), "scale_by_t2": draw(st.booleans()),
        "mapped": draw(st.sampled_from([False, False, True])),
        "label_weight": draw(st.sampled_from([0.0, 0.0, 0.0, 0.3, 1.0])), "tail": tail,
        "k": draw(st.one_of(st.integers(1, 8), st.integers(1, 64), st.just(5000))),
        "values_dtype": draw(st.sampled_from(["float32", "float32", "float64", "bfloat16", "float16"])),
        "given_tail": draw(st.sampled_from(["", "", "float32", "float64"])) if tail != "renormalize" else "",
        "label": draw(LABELS),
    }  # fmt: skip


@st.composite
def topk_cases(draw: Any) -> TopkCase:
    return TopkCase(**draw(common()) | {"teacher_offset": 0.0}, **draw(of_known_columns()))


LENGTHS = (1.0, 1.0, 1e-6, 1e-3, 30.0, 1e3, 1e6)


@st.composite
def hidden_cases(draw: Any) -> HiddenCase:
    form = draw(st.sampled_from(["mse", "cosine", "kl"]))
    lengths = draw(st.tuples(st.sampled_from(LENGTHS), st.sampled_from(LENGTHS))) if form == "cosine" else (1.0, 1.0)
    if form == "cosine" and draw(st.integers(0, 9)) == 0:
        lengths = draw(st.sampled_from([(1e19, 1.0), (1e-22, 1.0), (1e19, 1e-19), (1.0, 1e19), (1e-19, 1e-22)]))
    projected = draw(st.booleans())
    values = draw(common(st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 384, 768]))))
    if form != "kl":
        values |= {"student_offset": 0.0, "teacher_offset": 0.0}
    return HiddenCase(
        **values, form=form, student_length=lengths[0], teacher_length=lengths[1],
        width=draw(st.integers(1, 24)) if projected else 0, bias=projected and draw(st.booleans()),
        gelu=projected and draw(st.booleans()),
    )  # fmt: skip


@st.composite
def map_cases(draw: Any, kind: Any) -> Any:
    relation = kind is RelationCase
    length, widest = draw(st.sampled_from([(12, 64), (12, 16), (24, 24), (70, 8), (3, 64)]))
    width = draw(st.integers(1, widest))
    student = draw(st.sampled_from(["near", "near", "same", "apart", "other basis", "other basis"]))
    another = student in ("apart", "other basis") and draw(st.booleans())
    heads_mean = not relation and draw(st.integers(0, 4)) == 0
    padded = draw(st.booleans())
    dtypes = draw(DTYPE_PAIRS)
    commons = draw(st.sampled_from(["neither", "neither", "neither", "student", "both"]))
    return kind(
        seed=draw(SEEDS), form=draw(st.sampled_from(["prob_kl", "prob_mse", "score_mse"])), student=student,
        batch=draw(st.integers(1, 2)), heads=(heads := draw(st.sampled_from([1, 2, 2, 4]))),
        groups=1 if relation else draw(st.sampled_from([g for g in (1, 1, 2, 4) if heads % g == 0])),
        length=draw(st.integers(1, length)), student_width=draw(st.integers(1, widest)) if another else width,
        teacher_width=width, spread=draw(st.sampled_from([0.3, 1.0, 2.0, 4.0])), noise=draw(st.sampled_from(NOISES)),
        sink="nobody" if relation else draw(st.sampled_from(("nobody", "nobody", *ABSENT))),
        sink_score=draw(st.sampled_from([8.0, 12.0, 16.0, 22.0])),
        student_common=draw(st.sampled_from([1.0, 10.0, 100.0])) if commons != "neither" else 0.0,
        teacher_common=draw(st.sampled_from([1.0, 10.0, 100.0])) if commons == "both" else 0.0,
        causal=draw(st.booleans()), padded=padded, mask_queries=not padded or draw(st.booleans()),
        mean_of_heads=heads_mean, student_dtype=dtypes[0], teacher_dtype=dtypes[1],
        reduction=draw(st.sampled_from(REDUCTIONS)),
    )  # fmt: skip


@st.composite
def head_cases(draw: Any) -> dict[str, Any]:
    head = draw(st.sampled_from(["shared", "shared", "equal", "near", "near", "apart"]))
    width = draw(st.integers(1, 32))
    dtypes = draw(DTYPE_PAIRS) if head in ("near", "apart") else (draw(st.sampled_from(("float32", *DTYPES))),) * 2
    return {
        "seed": draw(SEEDS), "rows": draw(st.integers(1, 4)),
        "columns": draw(st.one_of(st.integers(1, 20), st.sampled_from([33, 100, 300]))),
        "student_width": width if head != "apart" or draw(st.booleans()) else draw(st.integers(1, 32)),
        "teacher_width": width, "head": head, "states": draw(st.sampled_from(["near", "near", "near", "same", "apart"])),
        "spread": draw(st.sampled_from([0.3, 1.0, 4.0, 12.0])), "noise": draw(st.sampled_from(NOISES)),
        "confidence": draw(CONFIDENCES),
        "bias": draw(st.booleans()), "frozen": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 0.0, 0.0, 5.0, 30.0])),
        "logit_scale": draw(st.sampled_from([1.0, 1.0, 0.25, 8.0])),
        "student_dtype": dtypes[0], "teacher_dtype": dtypes[1], "garbage": draw(st.booleans()),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
    }  # fmt: skip


@st.composite
def linear_cases(draw: Any) -> LinearCase:
    divergence = draw(st.sampled_from(LOSSES))
    t_s, t_t = draw(temperatures())
    values = draw(head_cases())
    return LinearCase(
        **values, divergence=divergence, beta=draw(st.sampled_from(BETAS.get(divergence, (0.5,)))), temperature=t_s,
        teacher_temperature=t_t, scale_by_t2=draw(st.booleans()),
        mapped=values["head"] in ("near", "apart") and draw(st.integers(0, 2)) == 0,
        label_weight=draw(st.sampled_from([0.0, 0.0, 0.0, 0.3, 1.0])), label=draw(LABELS),
    )  # fmt: skip


@st.composite
def linear_topk_cases(draw: Any) -> LinearTopkCase:
    values, teacher = draw(head_cases()), draw(of_known_columns())
    if teacher["mapped"] and values["head"] in ("shared", "equal"):
        values["head"] = "near"
    return LinearTopkCase(**values, **teacher)


# ---- arrays


def teacher_scores(case: Rows, rng: np.random.Generator, kind: str) -> Array:
    """Rows (N, V) of tempered logits."""
    shape = (case.rows, case.columns)
    x = case.spread * rng.standard_normal(shape)
    every = np.arange(case.rows)
    top = rng.integers(0, case.columns, case.rows)
    if kind == "flat":
        return np.zeros(shape)
    if kind == "nearly flat":
        return 1e-3 * rng.standard_normal(shape)
    if kind == "confident":
        return surest(x, top, case.confidence)
    if kind == "one-hot":
        return surest(np.zeros(shape), top, case.confidence)
    if kind == "two tops":
        x[every, top] = x[every, (top + 1) % case.columns] = x.max(-1) + 8
    if kind == "rising":
        x += np.linspace(0, 30, case.columns)
    if kind == "wide":
        x *= 25
    return x


def surest(x: Array, top: Array, rest: float) -> Array:
    """x with the logits at `top` such that the other columns have the mass `rest`."""
    if x.shape[-1] == 1:
        return x
    x, every = x.copy(), np.arange(len(x))
    x[every, top] = -np.inf
    largest = x.max(-1)
    mass = np.log(np.exp(x - largest[:, None]).sum(-1)) + largest
    x[every, top] = mass + np.log1p(-rest) - np.log(rest)
    return x


def student_scores(case: Rows, rng: np.random.Generator, b: Array) -> Array:
    if case.student == "same":
        return b
    if case.student == "apart":
        return teacher_scores(case, rng, TEACHERS[int(rng.integers(len(TEACHERS)))])
    if case.student == "sure of another":
        return surest(b, (b.argmax(-1) + 1 + rng.integers(0, max(1, case.columns - 1), case.rows)) % case.columns, case.confidence)  # fmt: skip
    if case.student == "surer":
        return 2 * b
    if case.student == "less sure":
        return 0.3 * b
    a = b + case.noise * rng.standard_normal(b.shape)
    if case.student == "one column off":
        a[np.arange(case.rows), rng.integers(0, case.columns, case.rows)] -= 30
    return a


def factors(case: MapCase, rng: np.random.Generator) -> list[Array]:
    """Queries and keys of student and teacher, (B, H, S, d); keys of a relation are its queries."""
    sizes = case.student_width, case.teacher_width
    relation = isinstance(case, RelationCase)
    found = []
    basis = other_bases(sizes, rng) if case.student == "other basis" else None
    for keys in (False,) if relation else (False, True):
        shape = (case.batch, case.heads // (case.groups if keys else 1), case.length)
        if basis is not None:
            shared = case.spread * rng.standard_normal((*shape, len(basis[0])))
            moved = shared + case.noise * case.spread * rng.standard_normal(shared.shape)
            stretch = (sizes[0] / sizes[1]) ** 0.25  # of both factors: the scale is 1 / sqrt(d)
            student, teacher = stretch * moved @ basis[0], shared @ basis[1]
        else:
            teacher = case.spread * rng.standard_normal((*shape, sizes[1]))
            student = case.spread * rng.standard_normal((*shape, sizes[0]))
            if case.student != "apart":
                student = teacher + (case.noise if case.student == "near" else 0.0) * student
        found.append([student, teacher])
    for side, name in enumerate(("student", "teacher")):
        unit = rng.standard_normal(sizes[side])
        unit /= np.linalg.norm(unit)
        if case.sink in ("both", name):
            length = (case.sink_score * sizes[side] ** 0.5) ** 0.5
            found[0][side] = found[0][side] + length * unit
            found[1][side][:, :, 0] += length * unit
        common = case.student_common if side == 0 else case.teacher_common
        if common:
            found[-1][side] = found[-1][side] + common * case.spread * rng.permutation(unit)
    queries, keys = found[0], found[-1]
    return [queries[0], keys[0], queries[1], keys[1]]


def other_bases(sizes: tuple[int, int], rng: np.random.Generator) -> list[Array]:
    rank = min(sizes)
    return [np.linalg.qr(rng.standard_normal((size, rank)))[0].T for size in sizes]


def heads(case: HeadCase, rng: np.random.Generator) -> list[Array]:
    """States, weights and biases: student's, then teacher's."""
    size = case.spread / math.sqrt(case.teacher_width)
    w_t = rng.standard_normal((case.columns, case.teacher_width))
    h_t = case.spread / math.sqrt(case.teacher_width) * rng.standard_normal((case.rows, case.teacher_width))
    b_t = rng.standard_normal(case.columns)
    if case.head == "apart":
        w_s = rng.standard_normal((case.columns, case.student_width))
        b_s = rng.standard_normal(case.columns)
    else:
        step = case.noise if case.head == "near" else 0.0
        w_s, b_s = w_t + step * rng.standard_normal(w_t.shape), b_t + step * rng.standard_normal(b_t.shape)
    noise = {"near": case.noise, "same": 0.0, "apart": 1.0}[case.states]
    if case.head == "apart" or case.states == "apart":
        h_s = size * rng.standard_normal((case.rows, case.student_width))
    else:
        h_s = h_t + noise * size * rng.standard_normal(h_t.shape)
    return [h_s, w_s, b_s, h_t, w_t, b_t]


CASES = {
    "logit": LogitCase,
    "hidden": HiddenCase,
    "topk": TopkCase,
    "attention": AttentionCase,
    "relation": RelationCase,
    "linear": LinearCase,
    "linear_topk": LinearTopkCase,
}
STRATEGIES = {
    "logit": logit_cases,
    "hidden": hidden_cases,
    "topk": topk_cases,
    "attention": lambda: map_cases(AttentionCase),
    "relation": lambda: map_cases(RelationCase),
    "linear": linear_cases,
    "linear_topk": linear_topk_cases,
}
