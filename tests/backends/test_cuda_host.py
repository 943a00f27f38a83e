"""The CUDA kernels without a GPU: the very sources, their threads as fibers on the CPU, in several orders.

tests/support/cuda_emulator.py says how. The cases are those of the other backends' tests: here the emulated kernels stand in
for the CPU's, so that the whole way from the public function through the cuda backend's module is taken.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cuda_emulator
import pytest
import rows
import test_logit
import test_rows
import test_sparse_select
import test_vocab_parallel
import torch
from cuda_emulator import ORDERS, Emulator
from judge import EXACT_VALUE, Outcome, error, judge_exact
from sparse_cases import DTYPES, model
from torch import Tensor, nn

import fastdistil as fd
from fastdistil.backends.cpu import logit as cpu_logit
from fastdistil.backends.cuda import logit as cuda_logit
from fastdistil.backends.cuda import sparse as cuda_sparse
from fastdistil.contracts.logit import DIVERGENCES, LOSSES, STATS
from fastdistil.sparse import SparseAdamW

pytestmark = pytest.mark.skipif(cuda_emulator.COMPILER is None, reason="needs a C++ compiler")

HOST = "cpu"  # the backend whose place the emulated one takes: the only compiled one that may read CPU tensors
CACHE = Path(__file__).parents[2] / "build/cuda_host"


@pytest.fixture(scope="module")
def library() -> Path:
    return cuda_emulator.build(CACHE)


@pytest.fixture
def emulator(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    found = Emulator(library)
    found.settings()
    install(found, monkeypatch)
    yield found
    found.settings()


@pytest.fixture(params=["two_reads", "cluster"])
def either(request: pytest.FixtureRequest, emulator: Emulator) -> Emulator:
    """Both kernels for rows of logits: the GPU that is played is of compute capability 8 or 9."""
    emulator.settings(capability=8 if request.param == "two_reads" else 9)
    return emulator


def install(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cuda backend's own modules, on the emulator, wherever the CPU's are asked for, which has the others."""
    ours = {"logit": cuda_logit, "sparse": cuda_sparse}
    backends = importlib.import_module("fastdistil.backends")  # fastdistil.backends is the function of that name
    load = backends._load
    for module in ours.values():
        monkeypatch.setattr(module, "_C", emulator)

    def found(stem: str, name: str) -> ModuleType:
        return ours[stem] if name == HOST and stem in ours else load(stem, name)

    monkeypatch.setattr(backends, "_load", found)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))


def test_conversions_round_as_torch_does(library: Path) -> None:
    emulator = Emulator(library)
    numbers = torch.cat(
        (torch.randn(2000) * torch.logspace(-9, 6, 2000), torch.tensor([0.0, -0.0, math.inf, 65519.99]))
    )
    ties = torch.arange(1, 2050, 2) * 2.0**-25  # between subnormals of float16, and between its first normals
    for x in torch.cat((numbers, ties)):
        for dtype, convert in ((torch.bfloat16, "to_bf16"), (torch.float16, "to_f16")):
            assert getattr(emulator.library, convert)(x.item()) == x.to(dtype).view(torch.int16).item() & 0xFFFF
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    back = torch.tensor([emulator.library.from_f16(x & 0xFFFF) for x in halves.view(torch.int16).tolist()])
    assert torch.equal(back.isnan(), halves.isnan())
    assert torch.equal(back.nan_to_num(), halves.float().nan_to_num())


# All in float32, and of each other type every third.
RULES = [
    (d, t)
    for i, d in enumerate(LOSSES)
    for j, t in enumerate(test_logit.DTYPES)
    if j == 0 or (d in DIVERGENCES and (i + j) % 3 == 0)
]


@pytest.mark.parametrize(("divergence", "dtype"), RULES, ids=str)
def test_every_divergence(either: Emulator, divergence: str, dtype: torch.dtype) -> None:
    test_logit.test_every_divergence_is_right(HOST, divergence, dtype)
    if divergence != "forward_kl" and dtype == torch.float32:
        test_logit.test_every_divergence_is_exact_near_convergence(HOST, divergence)
    if dtype == torch.float32:
        test_logit.test_infinities_never_make_a_finite_loss_nan(HOST, "tvd" if divergence == "mse" else divergence)
        test_logit.test_rows_of_weight_zero_are_not_read(HOST, divergence)


