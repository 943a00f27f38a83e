"""Losses between attention maps, from the queries and keys alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistil.contracts.attention import KINDS
from fastdistil.losses import _check
from fastdistil.ops.attention import accumulator, attention_rows, attention_total

HEADS = ("each", "mean")
_NAME = "attention_loss"


def attention_loss(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    *,
    kind: str = "prob_mse",
    mask: Tensor | None = None,
    causal: bool = False,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    mask_queries: bool = True,
    cu_seqlens: Tensor | None = None,
    heads: str = "each",
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The distance between two attention maps `A = scale * Q K^T`, `P = softmax(A)`, which never exist in memory.

    That is the whole map: softcaps on the scores (Gemma 2) and sliding windows (ModernBERT's local layers, Gemma) are
    no part of it, so such a layer's map is not the one that its model used.

    Args:
        student_q: (B, H, S, d_s) float32, bfloat16, float16 or float64, as all others, in any combination, any
            strides; after rotary embedding.
        teacher_q: (B, H, S, d_t), a constant. d_s and d_t may differ, B and S may not.
        student_k, teacher_k: as their queries, or with fewer heads that divide the queries' (grouped-query attention:
            a key head serves as many query heads in a row).
        kind: "prob_mse" (P_s - P_t)^2 (BiStil, arXiv 2306.01709); "score_mse" (A_s - A_t)^2 (TinyBERT, arXiv
            1909.10351); "prob_kl" KL(P_t || P_s) (MiniLM, arXiv 2002.10957).
        mask: (B, S) bool, True = non-padding token; the rest is no key, whatever it holds.
        causal: a query sees no key behind it.
        student_scale, teacher_scale: 1 / sqrt(d) by default. Models that scale otherwise need theirs, such as Gemma 2
            and 3 (config.query_pre_attn_scalar ** -0.5) or Granite (config.attention_multiplier): the attention
            module's `scaling` in transformers.
        mask_queries: False keeps the padded tokens as query rows, as BiStil does (they must then be finite).
        cu_seqlens: (n + 1,) int32 or int64, for n sequences packed without padding: all tensors are (total, H, d), and
            sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1], as in FlashAttention. No mask then.
        heads: "each" compares head by head (as many on both sides); "mean" compares the means over the heads of P (of A
            for score_mse), so that the head counts may differ.
        reduction: "mean" over visible (query, key) pairs and heads for prob_mse and score_mse, over query rows and
            heads for prob_kl (a mean over heads counts as one); "sum"; "none" one value per query row, summed over its
            keys, 0 where it is masked.
        num_items: replaces the number of pairs, or of query rows, in "mean"; the heads are averaged as before. A number
            or a tensor with one entry (gradient accumulation, data parallel): for prob_kl the non-padding tokens of
            all batches together, for the others the sum of their squared lengths. 0 as in `logit_loss`.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        A scalar, or for "none" (B, H, S), packed (H, total), with H = 1 for heads="mean": float32 (float64 where an
        input is). Without any non-padding token it is 0.

    Raises:
        TypeError, ValueError: what came and what was wanted, by argument; a teacher that requires grad.
        NotImplementedError: in forward-mode differentiation (torch.func.jvp).

    Example:
        >>> import torch, fastdistil
        >>> draw = torch.Generator().manual_seed(0)
        >>> student_q, student_k = torch.randn(2, 1, 12, 5, 16, generator=draw).requires_grad_()
        >>> teacher_q, teacher_k = torch.randn(2, 1, 12, 5, 64, generator=draw)
        >>> mask = torch.tensor([[True, True, True, True, False]])
        >>> loss = fastdistil.attention_loss(student_q, student_k, teacher_q, teacher_k, kind="prob_kl", mask=mask)
        >>> student_map = (student_q @ student_k.mT / 4)[..., :4, :4].log_softmax(-1)  # which it never forms
        >>> teacher_map = (teacher_q @ teacher_k.mT / 8)[..., :4, :4].log_softmax(-1)
        >>> kl = (teacher_map.exp() * (teacher_map - student_map)).sum(-1).mean()
        >>> print(torch.allclose(loss, kl, rtol=1e-4), loss.requires_grad)
        True True
    """
    _check.no_tangents(_NAME, student_q=student_q, student_k=student_k, teacher_q=teacher_q, teacher_k=teacher_k)
    _check.one_of(_NAME, "heads", heads, HEADS)
    packed = cu_seqlens is not None
    q_s, k_s, q_t, k_t = _check_tensors(student_q, student_k, teacher_q, teacher_k, packed, heads)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q_s)
        if mask is not None:
            raise ValueError(f"{_NAME}: mask came with cu_seqlens, expected one of them: packed tokens are all real")
    loss = of_maps(
        _NAME, (q_s, q_t), (k_s, k_t), kind, mask, causal, student_scale, teacher_scale, mask_queries, cu_seqlens,
        heads, reduction, num_items, backend,
    )  # fmt: skip
    return loss[0] if packed and reduction == "none" else loss


