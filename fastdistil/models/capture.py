"""Take hidden states, queries, keys and values out of a transformers encoder while it runs, with SDPA staying on.

Hidden states come from forward hooks. Queries, keys and values come from transformers' attention interface: for as long
as a capture is open, the model's configuration names an attention function that notes what a captured layer hands it
and then calls the one that was configured before. No attention map is formed for it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

# model_type -> (the list of blocks in the base model, the self-attention in a block)
_ENCODERS = {
    "bert": ("encoder.layer", "attention.self"),
    "roberta": ("encoder.layer", "attention.self"),
    "xlm-roberta": ("encoder.layer", "attention.self"),
    "distilbert": ("transformer.layer", "attention"),
}
_PREFIX = "fastdistil_capture_"  # before the name of the attention function that is called in the end

_Note = Callable[[Tensor, Tensor, Tensor], None]
_lock = threading.Lock()
_notes: WeakKeyDictionary[nn.Module, list[_Note]] = WeakKeyDictionary()  # self-attention -> who listens
_open: dict[int, tuple[int, str]] = {}  # id of a configuration -> captures open on it, its own attention function


@dataclass
class Captured:
    """What the model's last forward pass held, by layer: hidden_states (B, S, D), the rest (B, H, S, d), with gradient
    where the model ran with gradient."""

    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def capture(
    model: nn.Module,
    *,
    hidden_states: Iterable[int] = (),
    queries: Iterable[int] = (),
    keys: Iterable[int] = (),
    values: Iterable[int] = (),
) -> Iterator[Captured]:
    """Inside the `with` block, every forward pass of `model` fills the `Captured` that it yields.

        with fastdistil.capture(model, hidden_states=[0, 6], queries=[6], keys=[6]) as captured:
            model(input_ids, attention_mask)
        captured.queries[6]  # (B, H, S, d)

    Args:
        model: BERT, RoBERTa, XLM-R or DistilBERT of transformers, with or without a head.
        hidden_states: layers; 0 is the output of the embeddings, l the output of block l.
        queries, keys, values: blocks, from 1, as the attention function gets them.

    Raises:
        TypeError, ValueError: a model that is none of these, a layer that it does not have.
    """
    base, blocks, attention_path = _encoder(model)
    wanted = {"hidden_states": hidden_states, "queries": queries, "keys": keys, "values": values}
    layers = {
        name: _layers(name, value, 0 if name == "hidden_states" else 1, len(blocks), base)
        for name, value in wanted.items()
    }
    captured = Captured()
    with ExitStack() as stack:
        for layer in layers["hidden_states"]:
            block = blocks[layer - 1] if layer else base.get_submodule("embeddings")
            handle = block.register_forward_hook(_hidden_hook(captured, layer))
            stack.callback(handle.remove)
        attended = {layer for name in ("queries", "keys", "values") for layer in layers[name]}
        if attended:
            stack.enter_context(_redirected(base))
        for layer in attended:
            targets = [
                (position, getattr(captured, name))
                for position, name in enumerate(("queries", "keys", "values"))
                if layer in layers[name]
            ]
            stack.enter_context(_listening(blocks[layer - 1].get_submodule(attention_path), _note(targets, layer)))
        yield captured


def _encoder(model: nn.Module) -> tuple[nn.Module, nn.ModuleList, str]:
    """The base model, its blocks, and the path of the self-attention in a block."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"capture: model is {type(model).__name__}, expected a transformers model")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _ENCODERS:
        raise ValueError(
            f"capture: model is {type(model).__name__} of type {model_type!r}, "
            f"expected one of {', '.join(map(repr, _ENCODERS))}"
        )
    base = cast("nn.Module", getattr(model, "base_model", model))
    path, attention_path = _ENCODERS[model_type]
    return base, cast("nn.ModuleList", base.get_submodule(path)), attention_path


def _layers(name: str, value: Iterable[int], first: int, last: int, base: nn.Module) -> list[int]:
    if isinstance(value, (str, Tensor)) or not isinstance(value, Iterable):
        raise TypeError(f"capture: {name} is {type(value).__name__}, expected a list of layers")
    layers = list(value)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"capture: {name} holds {layer!r}, expected whole numbers")
        if not first <= layer <= last:
            raise ValueError(
                f"capture: {name} asks for layer {layer}, expected {first} to {last}: "
                f"{type(base).__name__} has {last} blocks"
            )
    return layers


def _hidden_hook(captured: Captured, layer: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        captured.hidden_states[layer] = output[0] if isinstance(output, tuple) else output

    return hook


def _note(targets: list[tuple[int, dict[int, Tensor]]], layer: int) -> _Note:
    def note(*query_key_value: Tensor) -> None:
        for position, target in targets:
            target[layer] = query_key_value[position]

    return note


@contextmanager
def _listening(attention: nn.Module, note: _Note) -> Iterator[None]:
    with _lock:
        _notes[attention] = [*_notes.get(attention, []), note]
    try:
        yield
    finally:
        with _lock:
            rest = [other for other in _notes[attention] if other is not note]
            if rest:
                _notes[attention] = rest
            else:
                del _notes[attention]


@contextmanager
def _redirected(base: nn.Module) -> Iterator[None]:
    """The model's configuration names the noting function until the last capture on it is closed, in whatever order."""
    config: Any = base.config
    with _lock:
        count, own = _open.get(id(config), (0, config._attn_implementation))
        if count == 0:
            config._attn_implementation = _register(own)
        _open[id(config)] = (count + 1, own)
    try:
        yield
    finally:
        with _lock:
            count, own = _open.pop(id(config))
            if count > 1:
                _open[id(config)] = (count - 1, own)
            else:
                config._attn_implementation = own


def _register(own: str) -> str:
    """The name under which transformers finds the noting function around its attention function `own`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        for note in _notes.get(module, ()):
            note(query, key, value)
        if own == "eager":  # each model file has its own
            attention = sys.modules[type(module).__module__].eager_attention_forward
        else:
            attention = ALL_ATTENTION_FUNCTIONS[own]
        return attention(module, query, key, value, *args, **kwargs)

    name = _PREFIX + own
    AttentionInterface.register(name, attend)
    if own in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])
    return name
