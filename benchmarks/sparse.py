"""Sparse fine-tuning: choosing the entries, a step on them, and a step inside of the backward.

Contenders and shapes are in sparse_contenders.py. A selection or a step that is wrong is not timed.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from fastdistil.benchmarks.measure import OtherLoad, child, floor_of, peak_of_cuda_mib, quantiles
from fastdistil.benchmarks.record import Record, environment
from fastdistil.benchmarks.sparse_contenders import (
    BERT,
    DENSITY,
    MBERT,
    Shapes,
    bert_shapes,
    chosen_sum,
    composable,
    dense_step,
    mask_tensor,
    models,
    parameters,
    state_bytes,
    topk,
    training_step,
)  # fmt: skip
from torch import Tensor, nn

from fastdistil.sparse import SparseAdamW, SparseMask, random_mask, select_topk

MIB = 1 << 20
SELECT_BARS = {"composable": 10.0, "topk": 3.0}  # how many times as fast as these
SELECT, BACKWARD = "mbert-select", "bert-backward"
STEP = {"cpu": ("bert-step", BERT), "cuda": ("mbert-step", MBERT)}
STEP_BYTES = 4 + 4 + 2 * (4 + 4 + 4)  # an entry: position and gradient read; value and both moments read and written
STEP_BARS = {"fused:bool": 6.0, "fused:float": 2.5}
MEMORY_BAR_MIB = 64  # of a selection, beyond its result
STATE_BAR = 7.0  # dense AdamW's state over ours, positions included
TENTH = 10

Say = Callable[[str], None]
Rates = dict[str, float]
Runs = dict[str, tuple[Callable[[], object], int, float]]  # name -> what runs, how often, factor of its time


def select(device: str, tiny: bool, rates: Rates, say: Say) -> list[Record]:
    shapes = bert_shapes(MBERT, tiny)
    count = parameters(shapes)
    k = round(DENSITY * count)
    moved = count * (4 + 4) + k * 4  # both models read once, positions written
    shared = shared_fields(SELECT, {"parameters": count, "tensors": len(shapes), "k": k}, moved, rates, device, tiny)
    say(f"sparse {SELECT}: {count:,} parameters, k {k:,}")
    with OtherLoad() as other:
        times, tenth, error = selection_times(shapes, k, device)
    shared |= {"other_load_cores": other.cores, "chosen_error": error, "status": "ok"}
    if error > 1e-9:
        reason = f"the changes that it chose add up to {error:.1e} off torch.topk's"
        return [{**shared, "contender": ours(device), "status": "refused", "reason": reason}]
    records = [{**shared, "contender": n, "time_us": {"both": t}} for n, t in times.items()]
    records[-1]["scaled_from_parameters"] = tenth
    add_bars(records, SELECT_BARS)
    if device == "cuda":
        tuned, base = models(shapes, device)
        records[0]["peak_mem_mib"] = peak_of_cuda_mib(lambda: select_topk(tuned, base, k=k))
        records[1]["peak_mem_mib"] = peak_of_cuda_mib(lambda: topk(tuned, base, k))
    if device == "cpu" and Path("/proc/self/clear_refs").exists():
        for record in records[:2]:
            task = {"what": "select", "contender": record["contender"], "tiny": tiny}
            record["peak_mem_mib"] = child("sparse", task)["peak_mib"]
        extra = records[0]["peak_mem_mib"] - 4 * k / MIB
        records[0]["beyond_result_mib"] = extra
        reached = extra <= MEMORY_BAR_MIB
        records[0]["bars"].append(bar("its result", "MiB beyond", MEMORY_BAR_MIB, extra, reached))
    return records


def selection_times(shapes: Shapes, k: int, device: str) -> tuple[dict[str, dict[str, float]], int, float]:
    """Times by contender, the parameters that composable-sft's way was measured on, and how far off our choice is."""
    tuned, base = models(shapes, device)
    mask = select_topk(tuned, base, k=k)
    total, found = topk(tuned, base, k)
    error = abs(chosen_sum(mask, tuned, base) - total) / total
    if mask.nnz != found or error > 1e-9:
        return {}, 0, max(error, 1.0)
    del mask
    cut = [{n: x.reshape(-1)[: -(-x.numel() // TENTH)] for n, x in model.items()} for model in (tuned, base)]
    tenth = sum(x.numel() for x in cut[0].values())
    runs: Runs = {
        ours(device): (lambda: select_topk(tuned, base, k=k), 7, 1.0),
        "topk": (lambda: topk(tuned, base, k), 2, 1.0),
        "composable": (lambda: composable(cut[0], cut[1], round(DENSITY * tenth)), 2, parameters(shapes) / tenth),
    }
    return interleaved(runs, device), tenth, error


def step(device: str, tiny: bool, rates: Rates, say: Say) -> list[Record]:
    case, vocabulary = STEP[device]
    shapes = bert_shapes(vocabulary, tiny)
    count = parameters(shapes)
    moved = round(DENSITY * count) * STEP_BYTES
    shared = shared_fields(case, {"parameters": count, "tensors": len(shapes)}, moved, rates, device, tiny)
    say(f"sparse {case}: {count:,} parameters, density {DENSITY}")
    named, gradients = models(shapes, device)
    mask = random_mask(named, density=DENSITY)
    if device != "cpu":
        mask = SparseMask({n: index.to(device) for n, index in mask.items()}, mask.shapes)
    error = trajectory_error(named, gradients, mask)
    params = [nn.Parameter(x) for x in named.values()]
    for param, gradient in zip(params, gradients.values(), strict=True):
        param.grad = gradient
    own = SparseAdamW(dict(zip(named, params, strict=True)), mask)
    record = {**shared, "contender": ours(device), "status": "ok", "trajectory_error": error}
    if error > 1e-5:
        return [record | {"status": "refused", "reason": f"it is {error:.1e} off dense AdamW on the chosen entries"}]
    fused = torch.optim.AdamW(params, fused=True, weight_decay=0.0)
    bools = [mask_tensor(mask[name], x) for name, x in named.items()]
    floats = [x.float() for x in bools]
    runs: Runs = {
        ours(device): (own.step, 9, 1.0),
        "fused": (dense_step(params, fused, None), 9, 1.0),
        "fused:bool": (dense_step(params, fused, bools), 9, 1.0),
        "fused:float": (dense_step(params, fused, floats), 9, 1.0),
    }
    with OtherLoad() as other:
        times = interleaved(runs, device)
    records: list[Record] = [
        {**record, "contender": n, "time_us": {"both": t}, "other_load_cores": other.cores} for n, t in times.items()
    ]
    if device == "cuda":
        for found, (run, *_) in zip(records, runs.values(), strict=True):
            found["peak_mem_mib"] = peak_of_cuda_mib(run)
    add_bars(records, STEP_BARS)
    dense_bytes, own_bytes = state_bytes(fused), state_bytes(own) + sum(index.nbytes for index in mask.values())
    for found in records:
        found["state_mib"] = (own_bytes if found is records[0] else dense_bytes) / MIB
    ratio = dense_bytes / own_bytes
    records[0]["bars"].append(bar("fused", "state", STATE_BAR, ratio, ratio >= STATE_BAR))
    return records


def trajectory_error(named: dict[str, Tensor], gradients: dict[str, Tensor], mask: SparseMask) -> float:
    """Largest relative difference from dense AdamW on the chosen entries after 100 steps, over a few tensors."""
    worst = 0.0
    for name in [n for n in named if n.startswith("0.")]:
        ours_, dense = nn.Parameter(named[name].clone()), nn.Parameter(named[name].clone())
        sparse = SparseAdamW({name: ours_}, {name: mask[name]}, weight_decay=0.01)
        plain = torch.optim.AdamW([dense], weight_decay=0.01)
        for number in range(100):
            for param, optimizer in ((ours_, sparse), (dense, plain)):
                param.grad = gradients[name] * (1 + number % 5) * (-1) ** number
                optimizer.step()
        chosen = mask[name].long()
        a, b = (x.detach().reshape(-1)[chosen].double() for x in (ours_, dense))
        worst = max(worst, float((a - b).norm() / b.norm().clamp(min=1e-30)))
    return worst


def backward(device: str, tiny: bool, rates: Rates, say: Say) -> list[Record]:
    """Memory in a child process each, time side by side here."""
    if device != "cpu":
        return []
    runs: Runs = {}
    for name, inside in ((ours(device), False), (ours(device) + ":backward", True)):
        run, gradient_bytes = training_step(inside, tiny)
        runs[name] = (run, 5, 1.0)
    with OtherLoad() as other:
        times = interleaved(runs, device)
    shape = {"parameters": gradient_bytes // 4, "batch": 2, "tokens": 64}
    shared = shared_fields(BACKWARD, shape, 0, rates, device, tiny)
    say(f"sparse {BACKWARD}: {shape['parameters']:,} parameters, gradients of {gradient_bytes / MIB:,.0f} MiB")
    records = []
    for name, time_us in times.items():
        task = {"what": "backward", "contender": name, "tiny": tiny}
        records.append({
            **shared, "contender": name, "status": "ok", "time_us": {"both": time_us}, "ratios": {}, "bars": [],
            "gradients_mib": gradient_bytes / MIB, "other_load_cores": other.cores,
            "peak_mem_mib": child("sparse", task)["peak_mib"],
        })  # fmt: skip
    return records


# ---- shared


def ours(device: str) -> str:
    return f"fastdistil:{'cpu' if device == 'cpu' else 'auto'}"


def shared_fields(case: str, shape: dict[str, int], moved: int, rates: Rates, device: str, tiny: bool) -> Record:
    """`moved`: bytes that any implementation must move; 0 where no formula says."""
    options = {"density": DENSITY}
    return {
        "op": "sparse", "case": case, "shape": shape, "dtype": "float32", "options": options, "small": tiny,
        "rates": rates, "bytes": {"both": moved}, "flops": {"both": 0},
        **environment("sparse", device),
    }  # fmt: skip


def interleaved(runs: Runs, device: str) -> dict[str, dict[str, float]]:
    """Quantiles in microseconds, each contender as often as it says; they take turns, after one run that is not
    counted. A contender's last number multiplies its times."""
    samples: dict[str, list[float]] = {name: [] for name in runs}

    def finish() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for number in range(1 + max(times for _, times, _ in runs.values())):
        for name, (run, times, factor) in runs.items():
            if number > times:
                continue
            start = finish()
            result = run()
            taken = finish() - start
            del result
            if number > 0:
                samples[name].append(taken * 1e6 * factor)
    return {name: quantiles(found) for name, found in samples.items()}


def bar(against: str, quantity: str, wanted: float, found: float, reached: bool) -> Record:
    return {"against": against, "quantity": quantity, "at_least": wanted, "found": found, "reached": reached}


def add_bars(records: list[Record], bars: dict[str, float]) -> None:
    """Ratios of medians to the first record, ours, and the bars that it must reach."""
    medians = {record["contender"]: record["time_us"]["both"]["p50"] for record in records}
    own, best = records[0]["contender"], min(medians.values())
    for record in records:
        median = medians[record["contender"]]
        ratios = {f"{n}_over_this": t / median for n, t in medians.items()}
        floor = floor_of(record["bytes"]["both"], 0, record["rates"])
        record["ratios"] = {"both": {**ratios, "this_over_best": median / best, "this_over_floor": median / floor}}
        record["bars"] = []
    for against, at_least in bars.items():
        found = medians[against] / medians[own]
        records[0]["bars"].append(bar(against, "time", at_least, found, found >= at_least))


def run(device: str, tiny: bool, rates: Rates, done: set[str], say: Say) -> Iterator[list[Record]]:
    """A list of records a case, but for those that are `done`."""
    for case, measure in ((SELECT, select), (STEP[device][0], step), (BACKWARD, backward)):
        if case in done:
            continue
        records = measure(device, tiny, rates, say)
        for record in records:
            record["bars"] = [] if tiny else record.get("bars", [])
            if record["status"] != "ok":
                say(f"  {record['contender']}: not timed, {record['reason']}")
                continue
            memory = f", {record['peak_mem_mib']:,.0f} MiB extra" if "peak_mem_mib" in record else ""
            say(f"  {record['contender']}: {record['time_us']['both']['p50'] / 1e3:,.1f} ms{memory}")
            for found in record["bars"]:
                verdict = "reached" if found["reached"] else "MISSED"
                say(f"    {found['quantity']} against {found['against']}: {found['found']:.1f}, {verdict}")
        if records and records[0].get("other_load_cores", 0) > 0.1:
            say(f"  other processes kept {records[0]['other_load_cores']} cores busy meanwhile: these times are void")
        yield records
        gc.collect()
