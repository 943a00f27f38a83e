"""The benchmark's own honesty: it refuses wrong answers, says where numbers come from, and knows when they are stale."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastdistil.benchmarks import (
    cases,
    child,
    exactness,
    figures,
    floors,
    losses,
    measure,
    plot,
    problems,
    record,
    run,
    sharing,
    steps,
    work,
)
from fastdistil.benchmarks.cases import Case, Threshold

DEVICE = run.device_here()
OURS = f"fastdistil:{'cpu' if DEVICE == 'cpu' else 'triton'}"
KL = {"divergence": "forward_kl", "temperature": 2.0}
RATES = {"copy_gb_s": 10.0, "matrix_gflop_s": 100.0}
FIELDS = {
    "op", "case", "shape", "dtype", "options", "baseline", "implementation", "status", "small", "rates", "bytes", "flops", "time_us",
    "ratios", "thresholds", "repetitions", "other_load_cores", "value_error", "gradient_error", "near_value_error",
    "near_gradient_error", "near_noise", "device", "device_name", "cpu_model", "cpu_isa", "cores", "threads", "driver",
    "clock_mhz", "versions", "commit", "kernel_hash", "date",
}  # fmt: skip


def tiny(*names: str, **rest: Any) -> Case:
    return Case("logits", "tiny", {"N": 5, "V": 131}, names, options=KL, repetitions=2, memory=False, **rest)


def quiet(*unused: object) -> None:
    pass


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    thresholds = (
        Threshold(OURS, "eager", 1e-9), Threshold(OURS, "eager", 1e9), Threshold(OURS, quantity="forward", at_most=1e12),
    )  # fmt: skip
    names = ("eager", "eager_common", "fastdistil:reference", OURS, f"{OURS}:inplace")
    return run.run_case(tiny(*names, thresholds=thresholds), DEVICE, RATES, quiet, tiny=True)


def test_a_record_says_everything(records: list[dict[str, Any]]) -> None:
    assert [r["status"] for r in records] == ["ok"] * 5
    for r in records:
        assert set(r) >= FIELDS, FIELDS - set(r)
        assert json.loads(json.dumps(r)) == r
        for times in r["time_us"].values():
            assert 0 < times["p20"] <= times["p50"] <= times["p80"]
        assert set(r["time_us"]) == {"forward", "forward_grad", "backward", "both"}
        assert r["ratios"]["both"]["this_over_best"] >= 1
        assert r["kernel_hash"] != "unknown"
    ours = next(r for r in records if r["implementation"] == OURS)
    assert ours["near_gradient_error"] < 1e-5 < records[0]["near_value_error"]
    assert [x["reached"] for x in ours["thresholds"]] == [True, False, True]


def test_inplace_gets_fresh_logits_every_time() -> None:
    case = tiny("eager")
    implementation = losses.build(f"{OURS}:inplace", case, problems.make(case, DEVICE, 1.0))
    first, second = implementation.outcome(), implementation.outcome()
    assert first.value == second.value
    assert torch.equal(first.gradients["student"], second.gradients["student"])


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_a_wrong_answer_is_not_timed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = losses._fastdistil

    def off(*arguments: Any) -> Callable[..., torch.Tensor]:
        loss = right(*arguments)
        if wrong == "value":
            return lambda x: loss(x) + 1e-3
        return lambda x: (y := loss(x)) * 1.01 - 0.01 * y.detach()

    monkeypatch.setattr(losses, "_fastdistil", off)
    eager, ours = run.run_case(tiny("eager", OURS), DEVICE, RATES, quiet)
    assert eager["status"] == "ok"
    assert ours["status"] == "refused"
    assert f"its {wrong} is" in ours["reason"]
    assert "time_us" not in ours


def test_implementations_that_cannot_run_say_why() -> None:
    other = "fastdistil:cuda" if DEVICE == "cpu" else "fastdistil:cpu"
    _, ours = run.run_case(tiny("eager", other), DEVICE, RATES, quiet)
    assert ours["status"] == "unavailable"
    assert ours["reason"]
    with pytest.raises(ValueError, match="implementation is 'magic', expected fastdistil:<backend> or"):
        losses.build("magic", tiny(), problems.make(tiny(), DEVICE, 1.0))
    with pytest.raises(ValueError, match="what is 'speed', expected one of logits, .*hidden"):
        run.run("speed")


@pytest.mark.parametrize("op", cases.LOSSES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_is_right_when_small(op: str, device: str) -> None:
    """The data of both devices: the cases build, and the textbook agrees with the loss that is measured."""
    for case in cases.select(device, (op,), tiny=True):
        problem = problems.make(case, DEVICE, 1.0)
        true = problems.truth(case, problem)
        errors = work.errors(losses.build("fastdistil:reference", case, problem).outcome(), true)
        assert errors["value_error"] < 1e-5, case.name
        assert errors["gradient_error"] < losses.GRADIENT_SLACK[case.dtype] + 1e-5, case.name
        assert 0 < floors.traffic_bytes(case, "forward") < floors.traffic_bytes(case, "both")


def test_mse_of_heads_without_logits_is_the_textbooks() -> None:
    case = Case("linear", "tiny", {"N": 9, "V": 131, "D_s": 16, "D_t": 16}, (), options={"divergence": "mse", "temperature": 2.0})  # fmt: skip
    problem = problems.make(case, DEVICE, 1e-3)
    wide = {name: x.double().requires_grad_(name in problem.wanted) for name, x in problem.tensors.items()}
    loss = problems.textbook(case)(wide)
    found = problems.truth(case, problem)
    assert abs(found.value / loss.item() - 1) < 1e-9
    for name, gradient in zip(
        problem.wanted, torch.autograd.grad(loss, [wide[n] for n in problem.wanted]), strict=True
    ):
        assert work.error(found.gradients[name], gradient) < 1e-9


def test_floors_by_formula() -> None:
    case = cases.cpu_cases()[0]
    assert floors.traffic_bytes(case, "both") == 3 * 4 * 512 * 119_547
    assert floors.floor_us(case, "both", {"copy_gb_s": 10.0, "matrix_gflop_s": 1e9}) == pytest.approx(
        73_449.7, rel=1e-4
    )
    attention = next(c for c in cases.gpu_cases() if c.name == "bert-prob_kl-512")
    assert floors.operations(attention, "both") == 2 * 32 * 12 * 512**2 * 64 * 4


@pytest.mark.skipif(DEVICE != "cpu", reason="resident memory is the CPU's")
def test_peak_memory_is_that_of_a_child_process() -> None:
    case = Case("logits", "memory", {"N": 256, "V": 32_000}, (), options=KL)  # 31.25 MiB a tensor
    arguments = {"case": asdict(case), "implementation": "fastdistil:cpu"}
    assert 25 < measure.child("memory", arguments)["peak_mib"] < 70  # its gradient
    with pytest.raises(RuntimeError, match="benchmark child 'memory' failed"):
        measure.child("memory", arguments | {"implementation": "magic"})


def test_stale_is_when_the_kernels_have_changed(tmp_path: Path) -> None:
    for name in ("csrc/cpu/logit.cpp", "csrc/rules/math.h", "kernels/triton/attention.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    taken = {"op": "logits", "kernel_hash": record.kernel_hash("logits", tmp_path)}
    assert not record.is_stale(taken, tmp_path)
    (tmp_path / "kernels/triton/attention.py").write_text("2")  # another op's
    assert not record.is_stale(taken, tmp_path)
    (tmp_path / "csrc/rules/math.h").write_text("2")  # everybody's
    assert record.is_stale(taken, tmp_path)
    (tmp_path / "csrc/rules/math.h").write_text("1")
    (tmp_path / "csrc/cpu/logit.cpp").rename(tmp_path / "csrc/logit.cpp")  # a move changes no kernel
    assert not record.is_stale(taken, tmp_path)
    (tmp_path / "csrc/logit.cpp").write_text("2")
    assert record.is_stale(taken, tmp_path)


def test_a_run_that_is_cut_off_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def one(case: Case, *unused: object) -> list[dict[str, Any]]:
        if seen:
            raise KeyboardInterrupt
        seen.append(case.name)
        return [{"op": "logits", "case": case.name}]

    monkeypatch.setattr(run, "run_case", one)
    monkeypatch.setattr(run, "machine_rates", lambda device: RATES)
    out = tmp_path / "deep" / "logits.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run.run("logits", tiny=True, out=out, say=quiet)
    assert [json.loads(x)["case"] for x in out.read_text().splitlines()] == seen
    assert list(out.parent.iterdir()) == [out]


def test_resume_measures_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def one(case: Case, *unused: object) -> list[dict[str, Any]]:
        seen.append(case.name)
        failed = {"implementation": OURS, "status": "failed", "reason": "it broke"}
        return [{"op": "hidden", "case": case.name, "kernel_hash": record.kernel_hash("hidden"), **failed}]

    monkeypatch.setattr(run, "run_case", one)
    monkeypatch.setattr(run, "machine_rates", lambda device: RATES)
    out = tmp_path / "hidden.jsonl"
    for _ in range(2):
        run.run("hidden", tiny=True, out=out, resume=True, say=quiet)
    names = [case.name for case in cases.select(DEVICE, ("hidden",), True)]
    assert seen == names
    lines = [json.loads(x) for x in out.read_text().splitlines()]
    assert [x["case"] for x in lines] == names
    assert run.wrong([out]) == [f"hidden {name}: {OURS} failed, it broke" for name in names]
    record.write_records(out, [x | {"kernel_hash": "0" * 16} for x in lines])  # the kernels have changed
    run.run("hidden", tiny=True, out=out, resume=True, say=quiet)
    assert seen == names * 2


@pytest.mark.soak
def test_report_has_tables_figures_and_marks(records: list[dict[str, Any]], tmp_path: Path) -> None:
    old = [{**r, "kernel_hash": "0" * 16} for r in records]
    exact = exactness.measure(("eager", "fastdistil:reference"), ("float32", "bfloat16"), {"N": 2, "V": 77}, DEVICE)
    shared = record.environment("exactness", DEVICE)
    record.write_records(tmp_path / "logits.jsonl", old)
    record.write_records(tmp_path / "exactness.jsonl", [{**r, **shared} for r in exact])
    page, *drawn = plot.report(tmp_path)
    text = page.read_text()
    assert text.count("**stale**") == len(old) + 3  # each row, and the three thresholds
    assert "pass" in text
    assert "**FAIL**" in text
    assert {p.name.removeprefix("gpu-") for p in drawn} == {"exactness.png", "logits-time.png", "roofline.png"}
    assert all(p.stat().st_size > 10_000 for p in drawn)
    fresh = tmp_path / "fresh"
    record.write_records(fresh / "logits.jsonl", records)
    assert "**stale**" not in plot.report(fresh)[0].read_text()
    record.write_records(fresh / "logits.jsonl", old)
    assert plot.report(fresh)[0].read_text().count("**stale**") == 1  # of all of them


def test_scaling_needs_three_sizes(records: list[dict[str, Any]], tmp_path: Path) -> None:
    wider = [{**r, "shape": {"N": 5, "V": v}, "peak_mem_mib": v / 10} for r in records for v in (100, 1000, 10_000)]
    assert plot._comparable(records, "V") == []
    assert plot._comparable(wider, "V") == wider
    assert figures.scaling(wider, "V", tmp_path / "scaling.png").stat().st_size > 10_000


def test_report_of_nothing_or_of_a_broken_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no records"):
        plot.report(tmp_path / "nowhere")
    (tmp_path / "x.jsonl").write_text('{"op": "logits"}\n{"op": ')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: is not a record"):
        plot.report(tmp_path)
    with pytest.raises(ValueError, match="has no section <!-- records:cpu -->"):
        plot.replace_section("nothing here", "cpu", "text")
    filled = plot.replace_section("a <!-- records:cpu -->old<!-- end:cpu --> b", "cpu", "new")
    assert filled == "a <!-- records:cpu -->\n\nnew\n\n<!-- end:cpu --> b"


def steps_case(name: str) -> Case:
    return next(c for c in cases.select(DEVICE, ("steps",), tiny=True) if c.name == name)


@pytest.mark.parametrize("name", ["lightmbert", "bistil"])
def test_whole_steps_are_cases(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(measure, "child", lambda task, arguments: child.memory(arguments))  # without a process each
    eager, ours = run.run_case(replace(steps_case(name), memory=True), DEVICE, RATES, quiet, tiny=True)
    assert (eager["implementation"], eager["status"]) == ("eager", "ok")
    assert (ours["implementation"], ours["status"]) == (OURS, "ok")
    for r in (eager, ours):
        assert r["time_us"]["both"]["p50"] > 0
        assert r["peak_mem_mib"] is None or r["peak_mem_mib"] >= 0
    assert 0 < ours["gradient_error"] <= 2 * eager["gradient_error"] + steps.SLACK[ours["dtype"]]
    assert 0 < ours["value_error"] <= 2 * eager["value_error"] + steps.SLACK[ours["dtype"]]
    assert min(r["ratios"]["both"]["this_over_best"] for r in (eager, ours)) == 1
    assert f"| steps {name} | {figures.label(OURS)} |" in plot.page([eager, ours], [])


def test_floors_of_steps_are_those_of_the_modules() -> None:
    pytest.importorskip("transformers")
    case = steps_case("bistil")
    step = steps.StepWork(case, DEVICE).build("eager")
    assert isinstance(step, steps.Step)
    blocks = [step.teacher.encoder, step.student.encoder, step.student.encoder]  # the last: its gradients
    assert floors.traffic_bytes(case, "both") == sum(p.nbytes for module in blocks for p in module.parameters())


def test_steps_under_autocast_err_by_their_rounding() -> None:
    """What a GPU measures, on whatever device there is."""
    pytest.importorskip("transformers")
    case = replace(steps_case("lightmbert"), dtype="bfloat16")
    rounded = steps.StepWork(case, DEVICE)
    true = rounded.truth()
    for name in case.implementations:
        found = work.errors(rounded.build(name).outcome(), true)
        assert all(1e-6 < error < 0.05 for error in found.values()), name


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    right = steps.Step._captured
    monkeypatch.setattr(steps.Step, "_captured", lambda self: 1.01 * right(self))
    eager, ours = run.run_case(steps_case("lightmbert"), DEVICE, RATES, quiet, tiny=True)
    assert (eager["status"], ours["status"]) == ("ok", "refused")
    assert "its gradient is" in ours["reason"]
    assert "time_us" not in ours


def test_thread_sharing_is_a_record() -> None:
    found = sharing.run(True, quiet)
    assert found["op"] == "threads"
    assert found["turns_over_sum"] > 0
