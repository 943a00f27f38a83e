"""Checkpoints of the loop (train.py): folders `step-N` that are complete or absent, whatever happens meanwhile.

state.json lists the other files with their sizes and sha256, and carries a sha256 of itself; those of earlier versions
do not.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastdistil.fingerprint import bare_names, same_data
from fastdistil.writing import digest, naming, sync

STATE, WEIGHTS = "state.json", "model.safetensors"
_DIGEST = "digest"
_LATER = {"final_lr": 0.0, "validation": None}  # what earlier versions had no other choice of


class Checkpoints:
    """Folders `step-N` under `out`: every process writes into `partial-N`, then the main one renames it.

    Weights are kept under the names of the bare module, so that a compiled or parallel one loads them as well.
    `fingerprint` holds what a run must agree on with the one that it continues.
    """

    def __init__(self, out: Path, accelerator: Accelerator, fingerprint: dict[str, Any]) -> None:
        self.out, self.accelerator, self.fingerprint = out, accelerator, fingerprint
        accelerator.register_save_state_pre_hook(_save_bare_names)
        accelerator.register_load_state_pre_hook(_load_bare_names)

    def save(
        self, step: int, history: list[dict[str, float]], *, stopped: bool, tokens: int, callbacks: list[Any]
    ) -> None:
        """After `step` steps; `stopped` where no further one is to come."""
        final, partial = self.out / f"step-{step}", self.out / f"partial-{step}"
        if self.accelerator.is_main_process and partial.exists():
            shutil.rmtree(partial)  # of a run that was killed, perhaps one of more processes
        self.accelerator.wait_for_everyone()
        with naming(partial):
            self.accelerator.save_state(str(partial))  # weights, optimizer, scheduler, and each process's generators
        self.accelerator.wait_for_everyone()  # a rename before would leave the others' files behind
        if self.accelerator.is_main_process:
            found = {str(x.relative_to(partial)): x for x in partial.rglob("*") if x.is_file()}
            state = {"step": step, "run": self.fingerprint, "history": history}
            state |= {"files": {name: path.stat().st_size for name, path in found.items()}}
            state |= {"sha256": {name: digest(path) for name, path in found.items()}}
            state |= {"stopped": stopped, "tokens": tokens, "callbacks": callbacks}
            with naming(partial / STATE):
                (partial / STATE).write_text(json.dumps(state | {_DIGEST: _digest(state)}), encoding="utf-8")
                for path in (*found.values(), partial / STATE, partial):
                    sync(path)  # before the one that it replaces goes
                if not final.exists():
                    os.rename(partial, final)
                    sync(self.out)
            for old in self.out.iterdir():
                if old != final and old.name.startswith(("step-", "partial-")):
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self) -> dict[str, Any]:
        """Restore the newest checkpoint and return what `save` was told: step 0 and no history where there is none.

        Raises ValueError where it is another run's, processes find different ones, a file is truncated, altered or
        holds code, and FileNotFoundError where a file is missing.
        """
        names = [path.name.removeprefix("step-") for path in self.out.glob("step-*")]
        found = [int(name) for name in names if name.isdecimal()]
        newest = max(found, default=0)
        self._check_common(newest)
        nothing: dict[str, Any] = {"step": 0, "history": [], "stopped": False, "tokens": 0, "callbacks": []}
        if not found:
            return nothing
        folder = self.out / f"step-{newest}"
        state = _read_state(folder / STATE)
        self._check_run(folder, state)
        self._check_files(folder, state)
        _check_pickles(folder)
        self.accelerator.load_state(str(folder))
        return {key: state.get(key, value) for key, value in nothing.items()}

    def _check_common(self, newest: int) -> None:
        if self.accelerator.num_processes == 1:
            return
        steps = self.accelerator.gather(torch.tensor([newest], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            raise ValueError(
                f"train: out is {self.out}, where the processes find checkpoints of steps {steps}, expected one folder "
                "that all of them see"
            )

    def _check_run(self, folder: Path, state: Mapping[str, Any]) -> None:
        run = {**_LATER, **state["run"]}
        for key, value in self.fingerprint.items():
            # Earlier versions knew less of a run.
            known = key in run or "files" in state
            if known and not (same_data(run.get(key), value) if key == "data" else run.get(key) == value):
                raise ValueError(
                    f"train: {folder} was written with {key} = {run.get(key)!r}, this run has {value!r}; "
                    "choose another folder or delete this one"
                )

    def _check_files(self, folder: Path, state: Mapping[str, Any]) -> None:
        """accelerate goes on without a process's generators, which would be another run."""
        sizes: dict[str, int | None] = dict(state.get("files", {}))
        sizes.setdefault(f"random_states_{self.accelerator.process_index}.pkl", None)
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file():
                raise FileNotFoundError(f"train: {path} is missing, expected it in a complete checkpoint")
            if size is not None and path.stat().st_size != size:
                raise ValueError(f"train: {path} has {path.stat().st_size} bytes, expected {size}")
            wanted = state.get("sha256", {}).get(name)
            if wanted is not None and (found := digest(path)) != wanted:
                raise ValueError(f"train: {path} is altered, its sha256 is {found}, expected {wanted}")


