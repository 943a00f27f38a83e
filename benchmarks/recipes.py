"""The three systems on Universal NER, arm by arm: one seed by one command, resumable; the tables of docs/recipes.md.

    python benchmarks/recipes.py xtremedistil --data ../shared/data/uner --seed 0
    python benchmarks/recipes.py bistil --data ../shared/data/uner --seed 0
    python benchmarks/recipes.py lightmbert --data ../shared/data/uner --seed 0
    python benchmarks/recipes.py --table          writes the tables from benchmarks/results/recipes/*.json

The teacher is multilingual-e5-small (the demo's), tuned as a name tagger on English once for all seeds. An arm is one
run of a command's function in runs/recipes/SYSTEM/seed-S/ARM; what it scored on the test files goes to
benchmarks/results/recipes/SYSTEM-S.json. `--small` runs everything for a few steps and writes no result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdistil.configs.bistil import BistilConfig
from fastdistil.configs.bistil_task import BistilTaskConfig
from fastdistil.configs.common import build
from fastdistil.configs.evaluate import EvaluateConfig
from fastdistil.configs.finetune import FinetuneConfig
from fastdistil.configs.lightmbert import LightmbertConfig
from fastdistil.configs.xtremedistil import XtremeDistilConfig

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/recipes"
PAGE = ROOT / "docs/recipes.md"
FILES = {"en": "en_ewt", "da": "da_ddt", "sv": "sv_talbanken", "pt": "pt_bosque"}
SENTENCES = 1500  # of each language's training file that students read
LICENCE = "CC BY-SA 4.0"
NONE = 1e-12  # a learning rate that leaves the teacher's blocks as they are: the student without the distillation
NO_FIGURE = 20.0  # an F1 below says that the student did not learn the task

Scores = dict[str, float | None]


@dataclass(frozen=True)
class Bench:
    """Where the data and the runs are; `small` for a dry run."""

    data: Path
    runs: Path
    seed: int
    small: bool

    def steps(self, count: int) -> int:
        return 4 if self.small else count

    def part(self, language: str, split: str) -> str:
        """LANGUAGE=FILE of the first sentences of a file; the whole test file."""
        whole = self.data / f"{FILES[language]}-ud-{split}.tsv"
        most = 40 if self.small else SENTENCES if split == "train" else None
        if most is None:
            return f"{language}={whole}"
        path = self.runs / "data" / f"{language}-{split}-{most}.tsv"
        if not path.exists():
            blocks = whole.read_text(encoding="utf-8").split("\n\n")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n\n".join(blocks[:most]) + "\n", encoding="utf-8")
        return f"{language}={path}"

    def text(self, language: str, split: str) -> str:
        """LANGUAGE=FILE of the sentences as running text, a line each, words joined by spaces."""
        source = Path(self.part(language, split).partition("=")[2])
        path = self.runs / "data" / f"{source.stem}.txt"
        if not path.exists():
            blocks = source.read_text(encoding="utf-8").strip().split("\n\n")
            lines = [[x.split("\t")[0] for x in block.splitlines() if "\t" in x] for block in blocks]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(" ".join(words) + "\n" for words in lines if words), encoding="utf-8")
        return f"{language}={path}"

    @property
    def tests(self) -> list[str]:
        return [self.part(language, "test") for language in FILES]

    def folder(self, system: str, arm: str) -> Path:
        return self.runs / system / f"seed-{self.seed}" / arm.replace(" ", "-").replace(",", "").replace("%", "")


def encoder(bench: Bench) -> Path:
    """multilingual-e5-small with its whole vocabulary as a folder."""
    from fastdistil.demo.material import load_source

    path = bench.runs / "encoder"
    if not path.exists():
        source = load_source(None, print)
        partial = path.with_name("encoder.partial")
        source.model.save_pretrained(partial)
        source.tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text("---\nlicense: mit\n---\n# multilingual-e5-small\n")
        partial.rename(path)
    return path


def finetune(bench: Bench, model: Path, out: Path, steps: int, lr: float, *, seed: int, head_steps: int = 0) -> Path:
    from fastdistil.systems.finetune import run

    options = {
        "model": str(model), "train": [bench.part("en", "dev")], "out": out, "seed": seed, "steps": steps, "lr": lr,
        "head_steps": head_steps, "batch_size": 16, "max_length": 96, "freeze_embeddings": True, "resume": True,
        "evaluate_every": max(1, steps // 2), "data_licence": LICENCE,
    }  # fmt: skip
    run(build(FinetuneConfig, options))
    return out


def teacher(bench: Bench) -> Path:
    """The tagger, the same for all seeds."""
    steps = bench.steps(400)
    return finetune(bench, encoder(bench), bench.runs / "teacher", steps, 1e-4, seed=0, head_steps=bench.steps(60))


def scores(bench: Bench, model: Path) -> Scores:
    """Entity F1 in percent by language."""
    from fastdistil.systems.evaluate import run

    found = run(build(EvaluateConfig, {"model": str(model), "test": bench.tests, "max_length": 128}))
    return {language: figures["f1"] for language, figures in found["languages"].items()}


def taught(bench: Bench) -> dict[str, Any]:
    """The teacher's scores, found once."""
    folder = teacher(bench)
    done = folder.with_suffix(".json")
    if not done.exists():
        done.write_text(json.dumps({"f1": scores(bench, folder)}, indent=1))
    found: dict[str, Any] = json.loads(done.read_text())
    return found


