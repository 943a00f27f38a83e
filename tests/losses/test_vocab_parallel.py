"""A vocabulary split over processes gives what one process gives: 2 and 4 gloo ranks on the CPU."""

from __future__ import annotations

import math
import sys
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import DEVICE, available
from distributed_logits import beside_loss_parallel, refused
from judge import EXACT_GRADIENT, EXACT_VALUE, Outcome, error, judge_exact, judge_rows

import fastdistil as fd
from fastdistil.backends import get
from fastdistil.contracts.logit import DIVERGENCES, LOSSES, PHASE_STATISTICS, PHASE_VALUE, STATS
from fastdistil.ops import vocab_parallel

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

ROWS, COLUMNS = 5, 203
# Uneven parts, one of them narrower than a vector.
PARTS = {3: [120, 3, 80]}


def logits(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    teacher = 4 * torch.randn(ROWS, COLUMNS, generator=generator)
    noise = {"near": 1e-3, "far": 60.0}.get(case, 1.0)
    student = teacher + noise * torch.randn(ROWS, COLUMNS, generator=generator)
    if case == "near":
        student += 7.7  # an offset that the divergence does not see
    if case == "masked":  # the first part of four has no teacher mass at all, in one row no student mass either
        teacher[:, :64] = -math.inf
        student[1, :64] = -math.inf
    return student, teacher


def outcome(student: torch.Tensor, teacher: torch.Tensor, **options: Any) -> Outcome:
    leaf = student.clone().requires_grad_()
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0])
    value = fd.logit_loss(leaf, teacher, temperature=2.0, weight=weight, **options)
    if "reduction" in options:
        value = (value * torch.arange(1.0, ROWS + 1)).sum()
    return Outcome(value.detach(), torch.autograd.grad(value, leaf))


def heads(rank_columns: slice = slice(None)) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(6)
    sizes = ((ROWS, 8), (COLUMNS, 8), (COLUMNS,), (ROWS, 12), (COLUMNS, 12))
    h, w, b, t, v = (torch.randn(*size, generator=generator) for size in sizes)
    return [h, w[rank_columns], b[rank_columns]], [t, v[rank_columns]]


def two_heads(part: slice = slice(None), **options: Any) -> Outcome:
    inputs, teacher = heads(part)
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = fd.linear_logit_loss(*leaves[:2], *teacher, student_bias=leaves[2], student_softcap=5.0, **options)
    return Outcome(value.detach(), torch.autograd.grad(value, leaves))


def one_head(part: slice, dtype: torch.dtype, **options: Any) -> Outcome:
    """A student near its teacher, on that teacher's head: the row kernels get differences."""
    (hidden, weight, _), _ = heads(part)
    teacher = (hidden + 1e-3 * hidden.flip(0)).to(dtype)
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
    value = fd.linear_logit_loss(*leaves, teacher, leaves[1].detach(), **options)
    return Outcome(value.detach(), torch.autograd.grad(value, leaves))


def close(found: torch.Tensor, wanted: torch.Tensor, what: str, allowed: float = 2e-6) -> None:
    assert error(found, wanted) <= allowed, f"{what}: {error(found, wanted):.1e}"


def check(rank: int, world: int) -> None:
    sizes = PARTS[world]
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    group = dist.group.WORLD
    for divergence in LOSSES:
        for case in ("usual", "near", "far", "masked"):
            if case != "usual" and divergence not in ("forward_kl", "jsd", "nla"):
                continue
            for options in ({}, {"reduction": "none"}):
                student, teacher = logits(case)
                whole = outcome(student.double(), teacher.double(), divergence=divergence, **options)
                mine = outcome(student[:, part], teacher[:, part], divergence=divergence, group=group, **options)
                wanted = Outcome(whole.value, (whole.gradients[0][:, part],))
                if case == "near":
                    judge_exact(mine, wanted, torch.float32)
                else:
                    name, alone = (
                        f"{divergence} {case} {options}",
                        outcome(student, teacher, divergence=divergence, **options),
                    )
                    close(mine.value, wanted.value, f"{name} value", 2 * error(alone.value, whole.value) + 1e-6)
                    alone_error = error(alone.gradients[0][:, part], wanted.gradients[0])
                    allowed = max(2 * alone_error, EXACT_GRADIENT[torch.float32])
                    close(mine.gradients[0], wanted.gradients[0], f"{name} gradient", allowed)
        for chunk_bytes in (1, None):
            options = {"divergence": divergence, "chunk_bytes": chunk_bytes}
            whole, mine = two_heads(**options), two_heads(part, group=group, **options)
            close(mine.value, whole.value, f"{divergence} heads value", 1e-5)
            close(mine.gradients[0], whole.gradients[0], f"{divergence} heads hidden", 1e-5)
            close(mine.gradients[1], whole.gradients[1][part], f"{divergence} heads weight", 1e-5)
            close(mine.gradients[2], whole.gradients[2][part], f"{divergence} heads bias", 1e-5)
        whole = one_head(slice(None), torch.float64, divergence=divergence)
        wanted = Outcome(whole.value, (whole.gradients[0], whole.gradients[1][part]))
        judge_exact(one_head(part, torch.float32, divergence=divergence, group=group), wanted, torch.float32)
    distributed_tensors(world)
    terms(rank, world)
    confident_labels(part)
    student, teacher = logits("usual")
    labels = torch.full((ROWS,), COLUMNS)
    with pytest.raises(ValueError, match="labels has 203, expected 0 to 202, through the columns of all ranks"):
        fd.logit_loss(student[:, part], teacher[:, part], labels=labels, label_weight=0.5, group=group)
    with pytest.raises(ValueError, match="backend 'reference' has no part of a vocabulary"):
        fd.logit_loss(student, teacher, backend="reference", group=group)


