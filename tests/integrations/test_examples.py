"""The files of examples/: short, run as they are, offline, and the student comes closer to its teacher."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
NAMES = ("trl_gkd", "sentence_transformers_student", "lightning_module")
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def test_examples_are_short_and_all_here() -> None:
    found = {path.stem: path for path in FOLDER.glob("*.py")}
    assert set(NAMES) <= found.keys()
    for path in found.values():
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80, path.name


@pytest.mark.parametrize("name", NAMES)
def test_student_comes_closer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HUB_OFFLINE", "TRL_EXPERIMENTAL_SILENCE", "CI"):
        monkeypatch.setenv(variable, "1")
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, after = module.main()
    assert after < 0.8 * before
