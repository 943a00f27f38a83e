"""The command line: fastdistil demo | distil | finetune | evaluate | bench | sparse | doctor.

What is heavy is imported where it is needed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from fastdistil.configs.bistil import BistilConfig
from fastdistil.configs.bistil_task import BistilTaskConfig
from fastdistil.configs.command_line import command
from fastdistil.configs.common import Configuration
from fastdistil.configs.evaluate import EvaluateConfig
from fastdistil.configs.finetune import FinetuneConfig
from fastdistil.configs.lightmbert import LightmbertConfig
from fastdistil.configs.xtremedistil import XtremeDistilConfig

app = typer.Typer(
    name="fastdistil",
    help="Fused, exact, memory-lean kernels for knowledge distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


sparse_app = typer.Typer(
    help="Sparse fine-tuning on checkpoints on disk (safetensors files, or folders with one or with shards).",
    no_args_is_help=True,
)
app.add_typer(sparse_app, name="sparse")
distil_app = typer.Typer(
    help="From a teacher and data to a saved student and its report: a system of a paper each.", no_args_is_help=True
)
app.add_typer(distil_app, name="distil")


class What(StrEnum):
    """What `fastdistil bench` measures."""

    logits = "logits"
    linear = "linear"
    topk = "topk"
    hidden = "hidden"
    attention = "attention"
    steps = "steps"
    exactness = "exactness"
    sparse = "sparse"
    all = "all"


def main() -> None:
    app()


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(importlib.metadata.version("fastdistil"))
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise typer.Exit(2)


def _fail(message: str) -> typer.Exit:
    typer.secho(message, fg=typer.colors.RED, err=True)
    return typer.Exit(1)


def _needs(extra: str, module: str) -> ModuleType:
    """A module of fastdistil whose dependencies are those of an extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = error.name or ""
        if name == module or name.startswith("fastdistil"):
            raise _fail(
                f"{name} is missing from this installation: reinstall with pip install 'fastdistil[{extra}]'"
            ) from error
        raise _fail(f"{name} is not installed: pip install 'fastdistil[{extra}]'") from error


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="Runs with this many seeds and reports the spread.")] = 1,
    seed: Annotated[int, typer.Option(help="The first seed; the same seed gives the same numbers.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Report folder: metrics, figures, the student.  [default: runs/demo, runs/demo-sparse]"),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Where downloaded packages are kept between runs.")] = None,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Instead: tune the student whole, and on 8% of its entries.")
    ] = False,
) -> None:
    """Distil a multilingual encoder into a small tagger, on real text, and report what it gained."""
    options = {"seed": seed, "seeds": seeds, "cache": cache}
    if sparse:
        _needs("demo", "fastdistil.demo.sparse").run_sparse(out=out or Path("runs/demo-sparse"), **options)
    else:
        _needs("demo", "fastdistil.demo.run").run_demo(out=out or Path("runs/demo"), **options)


def _option_of(config: Configuration, message: str) -> str:
    """The option whose file or name a message begins with."""
    for name, value in config.plain().items():
        for given in value if isinstance(value, list) else [value]:
            forms = (given, given.partition("=")[2]) if isinstance(given, str) else ()  # en=FILE names a language
            if any(form and message.startswith(f"{form}:") for form in forms):
                return f"--{name.replace('_', '-')}: "
    return ""


def _system(module: str) -> Callable[[Configuration], None]:
    """What runs a configuration: `run` of a module of fastdistil.systems. What is wrong with options or data is one
    line, not a traceback."""

    def run(config: Configuration) -> None:
        found = _needs("train", f"fastdistil.systems.{module}")
        try:
            found.run(config)
        except (ValueError, TypeError, OSError) as error:
            if os.environ.get("FASTDISTIL_TRACEBACK"):
                raise
            raise _fail(f"{_option_of(config, str(error))}{error}") from error
        except KeyboardInterrupt as interrupt:
            typer.echo(f"{interrupt or 'interrupted'}; the same command with --resume continues", err=True)
            raise typer.Exit(130) from interrupt

    return run


distil_app.command("lightmbert")(command(LightmbertConfig, _system("lightmbert")))
distil_app.command("bistil")(command(BistilConfig, _system("bistil")))
distil_app.command("bistil-task")(command(BistilTaskConfig, _system("bistil_task")))
distil_app.command("xtremedistil")(command(XtremeDistilConfig, _system("xtremedistil")))
app.command("finetune")(command(FinetuneConfig, _system("finetune")))
app.command("evaluate")(command(EvaluateConfig, _system("evaluate")))


