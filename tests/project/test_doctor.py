"""`fastdistil doctor`: what it prints, what it finds broken, what it says of what is missing."""

from __future__ import annotations

import builtins
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE, available
from typer.testing import CliRunner

import fastdistil
from fastdistil import cli, doctor, doctor_checks

runner = CliRunner()


# What the backends have no kernels for.
SORTED = {"uld_loss", "linear_uld_loss"}
FLOAT64 = {"projected_logit_loss", "linear_projected_logit_loss"}
MISSING = {"reference": set[str](), "cpu": SORTED, "triton": {"select_topk", *SORTED, *FLOAT64}}


def test_it_is_content_here() -> None:
    """In a process of its own, as its users run it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "fastdistil", "doctor"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stdout + found.stderr
    for word in (
        "fastdistil", "torch", "triton", "numpy", "transformers", "python", "system", "processor", "GPU", "CPU kernels",
        "CUDA kernels", "OpenMP", "OMP_WAIT_POLICY=passive", "backend reference", "backend cpu", f"{len(doctor_checks.CHECKS)} checks",
    ):  # fmt: skip
        assert word in found.stdout, word
    assert "BROKEN" not in found.stdout
    if not torch.cuda.is_available():
        assert "Missing, and how to get it:" in found.stdout


@pytest.mark.parametrize("backend", available("reference", "cpu", "triton", "cuda"))
def test_every_kernel_is_right(backend: str) -> None:
    errors = doctor_checks.errors(backend, DEVICE.type)
    assert {"logit_loss", "SparseAdamW"} <= errors.keys()
    if backend != "cuda":
        assert doctor_checks.CHECKS.keys() - errors.keys() == MISSING[backend]
    assert max(errors.values()) <= doctor.LIMIT / 10, errors


def test_every_loss_is_checked() -> None:
    assert {x for x in fastdistil.__all__ if x.endswith("_loss")} <= doctor_checks.CHECKS.keys()


def test_checks_see_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastdistil.logit_loss
    monkeypatch.setattr(fastdistil, "logit_loss", lambda x, *rest, **options: right(x * (1 + 1e-4), *rest, **options))
    assert doctor_checks.errors("reference", "cpu")["logit_loss"] > 1e-2


def test_a_wrong_kernel_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def errors(backend: str, device: str, isa: str = "") -> dict[str, float]:
        return {"logit_loss": 0.5 if backend == "reference" else 1e-8, "hidden_loss": float("nan")}

    monkeypatch.setattr(doctor_checks, "errors", errors)
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert (
        "BROKEN backend reference      logit_loss is 5e-01 off, hidden_loss is nan off (1e-05 allowed)" in result.output
    )
    assert "- The backend reference gives wrong numbers here: report it with this output" in result.output
    assert "are broken" in result.output


def test_a_kernel_that_raises_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def errors(*unused: object) -> dict[str, float]:
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(doctor_checks, "errors", errors)
    found = {x.name: x for x in doctor.backend_checks()}
    assert found["backend reference"].good is False
    assert found["backend reference"].value == "failed: RuntimeError: an illegal address"


def test_a_missing_extension_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "the C++ extension fastdistil._C cannot be imported"
    monkeypatch.setattr(fastdistil, "backends", lambda: {"reference": True, "cpu": why})
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert f"not available: {why}" in result.output


def test_what_is_missing_comes_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.metadata.distributions

    def without(**options: Any) -> Any:
        return iter(()) if options.get("name") in ("triton", "transformers") else found(**options)

    monkeypatch.setattr(importlib.metadata, "distributions", without)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_driver", lambda: "580.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    sentences = [x.missing for x in doctor.diagnosis() if x.missing]
    assert "Triton kernels (GPUs) need triton: pip install 'fastdistil[triton]'." in sentences
    assert any("need transformers: pip install 'fastdistil[train]'." in x for x in sentences)
    assert any(x.startswith("There is a GPU, and this torch is built for CPUs") for x in sentences)
    assert all(x[0].isupper() or x.startswith(("capture", "torch", "fastdistil", "`")) for x in sentences)
    assert all(x.endswith(".") for x in sentences)


def test_a_torch_that_cannot_be_imported_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, scope: Mapping[str, object] | None = None, *rest: Any) -> Any:
        if name == "torch" and scope is not None and scope.get("__name__") == "fastdistil.doctor":
            raise ImportError("libtorch.so: cannot open shared object file")
        return real(name, scope, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    *_, last = doctor.diagnosis()
    assert last.good is False
    assert last.value == "failed: libtorch.so: cannot open shared object file"
    assert last.missing.startswith("torch cannot be imported")


def test_two_openmp_runtimes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "7f00-7f01 r-xp 00000000 00:00 1    /usr/lib/{}\n"
    maps = line.format("libgomp.so.1") + line.format("libiomp5.so") + line.format("libgomp.so.1")
    monkeypatch.setattr(Path, "read_text", lambda self, *unused: maps)
    found = doctor.openmp()
    assert found.good is False
    assert found.value.startswith("2, ")
