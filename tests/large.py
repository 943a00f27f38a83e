"""More than 2^31 logits, entries and rows for real: needs 20 GiB of memory, so it is no test of the suite.

    python tests/large.py [PART ...] [--page docs/reliability.md]

Each part has 2^31 + 3 elements or more of bfloat16 (4 GiB) and is compared with the same numbers in pieces, for which
32-bit offsets would do. `make large`.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

import torch
from reliability import Row, write_rows

import fastdistil as fd
from fastdistil import teacher
from fastdistil.sparse import SparseAdamW, SparseDelta, select_topk

SIZE = (1 << 31) + 3
BF16 = torch.bfloat16


def logits() -> bool:
    """Rows of 2^20 columns, of which the last lie behind 2^31 elements, with their gradient in place."""
    columns = 1 << 20
    rows = (SIZE + columns - 1) // columns
    student, constants = torch.zeros(rows, columns, dtype=BF16), torch.randn(1, columns).to(BF16)
    student[:, ::7] = 1
    ends = [student[i].clone() for i in (0, rows - 1)]
    leaf = student.requires_grad_()
    found = fd.logit_loss(leaf, constants.expand(rows, columns).contiguous(), reduction="none", inplace_backward=True)
    found.sum().backward()
    assert leaf.grad is not None
    good = True
    for i, row in zip((0, rows - 1), ends, strict=True):
        own = row[None].requires_grad_()
        value = fd.logit_loss(own, constants, reduction="none")
        value.sum().backward()
        good &= (
            bool(torch.equal(value[0], found[i])) and own.grad is not None and torch.equal(own.grad[0], leaf.grad[i])
        )
    return good


def one_row() -> bool:
    """A row of 2^31 + 3 columns: its loss with itself, moved in the last column, is that column's share."""
    student = torch.zeros(1, SIZE, dtype=BF16)
    labels = torch.tensor([SIZE - 1])
    student[0, -1] = 30
    rows = fd.logit_loss(student, student, labels=labels, label_weight=1.0, reduction="none")
    wanted = torch.log1p(torch.tensor((SIZE - 1) * 1.0).double() * torch.tensor(-30.0).double().exp())
    return abs(float(rows[0]) - float(wanted)) < 1e-3 * float(wanted)


def selection() -> bool:
    """Changes at both ends and around 2^31 are found, in int64."""
    before = torch.zeros(SIZE, dtype=BF16)
    after = before.clone()
    places = torch.tensor([0, 5, (1 << 31) - 1, 1 << 31, SIZE - 1])
    after[places] = torch.arange(1, 6, dtype=BF16)
    mask = select_topk({"w": after}, {"w": before}, k=5)
    return mask["w"].dtype == torch.int64 and torch.equal(mask["w"], places)


def optimizer() -> bool:
    """One step at positions beyond 2^31, as of the same entries in a small tensor."""
    weight = torch.nn.Parameter(torch.ones(SIZE, dtype=BF16))
    places = torch.tensor([3, (1 << 31) - 1, 1 << 31, SIZE - 1])
    moved = weight.detach().clone()
    moved[places] += 1
    mask = select_topk({"w": moved}, {"w": weight}, k=len(places))
    small, at = torch.nn.Parameter(torch.ones(4, dtype=BF16)), torch.arange(4)
    small_mask = select_topk({"w": small.detach() + 1}, {"w": small}, k=4)
    large_optimizer = SparseAdamW([("w", weight)], mask, lr=0.1)
    small_optimizer = SparseAdamW([("w", small)], small_mask, lr=0.1)
    weight.grad = moved
    small.grad = moved[places]
    large_optimizer.step(), small_optimizer.step()
    return torch.equal(weight.detach()[places], small.detach()[at]) and float(weight[4]) == 1


def difference() -> bool:
    """Saved, loaded, applied and taken back."""
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(SIZE, dtype=BF16), requires_grad=False)
    places = torch.tensor([1, 1 << 31, SIZE - 1])
    delta = SparseDelta({"w": places}, {"w": torch.tensor([1.0, 2.0, 3.0])}, {"w": (SIZE,)})
    with tempfile.TemporaryDirectory() as folder:
        delta.save(Path(folder, "d.safetensors"))
        loaded = SparseDelta.load(Path(folder, "d.safetensors"))
    loaded.apply_(model)
    applied = model.w[places].tolist() == [1.0, 2.0, 3.0] and int(model.w.count_nonzero()) == 3
    loaded.revert_(model)
    return applied and int(model.w.count_nonzero()) == 0


def outputs() -> bool:
    """A shard of more than 2^31 elements: two examples, of which the second ends behind it."""
    width = 1 << 12
    tokens = SIZE // width + 1
    with tempfile.TemporaryDirectory() as folder:
        head = {"vocabulary": 2, "head_weight": torch.zeros(2, width)}
        options = {"dtype": BF16, "shard_bytes": 1 << 40}
        with teacher.Writer(folder, kind="hidden", width=width, **head, **options) as writer:  # type: ignore[arg-type]
            states = torch.zeros(tokens - 2, width, dtype=BF16)
            writer.add(hidden=states)
            del states
            writer.add(hidden=torch.full((2, width), 7.0, dtype=BF16))
        return bool((teacher.open(folder)[1]["hidden"] == 7).all())


PARTS: dict[str, Callable[[], bool]] = {
    f.__name__: f for f in (logits, one_row, selection, optimizer, difference, outputs)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []])
    parser.add_argument("--page", type=Path, help="the page whose rows are written")
    asked = parser.parse_args()
    rows, wrong = list[Row](), False
    for name in asked.parts or PARTS:
        good = PARTS[name]()
        gc.collect()
        fd.empty_cache()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20
        print(f"{name}: {'right' if good else 'WRONG'}, peak so far {peak} GiB", flush=True)
        wrong |= not good
        rows.append(Row(f"{name.replace('_', ' ')} of more than 2^31 elements", "1", "no" if good else "yes"))
    if asked.page:
        write_rows(asked.page, "sizes", rows, ("Size", "Times", "Wrong"), keep=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