def _read_state(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError or ValueError, naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"train: {path} is missing, expected it in a complete checkpoint")
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        good = isinstance(state, dict) and isinstance(state["run"], dict) and isinstance(state.get("files", {}), dict)
        good = good and state["step"] == int(path.parent.name.removeprefix("step-"))
    except (ValueError, KeyError) as error:
        raise ValueError(f"train: {path} cannot be read as the state of a run: {error}") from error
    if not good:
        raise ValueError(f"train: {path} is not the state of a run after {path.parent.name.replace('-', ' ')}")
    rest = {key: value for key, value in state.items() if key != _DIGEST}
    if state.get(_DIGEST, _digest(rest)) != _digest(rest):
        raise ValueError(f"train: {path} is altered, its digest is {_digest(rest)}, expected {state[_DIGEST]}")
    return state


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _check_pickles(folder: Path) -> None:
    """accelerate opens the states of what was registered with an unrestricted unpickler, in which a file may run code.
    What torch's restricted one accepts is tensors, numbers and containers."""
    for path in sorted(folder.glob("custom_checkpoint_*.pkl")):
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"train: {path} holds more than tensors and numbers; it is not loaded: {error}") from error


def _is_parallel(module: nn.Module) -> bool:
    return isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel))


def _save_bare_names(models: list[nn.Module], weights: list[Mapping[str, Any]], folder: str) -> None:
    """accelerate's hook before a save: `weights` is what it is going to write, empty where it wrote shards itself."""
    for index, (module, state) in enumerate(zip(models, weights, strict=False)):
        names = bare_names(state, _is_parallel(module))
        weights[index] = OrderedDict((names[name], value) for name, value in state.items())  # ordered: ties are cut


def _load_bare_names(models: list[nn.Module], folder: str) -> None:
    """accelerate's hook before a load: takes the one module over, where its weights are in one safetensors file."""
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS
    if len(models) != 1 or not path.is_file():
        return
    module = models.pop()
    own = module.state_dict()
    targets = {bare: name for name, bare in bare_names(own, _is_parallel(module)).items()}
    saved = load_file(path)
    # Earlier versions wrote the names as the run had them, with what was around its module.
    parallel = not saved.keys() <= targets.keys() and all(name.startswith("module.") for name in saved)
    sources = bare_names(saved, parallel)
    tensors = {targets.get(bare, bare): saved[name] for name, bare in sources.items()}
    _check_names(path, own, tensors)
    module.load_state_dict(tensors, strict=False)


def _check_names(path: Path, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Of tied tensors the file holds one."""
    held = {_place(own[name]) for name in found if name in own}
    missing = sorted(name for name, x in own.items() if name not in found and _place(x) not in held)
    foreign = sorted(name for name in found if name not in own)
    if missing or foreign:
        raise ValueError(
            f"train: {path} holds another module's weights: the objective has no {foreign[:4]}, the file no "
            f"{missing[:4]}"
        )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape)
