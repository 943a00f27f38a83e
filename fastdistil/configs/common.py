"""What all configurations have in common: fields with a help text, the shared options, and YAML."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastdistil.suggest import meant

C = TypeVar("C", bound="Configuration")


def option(default: Any = MISSING, help: str = "", *, identity: bool = True) -> Any:
    """A dataclass field with a help text; without `default` it must be given.

    `identity=False` marks what may change when a run is continued, as how often it is saved.
    """
    return field(default=default, metadata={"help": help, "identity": identity})


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Options by name. Raises ValueError or TypeError, with the option's name, where a value is not of its type or not
    one of its choices; subclasses check the rest in `check`, which this calls."""

    def __post_init__(self) -> None:
        for name, kind in hints(type(self)).items():
            object.__setattr__(self, name, _converted(type(self).__name__, name, kind, getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Raise ValueError where options contradict each other."""

    def at_least(self, **bounds: float) -> None:
        """Raise ValueError where an option is below its bound; None is no number and passes."""
        for name, bound in bounds.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"{type(self).__name__}: {name} is {value}, expected at least {bound}")

    def within(self, low: float, high: float, *names: str) -> None:
        """Raise ValueError where an option is outside of [low, high]; None passes."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{type(self).__name__}: {name} is {value}, expected {low} to {high}")

    def plain(self, *, identity: bool = False) -> dict[str, Any]:
        """Values that JSON and YAML hold, by name; with `identity`, of those that a continued run must share."""
        return {
            f.name: _plain(getattr(self, f.name))
            for f in fields(self)
            if not identity or f.metadata.get("identity", True)
        }


@dataclass(frozen=True, kw_only=True)
class Run(Configuration):
    """Options of everything that trains: where it is kept and how it is optimised."""

    out: Path = option(help="Folder of the run: checkpoints while it lasts, then the student and the report.")
    seed: int = option(0, "Seed of drawn weights, of the data's order and of its corruption.")
    batch_size: int = option(32, "Examples per micro-batch and process.")
    accumulate: int = option(1, "Micro-batches per step.")
    precision: Literal["no", "bf16", "fp16"] = option("no", "Mixed precision of the models; losses are exact in each.")
    data_licence: str | None = option(None, "Licence of the data, for the model card.", identity=False)
    save_every: int = option(100, "Steps between checkpoints.", identity=False)
    log: Literal["none", "tensorboard"] = option("none", "Also write TensorBoard event files.", identity=False)
    resume: bool = option(False, "Continue the run in the folder of --out, if there is one.", identity=False)
    dry_run: bool = option(
        False, "Print data, steps, memory and an estimate of time; train and write nothing.", identity=False
    )

    def check(self) -> None:
        self.at_least(batch_size=1, accumulate=1, save_every=1)
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{type(self).__name__}: out is {str(self.out)!r}, a file, expected a folder")


def hints(cls: type) -> dict[str, Any]:
    """{field: type} of a dataclass, its bases' fields first."""
    found = typing.get_type_hints(cls)
    return {f.name: found[f.name] for f in fields(cls)}


def optional(kind: Any) -> tuple[Any, bool]:
    """(T, True) of T | None, (T, False) of any other T."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        rest = [x for x in typing.get_args(kind) if x is not type(None)]
        if len(rest) != 1:
            raise TypeError(f"a field's type is {kind}, expected one type or one and None")
        return rest[0], True
    return kind, False


def _converted(owner: str, name: str, kind: Any, value: Any) -> Any:
    """`value` as the field's type; text becomes no number, but a number of another kind may be one."""
    kind, may_be_none = optional(kind)
    if value is None and may_be_none:
        return None
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        value = "no" if value is False and "no" in arguments else value  # YAML 1.1 reads no as false
        if value not in arguments:
            raise ValueError(f"{owner}: {name} is {value!r}, expected {' or '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if isinstance(value, (str, Path)) or not isinstance(value, (list, tuple)):
            way = f" ([{value}] for one)" if isinstance(value, (str, Path)) else ""
            raise TypeError(f"{owner}: {name} is {value!r}, expected a list{way}")
        return tuple(_converted(owner, name, arguments[0], x) for x in value)
    if kind is Path and isinstance(value, (str, os.PathLike)):
        return Path(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    good = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not good:
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
        raise TypeError(f"{owner}: {name} is {value!r}, expected {wanted.get(kind.__name__, kind.__name__)}")
    return float(value) if kind is float else value


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(x) for x in value] if isinstance(value, tuple) else value


def build(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """A configuration from values by name. Raises ValueError for a name that is no option and for one that is missing;
    `where` says where the values come from."""
    known = {f.name: f for f in fields(cls)}
    place = f"{where}: " if where else ""
    unknown = sorted(set(values) - set(known))
    if unknown:
        near = "".join(meant(name, known) for name in unknown)
        raise ValueError(
            f"{place}{', '.join(unknown)}: no option of {cls.__name__}, which has {', '.join(known)}{near}"
        )
    missing = [
        f.name for f in known.values() if f.name not in values and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise ValueError(f"{place}{cls.__name__} needs {', '.join(missing)}")
    return cls(**values)


def shipped() -> dict[str, Path]:
    """{name: file} of the configurations that come with the package: the papers' own settings."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "shipped").glob("*.yaml"))}


def read_yaml(path: Path) -> dict[str, Any]:
    """Options by name from a YAML file, or from a shipped one by its name; dashes in options' names are underscores.

    Relative paths in it are relative to the working directory, as on the command line.
    """
    import yaml

    if not path.exists():
        if str(path) not in shipped():
            raise ValueError(f"config: {path} is no file and none of those shipped ({', '.join(shipped())})")
        path = shipped()[str(path)]
    try:
        text = path.read_text(encoding="utf-8")
        found, top = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds {type(found).__name__}, expected options by name")
    names = [str(key.value).replace("-", "_") for key, _ in top.value]  # of two alike, YAML's reader takes the last
    if again := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{path}: has {again} twice, expected each option once")
    return {str(name).replace("-", "_"): value for name, value in found.items()}


def to_yaml(options: Configuration | Mapping[str, Any]) -> str:
    """Every option, as `read_yaml` reads it back."""
    import yaml

    plain = options.plain() if isinstance(options, Configuration) else dict(options)
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def changed(config: C, **values: Any) -> C:
    """The configuration with other values for some options."""
    return dataclasses.replace(config, **values)
