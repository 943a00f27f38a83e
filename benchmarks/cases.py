"""What is measured, as data: op -> shapes named after real models -> contenders -> bytes and operations by formula.

Axis letters as in docs/losses.md: N rows (tokens), V vocabulary, K known columns, B batch, H heads, S sequence, d head
size, D hidden size, L layers. A contender's name is resolved in contenders.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

OPS = ("logits", "topk", "linear", "hidden", "attention")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}  # bytes


@dataclass(frozen=True)
class Bar:
    """`contender` must be `at_least` times as fast as `against`, or need at most 1/`at_least` of its extra memory."""

    contender: str
    against: str
    at_least: float
    quantity: str = "both"  # a pass, or "memory"


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    shape: dict[str, int]
    contenders: tuple[str, ...]
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    repetitions: int = 7
    memory: bool = True
    bars: tuple[Bar, ...] = ()

    @staticmethod
    def from_json(data: dict[str, Any]) -> Case:
        bars = tuple(Bar(**bar) for bar in data.get("bars", ()))
        return Case(**{**data, "contenders": tuple(data["contenders"]), "bars": bars})


def traffic_bytes(case: Case, what: str) -> int:
    """Bytes that any implementation must move: each input read once; for "both" each gradient written once as well."""
    s, size = case.shape, ITEMSIZE[case.dtype]
    gradient = what == "both"
    if case.op == "logits":
        return s["N"] * s["V"] * size * (3 if gradient else 2)
    if case.op == "topk":
        return s["N"] * (s["V"] * size * (2 if gradient else 1) + s["K"] * (4 + 8))  # float32 values, int64 indices
    if case.op == "hidden":
        student, teacher = s["N"] * s["D_s"] * s["L"], s["N"] * s["D_t"] * s["L"]
        projection = s["D_s"] * s["D_t"] * s["L"] if case.options.get("projection") else 0
        return size * (student + teacher + projection + gradient * (student + projection))
    if case.op == "linear":
        student, teacher = (s["N"] + s["V"]) * s["D_s"], (s["N"] + s["V"]) * s["D_t"]
        own = s["N"] * s["D_s"] if case.options.get("frozen") else student
        return size * (student + teacher + gradient * own)
    heads = s["B"] * s["H"] * s["S"]
    return size * heads * (2 * s["d_s"] + 2 * s["d_t"] + gradient * 2 * s["d_s"])


def operations(case: Case, what: str) -> int:
    """Multiplications and additions of the matrix products, without recomputation; for logits, which have none, about
    10 operations an entry forward and 16 in all (never what limits them)."""
    s = case.shape
    gradient = what == "both"
    if case.op in ("logits", "topk"):
        return s["N"] * s["V"] * (16 if gradient else 10)
    if case.op == "hidden":
        products = (3 if gradient else 1) if case.options.get("projection") else 0
        return 2 * s["N"] * s["D_s"] * s["D_t"] * s["L"] * products
    if case.op == "linear":
        return _linear_operations(case, gradient)
    heads = s["B"] * s["H"]
    maps = 2 * heads * s["S"] ** 2 * (s["d_s"] + s["d_t"] + gradient * 2 * s["d_s"])
    if case.options["kind"] == "score_mse" and s["d_s"] == s["d_t"]:
        # No map at all: half of each factor's symmetric Gram matrix, 2 S d^2 multiply-adds each, and from these each
        # gradient for 2 S d^2 more (attention_low_rank.cpp). Fewer than the maps' from S = 2 d on.
        return min(maps, heads * s["S"] * s["d_s"] ** 2 * (16 if gradient else 8))
    return maps


def _linear_operations(case: Case, gradient: bool) -> int:
    """Of the logits' products and those back; of the Gram matrices and what is made of them for the mse of two heads of
    one width, which needs no logits (a frozen pair's matrices are there already)."""
    s, trained = case.shape, not case.options.get("frozen")
    if case.options["divergence"] == "mse" and s["D_s"] == s["D_t"]:
        return s["D_s"] ** 2 * (8 * s["N"] + s["V"] * (6 + 4 * gradient) * trained)
    back = 2 * s["D_s"] * gradient if trained else s["D_s"] * gradient
    return 2 * s["N"] * s["V"] * (s["D_s"] + s["D_t"] + back)


VOCABULARIES = {"mbert": 119_547, "llama3": 128_256, "xlmr": 250_002, "llama2": 32_000}  # columns of the logits

_CPU_LOGITS = (
    "eager", "eager_common", "compile", "fastdistil:cpu", "fastdistil:cpu:inplace",
)  # fmt: skip
_CPU_TOPK = ("eager", "compile", "fastdistil:cpu")
_CPU_OTHER = ("eager", "compile", "fastdistil:reference", "fastdistil:cpu")
_CPU_LINEAR = ("products", "eager", "compile", "linear_cross_entropy", "fastdistil:cpu")
_GPU_LINEAR = (
    "products", "eager", "eager_upcast", "compile", "liger_jsd", "orda", "fla_kl", "linear_cross_entropy",
    "fastdistil:triton", "fastdistil:cuda",
)  # fmt: skip
_CPU_BF16 = ("eager", "eager_upcast", "compile", "fastdistil:cpu", "fastdistil:cpu:inplace")
_GPU_LOGITS = (
    "eager", "eager_common", "eager_upcast", "compile", "liger_kl", "liger_jsd", "fastdistil:triton", "fastdistil:cuda",
    "fastdistil:triton:inplace", "fastdistil:cuda:inplace", "fastdistil:cuda:two_reads",
)  # fmt: skip
_GPU_OTHER = ("eager", "compile", "fastdistil:triton")
_KL = {"divergence": "forward_kl", "temperature": 2.0}
_JSD = {"divergence": "jsd", "temperature": 1.0}


def _logits(model: str, rows: int, dtype: str, options: dict[str, Any], names: tuple[str, ...], **rest: Any) -> Case:
    short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    label = {"forward_kl": "kl", "jsd": "jsd"}[options["divergence"]]
    shape = {"N": rows, "V": VOCABULARIES[model]}
    return Case("logits", f"{model}-{label}-{short}", shape, names, dtype, options, **rest)


def _linear(
    model: str,
    rows: int,
    sizes: tuple[int, int],
    dtype: str,
    options: dict[str, Any],
    names: tuple[str, ...],
    **rest: Any,
) -> Case:
    short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    label = {"forward_kl": "kl", "jsd": "jsd", "mse": "mse"}[options["divergence"]]
    name = f"{model}-{label}-{sizes[0]}-{sizes[1]}{'-frozen' * options.get('frozen', False)}-{short}"
    shape = {"N": rows, "V": VOCABULARIES[model], "D_s": sizes[0], "D_t": sizes[1]}
    return Case("linear", name, shape, names, dtype, options, **rest)


CPU_LINEAR_BARS = (
    Bar("fastdistil:cpu", "products", 1 / 1.08),
    Bar("fastdistil:cpu", "eager", 1.45),
    Bar("fastdistil:cpu", "compile", 1.0),
)


def _topk(model: str, rows: int, dtype: str, names: tuple[str, ...], **rest: Any) -> Case:
    shape = {"N": rows, "V": VOCABULARIES[model], "K": 64}
    return Case("topk", f"{model}-bucket-{dtype}", shape, names, dtype, {"tail": "bucket", "temperature": 2.0}, **rest)


CPU_LOGIT_BARS = (
    Bar("fastdistil:cpu", "eager", 7.0),
    Bar("fastdistil:cpu", "compile", 1.6),
    Bar("fastdistil:cpu:inplace", "eager", 14.0),
    Bar("fastdistil:cpu:inplace", "compile", 3.0),
)


# (kind, S) -> at least so many times as fast as eager, and as torch.compile
CPU_ATTENTION_BARS = {
    ("prob_mse", 128): (1.5, None), ("prob_mse", 512): (3.0, 1.8), ("prob_mse", 2048): (4.0, None),
    ("prob_kl", 128): (2.0, None), ("prob_kl", 512): (4.0, 1.8), ("prob_kl", 2048): (5.0, None),
    ("score_mse", 128): (1.5, None), ("score_mse", 512): (10.0, None), ("score_mse", 2048): (45.0, None),
}  # fmt: skip


def _less_memory(kind: str, length: int) -> float:
    return 10.0 if length == 512 else 40.0 if kind == "score_mse" else 50.0


def _attention_bars(kind: str, length: int) -> tuple[Bar, ...]:
    """Of time; and of memory beyond the inputs: at most 1/10 of eager's at S 512, 1/50 at 2048 (1/40 for score_mse, of
    whose eager form the gradients alone are 1/48)."""
    times = zip(("eager", "compile"), CPU_ATTENTION_BARS[kind, length], strict=True)
    found = [Bar("fastdistil:cpu", against, at_least) for against, at_least in times if at_least is not None]
    if length >= 512:
        found.append(Bar("fastdistil:cpu", "eager", _less_memory(kind, length), "memory"))
    return tuple(found)


def _hidden(name: str, rows: int, size_s: int, layers: int, names: tuple[str, ...], dtype: str, **rest: Any) -> Case:
    shape = {"N": rows, "D_s": size_s, "D_t": 768, "L": layers}
    return Case("hidden", name, shape, names, dtype, {"kind": "mse", "projection": size_s != 768}, **rest)


def _attention(kind: str, batch: int, length: int, names: tuple[str, ...], dtype: str, **rest: Any) -> Case:
    """BERT base: 12 heads of size 64."""
    shape = {"B": batch, "H": 12, "S": length, "d_s": 64, "d_t": 64}
    return Case("attention", f"bert-{kind}-{length}", shape, names, dtype, {"kind": kind}, **rest)


def cpu_cases() -> list[Case]:
    """The most valuable first."""
    half = (Bar("fastdistil:cpu", "eager", 2.0, "memory"),)
    logits = [
        _logits("mbert", 512, "float32", _KL, _CPU_LOGITS, bars=CPU_LOGIT_BARS),
        _logits("mbert", 64, "bfloat16", _KL, _CPU_BF16, memory=False),
        # The reference needs seconds a call: one case, to say what it costs.
        _logits("xlmr", 32, "float32", _KL, (*_CPU_LOGITS, "fastdistil:reference"), memory=False),
        _logits("mbert", 64, "float32", _JSD, (*_CPU_LOGITS[:1], *_CPU_LOGITS[2:]), memory=False),
        _logits("llama2", 256, "float32", _KL, _CPU_LOGITS, memory=False),
    ]
    mse = {"divergence": "mse", "temperature": 1.0}
    linear = [
        _linear("mbert", 512, (768, 768), "float32", _KL, _CPU_LINEAR, bars=CPU_LINEAR_BARS, repetitions=5),
        *(
            _linear(
                "mbert", 4096, (768, 768), "float32", mse | more, ("eager", "fastdistil:cpu"),
                bars=(Bar("fastdistil:cpu", "eager", bar),), repetitions=2, memory=False,
            )
            for more, bar in (({}, 3.0), ({"frozen": True}, 20.0))
        ),
    ]  # fmt: skip
    hidden = [
        _hidden("minilm-mbert-mse", 4096, 384, 1, _CPU_OTHER, "float32", bars=half),
        _hidden("lightmbert-mse", 2048, 768, 6, _CPU_OTHER, "float32", bars=(Bar("fastdistil:cpu", "eager", 1.1),)),
    ]
    attention = [
        _attention(
            kind, batch, length, _CPU_OTHER[:2] + _CPU_OTHER[3:], "float32", repetitions=5, memory=length > 128,
            bars=_attention_bars(kind, length),
        )
        for length, batch in ((128, 8), (512, 8), (2048, 2))
        for kind in ("prob_mse", "prob_kl", "score_mse")
    ]  # fmt: skip
    topk = [_topk("mbert", 512, "float32", _CPU_TOPK)]
    return [*logits, *topk, *linear, *hidden, *attention]


_FORWARD_KL = ("eager_common", "liger_kl", "fla_kl", "linear_cross_entropy")


def _same_work(name: str, dtype: str, options: dict[str, Any]) -> bool:
    """These contenders exist for 16-bit logits, or for the forward KL, alone."""
    if name == "eager_upcast":
        return dtype != "float32"
    return name not in _FORWARD_KL or options["divergence"] == "forward_kl"


_SLOW = ("eager_upcast", "compile")  # to run in float32, to compile: for the first heads alone
HEADS = ((384, 768), (768, 768), (768, 1024), (2048, 4096))  # widths of student and teacher
_FIRST_HEADS = [
    ("mbert", (768, 1024)), ("llama3", (2048, 4096)), ("mbert", (384, 768)), ("mbert", (768, 768)),
    ("xlmr", (768, 1024)),
]  # fmt: skip


def gpu_cases() -> list[Case]:
    """The most valuable first; the shapes of one H200 (139 GiB)."""
    more = {"repetitions": 20}
    logits = [
        _logits(model, 8192, dtype, options, tuple(n for n in _GPU_LOGITS if _same_work(n, dtype, options)), **more)
        for dtype in ("bfloat16", "float32")
        for options in (_KL, _JSD)
        for model in VOCABULARIES
    ]
    plain = {"divergence": "forward_kl", "temperature": 1.0}
    linear = [
        _linear(
            model, 8192, sizes, "bfloat16", options,
            tuple(n for n in _GPU_LINEAR if _same_work(n, "bfloat16", options) and (slow or n not in _SLOW)), **more,
        )
        for slow, options, heads in (
            (True, plain, _FIRST_HEADS),
            (False, _JSD, _FIRST_HEADS),
            (False, plain, [(v, d) for d in HEADS for v in VOCABULARIES if (v, d) not in _FIRST_HEADS]),
        )
        for model, sizes in heads
    ]  # fmt: skip
    hidden = [
        _hidden("minilm-mbert-mse", 8192, 384, 12, _GPU_OTHER, "bfloat16", **more),
        _hidden("lightmbert-mse", 8192, 768, 12, _GPU_OTHER, "bfloat16", **more),
    ]
    attention = [
        _attention(kind, batch, length, _GPU_OTHER, "bfloat16", **more)
        for length, batch in ((512, 32), (128, 32), (2048, 32), (8192, 1))
        for kind in ("prob_mse", "prob_kl", "score_mse")
    ]
    topk = [_topk(model, 8192, "bfloat16", _GPU_OTHER, **more) for model in ("mbert", "llama3")]
    return [*logits, *topk, *linear, *hidden, *attention]


SMALL = {"N": 6, "V": 515, "K": 7, "B": 2, "H": 2, "S": 33, "d_s": 16, "d_t": 16, "D_s": 24, "D_t": 32, "L": 2}


def small(case: Case, first: bool = True) -> Case:
    """The same case, tiny: a dry run of everything but the numbers, so without bars. What takes seconds whatever the
    size, torch.compile and memory in a child process, is for the first case of an op alone."""
    shape = {axis: min(size, SMALL[axis]) for axis, size in case.shape.items()}
    if case.op == "hidden" and not case.options["projection"]:
        shape["D_t"] = shape["D_s"]
    names = tuple(name for name in case.contenders if first or name != "compile")
    return replace(case, shape=shape, contenders=names, memory=case.memory and first, repetitions=3, bars=())


def select(device: str, ops: tuple[str, ...], tiny: bool = False) -> list[Case]:
    found = [case for case in (cpu_cases() if device == "cpu" else gpu_cases()) if case.op in ops]
    first = {case.op: case.name for case in reversed(found)}
    return [small(case, first[case.op] == case.name) for case in found] if tiny else found
