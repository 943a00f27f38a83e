"""What any implementation of a case must move and multiply, by formula; and how fast this machine could be at that."""

from __future__ import annotations

from fastdistil.benchmarks.cases import Case, parameters

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}  # bytes


def floor_us(case: Case, what: str, rates: dict[str, float]) -> float:
    """Nothing is faster than its memory traffic at copy speed, or its products at the matrix rate."""
    gigabytes, gigaflops = traffic_bytes(case, what) / 1e9, operations(case, what) / 1e9
    return max(gigabytes / rates["copy_gb_s"], gigaflops / rates["matrix_gflop_s"]) * 1e6


def _sparse_bytes(case: Case) -> int:
    count = parameters(case.shape, case.options["work"] != "train")
    k = round(float(case.options["density"]) * count)
    if case.options["work"] == "select":
        return count * (4 + 4) + k * 4  # both models read once, positions written
    # An entry: position and gradient read; value and both moments read and written.
    step = k * (4 + 4 + 2 * (4 + 4 + 4))
    blocks = count - case.shape["V"] * case.shape["D"]
    return step if case.options["work"] == "step" else step + 4 * (blocks + count)  # weights read, gradients written


def _encoder_operations(shape: dict[str, int], blocks: int) -> int:
    """Forward, of BERT's blocks: 12 D^2 weights for each token, and both products with the maps."""
    return 2 * blocks * shape["B"] * shape["S"] * (12 * shape["D"] ** 2 + 2 * shape["S"] * shape["D"])


def traffic_bytes(case: Case, what: str) -> int:
    """Bytes that any implementation must move: each input read once; for "both" each gradient written once as well."""
    s, size = case.shape, ITEMSIZE[case.dtype]
    gradient = what == "both"
    if case.op == "sparse":
        return _sparse_bytes(case)
    if case.op == "steps":  # every block's weights read once, every gradient written once
        return 4 * (s["L"] + s["L"] // 2 * 2) * (12 * s["D"] + 13) * s["D"]
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
    10 operations an entry forward and 16 in all (never what limits them); of a sparse selection or step none."""
    s = case.shape
    gradient = what == "both"
    if case.op == "sparse":
        return 3 * _encoder_operations(s, s["L"]) if case.options["work"] == "train" else 0
    if case.op == "steps":  # the teacher's forward, the student's, and twice that back
        return _encoder_operations(s, s["L"] + 3 * (s["L"] // 2))
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
