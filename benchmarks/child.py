"""What needs a process of its own: peak resident memory, and Triton's interpreter. JSON on stdin, JSON on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

from fastdistil.benchmarks import exactness
from fastdistil.benchmarks.cases import Case
from fastdistil.benchmarks.measure import peak_here_mib
from fastdistil.benchmarks.run import work_of


def memory(arguments: dict[str, Any]) -> dict[str, Any]:
    work = work_of(Case.from_json(arguments["case"]), "cpu")
    return {"peak_mib": peak_here_mib(work.build(arguments["implementation"]), "cpu")}


def main() -> None:
    tasks = {"memory": memory, "exactness": exactness.from_child}
    print(json.dumps(tasks[sys.argv[1]](json.load(sys.stdin))))


if __name__ == "__main__":
    main()
