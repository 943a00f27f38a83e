"""Who listens to a model's forward pass, looked up while it runs.

A model that is listened to has hooks on its base model and all of its blocks, and its configuration names an attention
function that shows queries, keys and values. All of them are the same functions whatever is captured, and find the
listeners by the module: code that torch.compile made for one capture serves the next one.

They are kept out of compiled graphs, which therefore break there (fullgraph=True is refused): the listeners of a pass
are those of its thread and of its model, found by the thread's identity and by weak dictionaries, and torch.compile
traces neither. A custom op could look them up, but sees tensors without their gradient.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_PREFIX = "fastdistil_capture_"  # before the name of the attention function that is called in the end
_ATTENDED = ("queries", "keys", "values")

_lock = threading.RLock()
_attachments: WeakKeyDictionary[nn.Module, _Attachment] = WeakKeyDictionary()  # base model -> what is attached to it
_layer_of: WeakKeyDictionary[nn.Module, tuple[nn.Module, int]] = WeakKeyDictionary()  # module -> base model, block
_redirected: dict[int, tuple[int, str]] = {}  # id of a configuration -> how often, its own attention function


class Listener:
    """One capture: where each part of each layer goes, and what has come in the pass that is running."""

    def __init__(self, model: str, stores: dict[str, tuple[dict[int, Tensor], list[int]]]) -> None:
        self.model, self.stores = model, stores
        self.thread, self.running, self.with_gradient = threading.get_ident(), False, False
        self.missing: set[tuple[str, int]] = set()

    def begin(self, with_gradient: bool) -> None:
        self.running, self.with_gradient = True, with_gradient
        self.missing = {(part, layer) for part, (_, layers) in self.stores.items() for layer in layers}

    def hear(self, part: str, layer: int, tensor: Tensor) -> None:
        """Not while a checkpointed block is computed again for the backward pass."""
        store, layers = self.stores[part]
        if not self.running or layer not in layers:
            return
        if self.with_gradient and not torch.is_grad_enabled():
            raise RuntimeError(
                f"capture: {part} of layer {layer} of {self.model} run without gradient in a pass with gradient: "
                "reentrant checkpointing cuts it, expected gradient_checkpointing_enable({'use_reentrant': False})"
            )
        store[layer] = tensor
        self.missing.discard((part, layer))

    def end(self, completed: bool) -> None:
        self.running = False
        if completed and self.missing:
            part, layer = min(self.missing, key=lambda x: x[1])
            raise RuntimeError(
                f"capture: {part} of layer {layer} of {self.model} cannot be captured: its block does not call "
                "transformers' attention interface, or did not run"
            )


class _Attachment:
    """The hooks on one base model, and how many captures need them."""

    def __init__(self) -> None:
        self.count, self.listeners, self.stack = 0, list[Listener](), ExitStack()

    def here(self) -> list[Listener]:
        """The captures that this thread opened."""
        thread = threading.get_ident()
        return [x for x in self.listeners if x.thread == thread]


@contextmanager
def attached(base: nn.Module, blocks: list[nn.Module]) -> Iterator[None]:
    """Hooks and attention function stay until the last capture of the model is closed, in whatever order."""
    with _lock:
        attachment = _attachments.setdefault(base, _Attachment())
        if attachment.count == 0:
            _attach(attachment.stack, base, blocks)
        attachment.count += 1
    try:
        yield
    finally:
        with _lock:
            attachment.count -= 1
            if attachment.count == 0:
                del _attachments[base]
                attachment.stack.close()


@contextmanager
def listening(base: nn.Module, listener: Listener) -> Iterator[None]:
    listeners = _attachments[base].listeners
    listeners.append(listener)
    try:
        yield
    finally:
        listeners.remove(listener)


def _attach(stack: ExitStack, base: nn.Module, blocks: list[nn.Module]) -> None:
    enter, leave, show_input, show_output, _ = _outside_of_graphs()
    for layer, block in enumerate(blocks, 1):
        for module in block.modules():
            _layer_of[module] = base, layer
            stack.callback(_layer_of.pop, module, None)
        stack.callback(block.register_forward_hook(show_output).remove)
    first = blocks[0].register_forward_pre_hook(show_input, with_kwargs=True)
    stack.callback(first.remove)
    stack.callback(base.register_forward_pre_hook(enter).remove)
    stack.callback(base.register_forward_hook(leave, always_call=True).remove)
    configs = {
        id(x): x for x in (base.config, *(m.config for b in blocks for m in b.modules() if hasattr(m, "config")))
    }
    for config in configs.values():
        if hasattr(config, "_attn_implementation"):
            stack.enter_context(_redirecting(config))


@cache
def _outside_of_graphs() -> tuple[Callable[..., Any], ...]:
    """The functions that look listeners up, each a break in a compiled graph."""
    return tuple(torch.compiler.disable(f) for f in (_enter, _leave, _show_input, _show_output, _show_attention))  # type: ignore[no-untyped-call]


def _enter(base: nn.Module, inputs: Any) -> None:
    attachment = _attachments.get(base)
    for listener in attachment.here() if attachment else ():
        listener.begin(torch.is_grad_enabled() and any(p.requires_grad for p in base.parameters()))


def _leave(base: nn.Module, inputs: Any, output: Any) -> None:
    attachment = _attachments.get(base)
    for listener in attachment.here() if attachment else ():
        listener.end(completed=output is not None)


def _listeners(module: nn.Module) -> tuple[list[Listener], int]:
    base, layer = _layer_of.get(module, (None, 0))
    attachment = None if base is None else _attachments.get(base)
    return (attachment.here() if attachment else []), layer


def _show_input(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    for listener in _listeners(block)[0]:
        listener.hear("hidden_states", 0, inputs[0] if inputs else named["hidden_states"])


def _show_output(block: nn.Module, inputs: Any, output: Any) -> None:
    found, layer = _listeners(block)
    for listener in found:
        listener.hear("hidden_states", layer, output[0] if isinstance(output, tuple) else output)


def _show_attention(module: nn.Module, *query_key_value: Tensor) -> None:
    found, layer = _listeners(module)
    for listener in found:
        for part, tensor in zip(_ATTENDED, query_key_value, strict=True):
            listener.hear(part, layer, tensor)


@contextmanager
def _redirecting(config: Any) -> Iterator[None]:
    """A configuration, which several models may share, names the showing function until the last one lets it go."""
    with _lock:
        count, own = _redirected.get(id(config), (0, config._attn_implementation))
        if count == 0:
            config._attn_implementation = _register(own)
        _redirected[id(config)] = count + 1, own
    try:
        yield
    finally:
        with _lock:
            count, own = _redirected.pop(id(config))
            if count > 1:
                _redirected[id(config)] = count - 1, own
            else:
                config._attn_implementation = own


@cache
def _register(own: str) -> str:
    """The name under which transformers finds the showing function around its attention function `own`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    show = _outside_of_graphs()[-1]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        show(module, query, key, value)
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
