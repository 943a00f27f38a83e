"""What is measured, as data: op -> shapes named after real models -> implementations -> thresholds.

Axis letters as in docs/losses.md: N rows (tokens), V vocabulary, K top-k columns, B batch, H heads, S sequence, d head
size, D hidden size, L layers. losses.py, sparse.py and steps.py say what the names of implementations stand for.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

LOSSES = ("logits", "topk", "linear", "hidden", "attention")
OPS = (*LOSSES, "sparse", "steps")


@dataclass(frozen=True)
class Threshold:
    """`implementation` must be `at_least` times as fast as `baseline`, or need at most 1/`at_least` of its "memory" or
    "state"; without a baseline its quantity (MiB) is `at_most` that."""

    implementation: str
    baseline: str = ""
    at_least: float = 0.0
    quantity: str = "both"  # a pass, "memory" or "state"
    at_most: float | None = None


@dataclass(frozen=True)
class Case:
    """`baseline`: whose error is the measure of the others', and whose speed is 1."""

    op: str
    name: str
    shape: dict[str, int]
    implementations: tuple[str, ...]
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    repetitions: int = 7
    memory: bool = True
    thresholds: tuple[Threshold, ...] = ()
    baseline: str = "eager"

    @staticmethod
    def from_json(data: dict[str, Any]) -> Case:
        thresholds = tuple(Threshold(**x) for x in data.get("thresholds", ()))
        return Case(**{**data, "implementations": tuple(data["implementations"]), "thresholds": thresholds})


VOCABULARIES = {"mbert": 119_547, "llama3": 128_256, "xlmr": 250_002, "llama2": 32_000}  # columns of the logits
DENSITY = 0.08  # of the entries that sparse fine-tuning trains: BiStil's
BERT = 30_522  # English BERT's vocabulary

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


CPU_LINEAR_THRESHOLDS = (
    Threshold("fastdistil:cpu", "products", 1 / 1.08),
    Threshold("fastdistil:cpu", "eager", 1.45),
    Threshold("fastdistil:cpu", "compile", 1.0),
)


def _topk(model: str, rows: int, dtype: str, names: tuple[str, ...], **rest: Any) -> Case:
    shape = {"N": rows, "V": VOCABULARIES[model], "K": 64}
    return Case("topk", f"{model}-bucket-{dtype}", shape, names, dtype, {"tail": "bucket", "temperature": 2.0}, **rest)


CPU_LOGIT_THRESHOLDS = (
    Threshold("fastdistil:cpu", "eager", 7.0),
    Threshold("fastdistil:cpu", "compile", 1.6),
    Threshold("fastdistil:cpu:inplace", "eager", 14.0),
    Threshold("fastdistil:cpu:inplace", "compile", 3.0),
)


# (kind, S) -> at least so many times as fast as eager, and as torch.compile
CPU_ATTENTION_THRESHOLDS = {
    ("prob_mse", 128): (1.5, None), ("prob_mse", 512): (3.0, 1.8), ("prob_mse", 2048): (4.0, None),
    ("prob_kl", 128): (2.0, None), ("prob_kl", 512): (4.0, 1.8), ("prob_kl", 2048): (5.0, None),
    ("score_mse", 128): (1.5, None), ("score_mse", 512): (10.0, None), ("score_mse", 2048): (45.0, None),
}  # fmt: skip


def _less_memory(kind: str, length: int) -> float:
    return 10.0 if length == 512 else 40.0 if kind == "score_mse" else 50.0


def _attention_thresholds(kind: str, length: int) -> tuple[Threshold, ...]:
    """Of time; and of memory beyond the inputs: at most 1/10 of eager's at S 512, 1/50 at 2048 (1/40 for score_mse, of
    whose eager form the gradients alone are 1/48)."""
    times = zip(("eager", "compile"), CPU_ATTENTION_THRESHOLDS[kind, length], strict=True)
    found = [Threshold("fastdistil:cpu", against, at_least) for against, at_least in times if at_least is not None]
    if length >= 512:
        found.append(Threshold("fastdistil:cpu", "eager", _less_memory(kind, length), "memory"))
    return tuple(found)


