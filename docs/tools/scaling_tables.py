"""The tables of docs/scaling.md, from benchmarks/scaling.py: which plan is fastest on how many GPUs, and when cached
teacher outputs pay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

from fastdistil.benchmarks.scaling import (
    H100,
    H200,
    Machine,
    Model,
    Plan,
    memory,
    seconds,
    sent_by_kind,
    simulate,
    step_tasks,
)

PAGE = Path(__file__).resolve().parents[1] / "scaling.md"
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
USABLE = 0.9  # of the memory: CUDA's and NCCL's own buffers and fragmentation take the rest
CLOSE = 1.05  # a simpler plan within 5% of the fastest is taken: the times are no better than that


@dataclass(frozen=True)
class Work:
    """A student, its teacher, and what each GPU gets in a step."""

    title: str
    student: Model
    teacher: Model
    sequences: int
    length: int
    machine: Machine


MBERT = Model("mBERT", 12, 768, 3072, 12, 12, 119_547, gated=False, tied=True, positions=512)
XLMR = Model("XLM-R large", 24, 1024, 4096, 16, 16, 250_002, gated=False, tied=True, positions=514, types=1)
LLAMA_8B = Model("8B", 32, 4096, 14_336, 32, 8, 128_256, gated=True, tied=False)
LLAMA_70B = Model("70B", 80, 8192, 28_672, 64, 8, 128_256, gated=True, tied=False)
WORK = {
    "mbert": Work("mBERT to 6 blocks", replace(MBERT, name="6 blocks", layers=6), MBERT, 64, 128, H100),
    "xlmr": Work("XLM-R large to 6 blocks", replace(XLMR, name="6 blocks", layers=6), XLMR, 64, 128, H100),
    "llama": Work("70B to 8B", LLAMA_8B, LLAMA_70B, 2, 4096, H100),
    "llama-h200": Work("70B to 8B", LLAMA_8B, LLAMA_70B, 2, 4096, H200),
}
LIVE = ("replicated", "sharded", "tensor", "own ranks")


def peak(student: Model, teacher: Model, plan: Plan) -> tuple[str, dict[str, float]]:
    """The moment of most memory, and its categories."""
    moments = memory(student, teacher, plan)
    name = max(moments, key=lambda x: sum(moments[x].values()))
    return name, moments[name]


def fits(work: Work, plan: Plan) -> bool:
    found = sum(peak(work.student, work.teacher, plan)[1].values())
    if plan.teacher == "own ranks":
        whole = plan.size * work.teacher.cost().parameters / plan.teacher_split
        found = max(found, whole)
    return found <= USABLE * work.machine.memory


def plans(work: Work, gpus: int, teacher: str) -> Iterator[Plan]:
    """Those that can be built, the simplest first."""
    decoder = work.student.gated
    if teacher == "tensor" and (not decoder or gpus % 8):
        return
    shares = [0]
    if teacher == "own ranks":
        if not decoder or gpus < 16:
            return
        cost = [x.cost().forward(1, work.length) for x in (work.student, work.teacher)]
        part = gpus * cost[1] / (3.5 * cost[0] + cost[1]) / 8
        shares = sorted({8 * min(max(1, round(part + x)), gpus // 8 - 1) for x in (-1, 0, 1)})
    options = product((1, 2, 4, 8) if decoder else (1,), (False, True), ("ddp", "fsdp"), shares)
    for tensor, checkpointing, kind, share in options:
        own = gpus - share
        if own % tensor or (kind == "fsdp" and own == tensor) or (teacher == "topk" and tensor > 1):
            continue
        yield Plan(
            own, kind, teacher, work.sequences * tensor, work.length, tensor, checkpointing=checkpointing,
            teacher_ranks=share,
        )  # fmt: skip


def rate(work: Work, plan: Plan) -> float:
    """Tokens per second and GPU, those of the teacher's ranks among them."""
    step = seconds(work.student, work.teacher, plan, work.machine)
    return plan.data * plan.tokens / step / (plan.gpus + plan.teacher_ranks)


@cache
def best(name: str, gpus: int, teachers: tuple[str, ...]) -> tuple[Plan, float] | None:
    """The simplest plan within 5% of the fastest that fits, and its tokens per second and GPU."""
    work = WORK[name]
    found = [(plan, rate(work, plan)) for x in teachers for plan in plans(work, gpus, x) if fits(work, plan)]
    fastest = max((speed for _, speed in found), default=0.0)
    return next(((plan, speed) for plan, speed in found if speed * CLOSE >= fastest), None)


def words(plan: Plan) -> str:
    said = "one GPU" if plan.gpus == 1 else "FSDP2" if plan.kind == "fsdp" else "DDP"
    if plan.tensor > 1:
        said = f"TP {plan.tensor}" if plan.data == 1 else f"TP {plan.tensor} × {said}"
    said += ", checkpointing" if plan.checkpointing else ""
    teachers = {
        "replicated": "teacher on each", "sharded": "teacher FSDP2", "tensor": f"teacher TP {plan.teacher_split}",
        "own ranks": f"teacher on {plan.teacher_ranks} of its own",
    }  # fmt: skip
    return f"{said}; {teachers[plan.teacher]}" if plan.teacher in teachers else said


