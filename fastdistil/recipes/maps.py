"""How two models form the attention maps that a recipe compares: asked of them, and whether attention_loss has it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastdistil as fd
from fastdistil.batches import kept_generators
from fastdistil.models.attention import AttentionRecord
from fastdistil.models.capture import base_model

_TOKENS = 4  # enough to tell a causal map from any other


@dataclass(frozen=True)
class _Layer:
    """One layer of one model."""

    where: str
    record: AttentionRecord | None
    error: str  # why there is no record


@dataclass(frozen=True)
class MapRule:
    """What attention_loss is told about two layers. `window`: of the narrower one (where, before, behind), if any."""

    causal: bool
    student_scale: float
    teacher_scale: float
    window: tuple[str, int, int] | None = None

    def check_length(self, length: int) -> None:
        """Raises ValueError where a window hides tokens of a batch of `length`."""
        if self.window is None:
            return
        where, before, behind = self.window
        if length - 1 > before or (not self.causal and length - 1 > behind):
            raise ValueError(
                f"terms.attention: {where} sees a window of {before} tokens before and {behind} behind its own, and "
                f"the batch is {length} tokens long: attention_loss has no windows, expected a layer without one (a "
                f"global layer), or at most {before + 1} tokens"
            )


def map_rules(
    student: nn.Module, teacher: nn.Module, layers: Mapping[str, tuple[int, int, bool]], batch: Mapping[str, Tensor]
) -> dict[str, MapRule]:
    """The rule of each name's student and teacher layer. True beside them where the models' own maps are compared, and
    not relations, of which only a causal order is asked. Errors as `common_rule`."""
    mask, ids = batch["attention_mask"], batch["input_ids"]
    own = _records(student, {x[0] for x in layers.values()}, ids, mask)
    others = _records(
        teacher.to(ids.device), {x[1] for x in layers.values()}, batch.get("teacher_input_ids", ids), mask
    )
    return {name: common_rule(own[i], others[j], exact) for name, (i, j, exact) in layers.items()}


def _records(model: nn.Module, layers: Collection[int], ids: Tensor, mask: Tensor) -> dict[int, _Layer]:
    """The attention records of `layers` of `model`, from a run over a few tokens of the batch ids (B, S), mask (B, S).
    No generator is moved on."""
    tokens = ids[mask.bool()][:_TOKENS]
    tokens = tokens.repeat(_TOKENS)[:_TOKENS][None] if len(tokens) else ids.new_ones(1, _TOKENS)
    chosen, base = sorted(layers), base_model(model, "Distillation")  # not what torch.compile would compile once more
    with torch.no_grad(), kept_generators(), fd.capture(base, queries=chosen) as captured:
        base(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    found = {}
    for layer in chosen:
        where = f"layer {layer} of {captured.model}"
        try:
            found[layer] = _Layer(where, captured.attention[layer], "")
        except RuntimeError as error:
            found[layer] = _Layer(where, None, str(error))
    return found


def common_rule(student: _Layer, teacher: _Layer, exact: bool) -> MapRule:
    """The rule of a term of two layers; `exact` as in `map_rules`.

    Raises ValueError for maps that attention_loss does not form.
    """
    for side in (student, teacher):
        if side.record is None:
            raise ValueError(f"terms: {side.error}")
        reasons = {
            "a softcap on its scores": exact and side.record.softcap is not None,
            "a bias on its scores (relative positions, ALiBi)": exact and side.record.bias is not None,
            "a mask that neither padding nor a causal order explains": side.record.mask is not None,
        }
        for reason, true in reasons.items():
            if true:
                raise ValueError(
                    f"terms.attention: {side.where} has {reason}, which attention_loss does not form, expected a layer "
                    "without"
                )
    assert student.record is not None and teacher.record is not None
    if student.record.causal is not teacher.record.causal:
        said = [f"{x.where} is {'' if x.record and x.record.causal else 'not '}causal" for x in (student, teacher)]
        raise ValueError(f"terms: {', '.join(said)}, expected both or neither")
    narrow = None
    if exact:
        windows = [(x.where, *x.record.window) for x in (student, teacher) if x.record and x.record.window is not None]
        narrow = min(windows, key=lambda x: x[1], default=None)
    return MapRule(student.record.causal, student.record.scale, teacher.record.scale, narrow)


def pairs_of(mask: Tensor, rule: MapRule | None, *, rows: bool) -> Tensor:
    """Items of a map, () : query rows, or the pairs of a query and a key that it sees, of the tokens of mask (B, S)."""
    tokens = mask.sum(1)
    if rows:
        return tokens.sum()
    assert rule is not None
    return (tokens * (tokens + 1) // 2 if rule.causal else tokens.square()).sum()
