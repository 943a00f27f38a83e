"""Of sparse fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdistil.sparse import SparseAdamW, SparseDelta, SparseMask, load_into, lottery_ticket, random_mask, select_topk
from mistakes import Mistake


def _model(width: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(width, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    return model.to(dtype)


def _tuned(width: int = 3) -> nn.Module:
    model = _model(width)
    with torch.no_grad():
        model[0].weight += 1  # type: ignore[operator, index]
    return model


def _base(model: nn.Module) -> dict[str, Any]:
    return {name: x.detach().clone() for name, x in model.named_parameters()}


BASE = _base(_model())
MASK = {"0.weight": torch.tensor([0, 3])}


def _delta(**options: Any) -> SparseDelta:
    return SparseDelta.from_params(_tuned(), BASE, select_topk(_tuned(), BASE, k=2), **options)


def _saved(folder: Path) -> Path:
    _delta().save(folder / "delta.safetensors")
    return folder / "delta.safetensors"


def _cut(folder: Path) -> Path:
    path = _saved(folder)
    path.write_bytes(path.read_bytes()[:40])
    return path


def _text(folder: Path) -> Path:
    (folder / "delta.safetensors").write_text("no delta at all, a readme")
    return folder / "delta.safetensors"


def _mask_file(folder: Path) -> Path:
    SparseMask(MASK, {"0.weight": torch.Size([2, 3])}).save(folder / "mask.safetensors")
    return folder / "mask.safetensors"


def _step_with_another_mask() -> None:
    state = SparseAdamW(_model(), MASK).state_dict()
    SparseAdamW(_model(), {"0.weight": torch.tensor([1])}).load_state_dict(state)


def _twice() -> None:
    model, delta = _model(), _delta()
    delta.apply_(model)
    delta.apply_(model)


def _dense_training(model: Any, mask: Any, out: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1


def _pairs_of_modules() -> Any:
    return [("0", nn.Linear(2, 2))]


MISTAKES = [
    # selection
    Mistake("neither-k-nor-density", lambda _: select_topk(_tuned(), BASE), "k", "None", "exactly one"),
    Mistake("k-and-density", lambda _: select_topk(_tuned(), BASE, k=2, density=0.5), "density", "0.5", "exactly one"),
    Mistake("density-in-percent", lambda _: select_topk(_tuned(), BASE, density=8), "density", "8.0", "0 to 1"),
    Mistake("more-entries-than-there-are", lambda _: select_topk(_tuned(), BASE, k=99), "k", "99", "0 to the 8"),
    Mistake("a-fraction-for-k", lambda _: select_topk(_tuned(), BASE, k=0.08), "k", "float", "int", "density"),
    Mistake("a-misspelt-include", lambda _: select_topk(_tuned(), BASE, k=1, include="wieght"), "include", "'wieght'", "part of no parameter's name", "'weight'?"),
    Mistake("excluding-everything", lambda _: select_topk(_tuned(), BASE, k=1, exclude=["weight", "bias"]), "exclude", "none of the 2", "leave"),
    Mistake("a-base-of-another-width", lambda _: select_topk(_tuned(), _base(_model(4)), k=1), "base_params", "(2, 4)", "(2, 3)"),
    Mistake("a-base-without-a-tensor", lambda _: select_topk(_tuned(), {"0.bias": BASE["0.bias"]}, k=1), "base_params", "no '0.weight'", "params has"),
    Mistake("a-base-of-whole-numbers", lambda _: select_topk(_tuned(), {n: x.long() for n, x in BASE.items()}, k=1), "base_params", "torch.int64", "float32"),
    Mistake("a-path-for-parameters", lambda _: select_topk("model.safetensors", BASE, k=1), "params", "str", "module", "Checkpoint"),
    Mistake("a-base-with-nan", lambda _: select_topk(_tuned(), {n: x * torch.nan for n, x in BASE.items()}, k=1), "base_params", "NaN", "numbers"),
    Mistake("parameters-without-names", lambda _: select_topk(list(_tuned().parameters()), BASE, k=1), "params", "Parameter", "pairs of a name and a tensor", "named_parameters()"),
    Mistake("a-drawn-density-above-1", lambda _: random_mask(_tuned(), density=1.5, seed=0), "density", "1.5", "0 to 1"),
    # the optimizer
    Mistake("an-optimizer-without-names", lambda _: SparseAdamW(_model().parameters(), MASK), "named_params", "Parameter", "pairs of a name and a tensor", "named_parameters()"),
    Mistake("a-mask-of-another-model", lambda _: SparseAdamW(_model(), {"encoder.weight": torch.tensor([0])}), "mask", "'encoder.weight'", "named_params has not"),
    Mistake("a-mask-of-booleans", lambda _: SparseAdamW(_model(), {"0.weight": torch.ones(2, 3).bool()}), "0.weight", "torch.bool", "int32 or int64", "nonzero"),
    Mistake("a-mask-out-of-range", lambda _: SparseAdamW(_model(), {"0.weight": torch.tensor([0, 6])}), "0.weight", "6", "0 to 5"),
    Mistake("a-mask-that-is-not-sorted", lambda _: SparseAdamW(_model(), {"0.weight": torch.tensor([3, 0])}), "0.weight", "not ascending", "sorted"),
    Mistake("a-mask-as-a-list", lambda _: SparseAdamW(_model(), {"0.weight": [0, 3]}), "0.weight", "list", "vector"),
    Mistake("a-tensor-for-a-mask", lambda _: SparseAdamW(_model(), torch.tensor([0, 3])), "mask", "Tensor", "names"),
    Mistake("a-negative-learning-rate", lambda _: SparseAdamW(_model(), MASK, lr=-1.0), "lr", "-1.0", "0"),
    Mistake("one-beta", lambda _: SparseAdamW(_model(), MASK, betas=0.9), "betas", "0.9", "two"),
    Mistake("the-state-of-another-mask", lambda _: _step_with_another_mask(), "state_dict", "mask", "expected"),
    # differences and their files
    Mistake("a-delta-to-another-model", lambda _: _delta().apply_(_model(4)), "module", "(2, 4)", "(2, 3)"),
    Mistake("a-delta-to-a-model-without-the-parameter", lambda _: _delta().apply_(nn.Linear(3, 2)), "module", "no parameter '0.weight'", "the delta has"),
    Mistake("a-delta-applied-twice", lambda _: _twice(), "delta", "applied to module already", "revert_"),
    Mistake("a-delta-reverted-before-it-is-applied", lambda _: _delta().revert_(_model()), "delta", "not applied", "apply_"),
    Mistake("a-delta-plus-a-number", lambda _: _delta() + 1, "SparseDelta", "int", "+", theirs=True),
    Mistake("a-delta-that-is-not-there", lambda x: SparseDelta.load(x / "none.safetensors"), "none.safetensors", "No such file", "file"),
    Mistake("a-folder-for-a-delta", lambda x: SparseDelta.load(x), "FOLDER", "folder", "file"),
    Mistake("a-delta-that-was-cut-off", lambda x: SparseDelta.load(_cut(x)), "delta.safetensors", "truncated", "bytes"),
    Mistake("a-readme-for-a-delta", lambda x: SparseDelta.load(_text(x)), "delta.safetensors", "safetensors", "no"),
    Mistake("a-mask-for-a-delta", lambda x: SparseDelta.load(_mask_file(x)), "mask.safetensors", "mask", "delta"),
    Mistake("a-delta-for-a-mask", lambda x: SparseMask.load(_saved(x)), "delta.safetensors", "delta", "mask"),
    Mistake("loading-into-another-model", lambda x: load_into(_model(4), _saved(x)), "delta.safetensors", "(2, 4)", "(2, 3)"),
    Mistake("a-delta-saved-into-no-folder", lambda x: _delta().save(x / "no" / "delta.safetensors"), "no/delta.safetensors", "not a folder", "cannot be written"),
    # tickets
    Mistake("a-ticket-that-trains-densely", lambda _: lottery_ticket(_model(), _dense_training, k=2), "train_fn", "outside of its mask", "expected"),
    Mistake("a-ticket-without-a-function", lambda _: lottery_ticket(_model(), None, k=2), "train_fn", "NoneType", "function"),
]  # fmt: skip
