"""One pass of a model over a batch, with the layers and logits that a recipe's terms ask for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import fastdistil as fd
from fastdistil.models.capture import Captured, transformers_models


@dataclass
class Outputs:
    """What one model shows of a batch."""

    captured: Captured = field(default_factory=Captured)
    logits: Tensor | None = None


def inputs_of(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch (B, S) the model's forward pass takes: batches of pairs have token_type_ids, but not every model
    knows them, as DistilBERT and a BiLSTM do not."""
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in batch:
        found = transformers_models(model)  # what wraps it takes anything
        forward = (found[0] if len(found) == 1 else model).forward
        names += ["token_type_ids"] * ("token_type_ids" in inspect.signature(forward).parameters)
    return {name: batch[name] for name in names}


def outputs_of(
    model: nn.Module, layers: Mapping[str, list[int]], inputs: Mapping[str, Tensor], logits: bool
) -> Outputs:
    """Run `model` on inputs (B, S): the `layers` of each part as `fd.capture` names parts; its logits where asked for.

    A model that is none of transformers' is called with output_hidden_states=True, and its output's hidden_states are
    the layers.
    """
    if not transformers_models(model):
        out: Any = model(**inputs, output_hidden_states=True)
        captured = Captured(hidden_states={i: out.hidden_states[i] for i in layers.get("hidden_states", ())})
        return Outputs(captured, getattr(out, "logits", None))
    body = model if logits else without_head(model)
    with fd.capture(body, **layers) if layers else nullcontext(Captured()) as captured:
        out = body(**inputs)
    return Outputs(captured, getattr(out, "logits", None) if logits else None)


def without_head(model: nn.Module) -> nn.Module:
    """The transformers model inside of one with a head: a language model's logits are often larger than all of its
    states together. What is wrapped (torch.compile, PEFT) runs as it is."""
    found = transformers_models(model)
    if len(found) != 1 or found[0] is not model:
        return model
    base: Any = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model
