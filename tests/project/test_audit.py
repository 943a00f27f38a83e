"""The verdict of `make audit`: nothing passes as clean that was not asked about."""

from __future__ import annotations

import json
from email.message import Message

import audit
import pytest
from audit import CLEAN, NOT_CHECKED, VULNERABLE

WANTED = {"torch": "2.13.0", "numpy": "2.3.5"}
ROWS = [{"name": "torch", "version": "2.13.0", "vulns": []}, {"name": "NumPy", "version": "2.3.5", "vulns": []}]
FOUND = {"id": "PYSEC-2026-1", "fix_versions": ["2.3.6"]}
SKIPPED = {"name": "numpy", "skip_reason": "not found on the service"}


@pytest.mark.parametrize(
    ("report", "code", "line"),
    [
        ("", NOT_CHECKED, "no advisory service gave an answer"),
        ("<html>a proxy's page</html>", NOT_CHECKED, "no advisory service gave an answer"),
        ("[]", NOT_CHECKED, "no advisory service gave an answer"),
        (json.dumps({"dependencies": []}), NOT_CHECKED, "answered about none of 2 packages"),
        (json.dumps({"dependencies": [ROWS[0], SKIPPED]}), NOT_CHECKED, "not asked about numpy"),
        (json.dumps({"dependencies": ROWS}), CLEAN, "2 packages"),
        (
            json.dumps({"dependencies": [ROWS[0], {**ROWS[1], "vulns": [FOUND]}]}),
            VULNERABLE,
            "PYSEC-2026-1, fixed in 2.3.6",
        ),
        (json.dumps({"dependencies": [{**ROWS[0], "vulns": [FOUND]}, SKIPPED]}), VULNERABLE, "torch 2.13.0"),
    ],
)
def test_verdict(report: str, code: int, line: str) -> None:
    found, lines = audit.verdict(report, WANTED)
    assert found == code and any(line in x for x in lines), lines


def test_the_verdicts_have_codes_of_their_own() -> None:
    """2 is Python's own, and make's."""
    assert len({CLEAN, VULNERABLE, NOT_CHECKED, 2}) == 4 and CLEAN == 0


def test_licences_are_as_packages_state_them() -> None:
    metadata = Message()
    assert audit.licence(metadata) == "not stated"
    metadata["License"] = "Apache 2.0\nand its whole text"
    assert audit.licence(metadata) == "Apache-2.0"
    metadata["Classifier"] = "License :: OSI Approved :: MIT License"
    assert audit.licence(metadata) == "MIT"
    metadata["License-Expression"] = "BSD-3-Clause AND MIT"
    assert audit.licence(metadata) == "BSD-3-Clause AND MIT"


def test_the_page_has_the_licences_of_what_users_install() -> None:
    page = audit.PAGE.read_text(encoding="utf-8")
    table = page.partition(audit.MARKS[0])[2].partition(audit.MARKS[1])[0]
    known = {name for row in table.splitlines() for name in row.rpartition("| ")[0].rpartition("| ")[2].split(", ")}
    known |= {name for row in table.splitlines() for name in row.strip("| ").rpartition(" | ")[2].split(", ")}
    direct = {"torch", "rich", "typer", "triton", "transformers", "accelerate", "tokenizers", "safetensors", "datasets"}
    assert direct | {"tqdm", "pyyaml", "seqeval", "matplotlib"} <= known
