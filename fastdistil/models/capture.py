"""Take hidden states, queries, keys and values out of a transformers model while it runs, with SDPA staying on.

Queries, keys and values come from transformers' attention interface: for as long as a capture is open, the model's
configuration names an attention function that shows what it is handed and then calls the one that was configured
before. Hidden states come from forward hooks. No attention map is formed for either. Who listens is found while the
model runs (`models/listeners.py`), so that compiled code stays right when captures open and close.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from fastdistil.models import listeners
from fastdistil.models.attention import AttentionRecord, Call, Records


@dataclass
class Captured:
    """What the model's last complete forward pass held, by layer: hidden_states (B, S, D), the rest
    (B, heads, S, d), with gradient where the model ran with gradient. Keys and values have fewer heads under
    grouped-query attention.

    `attention[layer]`, beside queries, keys or values, is an `AttentionRecord` (models/attention.py): scale, causal,
    window, softcap, bias and mask of the attention call, from which the map is rebuilt. Where it cannot be (attention
    sinks, FlashAttention, FlexAttention) asking for it is a RuntimeError that says why. Asking reads the mask, which on
    a GPU waits for it."""

    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    model: str = field(default="", repr=False)
    calls: dict[int, Call] = field(default_factory=dict, repr=False)

    @property
    def attention(self) -> Mapping[int, AttentionRecord]:
        return Records(self.model, self.calls)


@contextmanager
def capture(
    model: nn.Module,
    *,
    hidden_states: Iterable[int] = (),
    queries: Iterable[int] = (),
    keys: Iterable[int] = (),
    values: Iterable[int] = (),
) -> Iterator[Captured]:
    """Inside the `with` block, every forward pass of `model` on this thread fills the `Captured` that it yields.

        with fastdistil.capture(model, hidden_states=[0, 6], queries=[6], keys=[6]) as captured:
            model(input_ids, attention_mask)
        captured.queries[6]  # (B, H, S, d)

    Opened inside of a function that torch.compile compiles, it is part of the graph (fullgraph=True too); the modules
    then keep an attribute `forward` that is their own.

    Args:
        model: any encoder or decoder of transformers whose attention calls its attention interface (BERT, XLM-R,
            DistilBERT, ModernBERT, T5, Whisper, OPT, Llama, Qwen, Gemma, ...), with or without a head, also compiled
            or inside of a wrapper (DistributedDataParallel, PEFT, sentence-transformers). Gradient checkpointing must
            be the non-reentrant one.
            torch.compile makes one graph of it (fullgraph=True too), compiled once for all captures of the same parts;
            with checkpointing inside, fullgraph=True needs Dynamo's leave not to repeat what a block leaves behind when
            it is computed again: torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True.
        hidden_states: layers; 0 is what the first block gets, l the output of block l, before any norm behind the last.
        queries, keys, values: blocks, from 1, as the attention function gets them: after the rotary embedding, before
            the scale of `attention[layer]`, which `attention_loss` needs as student_scale or teacher_scale where it is
            not 1 / sqrt(d).

    Returns:
        A context manager that yields a `Captured`: hidden_states, queries, keys, values and attention, by layer.

    Raises:
        TypeError, ValueError: a model that is none of these, or several; a layer that it does not have.
        RuntimeError, at the end of the `with` block: the model did not run inside of it on this thread.
        RuntimeError, from the model's forward pass: a layer that cannot be captured, by number; so are queries, keys
            and values of a block that attends twice, to its own tokens and to an encoder's.

    Example:
        >>> import torch, fastdistil
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        >>> model = BertModel(BertConfig(vocab_size=30, **sizes))
        >>> with fastdistil.capture(model, hidden_states=[0, 2], queries=[2], keys=[2]) as captured:
        ...     _ = model(torch.arange(5)[None])
        ...
        >>> captured.hidden_states[2].shape, captured.queries[2].shape, captured.attention[2].causal
        (torch.Size([1, 5, 8]), torch.Size([1, 2, 5, 4]), False)
    """
    base = base_model(model, "capture")
    blocks = block_list(base, "capture")
    wanted = {"hidden_states": hidden_states, "queries": queries, "keys": keys, "values": values}
    layers = {
        name: _layers(name, value, 0 if name == "hidden_states" else 1, len(blocks), base)
        for name, value in wanted.items()
    }
    captured = Captured(model=type(base).__name__)
    with listeners.attached(base, list(blocks), listeners.Listener(type(base).__name__, captured, layers)):
        yield captured


def base_model(model: nn.Module, function: str, argument: str = "model") -> nn.Module:
    """The transformers model without head, inside of whatever wraps it: torch.compile, data parallelism, PEFT,
    sentence-transformers, a module of one's own."""
    if not isinstance(model, nn.Module):
        way = " (AutoModel.from_pretrained(...) loads one by its name)" if isinstance(model, str) else ""
        raise TypeError(f"{function}: {argument} is {type(model).__name__}, expected a transformers model{way}")
    found = list({id(x): x for x in transformers_models(model)}.values())  # PEFT's wrapper holds one twice
    if not found:
        raise ValueError(
            f"{function}: {argument} is {type(model).__name__}, expected a transformers model, "
            "whose config names its attention"
        )
    if len(found) > 1:
        names = ", ".join(type(x).__name__ for x in found)
        raise ValueError(
            f"{function}: {argument} is {type(model).__name__}, which holds {len(found)} transformers models "
            f"({names}), expected one: pass the one that is meant"
        )
    return cast("nn.Module", getattr(found[0], "base_model", found[0]))


def transformers_models(model: nn.Module) -> list[nn.Module]:
    """The outermost ones. A wrapper passes `config` on, a model has one of its own; so have its attention modules."""
    if isinstance(model, _pretrained()) and hasattr(model.config, "_attn_implementation"):
        return [model]
    found: list[nn.Module] = []
    for child in model.children():
        found.extend(transformers_models(child))
    return found


def _pretrained() -> type:
    """transformers' class of models; whoever has one has imported it."""
    module = sys.modules.get("transformers.modeling_utils")
    return type(None) if module is None else cast("type", module.PreTrainedModel)


def depth_of(model: nn.Module, function: str, argument: str) -> int:
    """How many blocks a transformers model says to have."""
    config: Any = base_model(model, function, argument).config
    return int(config.num_hidden_layers)


def block_list(base: nn.Module, function: str, argument: str = "model") -> nn.ModuleList:
    """The one list of the model's blocks."""
    count = getattr(base.config, "num_hidden_layers", None)
    lists = [x for x in base.modules() if isinstance(x, nn.ModuleList) and len(x) == count]
    inside = {id(x) for outer in lists for x in outer.modules() if x is not outer}
    found = [x for x in lists if id(x) not in inside and len({type(block) for block in x}) == 1]
    if len(found) != 1:
        raise ValueError(
            f"{function}: {argument} is {type(base).__name__}, which has {len(found)} lists of {count} blocks, "
            "expected one; of an encoder-decoder or a composite model pass the part, such as model.encoder"
        )
    return found[0]


def _layers(name: str, value: Iterable[int], first: int, last: int, base: nn.Module) -> list[int]:
    if isinstance(value, (str, Tensor)) or not isinstance(value, Iterable):
        way = f" ([{value}] for one)" if isinstance(value, int) else ""
        raise TypeError(f"capture: {name} is {type(value).__name__}, expected a list of layers{way}")
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
