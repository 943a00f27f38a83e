"""Other libraries are imported by who uses them."""

from __future__ import annotations

import doctest
import subprocess
import sys

from fastdistil.integrations import trl

LIBRARIES = ("trl", "sentence_transformers", "transformers", "peft", "lightning")


def test_no_library_comes_along() -> None:
    code = (
        "import sys, pathlib, importlib, fastdistil, fastdistil.integrations\n"
        "for path in pathlib.Path(fastdistil.integrations.__file__).parent.glob('*.py'):\n"
        "    if path.stem in ('trl', 'sentence_transformers'):\n"
        "        importlib.import_module(f'fastdistil.integrations.{path.stem}')\n"
        f"print(sorted(set(sys.modules) & set({LIBRARIES})), len(sys.modules))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("[] ")


def test_docstrings_examples_run() -> None:
    results = doctest.testmod(trl)
    assert results.failed == 0 and results.attempted >= 5
