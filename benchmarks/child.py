"""What needs a process of its own: peak resident memory, and Triton's interpreter. JSON on stdin, JSON on stdout."""

from __future__ import annotations

import json
import sys
from typing import Any

from fastdistil.benchmarks import exactness, sparse_contenders, steps
from fastdistil.benchmarks.cases import Case
from fastdistil.benchmarks.contenders import build
from fastdistil.benchmarks.measure import peak_here_mib
from fastdistil.benchmarks.problems import make


def memory(arguments: dict[str, Any]) -> dict[str, Any]:
    case = Case.from_json(arguments["case"])
    contender = build(arguments["contender"], case, make(case, "cpu", noise=1.0))
    return {"peak_mib": peak_here_mib(contender, "cpu")}


def main() -> None:
    tasks = {
        "memory": memory,
        "exactness": exactness.from_child,
        "sparse": sparse_contenders.from_child,
        "step": steps.from_child,
    }
    print(json.dumps(tasks[sys.argv[1]](json.load(sys.stdin))))


if __name__ == "__main__":
    main()
