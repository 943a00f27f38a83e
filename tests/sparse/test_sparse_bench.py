"""The sparse benchmark: every case runs when small, and a selection or a step that is wrong is not timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastdistil.benchmarks import measure, plot, record, run, sparse, sparse_contenders

from fastdistil.sparse import SparseAdamW, SparseMask

RATES = {"copy_gb_s": 10.0, "matrix_gflop_s": 100.0}
FIELDS = {"op", "case", "shape", "dtype", "contender", "status", "small", "time_us", "bars", "kernel_hash", "commit"}


def quiet(*unused: object) -> None:
    pass


def test_shapes_are_those_of_bert() -> None:
    assert sparse_contenders.parameters(sparse_contenders.bert_shapes(sparse_contenders.MBERT, False)) == 177_853_440
    assert sparse_contenders.parameters(sparse_contenders.bert_shapes(sparse_contenders.BERT, False)) == 109_482_240
    assert len(sparse_contenders.bert_shapes(sparse_contenders.BERT, False)) == 199


def test_small_run_writes_records_and_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "machine_rates", lambda device: RATES)
    monkeypatch.setattr(sparse, "child", lambda task, arguments: {"peak_mib": 12.0})
    run.run("sparse", tiny=True, out=tmp_path / "sparse.jsonl", say=quiet)
    records = [json.loads(line) for line in (tmp_path / "sparse.jsonl").read_text().splitlines()]
    assert {r["case"] for r in records} == {"mbert-select", "bert-step", "bert-backward"}
    for found in records:
        assert set(found) >= FIELDS, FIELDS - set(found)
        assert found["status"] == "ok"
        assert found["bars"] == []
    step = next(r for r in records if r["case"] == "bert-step")
    assert step["trajectory_error"] < 1e-5
    assert step["ratios"]["both"]["fused:bool_over_this"] > 0
    assert "Sparse fine-tuning" in plot.report(tmp_path)[0].read_text()
    assert record.kernel_hash("sparse") != record.kernel_hash("logits")


def test_bars_compare_medians() -> None:
    records: list[dict[str, Any]] = [
        {"contender": name, "time_us": {"both": {"p50": time}}, "bytes": {"both": 50_000}, "rates": RATES}
        for name, time in (("ours", 10.0), ("topk", 40.0))
    ]
    sparse.add_bars(records, {"topk": 3.0})
    assert records[0]["bars"] == [
        {"against": "topk", "quantity": "time", "at_least": 3.0, "found": 4.0, "reached": True}
    ]
    assert records[1]["ratios"]["both"] == {
        "ours_over_this": 0.25, "topk_over_this": 1.0, "this_over_best": 4.0, "this_over_floor": 8.0,
    }  # fmt: skip
    sparse.add_bars(records, {"topk": 5.0})
    assert records[0]["bars"][0]["reached"] is False


def test_a_wrong_selection_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sparse.select_topk

    def off(tuned: Any, base: Any, k: int) -> SparseMask:
        mask = right(tuned, base, k=k)
        name = max(mask, key=lambda name: len(mask[name]))
        index = mask[name].clone()
        index[0] = min(set(range(len(index) + 1)) - set(index.tolist()))  # one that was not chosen
        return SparseMask({**mask, name: index.unique()}, mask.shapes)

    monkeypatch.setattr(sparse, "select_topk", off)
    (found,) = sparse.select("cpu", True, RATES, quiet)
    assert found["status"] == "refused"
    assert "off torch.topk's" in found["reason"]


def test_a_wrong_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(SparseAdamW):
        def _constants(self, group: dict[str, Any], step: float) -> Any:
            return super()._constants({**group, "lr": 1.1 * group["lr"]}, step)

    monkeypatch.setattr(sparse, "SparseAdamW", Off)
    (found,) = sparse.step("cpu", True, RATES, quiet)
    assert found["status"] == "refused"
    assert "off dense AdamW on the chosen entries" in found["reason"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_is_that_of_a_child_process() -> None:
    arguments = {"what": "select", "contender": "fastdistil:cpu", "tiny": True}
    assert 0 < measure.child("sparse", arguments)["peak_mib"] < 64
