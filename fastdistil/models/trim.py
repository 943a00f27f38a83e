"""A model whose vocabulary is cut with its tokenizer's: embedding table, output head and its biases together.

    tokenizer, rows = trim_vocabulary(tokenizer, keep)
    trim_model_(teacher, rows)

transformers' resize_token_embeddings cuts the first rows alone, and of an untied BertForMaskedLM leaves a decoder bias
behind that is gone when the model is loaded again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastdistil.models._check import vocabulary_rows
from fastdistil.models.block_config import configurations
from fastdistil.sparse import SparseDelta


def trim_model_(model: Any, rows: Tensor) -> None:
    """Cut the vocabulary of a transformers model in place to `rows` (V_s,) int64: new id -> old id.

    Whatever has an entry per token follows: the input embeddings, the output embeddings with their bias, tied or not as
    before, an output head's other biases; ids and sizes in the configuration. What is kept is bit for bit what it was,
    so are the model's outputs on kept ids, the logits being those columns. A special id of the configuration that is
    not kept becomes None.

    Raises ValueError where `rows` holds an id that the model has not, or the padding id changes in a model that counts
    its positions from it (RoBERTa, XLM-R): all positions would move.
    """
    table = model.get_input_embeddings()
    size = int(table.weight.shape[0])
    rows = vocabulary_rows("trim_model_", rows, size)
    new_id = {old: new for new, old in enumerate(rows.tolist())}
    _check_positions(model, table, new_id)
    made: dict[int, nn.Parameter] = {}
    for module, name, parameter in list(_with_vocabulary(model, size)):
        if id(parameter) not in made:
            cut = parameter.detach()[rows.to(parameter.device)].clone()
            made[id(parameter)] = nn.Parameter(cut, requires_grad=parameter.requires_grad)
        setattr(module, name, made[id(parameter)])  # tied ones stay one
    for module in cast("Iterator[Any]", model.modules()):
        for name in ("num_embeddings", "out_features", "vocab_size"):
            own = isinstance(getattr(module, "weight", None), Tensor) and module.weight.shape[0] == len(rows)
            if getattr(module, name, None) == size and (own or name == "vocab_size"):
                setattr(module, name, len(rows))
    if table.padding_idx is not None:
        table.padding_idx = new_id.get(table.padding_idx)
    for config in [*configurations(model), getattr(model, "generation_config", None)]:
        _trim_config(config, size, new_id)


def _trim_config(config: Any, size: int, new_id: dict[int, int]) -> None:
    for name, value in list(vars(config).items()) if config is not None else ():
        if name == "vocab_size" and value == size:
            config.vocab_size = len(new_id)
        elif name.endswith("_token_id") and isinstance(value, int):
            setattr(config, name, new_id.get(value))
        elif name.endswith("_token_id") and isinstance(value, (list, tuple)):
            setattr(config, name, [new_id[i] for i in value if i in new_id])


def _with_vocabulary(model: Any, size: int) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(module, name, parameter) of all that has an entry per token, under each name that it has."""
    head = model.get_output_embeddings()
    chosen = {id(model.get_input_embeddings().weight)}
    if head is not None:
        parent = next((m for m in model.modules() if any(child is head for child in m.children())), model)
        own = [*head.parameters(recurse=False), *parent.parameters(recurse=False)]
        chosen |= {id(p) for p in own if p.shape[0] == size}
    for module in cast("Iterator[nn.Module]", model.modules()):
        for name, parameter in module._parameters.items():
            if id(parameter) in chosen and parameter is not None:
                yield module, name, parameter


def _check_positions(model: Any, table: nn.Module, new_id: dict[int, int]) -> None:
    for module in cast("Iterator[Any]", model.modules()):
        pad = getattr(module, "padding_idx", None)
        if module is table or isinstance(module, nn.Embedding) or not isinstance(pad, int):
            continue
        if new_id.get(pad) != pad:
            raise ValueError(
                f"trim_model_: the padding id {pad} becomes {new_id.get(pad)}, but {type(model).__name__} counts "
                "positions from it: every position would move; expected rows that keep the ids up to it"
            )


def trim_delta(delta: SparseDelta, rows: Tensor, size: int) -> SparseDelta:
    """A delta to a model of `size` tokens as one to the model after `trim_model_(model, rows)`.

    Of every tensor whose first dimension is `size` the entries of kept tokens stay: a model whose layers are as wide as
    its vocabulary is large is no model of language.
    """
    positions, values, shapes = dict[str, Tensor](), dict[str, Tensor](), dict[str, tuple[int, ...]]()
    table = torch.full((size,), -1)
    table[rows] = torch.arange(len(rows))
    for name, shape in delta.shapes.items():
        shapes[name] = tuple(shape)
        if name in delta.positions:
            positions[name], values[name] = delta.positions[name], delta.values[name]
            if shape[0] == size:
                shapes[name] = (len(rows), *shape[1:])
                width = shape.numel() // size
                at = positions[name].long()
                row = table[at // width]
                kept = row >= 0
                positions[name] = (row[kept] * width + at[kept] % width).to(delta.positions[name].dtype)
                values[name] = delta.values[name][kept]
    whole = {name: x[rows] if x.shape[0] == size else x for name, x in delta.whole.items()}
    return SparseDelta(positions, values, shapes, whole=whole, base_model=delta.base_model)
