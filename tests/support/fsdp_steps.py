"""Run by test_sharded_heads.py under torchrun: heads under fully_shard, each rank with tokens of its own, against one
process with the tokens of all of them."""

from __future__ import annotations

import copy
import os
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from judge import EXACT_GRADIENT, SAME_STEP, error
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

import fastdistil as fd
from fastdistil.losses._heads import whole_head
from fastdistil.ops import shards

VOCABULARY, HIDDEN, TEACHER = 5, 8, 6  # 5 over 4 ranks: 2, 2, 1 and no row at all
ROWS = (3, 0, 7, 2)  # of the ranks, one of which has no token


class Model(nn.Module):
    def __init__(self, seed: int, width: int, tied: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding, self.body = nn.Embedding(VOCABULARY, width), nn.Linear(width, width)
        self.head = nn.Linear(width, VOCABULARY)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = torch.tanh(self.body(self.embedding(ids)))
        return states


def ids_of(rank: int) -> Tensor:
    return torch.randint(VOCABULARY, (ROWS[rank],), generator=torch.Generator().manual_seed(9 + rank))


def two_heads(student: Model, teacher: Model, rank: int, **options: Any) -> Tensor:
    with torch.no_grad():
        states = teacher(ids_of(rank))
    loss: Tensor = fd.linear_logit_loss(
        student(ids_of(rank)), student.head.weight, states, teacher.head.weight.detach(),
        student_bias=student.head.bias, teacher_bias=teacher.head.bias.detach(), **options,
    )  # fmt: skip
    return loss


def one_head(student: Model, teacher: Model, rank: int, **options: Any) -> Tensor:
    """Both sides on the student's head, as a PEFT student and its base."""
    states = student(ids_of(rank))
    weight, bias = student.head.weight, student.head.bias
    target = states.detach() + 0.25
    loss: Tensor = fd.linear_logit_loss(
        states, weight, target, weight.detach(), student_bias=bias, teacher_bias=bias.detach(), **options
    )
    return loss


def made_whole(student: Model, teacher: Model, rank: int, **options: Any) -> Tensor:
    """As the mixin of TRL's DistillationTrainer, which multiplies in autocast's dtype."""
    weight, bias = (whole_head("made_whole", name, getattr(student.head, name)) for name in ("weight", "bias"))
    states = student(ids_of(rank))
    loss: Tensor = fd.linear_logit_loss(
        states, weight * 1, states.detach() + 0.25, weight.detach(), student_bias=bias, **options
    )
    return loss


def top_k(student: Model, teacher: Model, rank: int, **options: Any) -> Tensor:
    weight = student.head.weight
    values = torch.randn(ROWS[rank], VOCABULARY, generator=torch.Generator().manual_seed(rank)).log_softmax(-1)
    known = values.to(weight.dtype).topk(3)
    loss: Tensor = fd.linear_topk_logit_loss(
        student(ids_of(rank)), weight, *known, student_bias=student.head.bias, **options
    )
    return loss


def sharded(model: Model, how: str, mesh: Any = None, **options: Any) -> Model:
    """how: "alone" (the head is a unit of its own, gathered for its forward alone), "root" (a forward of the model
    leaves it whole) or "no" (not at all)."""
    if how == "alone":
        tied = model.head.weight is model.embedding.weight
        fully_shard([model.embedding, model.head] if tied else model.head, mesh=mesh, **options)
    if how != "no":
        fully_shard(model, mesh=mesh)
    return model


def same_step(
    loss: Callable[..., Tensor],
    dtype: torch.dtype = torch.float64,
    student: str = "alone",
    teacher: str = "alone",
    tied: bool = False,
    factor: float | None = None,
    ranks: int | None = None,
    shard: dict[str, Any] | None = None,
    backward: Callable[[Tensor, float], None] = lambda total, share: (total * share).backward(),
    **options: Any,
) -> None:
    """Value and gradients of a step, each rank with its rows, are those of one process with all rows."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ranks = world if ranks is None else ranks  # that have tokens of their own
    own, other = Model(0, HIDDEN, tied).to(dtype), Model(1, TEACHER).to(dtype)
    whole = [copy.deepcopy(x).double() for x in (own, other)]
    shard = shard or {}
    models = sharded(own, student, **shard), sharded(other, teacher)
    data = rank * ranks // world
    if factor is not None:
        for module in own.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(factor)
    total = loss(*models, data, **options)
    # Data parallelism averages over its ranks; a factor of its own takes the place of their number.
    backward(total, float(ranks if factor is None else factor))
    summed = sum(loss(*whole, data, **options) for data in range(ranks))
    backward(summed, 1.0)
    value = total.detach().sum().double() * ranks / world
    dist.all_reduce(value)
    assert error(value, summed.sum()) <= SAME_STEP[dtype], (loss.__name__, value, summed)
    for p in own.parameters() if student == "no" else ():  # nothing adds up the ranks' gradients
        dist.all_reduce(p.grad)
        p.grad /= world
    name = f"{loss.__name__}, student {student}, teacher {teacher}, {dtype}, {options}"
    for (key, p), wanted in zip(own.named_parameters(), whole[0].parameters(), strict=True):
        found = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        apart = error(found, wanted.grad)
        assert apart <= SAME_STEP[dtype], f"{name}: the gradient of {key} is off by {apart:.1e}"


def twice(total: Tensor, share: float) -> None:
    """Two backward passes through one graph, with halves of the loss."""
    (0.5 * share * total).backward(retain_graph=True)
    (0.5 * share * total).backward()


def of_rows(total: Tensor, share: float) -> None:
    (total.sum() * share).backward()


def every_step(world: int) -> None:
    items = {"num_items": sum(ROWS[:world])}
    for dtype in SAME_STEP:
        for student, teacher in (("alone", "alone"), ("root", "root"), ("alone", "no"), ("no", "alone")):
            same_step(two_heads, dtype, student, teacher, **items)
        for student in ("alone", "root"):
            for loss in (one_head, made_whole, top_k):
                same_step(loss, dtype, student, "no", **items)
    for student in ("alone", "root"):
        same_step(two_heads, student=student, tied=True, **items)
    same_step(top_k, tied=True, backward=twice, **items)
    same_step(two_heads, backward=twice, divergence="jsd", temperature=2.0, **items)
    same_step(two_heads, backward=of_rows, chunk_bytes=1, divergence="mse", reduction="sum")
    same_step(two_heads, factor=3.0, **items)
    same_step(two_heads, shard={"reshard_after_forward": False}, **items)
    same_step(two_heads, shard={"shard_placement_fn": lambda p: Shard(p.ndim - 1)}, **items)


def labels_and_rows(world: int) -> None:
    rank = dist.get_rank()
    student, teacher = (sharded(Model(i, HIDDEN).double(), "alone") for i in range(2))
    plain = [Model(i, HIDDEN).double() for i in range(2)]
    vocab_map = torch.tensor([4, 3, -1, 0, 2])
    found = []
    for models in ((student, teacher), plain):
        options = {"labels": ids_of(rank), "label_weight": 0.3, "vocab_map": vocab_map, "reduction": "none"}
        rows, stats = two_heads(*models, rank, return_stats=True, **options)
        mean = (rows * torch.arange(1.0, 1.0 + len(rows))).sum()
        mean.backward()
        found.append((rows, *stats))
    for mine, wanted in zip(*found, strict=True):
        assert error(mine, wanted) <= SAME_STEP[torch.float64]
    for mine, one in zip(student.parameters(), plain[0].parameters(), strict=True):
        dist.all_reduce(one.grad)
        assert error(mine.grad.full_tensor() * world, one.grad) <= SAME_STEP[torch.float64]


def other_meshes() -> None:
    """Four ranks: two shards on two replicas; shards of what tensor parallelism has split; smaller groups behind the
    forward."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    same_step(two_heads, shard={"mesh": mesh}, num_items=sum(ROWS))
    same_step(two_heads, shard={"reshard_after_forward": 2}, num_items=sum(ROWS))
    rank, items = dist.get_rank(), sum(ROWS[:3:2])
    data = 2 * mesh.get_local_rank("data")
    models = [Model(i, HIDDEN).double() for i in range(2)]
    whole = copy.deepcopy(models)
    for model in models:
        for name in ("weight", "bias"):
            p = getattr(model.head, name)
            setattr(model.head, name, nn.Parameter(distribute_tensor(p.detach(), mesh["model"], [Shard(0)])))
        fully_shard(model.head, mesh=mesh["data"])
    loss = two_heads(*models, data, num_items=items)
    (2 * loss).backward()
    wanted = sum(two_heads(*whole, x, num_items=items) for x in (0, 2))
    wanted.backward()
    for name in ("weight", "bias"):
        mine, one = (getattr(x.head, name).grad for x in (models[0], whole[0]))
        assert error(mine.full_tensor(), one) <= SAME_STEP[torch.float64], (rank, name)


def released(seen: list[weakref.ref[Any]]) -> bool:
    """Whether nothing holds these on any rank. gloo's thread holds what it has sent until a later turn."""
    for _ in range(100):
        held = torch.tensor(sum(x() is not None for x in seen))
        dist.all_reduce(held)
        if not held:
            return True
        time.sleep(0.05)
    return False


def what_stays_in_memory() -> None:
    """Of a gathered head nothing does behind the call, nor behind the backward pass."""
    student, teacher = sharded(Model(0, HIDDEN), "alone"), sharded(Model(1, TEACHER), "alone")
    seen: list[weakref.ref[Any]] = []
    gather = shards.Shard.gather

    def recorded(self: shards.Shard) -> Tensor:
        whole = gather(self)
        seen.append(weakref.ref(whole.untyped_storage()))
        return whole

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Shard, "gather", recorded)
        loss = two_heads(student, teacher, dist.get_rank(), reduction="sum")
        assert len(seen) == 4 and released(seen)
        loss.backward()
        assert len(seen) == 4  # the gradients came with the value
        loss = two_heads(student, teacher, dist.get_rank(), reduction="none")
        loss.sum().backward()
        assert len(seen) == 12 and released(seen)  # once more for the backward pass