@pytest.mark.parametrize("columns", [1, 7, 1000, 1024, 2049, 9001])
def test_ugly_shapes(either: Emulator, columns: int) -> None:
    for n in (0, 1, 5):
        test_logit.test_ugly_shapes(HOST, n, columns)


def test_logits_as_on_other_backends(either: Emulator) -> None:
    """Infinities, offsets, rows far apart, strided and misaligned rows, any incoming gradient, in place."""
    test_logit.test_infinities(HOST)
    for offset in (0.3, -40.0):
        test_logit.test_a_constant_offset_costs_nothing(HOST, offset)
        test_logit.test_logits_far_from_zero(HOST, 25 * offset)
    test_logit.test_a_peak_before_the_teacher_rises(HOST)
    for gap in (10.0, 60.0, 300.0, 3000.0):
        test_logit.test_rows_far_apart(HOST, gap)
    test_logit.test_nothing_counts(HOST, "mean")
    test_logit.test_strided_and_misaligned_rows(HOST)
    for dtype in (torch.float32, torch.bfloat16):
        test_logit.test_backward_twice_and_any_incoming_gradient(HOST, "none", dtype)
    for divergence in ("forward_kl", "jsd"):
        test_logit.test_inplace_backward_overwrites_the_logits(HOST, divergence)


def test_rows_as_training_makes_them(either: Emulator) -> None:
    """Without labels, whose kernel is Triton's."""
    test_rows.judge_some("logit", 15, [HOST], 3000, every_isa=False, labels=False)


def test_rows_that_ever_failed(either: Emulator) -> None:
    for case in map(rows.from_line, test_rows.LINES):
        if case.loss == "logit" and not case.label_weight and rows.size(case) <= 3000:
            test_rows.check(case, [HOST], every_isa=False)


@pytest.mark.parametrize(("dtype", "noise"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)], ids=str)
def test_exact_near_convergence(either: Emulator, dtype: torch.dtype, noise: float) -> None:
    test_logit.test_exact_near_convergence(HOST, noise, dtype)


@pytest.mark.pairs(3, "divergence", "case")
@pytest.mark.parametrize("case", ["usual", "near", "masked"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "mse"])
def test_phases(emulator: Emulator, divergence: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary in parts: statistics, then values, then centred gradients."""
    test_vocab_parallel.test_phases_of_every_backend(HOST, divergence, case, monkeypatch)


def values_and_gradients(divergence: str, dtype: torch.dtype) -> list[Tensor]:
    """Through the backend's module, which hides nothing: three rows, one of weight 0, one whose sides lie far apart."""
    generator = torch.Generator().manual_seed(3)
    teacher = 4 * torch.randn(5, 2049, generator=generator)
    student = (teacher + torch.randn(teacher.shape, generator=generator)).to(dtype)
    student[1, 5] += 3000
    student.requires_grad_()
    weight = torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0])
    value = fd.logit_loss(
        student, teacher.to(dtype), divergence=divergence, weight=weight, reduction="none", backend=HOST
    )
    return [value.detach(), torch.autograd.grad(value.nan_to_num(posinf=0).sum(), student)[0]]


IN_ORDERS = (("reversed", 0), ("random", 1), ("random", 2))


def orders_agree(emulator: Emulator, divergence: str, **options: int) -> bool:
    """Bit for bit: sums run in an order that barriers fix."""
    emulator.settings("forward", **options)
    expected = values_and_gradients(divergence, torch.bfloat16)
    for order, seed in IN_ORDERS:
        emulator.settings(order, seed, **options)
        if not all(map(torch.equal, values_and_gradients(divergence, torch.bfloat16), expected)):
            return False
    return True