def _hidden(name: str, rows: int, size_s: int, layers: int, names: tuple[str, ...], dtype: str, **rest: Any) -> Case:
    shape = {"N": rows, "D_s": size_s, "D_t": 768, "L": layers}
    return Case("hidden", name, shape, names, dtype, {"kind": "mse", "projection": size_s != 768}, **rest)


def _attention(kind: str, batch: int, length: int, names: tuple[str, ...], dtype: str, **rest: Any) -> Case:
    """BERT base: 12 heads of size 64."""
    shape = {"B": batch, "H": 12, "S": length, "d_s": 64, "d_t": 64}
    return Case("attention", f"bert-{kind}-{length}", shape, names, dtype, {"kind": kind}, **rest)


def parameters(shape: dict[str, int], pooler: bool = True) -> int:
    """Of BERT's V, D, L, with its position and type embeddings, norm and pooler, or without all four."""
    d = shape["D"]
    return d * shape["V"] + shape["L"] * (12 * d + 13) * d + pooler * d * (512 + 2 + 2 + d + 1)


def _selection(ours: str, **rest: Any) -> Case:
    """The entries of mBERT that training changed most; of 64 MiB more than their positions it may need no more."""
    shape = {"V": VOCABULARIES["mbert"], "D": 768, "L": 12}
    mib = 4 * DENSITY * parameters(shape) / (1 << 20) + 64
    speeds = (Threshold(ours, "composable", 10.0), Threshold(ours, "topk", 3.0))
    thresholds = (*speeds, Threshold(ours, quantity="memory", at_most=mib))
    return _sparse("select", "mbert-select", shape, (ours, "topk", "composable"), "topk", thresholds, **rest)


def _step(ours: str, name: str, vocabulary: int, **rest: Any) -> Case:
    shape = {"V": vocabulary, "D": 768, "L": 12}
    thresholds = (
        Threshold(ours, "fused:bool", 6.0), Threshold(ours, "fused:float", 2.5), Threshold(ours, "fused", 7.0, "state"),
    )  # fmt: skip
    return _sparse("step", name, shape, (ours, "fused", "fused:bool", "fused:float"), "fused", thresholds, **rest)


def _sparse(
    work: str, name: str, shape: dict[str, int], names: tuple[str, ...], baseline: str, thresholds: Any, **rest: Any
) -> Case:
    options = {"work": work, "density": DENSITY}
    return Case("sparse", name, shape, names, options=options, thresholds=thresholds, baseline=baseline, **rest)


def _steps(batch: int, dtype: str, ours: str, **rest: Any) -> list[Case]:
    """A teacher of mBERT's size, a student of half its blocks."""
    shape = {"B": batch, "S": 256, "L": 12, "D": 768, "H": 12, "V": VOCABULARIES["mbert"]}
    return [Case("steps", system, shape, ("eager", ours), dtype, **rest) for system in ("lightmbert", "bistil")]


