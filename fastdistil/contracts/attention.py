"""What the backends of attention_loss share."""

from __future__ import annotations

from torch import Tensor

# The order is the enum AttentionKind of csrc/cpu/attention_args.h.
KINDS = ("prob_mse", "prob_kl", "score_mse")


def sum_of_groups(dk: Tensor, key_heads: int) -> Tensor:
    """(B, H, S, d), one gradient a query head -> (B, key_heads, S, d), the sum over those that share a key head."""
    batch, heads, length, size = dk.shape
    return dk if key_heads == heads else dk.reshape(batch, key_heads, heads // key_heads, length, size).sum(2)
