"""A typer command from a configuration: every field an option, a YAML file beneath them."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastdistil.configs.common import Configuration, build, hints, optional, read_yaml


def command(cls: type[Configuration], run: Callable[[Any], None]) -> Callable[..., None]:
    """A function for typer that calls `run` with the configuration; options given win over those of --config.

    Wrong options end the command with one line and exit code 2.
    """

    def call(**given: Any) -> None:
        path: Path | None = given.pop("config")
        values = {name: _value(value) for name, value in given.items() if value is not None}
        try:
            below = {} if path is None else read_yaml(path)
            configuration = build(cls, {**below, **values}, "" if path is None else str(path))
        except (ValueError, TypeError, OSError) as error:
            raise typer.BadParameter(str(error)) from error
        run(configuration)

    kinds = hints(cls)
    own = cls.__annotations__
    # Required ones first, the bases' options last.
    ordered = sorted(fields(cls), key=lambda f: (f.default is not MISSING, f.name not in own))
    found = [_parameter(f, kinds[f.name]) for f in ordered]
    config = Annotated[
        Path | None, typer.Option("--config", help="A YAML file of these options, or a shipped one's name.")
    ]
    found.append(inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=config))
    call.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in found}
    call.__doc__ = (cls.__doc__ or "").split("\n\n")[0]
    return call


def _value(value: Any) -> Any:
    return value.value if isinstance(value, StrEnum) else value


def _enumeration(name: str, choices: tuple[Any, ...]) -> Any:
    make: Any = StrEnum
    return make(name, {str(x): str(x) for x in choices})


def _parameter(f: Field[Any], kind: Any) -> inspect.Parameter:
    """None stands for an option that was not given."""
    kind, _ = optional(kind)
    flag = "--" + f.name.replace("_", "-")
    given = f.metadata["help"]
    shown = "required" if f.default is MISSING else "" if f.default in (None, (), False) else f"default: {f.default}"
    settings: dict[str, Any] = {"help": f"{given} ({shown})" if shown else given, "show_default": False}
    names = [flag]
    if typing.get_origin(kind) is Literal:
        kind = _enumeration(f.name, typing.get_args(kind))
    elif typing.get_origin(kind) is tuple:
        kind = list[typing.get_args(kind)[0]]  # type: ignore[misc]
    elif kind is bool:
        names = [f"{flag}/--no-{flag[2:]}"]
    annotation = Annotated[kind | None, typer.Option(*names, **settings)]
    return inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
