"""What the systems that distil an encoder share: loading a teacher, saving a student so that it loads as it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from fastdistil.systems.folder import is_main_process
from fastdistil.systems.models import folder_of, load_config, without_report
from fastdistil.writing import new_folder, write_sums


def model_class(config: Any) -> Any:
    """The class of transformers that a model was saved from, with its head; AutoModel where the configuration names
    none."""
    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModel


def load_encoder(name: str, function: str) -> Any:
    """The model of a folder, a run's folder or a hub name in float32 and evaluation mode, with the head that it was
    saved with; without a pooler where none was saved.

    Raises ValueError where weights are missing: they would be random.
    """
    folder = folder_of(name)
    kind = model_class(load_config(name))
    with without_report():
        model, said = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if said["missing_keys"] and all("pooler" in key for key in said["missing_keys"]):
            model, said = kind.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, add_pooling_layer=False
            )
    if said["missing_keys"]:
        missing = ", ".join(sorted(said["missing_keys"])[:4])
        raise ValueError(f"{function}: {name} holds no weights for {missing} of a {type(model).__name__}")
    return model.eval()


def empty_encoder(name: str) -> Any:
    """The same without weights, on the meta device: for counting."""
    config = load_config(name)
    kind = model_class(config)
    with torch.device("meta"):
        return kind(config) if hasattr(kind, "base_model_prefix") else kind.from_config(config)


def check_tokenizer(model: Any, tokenizer: Any, function: str) -> None:
    """Raises ValueError where the tokenizer has ids that the model has no embeddings for."""
    most = max(tokenizer.get_vocab().values())
    size = int(model.get_input_embeddings().weight.shape[0])
    if most >= size:
        raise ValueError(f"{function}: the tokenizer has the id {most}, the {type(model).__name__} {size} embeddings")


def check_reloads(model: Any, folder: Path, function: str) -> None:
    """Raises RuntimeError unless what lies in `folder` loads as `model` is: every tensor, and what it answers."""
    kind: Any = type(model)
    bare = {"add_pooling_layer": False} if getattr(model, "pooler", model) is None else {}
    loaded, said = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **bare)
    wrong = [f"{name}: {sorted(map(str, keys))[:3]}" for name, keys in said.items() if keys]
    ours, theirs = model.state_dict(), loaded.state_dict()
    wrong += [name for name, x in ours.items() if name not in theirs or not torch.equal(theirs[name], x.cpu())][:3]
    if not wrong:
        ids = torch.arange(min(8, model.get_input_embeddings().weight.shape[0]))[None]
        ours_said, theirs_said = _answer(model, ids), _answer(loaded, ids)
        # Weights that lie elsewhere in memory may be multiplied in another order: the last bits can differ.
        wrong = ["its answers"] if not torch.allclose(ours_said, theirs_said, rtol=1e-4, atol=1e-5) else []
    if wrong:
        raise RuntimeError(
            f"{function}: the {kind.__name__} in {folder} does not load as it was saved ({'; '.join(wrong)})"
        )


@torch.no_grad()
def _answer(model: Any, ids: Tensor) -> Tensor:
    training, device = model.training, next(model.parameters()).device
    try:
        found: Tensor = model.cpu().eval()(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        return found
    finally:
        model.train(training).to(device)


def save_student(
    model: Any,
    tokenizer: Any,
    folder: Path,
    function: str,
    files: Mapping[str, str] | None = None,
    check: bool = True,
) -> None:
    """Write model, tokenizer and further text `files` into `folder`, whole or not at all, with a list of
    their sha256; unless `check` is False, the model must load as it is.

    Only the main process writes.
    """
    if not is_main_process():
        return
    with new_folder(folder, function) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for name, text in (files or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        if check:
            check_reloads(model, partial, function)
        write_sums(partial)


def remove_checkpoints(out: Path) -> None:
    """Remove `out`/checkpoints of a run that has ended; TensorBoard's files there go to `out`/tensorboard."""
    held = out / "checkpoints"
    for found in sorted(held.rglob("tensorboard")):
        target = out / "tensorboard" / found.parent.relative_to(held)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(found, target)
    shutil.rmtree(held, ignore_errors=True)


def inputs_by_size(ids: Tensor, mask: Tensor, most: int = 128) -> dict[int, dict[str, Tensor]]:
    """{1: inputs, 32: inputs} for `measure.latency` from rows (B, S) of pieces, repeated, cut to `most` pieces."""
    rows = torch.arange(32) % len(ids)
    return {n: {"input_ids": ids[rows[:n], :most], "attention_mask": mask[rows[:n], :most]} for n in (1, 32)}


def processes() -> int:
    """How many processes torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def process_state() -> PartialState:
    """accelerate's state of the processes, made as the training loop makes it later: on CPUs where the environment asks
    for them, which PartialState alone does not ask. Raises ValueError where accelerate knows nothing of processes that
    torchrun started: each would take itself for the main one and write."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if state.num_processes != processes():
        raise ValueError(
            f"WORLD_SIZE is {processes()} in the environment, accelerate runs {state.num_processes} process: on CPUs "
            "set ACCELERATE_USE_CPU=true beside torchrun, or start with `accelerate launch`"
        )
    return state