def of_maps(
    function: str,
    queries: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor] | None,
    kind: str,
    mask: Tensor | None,
    causal: bool,
    student_scale: float | None,
    teacher_scale: float | None,
    mask_queries: bool,
    cu_seqlens: Tensor | None,
    heads: str,
    reduction: str,
    num_items: object,
    backend: str,
) -> Tensor:
    """The loss for tensors, of student and teacher, whose shapes and dtypes agree: the rest of the checks, and the op.
    Without keys the queries are the keys too (a relation), for heads "each"."""
    _check.one_of(function, "kind", kind, KINDS)
    _check.one_of(function, "reduction", reduction, _check.REDUCTIONS)
    for name, flag in (("causal", causal), ("mask_queries", mask_queries)):
        if not isinstance(flag, bool):
            raise TypeError(f"{function}: {name} is {type(flag).__name__}, expected a bool")
    if mask is not None:
        _check_mask(function, mask, queries[0])
    named = (("student_scale", student_scale, queries[0]), ("teacher_scale", teacher_scale, queries[1]))
    scales = [x.shape[-1] ** -0.5 if y is None else _check.number(function, name, y) for name, y, x in named]
    items = _check.given_items(function, reduction, num_items, queries[0].device, accumulator(queries[0].dtype))
    if heads == "mean" and kind == "score_mse":  # the mean of the scores is one head's, as wide as all of them together
        assert keys is not None
        counts = queries[0].shape[1], queries[1].shape[1]
        if keys[0].shape[1] < counts[0]:  # their gradient is a sum over heads, rounded once
            wide = accumulator(keys[0].dtype)
            queries, keys = ((xs[0].to(wide), xs[1].to(wide)) for xs in (queries, keys))
        queries, keys = ((_one_head(xs[0], counts[0]), _one_head(xs[1], counts[1])) for xs in (queries, keys))
        scales, heads = [scales[0] / counts[0], scales[1] / counts[1]], "each"

    counted = 1 if heads == "mean" else queries[0].shape[1]
    if mask is not None:
        mask = _check.usable(mask)
    if cu_seqlens is not None:
        cu_seqlens = _check.usable(cu_seqlens)
    row_scale = _row_scale(queries[0], counted, mask, cu_seqlens, kind, causal, mask_queries, reduction, items)
    student_k, teacher_k = keys or (None, None)
    tensors = (queries[0], student_k, queries[1], teacher_k)
    arguments = (*tensors, mask, cu_seqlens, row_scale, kind, causal, scales[0], scales[1], heads, backend)
    if reduction == "none":
        rows: Tensor = attention_rows(*arguments)
        return rows
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors[:2]]
    if any(wanted):
        total: Tensor = attention_total(*arguments, wanted, False)[0]
        return total
    value: Tensor = attention_rows(*arguments).sum()
    return value


def _check_tensors(
    student_q: Tensor, student_k: Tensor, teacher_q: Tensor, teacher_k: Tensor, packed: bool, heads: str
) -> list[Tensor]:
    """The four tensors as (B, H, S, d), in one dtype."""
    named = {"student_q": student_q, "student_k": student_k, "teacher_q": teacher_q, "teacher_k": teacher_k}
    axes = "(total, H, d) with cu_seqlens" if packed else "(B, H, S, d)"
    for name, x in named.items():
        named[name] = _check.float_tensor(_NAME, name, x)
        if x.ndim != (3 if packed else 4) or 0 in (x.shape[-1], x.shape[1]):
            raise ValueError(f"{_NAME}: {name} has shape {tuple(x.shape)}, expected {axes}, with H > 0 and d > 0")
        _check.same_device(_NAME, name, x, "student_q", student_q.device)
    for name in ("student", "teacher"):
        _check_keys(name, named[f"{name}_q"], named[f"{name}_k"])
    _check.constant(_NAME, "teacher_q", teacher_q)
    _check.constant(_NAME, "teacher_k", teacher_k)
    wanted = [*student_q.shape[:-1], "d"]
    if heads == "mean":
        wanted[1] = "H"
    if any(want != found for want, found in zip(wanted[:-1], teacher_q.shape, strict=False) if want != "H"):
        raise ValueError(
            f"{_NAME}: teacher_q has shape {tuple(teacher_q.shape)}, expected ({', '.join(map(str, wanted))}) "
            "to match student_q" + (" (or another H with heads='mean')" if heads == "each" else "")
        )
    tensors = [x.transpose(0, 1)[None] if packed else x for x in named.values()]
    return _check.one_dtype(*tensors)