def terms(rank: int, world: int) -> None:
    """Labels, a map, statistics and logits that may be overwritten, alone and together, against one process in float64:
    each rank maps into its own part of another vocabulary."""
    sizes, own = PARTS[world], [60, 3, 101]
    ends, own_ends = ([sum(x[:i]) for i in range(world + 1)] for x in (sizes, own))
    part, teacher_part = slice(*ends[rank : rank + 2]), slice(*own_ends[rank : rank + 2])
    generator = torch.Generator().manual_seed(7)
    maps = [torch.arange(n) % m for n, m in zip(sizes, own, strict=True)]
    for i, x in enumerate(maps):
        x[torch.rand(len(x), generator=generator) < 0.3] = -1
        if i == 1:
            x.fill_(-1)  # a rank without a single partner
    mapped = torch.cat([torch.where(x < 0, x, x + begin) for x, begin in zip(maps, own_ends, strict=False)])
    student, teacher = logits("usual")
    other = 4 * torch.randn(ROWS, sum(own), generator=generator)
    given = torch.tensor([3, -100, 7, COLUMNS - 1, 120])
    for divergence in ("forward_kl", "jsd", "mse", "nla"):
        labels = "teacher" if divergence == "nla" else given
        for with_map in (False, True):
            for label_weight in (0.0, 0.3, 1.0):  # of 1: the statistics have a pass of their own
                options: dict[str, Any] = {"divergence": divergence, "return_stats": True, "temperature": 2.0}
                if label_weight:
                    options |= {"labels": labels, "label_weight": label_weight}
                t = other if with_map else teacher
                whole, here = ({"vocab_map": x} if with_map else {} for x in (mapped, maps[rank]))

                def run(s: torch.Tensor, t: torch.Tensor, inplace: bool = False, **more: Any) -> tuple[Outcome, Any]:
                    leaf = s.clone().requires_grad_()
                    z = leaf * 1 if inplace else leaf
                    value, stats = fd.logit_loss(
                        z, t, weight=torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0]), inplace_backward=inplace, **more
                    )
                    return Outcome(value.detach(), torch.autograd.grad(value, leaf)), torch.stack(stats)

                truth, stats = run(student.double(), t.double(), **options, **whole)
                alone, _ = run(student, t, **options, **whole)
                columns = teacher_part if with_map else part
                for inplace in (False, True):
                    name = f"{divergence}, map {with_map}, labels {label_weight}, in place {inplace}"
                    mine, found = run(
                        student[:, part], t[:, columns], inplace, group=dist.group.WORLD, **options, **here
                    )
                    close(mine.value, truth.value, f"{name}: value", 2 * error(alone.value, truth.value) + 1e-6)
                    wanted = truth.gradients[0][:, part]
                    allowed = 2 * error(alone.gradients[0][:, part], wanted) + 2e-6
                    close(mine.gradients[0], wanted, f"{name}: gradient", allowed)
                    close(found, stats, f"{name}: statistics", 2e-6)
    heads_options: dict[str, Any] = {"labels": given, "label_weight": 0.3, "weight": torch.tensor([1.0, 2, 0, 0.5, 1])}
    whole_heads, mine = two_heads(**heads_options), two_heads(part, group=dist.group.WORLD, **heads_options)
    close(mine.value, whole_heads.value, "labelled heads value", 1e-5)
    close(mine.gradients[0], whole_heads.gradients[0], "labelled heads hidden", 1e-5)
    close(mine.gradients[1], whole_heads.gradients[1][part], "labelled heads weight", 1e-5)


def confident_labels(part: slice) -> None:
    """Logits near 200 and a label of probability 1 - 1e-3 to 1 - 1e-11: no logsumexp of the row has its cross entropy's
    digits, nor has 1 + the other columns' sum. The student is its own teacher, so that the labels' term is the whole
    loss."""
    logits = 200 + torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(8))
    labels = torch.tensor([3, 119, 120, COLUMNS - 1, 7])
    logits[torch.arange(ROWS), labels] += torch.tensor([12.0, 15.0, 20.0, 30.0, 0.0])

    def rows(s: torch.Tensor, **options: Any) -> Outcome:
        leaf = s.clone().requires_grad_()
        value = fd.logit_loss(leaf, s, labels=labels, label_weight=0.5, reduction="none", **options)
        return Outcome(value.detach(), torch.autograd.grad(value.sum(), leaf))

    truth, mine = rows(logits.double()), rows(logits[:, part], group=dist.group.WORLD)
    leaf = logits.clone().requires_grad_()
    eager = 0.5 * torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    judge_rows(mine.value, truth.value, eager.detach())
    assert (mine.value / truth.value - 1).abs().max() <= EXACT_VALUE
    found, wanted = torch.autograd.grad(eager.sum(), leaf)[0], truth.gradients[0][:, part]
    judge_rows(mine.gradients[0], wanted, found[:, part])
    assert ((mine.gradients[0] - wanted).norm(dim=1) / wanted.norm(dim=1)).max() <= EXACT_VALUE


