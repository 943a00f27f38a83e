"""How an attention call made its map: what stands beside captured queries and keys, so that the map can be rebuilt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_KNOWN = ("sdpa", "eager")  # the attention functions whose arguments are understood
# Arguments that change a map and that no record holds.
_FOREIGN = {
    "s_aux": "attention sinks, a column of the softmax that is no key",
    "head_mask": "a mask of heads, which multiplies the map",
    "cu_seq_lens_q": "packed sequences",
}


class Call(NamedTuple):
    """The arguments of one attention call that decide on its map."""

    function: str
    mask: Any
    bias: Tensor | None
    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    queries: int
    keys: int
    foreign: str | None


def call_of(
    function: str, module: nn.Module, query: Tensor, key: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Call:
    """What the attention function `function` was handed, without a look at any value: torch.compile traces it."""
    scaling, is_causal = kwargs.get("scaling"), kwargs.get("is_causal")
    foreign = None
    for name, what in _FOREIGN.items():
        if kwargs.get(name) is not None:
            foreign = what
    if getattr(module, "sinks", None) is not None:
        foreign = _FOREIGN["s_aux"]
    return Call(
        function=function,
        mask=args[0] if args else kwargs.get("attention_mask"),
        bias=kwargs.get("position_bias"),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        queries=query.shape[-2],
        keys=key.shape[-2],
        foreign=foreign,
    )


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """What makes a block's map of its captured queries and keys:

        scores = scale * q kᵀ;  scores = softcap * tanh(scores / softcap), if any;  map = softmax(scores + bias)

    over the keys that `mask`, `causal` and `window` all leave visible.

    scale: as the call had it. 1 where a model scales its queries before (Whisper, OPT) or not at all (T5).
    causal: a query sees no key behind it.
    window: of a local layer, how many tokens before and behind its own a query sees, else None.
    softcap: of the scores (Gemma 2 under eager attention: transformers' SDPA leaves it out), else None.
    bias: (1 or B, 1 or H, S_q or 1, S_k) what is added to the scores (T5's relative positions), with its gradient, else
        None.
    mask: bool, True = visible; (1 or B, 1 or H, 1, S_k) for padded keys, (1 or B, 1 or H, S_q, S_k) where causal and
        window do not explain what the call was handed (packed or prefix masks, a cache), else None.
    """

    scale: float
    causal: bool
    window: tuple[int, int] | None
    softcap: float | None
    bias: Tensor | None
    mask: Tensor | None

    def map(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The whole map (B, H, S_q, S_k) of queries (B, H, S_q, d) and keys (B, H or fewer, S_k, d), in memory: for
        looking at it, and for tests. A query that sees no key has a row of zeros."""
        shared = queries.shape[1] // keys.shape[1]
        scores = self.scale * queries @ keys.repeat_interleave(shared, 1).mT
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.bias is not None:
            scores = scores + self.bias
        visible = _band(scores.shape[-2], scores.shape[-1], self.causal, self.window, scores.device)
        if self.mask is not None:
            visible = visible & self.mask
        return scores.masked_fill(~visible, -torch.inf).softmax(-1).masked_fill(~visible, 0.0)


class Records(Mapping[int, AttentionRecord]):
    """Records by layer, made when one is asked for; RuntimeError for a map that cannot be rebuilt."""

    def __init__(self, model: str, calls: Mapping[int, Call]) -> None:
        self._model, self._calls = model, calls

    def __getitem__(self, layer: int) -> AttentionRecord:
        if layer not in self._calls:
            raise KeyError(
                f"capture: attention has no layer {layer}, expected one of {sorted(self._calls)}, whose queries, keys "
                "or values were captured"
            )
        return _record(self._calls[layer], f"capture: the attention map of layer {layer} of {self._model}")

    def __contains__(self, layer: object) -> bool:
        return layer in self._calls

    def __iter__(self) -> Iterator[int]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)


def _record(call: Call, where: str) -> AttentionRecord:
    if call.foreign is not None:
        raise RuntimeError(f"{where} cannot be rebuilt: its call has {call.foreign}")
    if call.function not in _KNOWN:
        raise RuntimeError(f"{where} cannot be rebuilt: its attention is {call.function!r}, expected 'sdpa' or 'eager'")
    if call.mask is not None and not (isinstance(call.mask, Tensor) and call.mask.ndim == 4):
        came = f"of shape {tuple(call.mask.shape)}" if isinstance(call.mask, Tensor) else type(call.mask).__name__
        raise RuntimeError(f"{where} cannot be rebuilt: its mask is {came}, expected a tensor (B, H, S, S)")
    visible, bias = _split(call.mask)
    if call.bias is not None:
        bias = call.bias if bias is None else call.bias + bias
    softcap = call.softcap if call.function == "eager" else None  # SDPA has none, transformers' drops it
    if visible is None:
        # Without a mask SDPA goes by the flag (but for one query, which sees everything), eager attention by nothing.
        causal = bool(call.causal) and call.function == "sdpa" and call.queries > 1
        covers = call.window is not None and max(call.queries, call.keys) <= call.window
        return AttentionRecord(
            call.scale, causal, _around(call.window, causal) if covers else None, softcap, bias, None
        )
    causal, window, visible = _explained(visible, call)
    return AttentionRecord(call.scale, causal, window, softcap, bias, visible)


def _split(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What a mask shows, and what it adds to the scores that it shows."""
    if mask is None or mask.dtype == torch.bool:
        return mask, None
    visible = mask > torch.finfo(mask.dtype).min / 2
    added = mask.masked_fill(~visible, 0.0)
    if not torch.compiler.is_compiling() and not bool(added.any()):
        return visible, None
    return visible, added


def _explained(visible: Tensor, call: Call) -> tuple[bool, tuple[int, int] | None, Tensor | None]:
    """causal, window and what they leave of `visible`: padded keys, where the rest is the same for all queries. Rows of
    padded tokens are not looked at."""
    queries, keys = call.queries, call.keys
    if torch.compiler.is_compiling() or (visible.shape[-2] > 1 and queries != keys):  # no values; a cache's positions
        return False, None, visible
    real = visible.any(-2, keepdim=True)
    for causal in dict.fromkeys((bool(call.causal), False)):
        for window in dict.fromkeys((_around(call.window, causal), None)):
            expected = real & _band(queries, keys, causal, window, visible.device)
            rows = real.mT if queries == keys else torch.ones_like(real[..., :1])
            if not bool(((visible != expected) & rows).any()):
                return causal, window, None if bool(real.all()) else real
    return False, None, visible


def _around(window: int | None, causal: bool) -> tuple[int, int] | None:
    """transformers counts a window with the token itself, on the one side or on either."""
    return None if window is None else (window - 1, 0 if causal else window - 1)


def _band(queries: int, keys: int, causal: bool, window: tuple[int, int] | None, device: torch.device) -> Tensor:
    """(S_q, S_k) bool: the keys that causal and window leave."""
    ahead = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
    visible = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window is not None:
        visible = visible & (ahead >= -window[0]) & (ahead <= window[1])
    return visible