def _check_keys(name: str, queries: Tensor, keys: Tensor) -> None:
    """As the queries, but for a number of heads that divides theirs."""
    same = [*queries.shape]
    if keys.shape[1] <= same[1] and same[1] % keys.shape[1] == 0:
        same[1] = keys.shape[1]
    if [*keys.shape] != same:
        raise ValueError(
            f"{_NAME}: {name}_k has shape {tuple(keys.shape)}, expected {tuple(queries.shape)} to match {name}_q "
            "(or fewer heads, a divisor of them)"
        )


def _check_mask(function: str, mask: Tensor, student_q: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise _check.no_tensor(function, "mask", mask)
    _check.no_dtensor(function, "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{function}: mask has dtype {mask.dtype}, expected bool, True = real token (mask.bool())")
    wanted = (student_q.shape[0], student_q.shape[2])
    if tuple(mask.shape) != wanted:
        raise ValueError(f"{function}: mask has shape {tuple(mask.shape)}, expected {wanted}, (B, S) of the student")
    _check.same_device(function, "mask", mask, "the student", student_q.device)


def _check_cu_seqlens(cu_seqlens: Tensor, student_q: Tensor) -> None:
    """Its values are looked at on a CPU alone: a GPU would have to be waited for."""
    if not isinstance(cu_seqlens, Tensor):
        raise _check.no_tensor(_NAME, "cu_seqlens", cu_seqlens)
    _check.no_dtensor(_NAME, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        way = _check.way_to_integers("cu_seqlens", cu_seqlens)
        raise TypeError(f"{_NAME}: cu_seqlens has dtype {cu_seqlens.dtype}, expected int32 or int64{way}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{_NAME}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (n + 1,)")
    _check.same_device(_NAME, "cu_seqlens", cu_seqlens, "student_q", student_q.device)
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    total, ends = student_q.shape[2], cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != total or ends != sorted(ends):
        raise ValueError(f"{_NAME}: cu_seqlens is {ends}, expected numbers that rise from 0 to {total}, the total")


def _one_head(x: Tensor, heads: int) -> Tensor:
    """(B, H, S, d) -> (B, 1, S, heads * d), each head of x repeated where there are fewer than `heads`."""
    return x.repeat_interleave(heads // x.shape[1], 1).transpose(1, 2).flatten(2)[:, None]


def _row_scale(
    student_q: Tensor,
    heads: int,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str,
    causal: bool,
    mask_queries: bool,
    reduction: str,
    items: Tensor | float | None,
) -> Tensor:
    """The factor of each query row (B, heads, S): 1, or 1 / number of terms for "mean", where `items` replaces that of
    one head; 0 for what does not count."""
    batch, _, length, _ = student_q.shape
    dtype = accumulator(student_q.dtype)
    real = torch.ones(batch, length, dtype=torch.bool, device=student_q.device) if mask is None else mask
    keep = (real if mask_queries else torch.ones_like(real)).to(dtype)
    if items is not None:
        if mask is not None and not mask_queries and kind != "prob_kl":  # a query without keys is in no pair
            keep = torch.where(real.any(1, keepdim=True), keep, 0.0)
        keep = _check.per_item(keep, heads * items, zeros=mask is not None)
    elif reduction == "mean":
        if kind == "prob_kl":
            terms = keep
        elif cu_seqlens is not None:
            position = torch.arange(length, device=student_q.device)
            end = torch.searchsorted(cu_seqlens, position, right=True)
            terms = (position + 1 if causal else cu_seqlens[end]) - cu_seqlens[end - 1]
        else:  # the keys that each kept row sees
            keys = real.to(torch.int64)
            seen = keys.cumsum(1) if causal else keys.sum(1, keepdim=True)
            terms = keep * seen
        keep = keep / (heads * terms.sum(dtype=torch.float64)).clamp(min=1).to(dtype)
    return keep[:, None].expand(batch, heads, length).contiguous()
