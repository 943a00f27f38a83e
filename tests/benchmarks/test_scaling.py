"""benchmarks/scaling.py against real steps on 1, 2 and 4 processes, against transformers' models, and docs/scaling.md."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastdistil.benchmarks.scaling import H100, Model, Plan, Task, numbers, seconds, sent, simulate, step_tasks

from fastdistil.systems.plan import cost

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests/support"
sys.path.insert(0, str(ROOT / "docs/tools"))

steps = pytest.importorskip("scaling_steps", reason="needs transformers")
import scaling_tables  # noqa: E402

needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32", reason="needs gloo and torchrun"
)


@pytest.mark.parametrize("family", ["llama", "bert", "tables"])
def test_memory_of_a_step_in_one_process(family: str) -> None:
    steps.compared(family, "one", 1)


@needs_gloo
@pytest.mark.soak
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_memory_and_bytes_under_ddp_and_fully_shard(processes: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    found = subprocess.run(
        [*launch, str(SUPPORT / "scaling_steps.py")],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-6000:]
    assert found.stdout.count("measured") > 40 * (processes > 1)


@pytest.mark.parametrize("model", [*scaling_tables.WORK.values()], ids=[*scaling_tables.WORK])
def test_sizes_are_those_of_transformers(model: scaling_tables.Work) -> None:
    """Parameters, products and blocks of the page's models, built without memory."""
    for one in (model.student, model.teacher):
        with torch.device("meta"):
            real = steps.build(one)
        found, wanted = one.cost(), cost(real)
        assert (found.parameters, found.multiplied) == (wanted.parameters, wanted.multiplied), one
        block = real.model.layers[0] if one.gated else real.bert.encoder.layer[0]
        assert sum(p.numel() for p in block.parameters()) == numbers(one.block())


@pytest.mark.soak
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_saved_activations(family: str, dtype: torch.dtype, checkpointing: bool) -> None:
    """What lies between two depths of one model, all else being equal: a block's saved tensors."""
    ends = []
    for layers in (1, 4):
        one = replace(steps.STUDENTS[family], layers=layers)
        model = steps.build(one).to(dtype)
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = torch.zeros(steps.SEQUENCES, steps.LENGTH, dtype=torch.int64)
        steps.states(model, ids)  # what is made once and kept
        found: dict[str, int] = {}
        with steps.measured(found), torch.profiler.record_function("phase:forward"):
            kept = steps.states(model, ids)
        ends.append(found["after forward"])
        del kept
    wanted = ids.numel() * (one.width * dtype.itemsize if checkpointing else one.saved(dtype.itemsize))
    wanted += torch.get_rng_state().nbytes if checkpointing else 0  # for dropout, whatever the block's size
    what = f"{family} in {dtype}, checkpointing {checkpointing}, a block"
    steps.near(what, (ends[1] - ends[0]) / 3, wanted)


def test_overlap_is_computed() -> None:
    """Two streams: a prefetch hides behind work, what depends on the last block does not."""
    tasks = {
        "gather 0": Task("network", 2.0),
        "block 0": Task("compute", 3.0, ["gather 0"]),
        "gather 1": Task("network", 2.0),
        "block 1": Task("compute", 3.0, ["gather 1"]),
        "reduce": Task("network", 1.5, ["block 1"]),
    }
    assert simulate(tasks) == {"gather 0": 2.0, "gather 1": 4.0, "block 0": 5.0, "block 1": 8.0, "reduce": 9.5}


def test_a_step_is_never_faster_than_its_parts() -> None:
    student = Model("student", 4, 512, 2048, 8, 8, 32_000, gated=True, tied=False)
    for kind in ("ddp", "fsdp"):
        for gpus in (1, 8, 64):
            plan = Plan(gpus, kind, "replicated", 8, 512)
            found = seconds(student, student, plan, H100)
            tasks = step_tasks(student, student, plan, H100)
            streams = [sum(x.seconds for x in tasks.values() if x.stream == name) for name in ("compute", "network")]
            assert max(streams) <= found * (1 + 1e-12) <= sum(streams) * (1 + 1e-9)
            slower = replace(H100, network=H100.network / 4, nvlink=H100.nvlink / 4)
            later = seconds(student, student, plan, slower)
            assert later > found if gpus > 1 else later == found


def test_bytes_of_a_ring() -> None:
    assert [sent(96.0, n) for n in (1, 2, 4)] == [0.0, 48.0, 72.0]
    assert numbers([(5, 3), (4,)]) == 19
    assert numbers([(5, 3), (4,)], 4) == 8 * 3 + 4


def test_the_page_has_the_tables_that_the_code_gives() -> None:
    page = scaling_tables.PAGE.read_text(encoding="utf-8")
    assert scaling_tables.filled(page) == page, "run python benchmarks/scaling.py --table"
