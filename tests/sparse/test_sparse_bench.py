"""The sparse cases of the benchmark: each runs when small, and a selection or a step that is wrong is not timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from fastdistil.benchmarks import cases, child, measure, plot, record, run, sparse

from fastdistil.sparse import SparseAdamW, SparseMask

DEVICE = run.device_here()
RATES = {"copy_gb_s": 10.0, "matrix_gflop_s": 100.0}
SPARSE = {case.options["work"]: case for case in cases.cpu_cases() if case.op == "sparse"}
SMALL = {work: cases.small(case) for work, case in SPARSE.items()}


def records(case: cases.Case) -> list[dict[str, Any]]:
    return run.run_case(case, "cpu", RATES, lambda text: None, tiny=True)


def test_shapes_are_those_of_bert() -> None:
    for work, count in (("select", 177_853_440), ("step", 109_482_240)):
        shapes = sparse.bert_shapes(SPARSE[work].shape)
        assert len(shapes) == 199
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == count
        assert cases.parameters(SPARSE[work].shape) == count
    training = sparse.TrainingStep("fused:bool", SMALL["train"], "cpu")
    assert sum(p.numel() for p in training.model.parameters()) == cases.parameters(SMALL["train"].shape, pooler=False)


@pytest.mark.parametrize("work", SMALL)
def test_a_case_gives_time_memory_and_error(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "child", lambda task, arguments: child.memory(arguments))  # without a process each
    found = records(SMALL[work])
    assert tuple(r["implementation"] for r in found) == SPARSE[work].implementations
    for r in found:
        assert r["status"] == "ok", r
        assert r["time_us"]["both"]["p50"] > 0
        assert 0 <= r["value_error"] < 1e-5
        assert r["ratios"]["both"]["this_over_floor"] > 0
        assert r["thresholds"] == []
        if "scaled" in r:  # it works on a part
            assert 9 < r["scaled"] < 11
        else:
            assert r["peak_mem_mib"] is None or r["peak_mem_mib"] >= 0
    assert next(r for r in found if r["implementation"] == found[0]["baseline"])["ratios"]["both"][
        f"{found[0]['baseline']}_over_this"
    ] == pytest.approx(1)
    assert f"| sparse {SPARSE[work].name} | fastdistil cpu |" in plot.page(found, [])
    if work != "select":
        ours, dense = (r["state_mib"] for r in found if r["implementation"] in ("fastdistil:cpu", "fused:bool"))
        assert min(ours, dense) * 7 < max(ours, dense)
    assert record.kernel_hash("sparse") != record.kernel_hash("logits")


def test_thresholds_compare_medians_and_state() -> None:
    wanted = (cases.Threshold("ours", "fused", 3.0), cases.Threshold("ours", "fused", 7.0, "state"),
              cases.Threshold("ours", quantity="memory", at_most=64.0))  # fmt: skip
    case = replace(SMALL["step"], thresholds=wanted)
    times: dict[str, dict[str, Any]] = {
        "ours": {"time_us": {"both": {"p50": 10.0}}, "state_mib": 2.0, "peak_mem_mib": 65.0},
        "fused": {"time_us": {"both": {"p50": 40.0}}, "state_mib": 12.0},
    }
    run._compare(case, times, RATES)
    assert [(x["found"], x["reached"]) for x in times["ours"]["thresholds"]] == [
        (4.0, True),
        (6.0, False),
        (65.0, False),
    ]
    assert times["fused"]["thresholds"] == []
    assert times["fused"]["ratios"]["both"]["fused_over_this"] == 1
    assert times["fused"]["ratios"]["both"]["this_over_best"] == 4


def refused(case: cases.Case, name: str = "fastdistil:cpu") -> str:
    found = {r["implementation"]: r for r in records(case)}
    assert found[case.baseline]["status"] == "ok"
    assert found[name]["status"] == "refused"
    assert "time_us" not in found[name]
    return str(found[name]["reason"])


def test_a_wrong_selection_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sparse.select_topk

    def off(tuned: Any, base: Any, k: int, backend: str) -> SparseMask:
        mask = right(tuned, base, k=k, backend=backend)
        name = max(mask, key=lambda name: len(mask[name]))
        index = mask[name].clone()
        index[0] = min(set(range(len(index) + 1)) - set(index.tolist()))  # one that was not chosen
        return SparseMask({**mask, name: index.unique()}, mask.shapes)

    monkeypatch.setattr(sparse, "select_topk", off)
    assert "its value is" in refused(replace(SMALL["select"], memory=False))


@pytest.mark.parametrize("work", ["step", "train"])
def test_a_wrong_step_is_not_timed(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(SparseAdamW):
        def _constants(self, group: dict[str, Any], step: float) -> Any:
            return super()._constants({**group, "lr": 1.1 * group["lr"]}, step)

    monkeypatch.setattr(sparse, "SparseAdamW", Off)
    assert "its value is" in refused(replace(SMALL[work], memory=False))


def test_names_that_nothing_has_are_refused() -> None:
    for case in SMALL.values():
        with pytest.raises(ValueError, match="implementation is 'magic', expected fastdistil:<backend> or"):
            sparse.work(case, "cpu").build("magic").run()


@pytest.mark.soak
def test_memory_of_a_step_is_its_state() -> None:
    """The first step is measured: moments of every entry, or of the chosen ones."""
    if not measure.Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    case = replace(SMALL["step"], shape={"V": 20_000, "D": 256, "L": 2})
    peaks = {n: measure.peak_mib(case, n, "cpu", lambda: 0.0) for n in ("fastdistil:cpu", "fused")}
    dense_mib = cases.parameters(case.shape) * 8 / (1 << 20)
    assert peaks["fused"] == pytest.approx(dense_mib, rel=0.2)
    assert peaks["fastdistil:cpu"] < 0.3 * dense_mib
