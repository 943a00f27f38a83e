"""Who listens to a model's forward pass, found while it runs, in eager and in compiled code alike.

A model that is listened to has hooks on its base model and on all of its blocks, its configuration names an attention
function that shows queries, keys and values, and its base model and the modules of its blocks carry a `_Here`: what
listens there on the thread that asks. torch.compile traces all of it: what a layer shows becomes an output of the
graph, with its gradient, and the compiled code puts it into the ear that it finds in that attribute when it runs. The
code holds no capture, no thread and no layer's number, only which parts are wanted where: it serves every capture of
the same parts, and is compiled anew for others.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastdistil.models.attention import Call, call_of

_PREFIX = "fastdistil_capture_"  # before the name of the attention function that is called in the end
_HERE = "_fastdistil_listening"  # the attribute: captures on the base model, their ears on the modules of its blocks
_INPUT = "input"  # the part of a block that is the hidden states of layer 0

_lock = threading.RLock()
_attachments: WeakKeyDictionary[nn.Module, _Attachment] = WeakKeyDictionary()  # base model -> what is attached to it
_redirected: dict[int, tuple[int, str]] = {}  # id of a configuration -> how often, its own attention function


class _Here(threading.local):
    """What listens on the thread that asks; a copied model has nobody."""

    def __init__(self) -> None:
        self.listening = list[Any]()

    def __reduce__(self) -> tuple[Callable[[], _Here], tuple[()]]:
        return _Here, ()


class _Traced:
    """What listens while a graph is traced that opens a capture itself."""

    def __init__(self, listening: list[Any]) -> None:
        self.listening = listening


class Ear:
    """What one capture wants of one block, and what it has heard in the pass that is running, by part."""

    def __init__(self, listener: Listener, wanted: tuple[str, ...]) -> None:
        self.listener, self.wanted = listener, wanted
        self.input: Tensor | None = None
        self.hidden_states: Tensor | None = None
        self.queries: Tensor | None = None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.call: Call | None = None


class Listener:
    """One capture: the layers that it wants of each part, and an ear for each block that has one of them."""

    def __init__(self, model: str, captured: Any, layers: dict[str, list[int]]) -> None:
        self.model, self.captured, self.running, self.with_gradient = model, captured, False, False
        self.complete = False  # whether a pass has been heard to its end
        wanted: dict[int, list[str]] = {}
        self.sources: list[tuple[str, int, str, int]] = []  # part and layer, where to find it: part, block
        for part, numbers in layers.items():
            for layer in dict.fromkeys(numbers):
                heard, block = (part, layer) if layer else (_INPUT, 1)
                self.sources.append((part, layer, heard, block))
                wanted.setdefault(block, []).append(heard)
        self.ears = {block: Ear(self, tuple(parts)) for block, parts in wanted.items()}

    def begin(self, with_gradient: bool) -> None:
        self.running, self.with_gradient = True, with_gradient
        for ear in self.ears.values():
            ear.call = None
            for part in ear.wanted:
                setattr(ear, part, None)

    def _name(self, ear: Ear, heard: str) -> str:
        part, layer = next((x[0], x[1]) for x in self.sources if x[2] == heard and self.ears[x[3]] is ear)
        return f"capture: {part} of layer {layer} of {self.model}"

    def cut(self, ear: Ear, heard: str) -> str:
        return (
            f"{self._name(ear, heard)} run without gradient in a pass with gradient: "
            "reentrant checkpointing cuts it, expected gradient_checkpointing_enable({'use_reentrant': False})"
        )

    def again(self, ear: Ear, heard: str) -> str:
        return (
            f"{self._name(ear, heard)} cannot be captured: its block shows them twice in one pass, as a decoder's does "
            "whose tokens attend to themselves and to an encoder's"
        )

    def end(self) -> None:
        """A pass that an exception ends does not come here: what it has heard, the next one forgets."""
        self.running = False
        found: dict[str, dict[int, Tensor]] = {part: {} for part, *_ in self.sources}
        for part, layer, heard, block in self.sources:
            tensor = getattr(self.ears[block], heard)
            if tensor is None:
                raise RuntimeError(
                    f"capture: {part} of layer {layer} of {self.model} cannot be captured: its block does not call "
                    "transformers' attention interface, or did not run"
                )
            found[part][layer] = tensor
        for part, tensors in found.items():
            setattr(self.captured, part, tensors)
        calls = {block: self.ears[block].call for block in self.ears}
        self.captured.calls = {block: call for block, call in calls.items() if call is not None}
        self.complete = True

    def close(self) -> None:
        """Behind a `with` block that no exception ends."""
        if self.sources and not self.complete:
            raise RuntimeError(
                f"capture: no forward pass of {self.model} ran to its end inside of the with block on this thread, "
                "expected at least one: is it another copy of the model that runs?"
            )


class _Attachment:
    """What is attached to one base model, and how many captures need it."""

    def __init__(self) -> None:
        self.count, self.stack = 0, ExitStack()
        self.here, self.blocks = _Here(), list[_Here]()


@contextmanager
def attached(base: nn.Module, blocks: list[nn.Module], listener: Listener) -> Iterator[None]:
    """`listener` hears what `base` does on this thread. The hooks, the attributes and the attention function stay until
    the last capture of the model is closed, in whatever order."""
    if torch.compiler.is_compiling():
        with _traced(base, blocks, listener):
            yield
        return
    with _lock:
        attachment = _attachments.setdefault(base, _Attachment())
        if attachment.count == 0:
            _attach(attachment, base, blocks)
        attachment.count += 1
    here: list[tuple[list[Any], Any]] = [(attachment.here.listening, listener)]
    here += [(attachment.blocks[block - 1].listening, ear) for block, ear in listener.ears.items()]
    for listening, who in here:
        listening.append(who)
    try:
        yield
        listener.close()
    finally:
        for listening, who in here:  # this thread's lists, whichever thread closes
            listening.remove(who)
        with _lock:
            attachment.count -= 1
            if attachment.count == 0:
                del _attachments[base]
                attachment.stack.close()


def _attach(attachment: _Attachment, base: nn.Module, blocks: list[nn.Module]) -> None:
    """All blocks alike, since compiled code that serves them all does not ask which hooks a module has."""
    stack = attachment.stack
    _carry(stack, base, attachment.here)
    stack.enter_context(_announcing(base))
    for block in blocks:
        attachment.blocks.append(_Here())
        for module in block.modules():
            _carry(stack, module, attachment.blocks[-1])
        stack.callback(block.register_forward_pre_hook(_show_input, with_kwargs=True).remove)
        stack.callback(block.register_forward_hook(_show_output).remove)
    configs = {
        id(x): x for x in (base.config, *(m.config for b in blocks for m in b.modules() if hasattr(m, "config")))
    }
    for config in configs.values():
        if hasattr(config, "_attn_implementation"):
            stack.enter_context(_redirecting(config))


def _carry(stack: ExitStack, module: nn.Module, here: _Here) -> None:
    setattr(module, _HERE, here)
    stack.callback(vars(module).pop, _HERE, None)


def _listening(module: nn.Module) -> list[Any]:
    """The captures of this thread at a base model, their ears in a block."""
    here: _Here | _Traced | None = getattr(module, _HERE, None)
    return [] if here is None else here.listening


@contextmanager
def _announcing(base: nn.Module) -> Iterator[None]:
    """`base` tells of each forward pass, also where a wrapper calls its `forward` and passes its hooks by."""
    before = vars(base).get("forward")  # of accelerate, say
    announced = MethodType(_announced_method(type(base).forward), base) if before is None else _announced(before, base)
    base.forward = announced
    try:
        yield
    finally:
        if vars(base).get("forward") is announced:
            if before is None:
                del base.forward
            else:
                base.forward = before


@cache  # compiled code asks which function it is
def _announced_method(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def announced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _enter(self)
        output = forward(self, *args, **kwargs)
        _leave(self)
        return output

    return announced


def _announced(forward: Callable[..., Any], base: nn.Module) -> Callable[..., Any]:
    def announced(*args: Any, **kwargs: Any) -> Any:
        _enter(base)
        output = forward(*args, **kwargs)
        _leave(base)
        return output

    return announced


def _shown(forward: Callable[..., Any], block: nn.Module) -> Callable[..., Any]:
    def shown(*args: Any, **kwargs: Any) -> Any:
        _show_input(block, args, kwargs)
        output = forward(*args, **kwargs)
        _show_output(block, args, output)
        return output

    return shown


@contextmanager
def _traced(base: nn.Module, blocks: list[nn.Module], listener: Listener) -> Iterator[None]:
    """What `attached` does, where torch.compile traces the opening itself: no lock and no thread, because what the
    graph changes it changes back before anybody else runs. Dynamo cannot take an attribute away again: the modules keep
    their own `forward`, and nobody who listens."""
    config: Any = base.config
    here, own = _Traced([listener]), config._attn_implementation
    forwards: list[tuple[nn.Module, Callable[..., Any]]] = [(base, base.forward)]
    setattr(base, _HERE, here)
    base.forward = _announced(base.forward, base)
    for number, block in enumerate(blocks):
        ears = _Traced([listener.ears[number + 1]] if number + 1 in listener.ears else [])
        for module in _calling(block):
            setattr(module, _HERE, ears)
        forwards.append((block, block.forward))
        block.forward = _shown(block.forward, block)
    config._attn_implementation = _register_now(own)
    try:
        yield
        listener.close()
    finally:
        config._attn_implementation = own
        for module, forward in forwards:
            module.forward = forward
        setattr(base, _HERE, None)
        for block in blocks:
            for module in _calling(block):
                setattr(module, _HERE, None)


def _calling(block: nn.Module) -> list[nn.Module]:
    """The block, and the modules inside that may call the attention function, whose name is in their configuration."""
    return [block, *(x for x in block.modules() if x is not block and hasattr(x, "config"))]


def _enter(base: nn.Module) -> None:
    for listener in _listening(base):
        listener.begin(torch.is_grad_enabled() and any(p.requires_grad for p in base.parameters()))


def _leave(base: nn.Module) -> None:
    for listener in _listening(base):
        listener.end()


def _show_input(block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    _show(block, _INPUT, inputs[0] if inputs else named["hidden_states"])


def _show_output(block: nn.Module, inputs: Any, output: Any) -> None:
    _show(block, "hidden_states", output[0] if isinstance(output, tuple) else output)


def _show(module: nn.Module, part: str, tensor: Tensor) -> None:
    """Not while a checkpointed block is computed again for the backward pass."""
    for ear in _listening(module):
        if part not in ear.wanted or not ear.listener.running:
            continue
        if ear.listener.with_gradient and not torch.is_grad_enabled():
            raise RuntimeError(ear.listener.cut(ear, part))
        if getattr(ear, part) is not None:
            raise RuntimeError(ear.listener.again(ear, part))
        setattr(ear, part, tensor)


@contextmanager
def _redirecting(config: Any) -> Iterator[None]:
    """A configuration, which several models may share, names the showing function until the last one lets it go."""
    with _lock:
        # A configuration that was copied inside of a capture has the showing function's name still.
        count, own = _redirected.get(id(config), (0, config._attn_implementation.removeprefix(_PREFIX)))
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

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        for part, tensor in (("queries", query), ("keys", key), ("values", value)):
            _show(module, part, tensor)
        for ear in _listening(module):
            if ear.listener.running and any(part in ear.wanted for part in ("queries", "keys", "values")):
                ear.call = call_of(own, module, query, key, args, kwargs)
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


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _register_now(own: str) -> str:
    """`_register`, done by Dynamo itself while it traces."""
    return _register(own.removeprefix(_PREFIX))