@pytest.mark.pairs(3, "divergence", "cluster")
@pytest.mark.parametrize("cluster", [0, 1, 4])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "mse"])
def test_the_order_of_threads_changes_nothing(emulator: Emulator, divergence: str, cluster: int) -> None:
    assert orders_agree(emulator, divergence, cluster=cluster, active_clusters=2)


def without(file: str, barrier: str, which: int) -> Path:
    """The library without the which-th `barrier` of a file; what that makes compile anew has jsd in bfloat16 alone."""
    compiled = "logit.cu" if file == "logit.cu" else "logit_cluster.cu"

    def change(name: str, source: str) -> str:
        if name == compiled:
            others = ("float", "__half", "double") if name == "logit.cu" else ("float", "__half")
            source = cuda_emulator.launching_less(source, others, "false")
            source = cuda_emulator.launching_less(source, ("__nv_bfloat16",), "std::is_same_v<Rule, JensenShannon>")
        if name != file:
            return source
        parts = source.split(barrier)
        assert len(parts) > which + 1, "fewer barriers than that"
        return barrier.join(parts[: which + 1]) + barrier.join(parts[which + 1 :])

    return cuda_emulator.build(CACHE, change)


BARRIERS = [
    ("logit.cu", "__syncthreads();", 0),  # before a reduction writes its parts
    ("cluster_chunks.h", "__syncthreads();", 0),  # before a chunk is filled with the next row
    ("logit_cluster.cu", "hopper::cluster_sync();", 0),  # before a block's totals are read by the others
    ("cluster_chunks.h", "hopper::wait(full_ + c, parities_ >> c & 1);", 0),  # before a chunk is read
]


