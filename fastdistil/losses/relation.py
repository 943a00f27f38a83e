"""MiniLM's relations: how the tokens of one layer attend to each other by their queries, keys or values alone."""

from __future__ import annotations

from torch import Tensor

from fastdistil.losses import _check
from fastdistil.losses.attention import of_maps

_NAME = "relation_loss"


def relation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    relation_heads: int,
    kind: str = "prob_kl",
    mask: Tensor | None = None,
    causal: bool = False,
    student_scale: float | None = None,
    teacher_scale: float | None = None,
    mask_queries: bool = True,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The distance between two relations `A = scale * x x^T` of a layer's tokens, a relation head at a time.

    MiniLMv2 (arXiv 2012.15828) adds up three of them, of the queries, of the keys and of the values; MiniLM (arXiv
    2002.10957) takes the values' beside the attention maps. The relation heads have nothing to do with the model's
    attention heads: x is split anew, so that student and teacher may differ in width and in number of heads.

    Args:
        student: x (B, S, D_s), float32, bfloat16, float16 or float64, any strides; or (B, H, S, d) as `capture` gives
            queries, keys and values, whose heads are then put side by side again.
        teacher: likewise with D_t, in any of these dtypes, a constant. D_s and D_t may differ, B and S may not.
        relation_heads: divides D_s and D_t.
        kind: "prob_kl" KL(P_t || P_s), P the softmax of A over the keys; "prob_mse"; "score_mse".
        mask: (B, S) bool, True = non-padding token.
        causal, mask_queries, reduction, num_items, backend: as in `attention_loss`.
        student_scale, teacher_scale: 1 / sqrt(D / relation_heads) by default.

    Returns:
        A scalar, or (B, relation_heads, S) for "none": float32 (float64 for float64 inputs). The gradient runs through
        both sides of x x^T.

    Raises:
        TypeError, ValueError: what came and what was wanted, by argument; a teacher that requires grad.
        NotImplementedError: in forward-mode differentiation (torch.func.jvp).

    Example:
        >>> import torch, fastdistil
        >>> draw = torch.Generator().manual_seed(0)
        >>> student = torch.randn(1, 5, 32, generator=draw, requires_grad=True)
        >>> teacher = torch.randn(1, 5, 64, generator=draw)  # wider, with as many relation heads
        >>> loss = fastdistil.relation_loss(student, teacher, relation_heads=4)
        >>> loss.backward()
        >>> print(loss.shape, student.grad.shape)
        torch.Size([]) torch.Size([1, 5, 32])
        >>> print(fastdistil.relation_loss(teacher, teacher, relation_heads=4).item())
        0.0
    """
    _check.no_tangents(_NAME, student=student, teacher=teacher)
    if isinstance(relation_heads, bool) or not isinstance(relation_heads, int):
        raise TypeError(f"{_NAME}: relation_heads is {type(relation_heads).__name__}, expected a whole number")
    if relation_heads < 1:
        raise ValueError(f"{_NAME}: relation_heads is {relation_heads}, expected at least 1")
    xs = _side_by_side("student", student), _side_by_side("teacher", teacher)
    _check.constant(_NAME, "teacher", teacher)
    _check.same_device(_NAME, "teacher", teacher, "student", student.device)
    for name, x in zip(("student", "teacher"), xs, strict=True):
        if x.shape[-1] == 0 or x.shape[-1] % relation_heads:
            raise ValueError(
                f"{_NAME}: {name} has shape {tuple(x.shape)}, expected (B, S, D) with D a multiple of "
                f"{relation_heads}, the relation_heads"
            )
    if xs[1].shape[:2] != xs[0].shape[:2]:
        raise ValueError(
            f"{_NAME}: teacher has shape {tuple(xs[1].shape)}, expected {(*xs[0].shape[:2], xs[1].shape[2])} "
            "to match student"
        )
    s, t = (_split(x, relation_heads) for x in _check.one_dtype(*xs))
    return of_maps(
        _NAME, (s, t), None, kind, mask, causal, student_scale, teacher_scale, mask_queries, None, "each", reduction,
        num_items, backend,
    )  # fmt: skip


def _side_by_side(name: str, x: object) -> Tensor:
    """(B, S, D) from that, or from (B, H, S, d)."""
    x = _check.float_tensor(_NAME, name, x)
    if x.ndim not in (3, 4):
        raise ValueError(f"{_NAME}: {name} has shape {tuple(x.shape)}, expected (B, S, D) or (B, H, S, d)")
    return x.transpose(1, 2).flatten(2) if x.ndim == 4 else x


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, S, D) -> (B, heads, S, D / heads)."""
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(1, 2)