def figures(work: Work, plan: Plan, speed: float) -> str:
    held = sum(peak(work.student, work.teacher, plan)[1].values())
    out = sum(sent_by_kind(work.student, work.teacher, plan).values())
    step = seconds(work.student, work.teacher, plan, work.machine)
    return f"{held / 1e9:.1f} | {out / 1e9:.2f} | {step * 1e3:,.0f} | {speed:,.0f}"


def choices(name: str, teachers: tuple[str, ...]) -> str:
    """The plan for each number of GPUs."""
    work = WORK[name]
    lines = ["| GPUs | plan | GB | GB sent | ms a step, predicted | tokens/s/GPU, predicted |", "| --- " * 6 + "|"]
    for gpus in GPUS:
        found = best(name, gpus, teachers)
        cells = "none fits | – | – | – | –" if found is None else f"{words(found[0])} | {figures(work, *found)}"
        lines.append(f"| {gpus} | {cells} |")
    return "\n".join(lines)


def placements(name: str, gpus: int) -> str:
    """The best plan for each place of the teacher, and how much of its time the network is waited for."""
    work = WORK[name]
    head = (
        "| teacher | plan | GB | GB sent | ms a step, predicted | tokens/s/GPU, predicted | waiting for the network |"
    )
    lines = [head, "| --- " * 7 + "|"]
    for teacher in (*LIVE, "hidden", "topk"):
        found = best(name, gpus, (teacher,))
        if not any(plans(work, gpus, teacher)):
            continue
        if found is None:
            lines.append(f"| {teacher} | none fits | – | – | – | – | – |")
            continue
        tasks = step_tasks(work.student, work.teacher, found[0], work.machine)
        busy = sum(x.seconds for x in tasks.values() if x.stream == "compute")
        waits = 1 - busy / max(simulate(tasks).values())
        lines.append(f"| {teacher} | {words(found[0])} | {figures(work, *found)} | {waits:.0%} |")
    return "\n".join(lines)


def parts(name: str, gpus: int) -> str:
    """Memory by category at its peak."""
    work = WORK[name]
    lines = list[str]()
    for label, teachers in (("live teacher", LIVE), ("cached states", ("hidden",)), ("cached top-k", ("topk",))):
        found = best(name, gpus, teachers)
        if found is None:
            continue
        moment, held = peak(work.student, work.teacher, found[0])
        if not lines:
            lines = [f"| | plan | peak at | {' | '.join(held)} |", "| --- " * (3 + len(held)) + "|"]
        amounts = " | ".join(f"{x / 1e9:.1f}" for x in held.values())
        lines.append(f"| {label} | {words(found[0])} | {moment} | {amounts} |")
    return "\n".join(lines)


def payoff(gpus: int) -> str:
    """What cached outputs cost on disk, and after how many passes over the data they have saved time."""
    lines = [
        "| | cached | bytes a token | TB a 1e9 tokens | MB/s to read a GPU | ms a step, predicted | live, predicted | "
        "teacher's pass, predicted | passes that pay for it, predicted |",
        "| --- " * 9 + "|",
    ]
    for name, work in WORK.items():
        live = best(name, gpus, LIVE)
        for cached in ("hidden", "topk"):
            if live is None:
                continue
            plan = replace(live[0], teacher=cached)
            speed = rate(work, plan)
            stored = 2 * work.teacher.width if cached == "hidden" else 8 * plan.k + 4
            tokens = work.sequences * work.length
            forward = work.machine.products(work.teacher.block_forward(tokens, work.length)) * work.teacher.layers
            if cached == "topk":
                forward += work.machine.products(work.teacher.head_forward(tokens))
            times = [tokens / x for x in (speed, live[1])]
            passes = forward / (times[1] - times[0])
            disk = f"{stored:,} | {stored / 1e3:.2f} | {stored * speed / 1e6:,.0f}"
            spent = " | ".join(f"{x * 1e3:,.0f}" for x in (*times, forward))
            kind = "states" if cached == "hidden" else f"top {plan.k}"
            lines.append(f"| {work.title}, {work.machine.name} | {kind} | {disk} | {spent} | {passes:.1f} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """By the name of their marks on the page."""
    found = dict[str, str]()
    for name in WORK:
        found[f"{name} live"] = choices(name, LIVE)
        found[f"{name} cached"] = choices(name, ("hidden",))
    found["placements"] = placements("llama", 64)
    found["placements of mBERT"] = placements("mbert", 8)
    found["parts"] = parts("llama", 64)
    found["payoff"] = payoff(64)
    return found


def filled(page: str) -> str:
    """The page with its tables."""
    for name, table in tables().items():
        marks = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found, rest = page.partition(marks[0])
        if not found or marks[1] not in rest:
            raise ValueError(f"docs/scaling.md has no marks {marks[0].strip()} and {marks[1]}, expected both")
        page = before + marks[0] + table + "\n" + marks[1] + rest.partition(marks[1])[2]
    return page


def write() -> None:
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