@app.command()
def bench(
    what: Annotated[
        What | None, typer.Argument(help="What to measure.  [default: all, or nothing with --report]")
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="A dry run with tiny shapes; its times mean nothing.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the records go; in a checkout benchmarks/results/<device>/ by default.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Turn the records into a page with tables and figures.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the file's records, measure only the cases that it lacks.")
    ] = False,
) -> None:
    """Measure time, memory and error against PyTorch and its peers, on the GPU where there is one, else on the CPU.

    The exit code is 1 where a kernel of fastdistil's own gave a wrong answer or crashed.
    """
    if out is not None and out.suffix != ".jsonl":
        raise typer.BadParameter(f"is {str(out)!r}, expected a file that ends in .jsonl", param_hint="--out")
    runner = _needs("bench", "fastdistil.benchmarks.run")
    written: list[Path] = []
    if what is not None or not report:
        written = runner.run((what or What.all).value, tiny=small, out=out, resume=resume, say=typer.echo)
        for path in written:
            typer.echo(f"records: {path}")
    if report or what in (What.exactness, What.all):
        plot = _needs("bench", "fastdistil.benchmarks.plot")
        folder = (out or runner.default_out("logits", runner.device_here(), small)).parent
        try:
            for path in plot.report(folder):
                typer.echo(f"report: {path}")
        except ValueError as error:
            raise _fail(str(error)) from error
    wrong = runner.wrong(written)
    if wrong:
        raise _fail("\n".join(wrong))


Parts = Annotated[list[str] | None, typer.Option(help="Parts of tensor names; may be given several times.")]
Out = Annotated[Path, typer.Option(help="The file to write.")]


def _sparse(command: str, *arguments: Any, **options: Any) -> Any:
    """A function of fastdistil.sparse.commands; what is wrong with a file is one line, not a traceback."""
    module = _needs("train", "fastdistil.sparse.commands")
    try:
        return getattr(module, command)(*arguments, **options)
    except (ValueError, OSError) as error:
        raise _fail(str(error)) from error


@sparse_app.command("select")
def sparse_select(
    tuned: Annotated[Path, typer.Argument(help="The checkpoint after training.")],
    base: Annotated[Path, typer.Argument(help="The checkpoint before.")],
    out: Out,
    density: Annotated[float | None, typer.Option(help="Share of the elements.  [default: 0.08]")] = None,
    k: Annotated[int | None, typer.Option(help="Number of entries, in place of the density.")] = None,
    include: Parts = None,
    exclude: Parts = None,
    whole: Annotated[list[str] | None, typer.Option(help="Parts of names of tensors to store whole: a head.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The base model's name, kept in the file.")] = None,
) -> None:
    """Write the largest changes between two checkpoints as a sparse difference."""
    parts = {"include": include or (), "exclude": exclude or (), "whole": whole or ()}
    delta = _sparse("select", tuned, base, out, k=k, density=density, base_model=base_model, **parts)
    typer.echo(f"{out}: {delta}, density {delta.density:.4f}")


@sparse_app.command("info")
def sparse_info(
    path: Annotated[Path, typer.Argument(help="A difference, a mask, or a file of composable-sft.")],
) -> None:
    """Say what a sparse file holds."""
    for line in _sparse("info", path):
        typer.echo(line)


@sparse_app.command("apply")
def sparse_apply(
    base: Annotated[Path, typer.Argument(help="The checkpoint that the difference is to.")],
    delta: Annotated[Path, typer.Argument(help="The difference.")],
    out: Annotated[Path, typer.Option(help="The new checkpoint; a folder where the base is one.")],
) -> None:
    """Write a checkpoint plus a sparse difference."""
    typer.echo(f"{out}: {_sparse('apply', base, delta, out)} applied")


@sparse_app.command("compose")
def sparse_compose(
    deltas: Annotated[list[Path], typer.Argument(help="Differences, such as a language's and a task's.")],
    out: Out,
    scale: Annotated[list[float] | None, typer.Option(help="A factor for each, in their order.")] = None,
) -> None:
    """Write the sum of sparse differences."""
    typer.echo(f"{out}: {_sparse('compose', deltas, out, scale or ())}")


@app.command()
def doctor() -> None:
    """Say what is installed, what can run here and why not, and check every kernel against its formula in float64.

    Paste all of it into a bug report. The exit code is 1 where a part is broken or a kernel gives wrong numbers.
    """
    diagnosis = importlib.import_module("fastdistil.doctor").diagnosis
    broken, missing = 0, dict[str, None]()
    for found in diagnosis():
        mark = {True: "ok    ", False: "BROKEN", None: "      "}[found.good]
        typer.secho(f"{mark} {found.name:<22} {found.value}", fg=typer.colors.RED if found.good is False else None)
        broken += found.good is False
        if found.missing:
            missing[found.missing] = None
    if missing:
        typer.echo("\nMissing, and how to get it:")
        for sentence in missing:
            typer.echo(f"- {sentence}")
    if broken:
        raise _fail(f"{broken} of these {'is' if broken == 1 else 'are'} broken")


if __name__ == "__main__":
    main()
