"""What is installed and fetched: known vulnerabilities, a software bill of materials, licences (`make audit`).

    python tests/audit.py TOOLS [--out FOLDER]

TOOLS is the folder of pip-audit and cyclonedx-py, which have an environment of their own: they are no part of what is
audited. The audited set is this environment's, with the versions that constraints.txt locks. Exit codes:

| code | verdict |
|---|---|
| 0 | clean: the advisory service was asked about every package, and knows of nothing |
| 1 | vulnerable |
| 2 | this script failed |
| 3 | not checked: no advisory service was reached, or it was not asked about some of the packages |
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

CLEAN, VULNERABLE, NOT_CHECKED = 0, 1, 3
OWN = "fastdistil"
EXTRAS = ("train", "triton")  # what users install
PAGE = Path(__file__).parents[1] / "docs/reliability.md"
MARKS = ("<!-- licences: make audit -->", "<!-- end of licences -->")
# What packages call the licences that have an SPDX name.
SPDX = {
    "apache software license": "Apache-2.0", "apache 2.0": "Apache-2.0", "apache 2.0 license": "Apache-2.0", "apache": "Apache-2.0",
    "apache license 2.0": "Apache-2.0", "apache license, version 2.0": "Apache-2.0", "apache-2.0": "Apache-2.0",
    "mit": "MIT", "mit license": "MIT", "bsd license": "BSD", "bsd": "BSD", "bsd-3-clause": "BSD-3-Clause",
    "bsd 3-clause license": "BSD-3-Clause", "3-clause bsd license": "BSD-3-Clause", "python software foundation license": "PSF-2.0",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0", "mpl-2.0": "MPL-2.0", "isc license (iscl)": "ISC",
    "the unlicense (unlicense)": "Unlicense",
}  # fmt: skip


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """{name: version} of this environment, without fastdistil."""
    found = {normal(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}
    return {name: version for name, version in sorted(found.items()) if name != OWN}


def verdict(report: str, wanted: dict[str, str]) -> tuple[int, list[str]]:
    """(exit code, lines) from pip-audit's JSON, "" where it wrote none."""
    try:
        rows: list[dict[str, Any]] = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return NOT_CHECKED, ["not checked: no advisory service gave an answer"]
    lines = [
        f"vulnerable: {row['name']} {row['version']}: {x['id']}, fixed in {', '.join(x['fix_versions']) or 'none'}"
        for row in rows
        for x in row.get("vulns", ())
    ]
    if lines:
        return VULNERABLE, lines
    asked = {normal(row["name"]) for row in rows if "vulns" in row}
    missing = [name for name in wanted if name not in asked]
    if missing and not asked:
        return NOT_CHECKED, [f"not checked: the service answered about none of {len(wanted)} packages"]
    if missing:
        return NOT_CHECKED, [f"not checked: the service was not asked about {', '.join(missing)}"]
    return CLEAN, [f"clean: {len(wanted)} packages, no known vulnerability"]


def audit(tools: Path, out: Path, wanted: dict[str, str]) -> tuple[int, list[str]]:
    """pip-audit over exact versions; nothing is resolved or installed."""
    requirements = out / "audited.txt"
    # A local version, as of torch's CPU builds (2.13.0+cpu), is one of the public version for an advisory.
    requirements.write_text("".join(f"{name}=={version.partition('+')[0]}\n" for name, version in wanted.items()))
    command = [tools / "pip-audit", "--requirement", requirements, "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run(
        [*command, "--progress-spinner", "off", "--timeout", "20"], capture_output=True, text=True, check=False
    )
    (out / "pip-audit.json").write_text(done.stdout)
    code, lines = verdict(done.stdout, wanted)
    said = done.stderr.strip().splitlines()
    return code, [*lines, *(said[-1:] if not done.stdout.strip() else [])]


def licence(metadata: Any) -> str:
    """As the package's metadata says: its expression, its classifiers, or the first line of its field."""
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classes = [x.rpartition(" :: ")[2] for x in metadata.get_all("Classifier") or [] if x.startswith("License :: ")]
    names = [x for x in classes if x != "OSI Approved"] or [(metadata.get("License") or "").strip().partition("\n")[0]]
    return " AND ".join(sorted({SPDX.get(x.lower(), x) for x in names if x and x != "UNKNOWN"})) or "not stated"


def users_packages() -> list[str]:
    """What `pip install 'fastdistil[train,triton]'` brings, with everything that this brings in turn."""
    found, left = dict[str, None](), deque([(OWN, frozenset(EXTRAS))])
    seen = set[tuple[str, frozenset[str]]]()
    while left:
        name, extras = left.popleft()
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another system
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if name != OWN:
            found[name] = None
        for text in requires:
            one = Requirement(text)
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                left.append((normal(one.name), frozenset(one.extras)))
    return sorted(found)


def licence_table() -> str:
    """Packages by licence, as Markdown."""
    by_licence: dict[str, list[str]] = {}
    for name in users_packages():
        by_licence.setdefault(licence(importlib.metadata.metadata(name)), []).append(name)
    rows = [
        f"| {kind} | {', '.join(names)} |" for kind, names in sorted(by_licence.items(), key=lambda x: x[0].lower())
    ]
    return "\n".join(["| licence, as the package states it | packages |", "| --- | --- |", *rows])


def write_page(table: str) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    PAGE.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Vulnerabilities, bill of materials and licences of this environment.")
    parser.add_argument("tools", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/audit"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    wanted = installed()
    code, lines = audit(given.tools, given.out, wanted)
    bill = given.out / "bill-of-materials.cdx.json"
    command = [
        given.tools / "cyclonedx-py",
        "environment",
        sys.executable,
        "--output-format",
        "JSON",
        "--output-file",
        bill,
    ]
    subprocess.run(command, check=True)
    print(f"{bill}: {len(json.loads(bill.read_text())['components'])} components, CycloneDX")
    write_page(licence_table())
    print(f"{PAGE.name}: licences of {len(users_packages())} packages")
    print("\n".join(lines), f"exit code {code}", sep="\n")
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"audit: {error}", file=sys.stderr)
        sys.exit(2)