def distributed_tensors(world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    (hidden, weight, _), (teacher_hidden, teacher_weight) = heads()
    leaf = weight.clone().requires_grad_()
    value = fd.linear_logit_loss(hidden, leaf, teacher_hidden, teacher_weight)
    wanted = torch.autograd.grad(value, leaf)[0]
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    teacher = distribute_tensor(teacher_weight, mesh, [Shard(0)])
    found = fd.linear_logit_loss(hidden, sharded, teacher_hidden, teacher)
    found.backward()
    close(found, value, "DTensor value")
    close(sharded.grad.full_tensor(), wanted, "DTensor weight", 1e-5)
    beside_loss_parallel(mesh)
    refused(mesh)
    with pytest.raises(ValueError, match=r"teacher_weight is placed as \(Replicate\(\),\), expected a DTensor sharded"):
        fd.linear_logit_loss(hidden, sharded, teacher_hidden, distribute_tensor(teacher_weight, mesh, [Replicate()]))
    with pytest.raises(ValueError, match="teacher_weight is no DTensor, expected a DTensor sharded by rows"):
        fd.linear_logit_loss(hidden, sharded, teacher_hidden, teacher_weight)


def process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        check(rank, world)
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo's file store")
@pytest.mark.parametrize("world", PARTS)
def test_ranks_agree_with_one_process(world: int, tmp_path: Path) -> None:
    try:
        mp.spawn(process, (world, str(tmp_path)), nprocs=world)
    except Exception:
        errors = sorted(tmp_path.glob("error-*"))
        pytest.fail("\n".join(path.read_text() for path in errors[:1]) or traceback.format_exc())


def test_a_group_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"logit_loss: group is int, expected a torch.distributed.ProcessGroup"):
        fd.logit_loss(torch.zeros(2, 3), torch.zeros(2, 3), group=3)


@pytest.mark.pairs(3, "divergence", "case")
@pytest.mark.parametrize("case", ["usual", "near", "masked"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "mse"])
@pytest.mark.parametrize("backend", available("cpu", "triton", "cuda"))
def test_phases_of_every_backend(backend: str, divergence: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in one process: statistics of each part, merged, then values and gradients from them."""
    module, rule = get("logit", backend, DEVICE), as_rule(divergence)
    student, teacher = (x.to(DEVICE) for x in logits(case))
    scale = torch.rand(ROWS, device=DEVICE)
    loss, stats, gradient = scale.clone(), scale.new_empty(ROWS, STATS), torch.empty_like(student)
    module.logit_fwd(student, teacher, scale, loss, stats, gradient, **rule)
    ends = [0, 64, 67, 168, COLUMNS]
    parts = [slice(a, b) for a, b in pairwise(ends)]
    found = [torch.empty_like(stats) for _ in parts]
    ignored = torch.empty_like(scale)
    for part, own in zip(parts, found, strict=True):
        module.logit_fwd(student[:, part], teacher[:, part], scale, ignored, own, None, phase=PHASE_STATISTICS, **rule)
    monkeypatch.setattr(vocab_parallel, "_gather", lambda own, group: torch.stack(found).double())
    merged = torch.empty_like(stats)
    if divergence == "mse":
        merged.zero_()
        vocab_parallel.count(merged, None)
    else:
        vocab_parallel.merge(merged, rule, None)
    values, centres, written = torch.zeros_like(scale), torch.zeros_like(scale), torch.empty_like(student)
    for part in parts:
        own, share = merged.clone(), torch.empty_like(scale)
        direct = written[:, part] if divergence in vocab_parallel.DIRECT else None
        module.logit_fwd(student[:, part], teacher[:, part], scale, share, own, direct, phase=PHASE_VALUE, **rule)
        values, centres = values + share, centres + own[:, 4]
    if divergence not in vocab_parallel.DIRECT:
        merged[:, 4] = centres
        for part in parts:
            rest = (scale, merged, written[:, part], torch.ones_like(scale), False)
            module.logit_bwd(student[:, part], teacher[:, part], *rest, **rule)
    judge_exact(Outcome(values, (written,)), Outcome(loss, (gradient,)), torch.float32)


def as_rule(divergence: str) -> Any:
    return {
        "divergence": DIVERGENCES.index(divergence),
        "beta": 0.5,
        "student_temperature": 2.0,
        "teacher_temperature": 2.0,
        "value_factor": 4.0,
    }
