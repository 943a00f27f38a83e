"""The folder of a run: one configuration each, continued only when asked, finished or not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fastdistil.configs.common import Run, to_yaml
from fastdistil.writing import naming

CONFIG, IDENTITY, RESULT = "config.yaml", "run.json", "metrics.json"
TEXT = "text"  # pieces of raw text under names of their own content, the same for every run
_BEFORE_THE_FIRST_STEP = {CONFIG, IDENTITY, TEXT}


def is_main_process() -> bool:
    """Whether this process writes: one of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def write_text(path: Path, text: str) -> None:
    """Write through a temporary name: `path` is absent, the old file or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    with naming(path):
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises ValueError naming the file where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error


class RunFolder:
    """Opens `config.out` for the run of `config` and writes its configuration there, unless the run has ended.

    Raises ValueError where the folder holds something else, another configuration, or a run that `config.resume` does
    not ask to continue. `finished` holds metrics.json's content where the run has ended before.
    """

    def __init__(self, config: Run) -> None:
        self.path = config.out
        name = type(config).__name__
        wanted = {"configuration": name, **config.plain(identity=True)}
        del wanted["out"]  # the folder may be moved
        self.finished: dict[str, Any] | None = None
        held = self.path / IDENTITY
        if not is_main_process():  # what the main one refuses ends the others, too
            if config.resume and (self.path / RESULT).is_file():
                self.finished = read_json(self.path / RESULT)
            return
        inside = {x.name for x in self.path.iterdir()} if self.path.is_dir() else set()
        if inside <= _BEFORE_THE_FIRST_STEP or all(name.endswith(".partial") for name in inside):
            pass  # new, or stopped by what was wrong with its options or data: those may be mended
        elif held.is_file():
            before = read_json(held)
            self._check(name, before, wanted)
            if not config.resume:
                raise ValueError(
                    f"{name}: out is {self.path}, which holds this run already; continue it with resume, or choose "
                    "another folder"
                )
            if (self.path / RESULT).is_file():
                self.finished = read_json(self.path / RESULT)
                return
        else:
            raise ValueError(f"{name}: out is {self.path}, which holds other files, expected a new or an empty folder")
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / CONFIG, to_yaml(config))
        write_json(held, wanted)

    def _check(self, name: str, before: dict[str, Any], wanted: dict[str, Any]) -> None:
        other = {key for key in before.keys() | wanted.keys() if before.get(key) != wanted.get(key)}
        if other:
            said = "; ".join(f"{k} was {before.get(k)!r}, is {wanted.get(k)!r}" for k in sorted(other))
            raise ValueError(f"{name}: out is {self.path}, which holds a run of other options: {said}")