def arm(bench: Bench, system: str, name: str, make: Callable[[Path], Path]) -> dict[str, Any]:
    """Run one arm, score its model, and keep both beside the run."""
    folder = bench.folder(system, name)
    done = folder.with_suffix(".json")
    if not done.exists():
        whole, start = not folder.exists(), time.process_time()
        model = make(folder)
        seconds = time.process_time() - start
        facts = json.loads((folder / "metrics.json").read_text()) if (folder / "metrics.json").exists() else {}
        found = {
            "f1": scores(bench, model),
            # With OMP_NUM_THREADS=1; threads that wait for each other count as well.
            "core_seconds": round(seconds) if whole else None,  # no figure where it was interrupted
            "steps": facts.get("steps"),
            "parameters": facts.get("sizes", {}).get("student", {}).get("parameters"),
        }
        done.write_text(json.dumps(found, indent=1))
    result: dict[str, Any] = json.loads(done.read_text())
    print(system, name, result, flush=True)
    return result


def xtremedistil(bench: Bench) -> dict[str, Any]:
    """Two students by five schedules, the same number of steps each; the teacher's outputs are cached once."""
    from fastdistil.systems.xtremedistil import run

    tagger = teacher(bench)
    unlabelled = [bench.part(language, "train") for language in ("da", "sv", "pt")]
    found: dict[str, Any] = {"teacher": taught(bench)}
    for student, steps in (("transformer", 900), ("bilstm", 900)):
        for schedule in ("labels", "joint", "logits", "stage-wise", "unfreezing"):

            def make(out: Path, student: str = student, schedule: str = schedule, steps: int = steps) -> Path:
                more = {"embedding_size": 128, "lstm_size": 128} if student == "bilstm" else {}
                options = {
                    "teacher": str(tagger), "train": [bench.part("en", "dev")], "unlabelled": unlabelled, "out": out,
                    "student": student, "schedule": schedule, "steps": bench.steps(steps) * (9 if bench.small else 1),
                    "seed": bench.seed, "divergence": "forward_kl", "max_length": 64, "resume": True,
                    "cache": bench.runs / "outputs", "data_licence": LICENCE, **more,
                }  # fmt: skip
                run(build(XtremeDistilConfig, options))
                return out

            name = f"{student}, {schedule}"
            found[name] = arm(bench, "xtremedistil", name, make)
    return found


def bistil(bench: Bench) -> dict[str, Any]:
    """English and Danish: phase 1, then the sparse task training against full, against labels alone, against none of
    phase 1."""
    from fastdistil.systems.bistil import run
    from fastdistil.systems.bistil_task import run as run_task

    tagger = teacher(bench)
    texts = [bench.text("en", "dev"), bench.text("da", "train")]

    def phase_1(name: str, steps: int) -> Path:
        out = bench.folder("bistil", name)
        options = {
            "teacher": str(encoder(bench)), "text": texts, "out": out, "reduction": 3, "max_length": 64,
            "seed": bench.seed, "steps": steps, "lr": 3e-4 if steps > 1 else NONE, "held_out": 0.05, "resume": True,
            "data_licence": LICENCE,
        }  # fmt: skip
        run(build(BistilConfig, options))
        return out

    pair, bare = phase_1("phase 1", bench.steps(400)), phase_1("no phase 1", 1)
    found: dict[str, Any] = {"teacher": taught(bench)}
    arms: Mapping[str, tuple[Path, dict[str, Any]]] = {
        "8% sparse": (pair, {}),
        "full": (pair, {"full": True}),
        "full, labels only": (pair, {"full": True, "labels_only": True}),
        "full, labels only, no phase 1": (bare, {"full": True, "labels_only": True}),
    }
    for name, (student, more) in arms.items():

        def make(out: Path, student: Path = student, more: Mapping[str, Any] = more) -> Path:
            options = {
                "student": str(student), "teacher": str(tagger), "train": [bench.part("en", "dev")], "out": out,
                "seed": bench.seed, "steps": bench.steps(500), "lr": 5e-4, "warmup_share": 0.1,
                "head_steps": bench.steps(60), "freeze_embeddings": True, "batch_size": 16, "max_length": 96,
                "resume": True, "data_licence": LICENCE, **more,
            }  # fmt: skip
            run_task(build(BistilTaskConfig, options))
            return out

        found[name] = arm(bench, "bistil", name, make)
    return found


