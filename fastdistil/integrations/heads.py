"""Language models without their logits: the last linear layer's input and weights, for losses that form logits chunk by
chunk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdistil.batches import kept_generators
from fastdistil.models.capture import transformers_models

_TOKENS = 4  # enough to see what a model does to its logits behind the head


@dataclass(frozen=True)
class Head:
    """A language model's last linear layer. The logits are softcap(scale * linear(states))."""

    linear: nn.Linear
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class HeadInput:
    """What a head got in one forward pass: states (B, S, D)."""

    head: Head
    states: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """States (B, S, D), weight (V, D) and bias (V,), in autocast's dtype where autocast is on, as it would have
        multiplied them."""
        linear = self.head.linear
        return _as_autocast(self.states), _as_autocast(linear.weight), _as_autocast(linear.bias)


def _as_autocast(x: Any) -> Any:
    if x is None or x.dtype != torch.float32 or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def head_of(model: nn.Module) -> Head | str:
    """The head of the one transformers model in `model`, or why its logits cannot be formed outside of it."""
    inner: Any = transformers_models(model)[0]
    name = type(inner).__name__
    linear = inner.get_output_embeddings()
    if linear is None:
        return f"{name} has no output embeddings"
    if type(linear) is not nn.Linear:
        return f"the head of {name} is {type(linear).__name__}, not torch.nn.Linear"
    config = inner.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    head = Head(linear, scale, getattr(config, "final_logit_softcapping", None))
    if not _explains(inner, head):
        return f"{name} does more to its logits than its configuration says"
    return head


def _explains(model: nn.Module, head: Head) -> bool:
    """Whether the model's own logits of a few tokens are those of `head`. No generator is moved on."""
    ids = torch.ones((1, _TOKENS), dtype=torch.long, device=head.linear.weight.device)
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), kept_generators(), recorded(head, keep_logits=True) as seen:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    finally:
        for module, mode in training:
            module.training = mode
    if len(seen) != 1:
        return False
    own = head.linear(seen[0]).detach().double() * head.scale
    own = own if head.softcap is None else torch.tanh(own / head.softcap) * head.softcap
    allowed = 16 * torch.finfo(head.linear.weight.dtype).eps * max(1.0, float(own.abs().max()))
    return logits.shape == own.shape and math.isfinite(allowed) and bool((logits - own).abs().max() <= allowed)


@contextmanager
def recorded(head: Head, *, keep_logits: bool) -> Iterator[list[Tensor]]:
    """Inside, the list that it yields gets what the head is handed, (B, S, D); unless `keep_logits`, the model then has
    logits of no columns, (B, S, 0)."""
    seen: list[Tensor] = []
    linear: Any = head.linear
    before, forward = vars(linear).get("forward"), linear.forward

    def recording(states: Tensor) -> Tensor:
        seen.append(states)
        logits: Tensor = forward(states) if keep_logits else states[..., :0]
        return logits

    linear.forward = recording
    try:
        yield seen
    finally:
        if before is None:
            del linear.forward
        else:
            linear.forward = before