def cpu_cases() -> list[Case]:
    """The most valuable first."""
    half = (Threshold("fastdistil:cpu", "eager", 2.0, "memory"),)
    logits = [
        _logits("mbert", 512, "float32", _KL, _CPU_LOGITS, thresholds=CPU_LOGIT_THRESHOLDS),
        _logits("mbert", 64, "bfloat16", _KL, _CPU_BF16, memory=False),
        # The reference needs seconds a call: one case, to say what it costs.
        _logits("xlmr", 32, "float32", _KL, (*_CPU_LOGITS, "fastdistil:reference"), memory=False),
        _logits("mbert", 64, "float32", _JSD, (*_CPU_LOGITS[:1], *_CPU_LOGITS[2:]), memory=False),
        _logits("llama2", 256, "float32", _KL, _CPU_LOGITS, memory=False),
    ]
    mse = {"divergence": "mse", "temperature": 1.0}
    linear = [
        _linear("mbert", 512, (768, 768), "float32", _KL, _CPU_LINEAR, thresholds=CPU_LINEAR_THRESHOLDS, repetitions=5),
        *(
            _linear(
                "mbert", 4096, (768, 768), "float32", mse | more, ("eager", "fastdistil:cpu"),
                thresholds=(Threshold("fastdistil:cpu", "eager", at_least),), repetitions=2, memory=False,
            )
            for more, at_least in (({}, 3.0), ({"frozen": True}, 20.0))
        ),
    ]  # fmt: skip
    hidden = [
        _hidden("minilm-mbert-mse", 4096, 384, 1, _CPU_OTHER, "float32", thresholds=half),
        _hidden(
            "lightmbert-mse",
            2048,
            768,
            6,
            _CPU_OTHER,
            "float32",
            thresholds=(Threshold("fastdistil:cpu", "eager", 1.1),),
        ),
    ]
    attention = [
        _attention(
            kind, batch, length, _CPU_OTHER[:2] + _CPU_OTHER[3:], "float32", repetitions=5, memory=length > 128,
            thresholds=_attention_thresholds(kind, length),
        )
        for length, batch in ((128, 8), (512, 8), (2048, 2))
        for kind in ("prob_mse", "prob_kl", "score_mse")
    ]  # fmt: skip
    topk = [_topk("mbert", 512, "float32", _CPU_TOPK)]
    ours = "fastdistil:cpu"
    train = {"V": BERT, "D": 768, "L": 12, "B": 2, "S": 64}
    names = ("fused:bool", ours, f"{ours}:backward")
    sparse = [
        _selection(ours, repetitions=5),
        _step(ours, "bert-step", BERT, repetitions=9),
        _sparse("train", "bert-backward", train, names, "fused:bool", (), repetitions=5),
    ]
    return [*logits, *topk, *linear, *hidden, *attention, *sparse, *_steps(8, "float32", ours, repetitions=3)]


_FORWARD_KL = ("eager_common", "liger_kl", "fla_kl", "linear_cross_entropy")


def _same_work(name: str, dtype: str, options: dict[str, Any]) -> bool:
    """These implementations exist for 16-bit logits, or for the forward KL, alone."""
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
    ours = "fastdistil:auto"
    sparse = [_selection(ours, repetitions=7), _step(ours, "mbert-step", VOCABULARIES["mbert"], repetitions=9)]
    steps = _steps(32, "bfloat16", "fastdistil:triton", **more)
    return [*logits, *topk, *linear, *hidden, *attention, *sparse, *steps]


SMALL = {"N": 6, "V": 515, "K": 7, "B": 2, "H": 2, "S": 33, "d_s": 16, "d_t": 16, "D_s": 24, "D_t": 32, "L": 2, "D": 32}


def small(case: Case, first: bool = True) -> Case:
    """The same case, tiny: a dry run of everything but the numbers, so without thresholds. What takes seconds whatever
    the size, torch.compile and memory in a child process, is for the first case of an op alone."""
    shape = {axis: min(size, SMALL[axis]) for axis, size in case.shape.items()}
    if case.op == "hidden" and not case.options["projection"]:
        shape["D_t"] = shape["D_s"]
    names = tuple(name for name in case.implementations if first or name != "compile")
    return replace(case, shape=shape, implementations=names, memory=case.memory and first, repetitions=3, thresholds=())


def select(device: str, ops: tuple[str, ...], tiny: bool = False) -> list[Case]:
    found = [case for case in (cpu_cases() if device == "cpu" else gpu_cases()) if case.op in ops]
    first = {case.op: case.name for case in reversed(found)}
    return [small(case, first[case.op] == case.name) for case in found] if tiny else found
