"""Which files may import which: losses -> ops -> backends -> contracts, and never back; no circles. And that C++ has the
names and numbers of the contracts."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from fastdistil import _C
from fastdistil.contracts import acceptance, attention, hidden, logit, row_moments, sparse, topk

ROOT = Path(__file__).parents[2]

# The layers from the door down; a file may import its own layer and those below it.
LAYERS = (
    ("fastdistil.losses",),
    ("fastdistil.ops",),
    ("fastdistil.backends", "fastdistil.reference", "fastdistil.kernels"),
    ("fastdistil.contracts",),
)
# What the backends' modules may hold besides: the extension.
EXTENSION = "fastdistil._C"


def modules() -> dict[str, Path]:
    """Every module of the package by name; kernels/ is fastdistil.kernels once it is installed."""
    found = {}
    for folder, package in ((ROOT / "fastdistil", "fastdistil"), (ROOT / "kernels", "fastdistil.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(x for x in parts if x != "__init__")))] = path
    return found


def imports(path: Path, known: set[str], *, anywhere: bool) -> set[str]:
    """The modules of the package that a file imports: anywhere, or as it is loaded itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if anywhere else iter(tree.body)
    found = set[str]()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {x.name for x in node.names if x.name.startswith("fastdistil")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastdistil"):
            inside = {f"{node.module}.{x.name}" for x in node.names}
            found |= (inside & known) | ({node.module or ""} if inside - known else set())
    return found


def layer(name: str) -> int | None:
    """Of a module; None for what stands beside the losses' path."""
    for i, packages in enumerate(LAYERS):
        if any(name == package or name.startswith(package + ".") for package in packages):
            return i
    return None


def test_layers_import_downwards() -> None:
    known = modules()
    wrong, seen = [], set[tuple[int, int]]()
    for name, path in known.items():
        own = layer(name)
        if own is None:
            continue
        for other in imports(path, set(known) | {EXTENSION}, anywhere=True) - {EXTENSION}:
            below = layer(other)
            if below is None or below < own:
                wrong.append(f"{name} imports {other}")
            else:
                seen.add((own, below))
    assert not wrong, "\n".join(wrong)
    assert {(0, 1), (1, 2), (2, 3)} <= seen  # the files were found and read


def test_no_file_imports_itself_by_way_of_others() -> None:
    known = modules()
    graph = {name: imports(path, set(known), anywhere=False) - {name} for name, path in known.items()}
    packages = {name for name, path in known.items() if path.name == "__init__.py"}
    graph = {name: {x for x in found if x not in packages} for name, found in graph.items()}
    assert sum(map(len, graph.values())) > 100
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_contracts_are_those_of_the_extension() -> None:
    assert _C.contracts == {
        "divergences": logit.DIVERGENCES,
        "phases": logit.PHASES,
        "tails": topk.TAILS,
        "hidden_kinds": hidden.KERNEL_KINDS,
        "attention_kinds": attention.KINDS,
        "logit_stats": logit.STATS,
        "topk_stats": topk.STATS,
        "acceptance_levels": acceptance.LEVELS,
        "row_moments": row_moments.MOMENTS,
        "update_columns": sparse.COLUMNS,
        "update_constants": sparse.CONSTANTS,
        "high_buckets": sparse.HIGH_BUCKETS,
        "low_buckets": sparse.LOW_BUCKETS,
        "all_buckets": sparse.ALL_BUCKETS,
    }
    assert (topk.TAILS[topk.BUCKET], topk.TAILS[topk.RENORMALIZE], topk.TAILS[topk.ZERO]) == topk.TAILS
    assert [logit.PHASES[x] for x in (logit.PHASE_ALL, logit.PHASE_STATISTICS, logit.PHASE_VALUE)] == list(logit.PHASES)
