"""A hundredth of tests/faults.py, and the checks of an index that is no column or position."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import faults
import pytest
import saved_things
import torch
from torch import Tensor

from fastdistil import _C
from fastdistil.contracts.sparse import UpdateConstants, UpdateRow, update_table
from fastdistil.writing import Folder, new_folder, replacing


@pytest.mark.parametrize("thing", saved_things.THINGS, ids=lambda thing: thing.name)
def test_nothing_is_lost_and_nothing_else_loads(thing: Any, tmp_path: Path) -> None:
    damage = faults.Damage(thing, tmp_path, random.Random(0), 0.01)
    counts = [damage.truncated(), damage.flipped(), faults.killed(thing, tmp_path, 1, random.Random(1))]
    counts += [faults.full(thing, tmp_path, 1, random.Random(2)), faults.read_only(thing, tmp_path)]
    assert [count.first for count in counts if count.lost] == []


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with Folder(tmp_path / "a", "first"), pytest.raises(RuntimeError, match="second: another process writes to .*a"):
        Folder(tmp_path / "a", "second")
    Folder(tmp_path / "a", "third").release()
    with replacing(tmp_path / "f") as file, pytest.raises(RuntimeError, match="f: another process writes it"):
        file.write(b"1")
        with replacing(tmp_path / "f"):
            pass
    assert (tmp_path / "f").read_bytes() == b"1"
    for text in ("1", "2"):
        with new_folder(tmp_path / "g", "fourth") as partial:
            (partial / "x").write_text(text)
            with pytest.raises(RuntimeError, match="another process"), new_folder(tmp_path / "g", "fifth"):
                pass
    assert (tmp_path / "g/x").read_text() == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "f", "g"]


@pytest.mark.parametrize("label", [-1, 7, 1 << 62])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_label_that_is_no_column_makes_its_row_nan(label: int, dtype: torch.dtype) -> None:
    """Whoever writes it while the kernel runs: the public functions refuse it before."""
    logits, ones = torch.randn(2, 7, dtype=dtype), torch.ones(2, dtype=dtype)
    labels, loss, gradient = torch.tensor([3, label]), torch.zeros(2, dtype=dtype), torch.zeros(2, 7, dtype=dtype)
    _C.cross_entropy_rows(logits, labels, ones, loss, gradient, None, 1)
    assert loss.isnan().tolist() == [False, True]
    assert gradient.isnan().all(1).tolist() == [False, True]
    assert gradient[0].isfinite().all()
    stats = torch.zeros(2, _C.contracts["logit_stats"], dtype=dtype)
    rule = {"divergence": 0, "beta": 0.5, "student_temperature": 1.0, "teacher_temperature": 1.0, "value_factor": 1.0}
    _C.logit_fwd(logits, logits + 1, ones, loss, stats, gradient, threads=1, labels=labels, label_scale=ones, **rule)
    assert loss.isnan().tolist() == [False, True]
    assert gradient.isnan().all(1).tolist() == [False, True]


@pytest.mark.parametrize("columns", [[3, 1], [-1, 2]])
def test_top_columns_that_do_not_ascend_make_their_row_nan(columns: list[int]) -> None:
    student, wide = torch.randn(2, 9), torch.float64
    at = torch.tensor([[1, 3], columns], dtype=torch.int32)
    values, rest = torch.full((2, 2), 0.25, dtype=wide).log(), torch.full((2,), 0.5, dtype=wide).log()
    ones, loss, gradient = torch.ones(2), torch.zeros(2), torch.zeros(2, 9)
    stats = torch.zeros(2, _C.contracts["topk_stats"] + 2, dtype=wide)
    _C.topk_fwd(student, values, at, rest, ones, loss, stats, gradient, 0, 0.5, 0, 1.0, 1.0, 1)
    assert loss.isnan().tolist() == [False, True]
    assert gradient.isnan().all(1).tolist() == [False, True]
    _C.topk_bwd(student, at, ones, stats, gradient, ones, False, 1.0, 1)
    assert gradient.isnan().all(1).tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [-1, 50])
def test_a_position_outside_of_its_tensor_is_an_error(dtype: torch.dtype, wrong: int) -> None:
    tensor, index = torch.arange(50.0), torch.arange(40, dtype=dtype)
    index[35] = wrong
    values = torch.zeros(40)
    for call in (_C.sparse_take, _C.sparse_put):
        with pytest.raises(IndexError, match="a position outside of its tensor"):
            call(tensor, index, values, 1)
    param, gradient, moments = torch.ones(50), torch.ones(50), torch.zeros(2, 40)
    constants = UpdateConstants(1.0, 0.1, 0.9, 0.1, 1e-8, 0.1, 1.0, 0.0)
    row = UpdateRow(param, gradient, index, moments[0], moments[1], None, None, constants)
    with pytest.raises(IndexError, match="a position outside of its tensor"):
        _C.sparse_update(*update_table([row]), 1)
    assert (param[:32] < 1).all()
    assert (param[32:] == 1).all()


def test_a_tensor_whose_memory_is_gone_is_refused() -> None:
    gone: Tensor = torch.zeros(2, 7)
    gone.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="a tensor of 14 elements has no memory"):
        _C.cross_entropy_rows(gone, torch.zeros(2, dtype=torch.int64), torch.ones(2), torch.ones(2), None, None, 1)


def test_a_negative_number_of_ties_is_refused() -> None:
    """It once let more positions be written than there was room for."""
    with pytest.raises(ValueError, match="ties is -1, expected at least 0"):
        _C.sparse_compact(torch.zeros(9), torch.zeros(9), torch.zeros(3, dtype=torch.int64), 0, -1, 1)