def lightmbert(bench: Bench) -> dict[str, Any]:
    """Zero-shot transfer from English of the bottom six blocks, with and without distillation before."""
    from fastdistil.systems.lightmbert import run

    texts = [bench.text("en", "dev"), *(bench.text(language, "train") for language in ("da", "sv", "pt"))]
    found: dict[str, Any] = {"teacher": taught(bench)}
    for name, steps in (("no distillation", 1), ("distilled", bench.steps(400))):
        student = bench.folder("lightmbert", f"blocks, {name}")
        options = {
            "teacher": str(encoder(bench)), "text": texts, "out": student, "max_length": 64, "seed": bench.seed,
            "steps": steps, "lr": 1e-4 if steps > 1 else NONE, "held_out": 0.05, "resume": True,
            "data_licence": LICENCE,
        }  # fmt: skip
        run(build(LightmbertConfig, options))

        def make(out: Path, student: Path = student) -> Path:
            return finetune(bench, student, out, bench.steps(250), 2e-4, seed=bench.seed, head_steps=bench.steps(60))

        found[name] = arm(bench, "lightmbert", name, make)
    return found


SYSTEMS = {"xtremedistil": xtremedistil, "bistil": bistil, "lightmbert": lightmbert}


def table(system: str) -> str:
    """A row per arm: F1 by language, mean over the seeds that ran it with the lowest and highest."""
    seeds = [json.loads(path.read_text())["arms"] for path in sorted(RESULTS.glob(f"{system}-*.json"))]
    if not seeds:
        return f"`{system}` has not been run."
    lines = [f"| entity F1 | {' | '.join(FILES)} | seeds | core seconds |", "|" + " --- |" * (len(FILES) + 3)]
    for name in dict.fromkeys(name for arms in seeds for name in arms):
        runs = [arms[name] for arms in seeds if name in arms]
        cells = [_cell([run["f1"].get(language) for run in runs]) for language in FILES]
        seconds = [run["core_seconds"] for run in runs if run.get("core_seconds") is not None]
        count = "" if name == "teacher" else len(runs)  # the same for all seeds
        lines.append(
            f"| {name} | {' | '.join(cells)} | {count} | {f'{statistics.fmean(seconds):.0f}' if seconds else ''} |"
        )
    return "\n".join(lines)


def _cell(values: list[float | None]) -> str:
    there = [x for x in values if x is not None]
    if not there:
        return "no figure"
    text = f"{statistics.fmean(there):.1f}"
    if max(there) > min(there):
        text += f" ({min(there):.1f} to {max(there):.1f})"
    return text + (" *" if statistics.fmean(there) < NO_FIGURE else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", nargs="*", choices=[*SYSTEMS, []], default=[])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/uner")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/recipes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    runs = options.runs.with_name(options.runs.name + "-small") if options.small else options.runs
    for system in options.system:
        if not options.data.is_dir():
            raise SystemExit(f"recipes: --data is {options.data}, which is no folder; expected Universal NER's files")
        arms = SYSTEMS[system](Bench(options.data, runs, options.seed, options.small))
        if not options.small:
            RESULTS.mkdir(parents=True, exist_ok=True)
            result = {"system": system, "seed": options.seed, "arms": arms}
            (RESULTS / f"{system}-{options.seed}.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.table:
        page = PAGE.read_text(encoding="utf-8")
        for system in SYSTEMS:
            marks = f"<!-- {system} -->\n", f"<!-- end of {system} -->"
            before, _, rest = page.partition(marks[0])
            page = before + marks[0] + table(system) + "\n" + marks[1] + rest.partition(marks[1])[2]
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