def other_dtypes(world: int) -> None:
    """16-bit parameters, and a policy under which a forward would use such: the head's own dtype, float32, is gathered.
    The whole head of "root" is the policy's."""
    rank, other = dist.get_rank(), Model(1, TEACHER)
    policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    for dtype, options in ((torch.bfloat16, {}), (torch.float32, policy)):
        student, plain = (Model(0, HIDDEN).to(dtype) for _ in range(2))
        sharded(student, "alone", **options)
        (two_heads(student, other, rank, num_items=sum(ROWS[:world])) * world).backward()
        for data in range(world):
            two_heads(plain, other, data, num_items=sum(ROWS[:world])).backward()
        assert student.head.weight.grad.dtype == dtype
        found, wanted = student.head.weight.grad.full_tensor(), plain.head.weight.grad
        assert error(found, wanted) <= EXACT_GRADIENT[dtype] * (world if dtype == torch.bfloat16 else 1)


def what_cannot_be_told(world: int) -> None:
    """A cast is no parameter of FSDP's any more, and might be a split of the vocabulary."""
    rank = dist.get_rank()
    student, teacher = sharded(Model(0, HIDDEN), "alone"), Model(1, TEACHER)
    weight = student.head.weight.double()
    states, target = torch.ones(ROWS[rank], HIDDEN), torch.ones(ROWS[rank], TEACHER)
    with pytest.raises(ValueError, match=r"student_weight is a DTensor placed as .* Expected the module's own") as told:
        fd.linear_logit_loss(states, weight, target, teacher.head.weight.detach())
    with pytest.raises(ValueError, match="student_weight is a DTensor placed as"):
        fd.linear_topk_logit_loss(states, weight, states.log_softmax(-1)[:, :2], torch.arange(2).expand(ROWS[rank], 2))
    with pytest.raises(ValueError, match="group came, and student_weight is a shard of fully_shard"):
        fd.linear_logit_loss(states, student.head.weight, target, teacher.head.weight.detach(), group=dist.group.WORLD)
    assert "full_tensor(grad_placements=[Partial('avg')])" in str(told.value)
    # What the error says to do, for tokens of the ranks' own and for the same ones.
    whole = weight.full_tensor(grad_placements=[Partial("avg")])
    fd.linear_logit_loss(states, whole, target, teacher.head.weight.detach(), reduction="sum").backward()
    one = Model(0, HIDDEN).head.weight
    for data in range(world):
        sizes = (ROWS[data], HIDDEN), (ROWS[data], TEACHER)
        rows = [torch.ones(*size) for size in sizes]
        fd.linear_logit_loss(rows[0], one.double(), rows[1], teacher.head.weight.detach(), reduction="sum").backward()
    assert error(student.head.weight.grad.full_tensor() * world, one.grad) <= SAME_STEP[torch.float32]
    mesh = weight.device_mesh
    split = distribute_tensor(teacher.head.weight.detach(), mesh, [Shard(0)])
    states, target = torch.ones(3, HIDDEN), torch.ones(3, TEACHER)
    same_tokens = (states, weight.detach(), target, split)
    if world == 4:  # 2, 2, 1 and 0 rows
        with pytest.raises(ValueError, match="student_weight has 5 rows over 4 ranks, one of which has none"):
            fd.linear_logit_loss(*same_tokens, group=mesh.get_group())
        return
    parts = fd.linear_logit_loss(*same_tokens, group=mesh.get_group())
    assert error(parts, fd.linear_logit_loss(states, one.double(), target, teacher.head.weight.detach())) <= 1e-6
    with pytest.raises(
        ValueError, match="teacher_weight is a shard of fully_shard, expected a DTensor sharded by rows"
    ):
        named = init_device_mesh("cpu", (world,), mesh_dim_names=("model",))
        tensor_parallel = distribute_tensor(one.detach(), named, [Shard(0)])
        fd.linear_logit_loss(states, tensor_parallel, states, student.head.weight.detach())
    with pytest.raises(TypeError, match=r"hidden_loss: projection is a DTensor placed as \(Shard\(dim=0\),\)"):
        fd.hidden_loss(torch.ones(3, HIDDEN), torch.ones(3, VOCABULARY), projection=student.head.weight)
    with pytest.raises(TypeError, match="logit_loss: weight is a DTensor"):
        fd.logit_loss(states, states, weight=distribute_tensor(torch.ones(3), mesh, [Replicate()]))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    world = int(os.environ["WORLD_SIZE"])
    try:
        every_step(world)
        labels_and_rows(world)
        if world == 4:
            other_meshes()
        what_stays_in_memory()
        other_dtypes(world)
        what_cannot_be_told(world)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
