"""Configurations of transformers models: all that a model holds, and that of one which keeps some of its blocks.

What a configuration says block by block is cut with the blocks, as a model is built from it when it is loaded. Whether
the cut configuration builds the blocks that were kept is seen by building both models without memory, on the meta
device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastdistil.models.capture import block_list

_ONE_PER_BLOCK = re.compile(
    "layer|block|pattern|heads|window|intermediate_size"
)  # names of lists with an entry per block
_BLOCK_NUMBERS = ("mlp_only_layers", "moe_layers", "ple_layer_ids")  # lists of the blocks that are special
_LEADING = ("first_k_dense_replace",)  # how many blocks from the first are special
_PLAIN = (bool, int, float, str, type(None))


def cut_config(config: Any, blocks: Sequence[int], count: int) -> None:
    """Make the `config` of a model of `count` blocks that of its `blocks`, numbered from 0, in this order."""
    if getattr(config, "mlp_only_layers", None) is not None:  # Qwen's mixtures: every step-th block but these
        step, dense = config.decoder_sparse_step, config.mlp_only_layers
        config.mlp_only_layers = [block for block in range(count) if block in dense or (block + 1) % step]
        config.decoder_sparse_step = 1
    for name, value in list(vars(config).items()):
        if name in _BLOCK_NUMBERS and isinstance(value, (list, tuple)):
            setattr(config, name, [place for place, block in enumerate(blocks) if block in value])
        elif name in _LEADING and isinstance(value, int):
            setattr(config, name, sum(block < value for block in blocks))
        elif isinstance(value, (list, tuple)) and len(value) == count and _ONE_PER_BLOCK.search(name):
            setattr(config, name, [value[block] for block in blocks])
    if getattr(config, "attention_types", None) is not None:  # GPT-Neo's run-length form of attention_layers
        config.attention_types = [[list(config.attention_layers), 1]]
    config.num_hidden_layers = len(blocks)


def check_rebuilds(model: nn.Module, before: Any, after: Any, blocks: Sequence[int], function: str) -> None:
    """Raises ValueError unless configuration `after` builds at each place the block that `before` builds for it.

    `model` is the transformers model without head, of which the class alone counts; `blocks[place]` is a block's number
    in `before`. Compared are the modules' types, parameters' shapes and plain attributes; no weights are made.
    """
    theirs, ours = (_built(model, config, function) for config in (before, after))
    for place, block in enumerate(blocks):
        found = _difference(theirs[block], ours[place], block, place)
        if found is not None:
            raise ValueError(
                f"{function}: blocks has the teacher's block {block} at place {place}, where the configuration of a "
                f"{type(model).__name__} builds another kind of block ({found}): once saved, the student would load as "
                "another model; expected blocks that its configuration can name"
            )


def _built(model: nn.Module, config: Any, function: str) -> nn.ModuleList:
    """The blocks of a model of this class as they are built behind a save and a load of the configuration."""
    from transformers.initialization import no_init_weights

    kind: Any = type(model)
    loaded = type(config).from_dict(json.loads(config.to_json_string()))
    loaded._attn_implementation = config._attn_implementation
    try:
        with torch.device("meta"), no_init_weights():
            return block_list(kind(loaded), function)
    except Exception as error:  # whatever a model's own code raises where the configuration does not fit it
        raise ValueError(
            f"{function}: model is {kind.__name__}, which its configuration of {config.num_hidden_layers} blocks does "
            f"not build ({type(error).__name__}: {error})"
        ) from error


def _difference(theirs: nn.Module, ours: nn.Module, block: int, place: int) -> str | None:
    """What differs first between two blocks, apart from their numbers; None where nothing does."""
    a, b = dict(_facts(theirs)), dict(_facts(ours))
    for name in [*a, *(name for name in b if name not in a)]:
        x, y = a.get(name), b.get(name)
        numbered = type(x) is int and type(y) is int and x - y == block - place and name.endswith(("idx", "id"))
        if x != y and not numbered:
            return f"{name} is {y}, not {x}"
    return None


def _facts(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, value) of all that a block's configuration has decided."""
    for path, module in block.named_modules():
        yield path or "block", type(module).__name__
        for name, value in vars(module).items():
            if not name.startswith("_") and name != "training" and isinstance(value, _PLAIN):
                yield f"{path}.{name}".lstrip("."), value
    for name, parameter in block.named_parameters():
        yield f"{name}.shape", tuple(parameter.shape)


def configurations(model: nn.Module) -> list[Any]:
    """The transformers configurations in a model, each once, those inside of another one included."""
    found: dict[int, Any] = {}
    waiting = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if hasattr(config, "to_diff_dict") and id(config) not in found:
            found[id(config)] = config
            waiting.extend(vars(config).values())
    return list(found.values())
