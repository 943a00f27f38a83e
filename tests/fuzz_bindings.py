"""Drawn calls of the C++ bindings: shapes, strides, overlapping and misaligned memory, wrong dtypes, indices out of range.

    python tests/fuzz_bindings.py [FAMILY ...] [--seconds 1800] [--seed 0] [--page docs/reliability.md]

A call is drawn as the library makes it, then up to three of its arguments are changed. It ends, or is refused with a
ValueError, TypeError or IndexError; under AddressSanitizer (`make sanitize`) an access out of bounds ends the process,
and the case's number is printed. Every fourth call has another thread that writes its indices meanwhile. Numbers that
ever failed are kept in tests/data/fuzz_bindings.txt and tried first.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).parent / "support"))

import sanitized  # noqa: F401  the extension that was built with a sanitizer, where there is one
import torch
from reliability import Row, write_rows
from torch import Tensor

from fastdistil import _C
from fastdistil.contracts.sparse import UpdateConstants, UpdateRow, update_table

KEPT = Path(__file__).parent / "data/fuzz_bindings.txt"
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DTYPES = [*FLOATS, torch.int32, torch.int64, torch.int8, torch.bool]
SIZES = [0, 1, 1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 64, 67, 511, 513, 1030]
REFUSED = (ValueError, TypeError, IndexError)
Call = tuple[Callable[..., Any], dict[str, Any]]


class Draw(random.Random):
    """Numbers and tensors of one case."""

    def size(self, most: int = 2000) -> int:
        return self.choice([n for n in SIZES if n <= most])

    def flag(self, share: float = 0.5) -> bool:
        return self.random() < share

    def fill(self, x: Tensor) -> Tensor:
        """Ordinary numbers, with an infinity, a NaN or a huge one among them now and then."""
        if not x.dtype.is_floating_point:
            return x.random_(0, 5)
        x.copy_(torch.randn(x.shape) * self.choice([0.01, 1.0, 30.0]))
        if x.numel() and self.flag(0.2):
            x.view(-1)[self.randrange(x.numel())] = self.choice([float("inf"), -float("inf"), float("nan"), 6e4])
        return x

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """In memory of its own that ends where it ends."""
        return self.fill(torch.empty(shape, dtype=dtype))

    def rows(self, n: int, v: int, dtype: torch.dtype) -> Tensor:
        """Rows that are dense, with any stride between them: wider, the same, less (they overlap) or none; the memory
        begins anywhere and ends with the last row."""
        stride = self.choice([v, v + 1, v + 3, 2 * v + 5, max(0, v - 2), 1, 0])
        offset = self.choice([0, 0, 1, 3])
        whole = self.tensor(offset + (stride * (n - 1) + v if n and v else 0), dtype=dtype)
        return whole.as_strided((n, v), (stride, 1), offset)

    def threads(self) -> int:
        return self.choice([1, 1, 2, 3, 0, -1, 64])

    def positive(self) -> float:
        return self.choice([1.0, 1.0, 2.0, 0.5, 1e-3, 1e4, 0.0, -1.0, float("nan"), float("inf")])


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def logit(d: Draw) -> Call:
    n, v, dtype = d.size(67), d.size(), d.choice(FLOATS)
    sums = wide(dtype)
    call: dict[str, Any] = {"student": d.rows(n, v, dtype), "teacher": d.rows(n, v, dtype)}
    call |= {"row_scale": d.tensor(n, dtype=sums), "stats": d.tensor(n, _C.contracts["logit_stats"], dtype=sums)}
    call |= {"gradient": d.choice([None, d.rows(n, v, dtype)]), "divergence": d.randrange(-1, 9), "beta": d.random()}
    call |= {"student_temperature": d.positive(), "teacher_temperature": d.positive(), "value_factor": 1.0}
    call |= {"threads": max(0, d.threads()), "difference": d.flag(0.2)}
    if d.flag(0.3) and call["gradient"] is not None:
        return _C.logit_bwd, call | {"dloss": d.tensor(n, dtype=sums), "keep_unit": d.flag()}
    call |= {"loss": d.tensor(n, dtype=sums), "phase": d.choice([0, 0, 0, 1, 2, 3])}
    if d.flag():
        call |= {"labels": torch.randint(0, v, (n,)) if v else torch.zeros(n, dtype=torch.int64)}
        call |= {"label_scale": d.tensor(n, dtype=sums)}
    return _C.logit_fwd, call


def cross_entropy(d: Draw) -> Call:
    n, v, dtype = d.size(67), d.size(), d.choice([torch.float32, torch.float64])
    call: dict[str, Any] = {"logits": d.rows(n, v, dtype), "row_scale": d.tensor(n, dtype=dtype)}
    call |= {"labels": torch.randint(0, v, (n,)) if v else torch.zeros(n, dtype=torch.int64)}
    call |= {"loss": d.tensor(n, dtype=dtype), "gradient": d.choice([None, d.rows(n, v, dtype)])}
    return _C.cross_entropy_rows, call | {
        "whole": d.choice([None, d.tensor(n, 2, dtype=dtype)]),
        "threads": d.threads(),
    }


def topk(d: Draw) -> Call:
    n, v, k, dtype = d.size(67), d.size(), d.size(33), d.choice(FLOATS)
    sums, double = wide(dtype), torch.float64
    columns = torch.randint(0, v + 2, (n, k)).sort(-1).values.int()
    stats = d.tensor(n, _C.contracts["topk_stats"] + k, dtype=double)
    call: dict[str, Any] = {"student": d.rows(n, v, dtype), "columns": columns, "row_scale": d.tensor(n, dtype=sums)}
    call |= {"stats": stats, "gradient": d.rows(n, v, dtype), "temperature": d.positive(), "threads": d.threads()}
    if d.flag(0.3):
        return _C.topk_bwd, call | {"dloss": d.tensor(n, dtype=sums), "keep_unit": d.flag()}
    call |= {"values": -d.tensor(n, k, dtype=double).abs(), "rest": d.tensor(n, dtype=double), "value_factor": 1.0}
    call |= {"loss": d.tensor(n, dtype=sums), "divergence": d.randrange(-1, 9), "beta": 0.5, "tail": d.randrange(-1, 4)}
    return _C.topk_fwd, call


def hidden(d: Draw) -> Call:
    n, v, dtype = d.size(67), d.size(), d.choice(FLOATS)
    sums = d.choice([torch.float32, torch.float64])
    call: dict[str, Any] = {"student": d.rows(n, v, dtype), "teacher": d.rows(n, v, d.choice(FLOATS))}
    call |= {"bias": d.choice([None, d.tensor(v, dtype=sums)]), "row_scale": d.tensor(n, dtype=sums)}
    call |= {"loss": d.tensor(n, dtype=sums), "gradient": d.choice([None, d.tensor(n, v, dtype=d.choice(FLOATS))])}
    return _C.hidden_rows, call | {"kind": d.randrange(-1, 4), "threads": d.threads()}


def moments(d: Draw) -> Call:
    n, v, dtype = d.size(67), d.size(), d.choice(FLOATS)
    sums, acceptance = wide(dtype), d.flag()
    call: dict[str, Any] = {"student": d.rows(n, v, dtype), "teacher": d.rows(n, v, dtype)}
    call |= {"row_scale": d.tensor(n, dtype=sums), "student_temperature": d.positive()}
    call |= {"teacher_temperature": d.positive(), "threads": d.threads()}
    if acceptance:
        call |= {"levels": d.tensor(n, _C.contracts["acceptance_levels"], dtype=sums)}
        return _C.acceptance, call | {"log_acceptance": d.tensor(n, dtype=sums)}
    return _C.row_moments, call | {"moments": d.tensor(n, _C.contracts["row_moments"], dtype=sums)}


def attention(d: Draw) -> Call:
    b, s, keys, group = d.choice([0, 1, 1, 2, 3]), d.size(67), d.choice([1, 2]), d.choice([1, 2, 3])
    dtype, causal = d.choice(FLOATS), d.flag()
    sums, h = wide(dtype), keys * group
    sizes = d.choice([(8, 8), (16, 16), (5, 7), (1, 1), (33, 4), (0, 3)])

    def heads(count: int, size: int) -> Tensor:
        strides = [d.choice([count * s * size, 0]), d.choice([s * size, size, 0]), d.choice([size, size + 1, 0]), 1]
        shape = (b, count, s, size)
        ends = sum((n - 1) * x for n, x in zip(shape, strides, strict=True)) + 1 if min(shape) else 0
        return d.tensor(ends, dtype=dtype).as_strided(shape, strides)

    call: dict[str, Any] = {"student_q": heads(h, sizes[0]), "student_k": heads(keys, sizes[0])}
    call |= {"teacher_q": heads(h, sizes[1]), "teacher_k": heads(d.choice([keys, h, 1]), sizes[1])}
    call |= {"real": d.choice([None, (torch.rand(b, s) < 0.7).to(sums)]), "row_scale": d.tensor(b, h, s, dtype=sums)}
    gradients = d.flag()
    call |= {"rows": d.tensor(b, h, s, dtype=sums)}
    call |= {"dq": d.tensor(b, h, s, sizes[0], dtype=sums) if gradients else None}
    call |= {"dk": d.tensor(b, keys, s, sizes[0], dtype=sums) if gradients else None}
    kind = d.randrange(-1, 4)
    offsets = sorted(d.choices(range(s + 1), k=3)) if d.flag(0.3) else []
    call |= {"offsets": [0, *offsets, s] if offsets else [], "kind": kind, "causal": causal}
    call |= {"student_scale": 0.3, "teacher_scale": d.choice([0.3, 1.0]), "low_rank": d.flag(0.3)}
    return _C.attention, call | {"threads": d.threads()}


def select(d: Draw) -> Call:
    shape = d.choice([(d.size(),), (d.size(33), d.size(67)), (70_001,)])
    call: dict[str, Any] = {"param": d.tensor(*shape, dtype=d.choice(FLOATS)), "threads": d.threads()}
    call |= {"base": d.tensor(*shape, dtype=d.choice(FLOATS))}
    if d.flag():
        bucket = d.choice([-1, 0, 1000, 2047, 2048, -2])
        counts = torch.zeros(_C.contracts["high_buckets" if bucket == -1 else "low_buckets"], dtype=torch.int64)
        return _C.sparse_histogram, call | {"counts": counts, "bucket": bucket}
    out = torch.empty(d.size(), dtype=d.choice([torch.int32, torch.int64]))
    call |= {"out": d.choice([None, out]), "threshold": d.choice([0, 1 << 29, 0x3F800000, 0x7FFFFFFF, -1, 1 << 31])}
    return _C.sparse_compact, call | {"ties": d.choice([0, 1, 100, 1 << 40, -1, -(1 << 40)])}


def moves(d: Draw) -> Call:
    size, n, dtype = d.size(), d.size(), d.choice(FLOATS)
    n = min(n, size)
    index = torch.randperm(size)[:n].sort().values.to(d.choice([torch.int32, torch.int64]))
    param = d.tensor(size, dtype=dtype)
    if d.flag():
        call = {"tensor": param, "index": index, "values": d.tensor(n, dtype=dtype), "threads": d.threads()}
        return d.choice([_C.sparse_take, _C.sparse_put]), call
    sums = wide(dtype)
    m, v = d.tensor(n, dtype=sums), d.tensor(n, dtype=sums)
    master = d.tensor(n) if dtype in (torch.bfloat16, torch.float16) and d.flag() else None
    base = d.tensor(n, dtype=sums) if d.flag() else None
    gradient = d.tensor(size, dtype=dtype)
    if d.flag(0.3) and n:
        index[d.randrange(n)] = d.choice([-1, size, (1 << 31) - 1, -(1 << 31)])
    row = UpdateRow(
        param, gradient, index, m, v, master, base, UpdateConstants(1.0, 0.1, 0.9, 0.1, 1e-8, 0.1, 1.0, 0.1)
    )

    def update(index: Tensor, threads: int) -> None:
        _C.sparse_update(*update_table([row]), threads)

    return update, {"index": index, "threads": d.threads()}


FAMILIES: dict[str, Callable[[Draw], Call]] = {
    f.__name__: f for f in (logit, cross_entropy, topk, hidden, moments, attention, select, moves)
}
INDICES = ("labels", "columns", "index")


def changed(d: Draw, x: Tensor) -> Tensor:
    """The tensor, with something about it that the binding has to see, or that it may not mind."""
    kind = d.randrange(9)
    gone = x.numel() and not x.untyped_storage().nbytes()
    if gone or x.numel() > 1 << 20:  # torch itself would read what is not there, or copy what is huge
        return x
    if kind == 0:
        return x.to(d.choice(DTYPES))
    if kind == 1:
        return d.fill(torch.empty([max(0, n + d.choice([-1, 0, 1])) for n in x.shape], dtype=x.dtype))
    if kind == 2:
        return x.unsqueeze(0) if d.flag() else x.reshape(-1)
    if kind == 3 and x.dim() > 1:
        return x.transpose(-1, -2)
    if kind == 4:
        return x[..., ::2]
    if kind == 5:  # sizes past 2^31 without the memory
        return x.reshape(-1)[:1].expand((1 << 31) + d.choice([0, 5]), *([d.choice([1, 3, 1 << 20])] * (x.dim() - 1))) if x.numel() else x  # fmt: skip
    if kind == 6 and x.dtype in (torch.int32, torch.int64) and x.numel():
        x = x.clone()
        x.view(-1)[d.randrange(x.numel())] = d.choice([-1, 1 << 30, -(1 << 31), (1 << 31) - 1])
        return x
    if kind == 7:
        x = x.clone()
        x.untyped_storage().resize_(0)
        return x
    return x.expand(x.shape) if kind == 8 else x.flip(0) if x.dim() else x


def one(family: str, number: int) -> str:
    """Case `number` of a family: what became of it."""
    d = Draw(f"{family} {number}")
    torch.manual_seed(number)
    function, call = FAMILIES[family](d)
    for _ in range(d.choice([0, 0, 1, 1, 2, 3])):
        name = d.choice(sorted(call))
        value = call[name]
        with contextlib.suppress(RuntimeError):  # torch itself knows no such tensor
            call[name] = changed(d, value) if isinstance(value, Tensor) else d.choice([value, None, -1, 1 << 40, "x"])
    written = [call[name] for name in INDICES if isinstance(call.get(name), Tensor) and call[name].is_contiguous() and call[name].dtype in (torch.int32, torch.int64)]  # fmt: skip
    written = [
        x for x in written if x.numel() and x.untyped_storage().nbytes() >= x.nbytes
    ]  # torch writes past the end
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            for x in written:
                x.random_(-(1 << 31), (1 << 31) - 1)

    disturbed = bool(written) and d.flag(0.25)
    thread = threading.Thread(target=disturb)
    if disturbed:
        thread.start()
    try:
        for _ in range(4 if disturbed else 1):
            function(**call)
        return "disturbed" if disturbed else "ran"
    except REFUSED:
        return "refused"
    except RuntimeError as error:
        if "changed between the passes" in str(error):
            return "refused"
        raise
    finally:
        stop.set()
        if disturbed:
            thread.join()


def run(family: str, seconds: float, seed: int) -> tuple[Counter[str], str]:
    """In a process of its own, whose death is a finding. Counts, and what went wrong."""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(1024))
        file.flush()
        shared = mmap.mmap(file.fileno(), 1024)
        process = os.fork()
        if process == 0:
            torch.set_num_threads(2)
            counts = Counter[str]()
            kept = [int(line.split()[1]) for line in KEPT.read_text().splitlines() if line.split()[:1] == [family]]
            end, number = time.monotonic() + seconds, seed << 32
            while time.monotonic() < end:
                case = kept.pop() if kept else number
                number += case == number
                struct.pack_into("<q", shared, 0, case)
                try:
                    counts[one(family, case)] += 1
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                struct.pack_into("<qqq", shared, 8, counts["ran"], counts["refused"], counts["disturbed"])
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        case, ran, refused, disturbed = struct.unpack_from("<qqqq", shared, 0)
    counts = Counter({"ran": ran, "refused": refused, "disturbed": disturbed})
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return counts, "" if code == 0 else f"{family} {case}: {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], help="all of them by default")
    parser.add_argument("--seconds", type=float, default=1800, help="a family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone, in this process")
    parser.add_argument("--page", type=Path, help="the page whose rows are written")
    asked = parser.parse_args()
    rows, wrong = list[Row](), False
    for family in asked.families or FAMILIES:
        if asked.case is not None:
            print(family, asked.case, one(family, asked.case))
            continue
        counts, problem = run(family, asked.seconds, asked.seed)
        print(f"{family}: {dict(counts)} {problem}", flush=True)
        wrong |= bool(problem)
        said = f"bindings of {family}: {counts['ran']:,} ran, {counts['refused']:,} refused, {counts['disturbed']:,} with an index written meanwhile"  # fmt: skip
        rows.append(Row(said, f"{sum(counts.values()):,}", "1" if problem else "0"))
    if asked.page:
        write_rows(asked.page, "bindings", rows, ("Drawn calls", "Times", "Out of bounds"))
    sys.exit(wrong)


if __name__ == "__main__":
    main()
