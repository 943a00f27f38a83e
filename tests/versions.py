"""The tests in environments of their own, against the versions that pyproject.toml accepts: `make versions`.

    python tests/versions.py [NAME ...]     those of ENVIRONMENTS, all by default; the results go to docs/versions.md

Environments lie in build/versions/NAME and are kept. The compiled extension knows no torch, so that each of them takes
the build of the interpreter that runs this file. An environment whose packages are not to be had is a line of the table
that says so.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build/versions"
PAGE = ROOT / "docs/versions.md"
RECORDS = ROOT / "tests/data/versions.jsonl"

SHOWN = ("torch", "triton", "numpy", "transformers", "tokenizers", "accelerate")
SHOWN += ("trl", "sentence-transformers", "peft", "lightning")


def _names(project: dict[str, Any], requirements: list[str]) -> set[str]:
    """The packages of requirements, those of our own extras in the place of these, without their versions."""
    found = set[str]()
    for requirement in requirements:
        name, extras = re.findall(r"^([\w.-]+)(?:\[([\w,-]+)\])?", requirement)[0]
        if name == project["name"]:
            for extra in extras.split(","):
                found |= _names(project, project["optional-dependencies"][extra])
        else:
            found.add(name)
    return found


_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What the tests need besides: whatever pyproject.toml says of them, in the newest version that goes with the rest.
TOOLS = sorted(_names(_PROJECT, [*_PROJECT["dependencies"], "fastdistil[test]"]) - {*SHOWN[:6]})
NVIDIA = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")
AMD = ("gfx942", "gfx950")
MODELS = ("models", "capture", "capture_anywhere", "capture_compile", "recipes_layers", "train", "demo", "demo_teacher")


@dataclass(frozen=True)
class Environment:
    """What pip installs, the arguments of pytest, and the GPUs that kernels are compiled for."""

    packages: tuple[str, ...]
    tests: tuple[str, ...]
    what: str
    targets: tuple[str, ...] = ()


def _files(*stems: str) -> tuple[str, ...]:
    found = (path for stem in stems for path in ROOT.glob(f"tests/*/test_{stem}.py"))
    return tuple(str(path.relative_to(ROOT)) for path in found)


ENVIRONMENTS = {
    "newest": Environment(
        ("torch==2.14.1", "transformers", "tokenizers", "accelerate", "numpy"),
        ("tests", "--deselect=tests/backends/test_aot.py::test_triton_kernels_compile_for_every_target_without_spills"),
        "every test",
    ),
    "triton-newest": Environment(
        ("torch==2.13.0", "triton==3.9.0", "numpy", "transformers==5.17.0", "accelerate<2"),
        ("tests", "-k", "triton and not every_target"),
        "every test of Triton, in the interpreter",
        (*NVIDIA, *AMD),
    ),
    "triton-oldest": Environment(
        ("torch==2.13.0", "triton==3.6.0", "numpy<2.4", "transformers==5.17.0", "accelerate<2"),
        ("tests", "-k", "triton and not every_target"),
        "every test of Triton, in the interpreter",
        (*NVIDIA, *AMD),
    ),
    "transformers-oldest": Environment(
        ("torch==2.13.0", "triton==3.6.0", "numpy<2.4", "transformers==5.8.0", "accelerate<2"),
        _files(*MODELS),
        "capture, vocabularies, recipes, training and the demo",
    ),
    "integrations-oldest": Environment(
        (
            "torch==2.13.0",
            "triton==3.6.0",
            "numpy<2.4",
            "transformers==5.17.0",
            "accelerate<2",
            "trl==1.16.0",
            "sentence-transformers==6.2.0",
            "peft==0.21.0",
            "lightning==2.6.0",
        ),
        ("tests/integrations", "tests/project/test_docs.py"),
        "other people's trainers, and the documentation",
    ),
}


def python(name: str) -> Path:
    return FOLDER / name / "bin/python"


def install(name: str) -> None:
    """Raises CalledProcessError where a package is not to be had."""
    if not python(name).exists():
        venv.create(FOLDER / name, with_pip=True)
    packages = ENVIRONMENTS[name].packages
    own = {re.split("[=<>]", package)[0] for package in packages}
    tools = [tool for tool in TOOLS if tool not in own]
    subprocess.run([python(name), "-m", "pip", "install", "-q", *packages, *tools], check=True)
    ours, theirs = (Path(x) for x in (sysconfig.get_paths()["purelib"], _site(name)))
    found = [path for path in ours.iterdir() if re.match(r"fastdistil|_(editable_skbc_)?fastdistil", path.name)]
    if not found:
        raise SystemExit(f"versions: {sys.executable} has no fastdistil; expected the one of `make test`")
    for path in found:
        if path.is_dir():
            shutil.copytree(path, theirs / path.name, dirs_exist_ok=True)
        else:
            shutil.copy2(path, theirs / path.name)


def _site(name: str) -> str:
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return subprocess.run([python(name), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def versions(name: str) -> dict[str, str]:
    code = f"import json, importlib.metadata as m; print(json.dumps({{p: m.version(p) for p in {SHOWN}}}))"
    return json.loads(subprocess.run([python(name), "-c", code], check=True, capture_output=True, text=True).stdout)


def pytest(name: str, *arguments: str, **environment: str) -> str:
    """pytest's last line; its output goes to build/versions/NAME.log as well."""
    command = [python(name), "-m", "pytest", "-p", "no:cacheprovider", "-n", "auto", "--maxprocesses", "4"]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **environment}
    with (FOLDER / f"{name}.log").open("a") as log:
        process = subprocess.Popen(
            [*command, "--dist", "loadfile", "--no-loadscope-reorder", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            last = line.strip("= \n") or last
        code = process.wait()
    counts = ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|errors?)", last))
    return counts if counts else f"no test ran (exit code {code})"


@dataclass
class Record:
    name: str
    date: str
    versions: dict[str, str]
    what: str
    tests: str
    targets: dict[str, str]


def run(name: str) -> Record:
    wanted, today = ENVIRONMENTS[name], datetime.date.today().isoformat()
    try:
        install(name)
    except subprocess.CalledProcessError:
        return Record(name, today, {}, wanted.what, f"not to be had: {' '.join(wanted.packages)}", {})
    (FOLDER / f"{name}.log").unlink(missing_ok=True)
    results = pytest(name, *wanted.tests)
    compiled = {}
    for target in wanted.targets:
        compiled[target] = pytest(
            name, "tests/backends/test_aot.py", "-k", "every_target", FASTDISTIL_AOT_TARGETS=target
        )
    return Record(name, today, versions(name), wanted.what, results, compiled)


def table(records: list[Record]) -> str:
    rows = [["environment", *SHOWN, "what ran", "result", "compiled without spills", "date"]]
    for r in records:
        good = [target for target, result in r.targets.items() if result == "1 passed"]
        bad = [f"**not {target}**" for target in r.targets if target not in good]
        shown = [r.versions.get(package, "–") for package in SHOWN]
        rows.append([r.name, *shown, r.what, r.tests, ", ".join(good + bad) or "–", r.date])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        raise SystemExit(f"versions: no environment {unknown[0]!r}, expected some of {', '.join(ENVIRONMENTS)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    done = [Record(**json.loads(line)) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []
    records = {record.name: record for record in done}
    for name in names or ENVIRONMENTS:
        records[name] = run(name)
        RECORDS.parent.mkdir(exist_ok=True)
        ordered = [records[x] for x in ENVIRONMENTS if x in records]
        RECORDS.write_text("".join(json.dumps(asdict(record)) + "\n" for record in ordered))
        before, rest = PAGE.read_text().split("<!-- versions -->\n")
        after = rest.split("<!-- end -->")[1]
        PAGE.write_text(f"{before}<!-- versions -->\n{table(ordered)}\n<!-- end -->{after}")
    bad = [r.name for r in records.values() if "passed" not in r.tests or re.search(r"failed|error", r.tests)]
    bad += [f"{r.name} {t}" for r in records.values() for t, result in r.targets.items() if result != "1 passed"]
    if bad:
        print("versions: not green:", ", ".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