@pytest.mark.parametrize(("file", "barrier", "which"), BARRIERS)
def test_a_missing_barrier_is_noticed(file: str, barrier: str, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = Emulator(without(file, barrier, which))
    install(emulator, monkeypatch)
    clustered = file != "logit.cu"
    with contextlib.suppress(RuntimeError):  # threads that part for good are a deadlock, which the emulator reports
        assert not orders_agree(emulator, "jsd", cluster=2 if clustered else 0, active_clusters=1)


CLUSTERS = [(blocks, columns) for blocks in (1, 2, 4, 8, 16) for columns in (5, 33, 4099) if blocks < 8 or columns > 33]


@pytest.mark.parametrize(("blocks", "columns"), [*CLUSTERS, (2, 17_001), (4, 33_333)])
def test_clusters_of_every_size(emulator: Emulator, blocks: int, columns: int) -> None:
    """Seven rows on two clusters: each goes from row to row, some of which do not count, in any order of threads."""
    divergence = ("forward_kl", "jsd", "skew_kl")[columns % 3]
    rule = test_vocab_parallel.as_rule(divergence)
    t_s, t_t = rule["student_temperature"], rule["teacher_temperature"]
    kinds = ((torch.bfloat16, "random"), (torch.float32, "reversed"), (torch.float16, "forward"))
    for dtype, order in kinds[: 3 if blocks < 8 and columns < 9999 else 1]:  # a thread costs what a GPU's does not
        # Rows of three alignments, each moving along as odd strides make it.
        memory = torch.full((3, 7, columns + 40), 7e3, dtype=dtype)
        student, teacher, gradient = memory[0, :, 3:-37], memory[1, :, 1 : columns + 1], memory[2, :, 6 : columns + 6]
        teacher.copy_(4 * torch.randn(7, columns))
        student.copy_(teacher.float() + torch.randn(7, columns))
        teacher[3, columns // 2] += 40  # sure of itself
        student[3, columns // 2] += 40
        student[5] *= 10  # far away
        scale = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 0.5, 1.0])
        student[1] = math.nan
        sentinels = memory.clone()
        truth = [torch.empty_like(scale), torch.empty(7, STATS), torch.empty(7, columns)]
        cpu_logit.logit_fwd(student.float(), teacher.float(), scale, *truth, **rule)
        found = [torch.empty_like(scale), torch.empty(7, STATS)]
        for inplace in (False, True):
            emulator.settings(order, columns, active_clusters=2, cluster=blocks)
            before = emulator.library.clusters_seen()
            into = student if inplace else gradient
            cuda_logit.logit_fwd(student, teacher, scale, *found, into, **rule)
            assert emulator.library.clusters_seen() == before + (blocks > 1)
            judge_exact(Outcome(found[0], (into,)), Outcome(truth[0], (truth[2],)), dtype)
            for stats in (found[1], truth[1]):  # where two columns are largest, either may be the reference
                stats[:, 3] += stats[:, 5] + stats[:, 2] / t_s - stats[:, 10] / t_t
                stats[:, 7] += stats[:, 6] / t_s
                stats[:, [2, 5, 6, 9, 10]] = 0
                if divergence == "forward_kl":  # it has no centre, and the CPU's says how its gradient was made
                    stats[:, 4] = 0
            near = [r for r in range(7) if r != 5]
            assert error(found[1][near], truth[1][near]) <= EXACT_VALUE
        for view in (student, gradient):
            view.copy_(sentinels[0, :, 3:-37])
            sentinels[0 if view is student else 2].copy_(memory[0 if view is student else 2])
        assert torch.equal(memory.nan_to_num(), sentinels.nan_to_num())


def test_the_largest_rows(emulator: Emulator) -> None:
    """V 250,002: 8 blocks hold it in bf16, 16 in float32."""
    rule = test_vocab_parallel.as_rule("forward_kl")
    for dtype in (torch.bfloat16, torch.float32):
        teacher = 4 * torch.randn(1, 250_002)
        student = (teacher + torch.randn(teacher.shape)).to(dtype)
        scale, teacher = torch.ones(1), teacher.to(dtype)
        truth = [torch.empty(1), torch.empty(1, STATS), torch.empty_like(student, dtype=torch.float32)]
        cpu_logit.logit_fwd(student.float(), teacher.float(), scale, *truth, **rule)
        found = [torch.empty(1), torch.empty(1, STATS), torch.empty_like(student)]
        before = emulator.library.clusters_seen()
        cuda_logit.logit_fwd(student, teacher, scale, *found, **rule)
        assert emulator.library.clusters_seen() == before + 1
        judge_exact(Outcome(found[0], (found[2],)), Outcome(truth[0], (truth[2],)), dtype)


# ---- sparse updates


@pytest.mark.parametrize("order", ORDERS)
def test_selection(emulator: Emulator, order: str) -> None:
    emulator.settings(order)
    for dtype in DTYPES if order == "forward" else DTYPES[1:2]:
        test_sparse_select.test_equals_a_stable_sort_of_everything(dtype, HOST)
    test_sparse_select.test_infinities_and_neighbouring_floats(HOST)


def test_ties_and_neighbours(emulator: Emulator) -> None:
    """70,000 and 200,000 elements, of which most are equal; one kind of base is elsewhere, NaN is named."""
    test_sparse_select.test_ties_go_to_the_first_tensor_and_position(HOST)
    test_sparse_select.test_mixed_dtypes_compare_in_float32()
    test_sparse_select.test_nan_is_found_wherever_it_is(torch.bfloat16, 65_536)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps(emulator: Emulator, dtype: torch.dtype) -> None:
    """SparseAdamW against the reference: masked and dense tensors, masters, the pull towards a base."""
    start = model(dtype)
    mask = fd.sparse.random_mask(start, density=0.1, exclude="head", seed=1)
    found = []
    for backend in ("reference", HOST):
        params = {name: nn.Parameter(x.clone()) for name, x in start.items()}
        optimizer = SparseAdamW(params, mask, lr=3e-3, weight_decay=0.1, l1=0.3, backend=backend)
        for step in range(10):
            generator = torch.Generator().manual_seed(step)
            for param in params.values():
                param.grad = torch.randn(param.shape, generator=generator).to(dtype)
            optimizer.step()
        found.append({n: optimizer.state[p].get("master", p.detach()).double() for n, p in params.items()})
        for name in mask:
            outside = torch.ones(params[name].numel(), dtype=torch.bool)
            outside[mask[name].long()] = False
            assert torch.equal(params[name].detach().reshape(-1)[outside], start[name].reshape(-1)[outside])
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-6)
