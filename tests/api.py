"""Writes tests/data/api.txt: every public name with its arguments and defaults, so that a change of them is a visible
difference. Public is what docs/api/ shows, `__all__` of the packages, and the commands' options.

    python tests/api.py
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests/data/api.txt"
# Of configurations, what docs/api/cli.md leaves out.
NOT_SHOWN = ("at_least", "check", "plain", "within")
PACKAGES = ("fastdistil", "fastdistil.sparse", "fastdistil.teacher", "fastdistil.train")


def _found(path: str) -> Any:
    """The module or the object that a dotted path names."""
    parts = path.split(".")
    for last in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:last]))
        except ModuleNotFoundError:
            continue
        for name in parts[last:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def _documented() -> Iterator[tuple[str, Any]]:
    """What docs/api/ shows, in its order, modules as their members."""
    for page in sorted((ROOT / "docs/api").glob("*.md")):
        for path, options in re.findall(
            r"^::: (\S+)\n((?:    .*\n|\n(?=    ))*)", page.read_text(encoding="utf-8") + "\n", re.M
        ):
            found = _found(path)
            if not isinstance(found, ModuleType):
                yield path, found
                continue
            members = re.search(r"members: \[(.*)\]", options)
            names = members[1].split(", ") if members else [x for x in vars(found) if not x.startswith("_")]
            for name in names:
                member = getattr(found, name)
                here = getattr(member, "__module__", None) == path and isinstance(member, (type, FunctionType))
                if members or here:
                    yield f"{path}.{name}", member


def _shown(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return repr(value.value)
    if callable(value):
        return f"<{getattr(value, '__qualname__', type(value).__qualname__)}>"
    return "<object>" if " at 0x" in repr(value) else repr(value)


def _arguments(function: Any, method: bool = False) -> str:
    found, star = [], False
    for parameter in list(inspect.signature(function).parameters.values())[1 if method else 0 :]:
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            found.append("*")
        star |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        mark = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "" if parameter.default is parameter.empty else f"={_shown(parameter.default)}"
        found.append(f"{mark}{parameter.name}{default}")
    return f"({', '.join(found)})"


def _constructor(cls: Any) -> str:
    """Of a class that inherits another library's fields or constructor, its own alone: theirs change with them."""
    foreign = [x for x in cls.__mro__[1:] if not x.__module__.startswith(("fastdistil", "builtins"))]
    if dataclasses.is_dataclass(cls) and any(map(dataclasses.is_dataclass, foreign)):
        own = [f for f in dataclasses.fields(cls) if f.name in cls.__annotations__]
        if own:
            return f"(..., {', '.join(f'{f.name}={_shown(f.default)}' for f in own)})"
    if cls.__init__ is object.__init__ or getattr(cls, "_is_protocol", False):
        return "()"
    owner = next(x for x in cls.__mro__ if "__init__" in vars(x))
    return _arguments(cls.__init__, method=True) if owner.__module__.startswith("fastdistil") else "(...)"


def _lines(path: str, found: Any) -> Iterator[str]:
    if not inspect.isclass(found):
        yield f"{path}{_arguments(found)}" if callable(found) else f"{path}: {type(found).__name__}"
        return
    fields = set(getattr(found, "_fields", ()))  # of a named tuple
    yield f"{path}{_arguments(found) if fields else _constructor(found)}"
    own = {
        name: x
        for cls in reversed(found.__mro__)
        if cls.__module__.startswith("fastdistil")
        for name, x in vars(cls).items()
    }
    for name, member in sorted(own.items()):
        if (
            name.startswith("_")
            or name in fields
            or (dataclasses.is_dataclass(found) and name in found.__annotations__)
        ):
            continue
        if isinstance(member, property):
            yield f"{path}.{name}"
        elif isinstance(member, (classmethod, staticmethod)):
            yield f"{path}.{name}{_arguments(member.__func__, isinstance(member, classmethod))}"
        elif inspect.isfunction(member):
            yield f"{path}.{name}{_arguments(member, method=True)}"


def _commands(command: Any, name: str) -> Iterator[str]:
    for key, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _commands(inner, f"{name} {key}")
    if not hasattr(command, "commands"):
        options = [x.opts[0] if x.param_type_name == "option" else x.name.upper() for x in command.params]
        yield " ".join([name, *sorted(x for x in options if x != "--help")])


def recorded() -> str:
    """The whole record."""
    import typer

    from fastdistil.cli import app

    lines = [f"{path}.{name}" for path in PACKAGES for name in sorted(_found(path).__all__)]
    lines.append("")
    for path, found in _documented():
        lines.extend(_lines(path, found))
    lines.extend(("", *_commands(typer.main.get_command(app), "fastdistil")))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(recorded(), encoding="utf-8")
