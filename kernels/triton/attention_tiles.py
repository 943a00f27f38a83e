"""Device functions of the attention kernels: what happens to one tile, whichever side it is walked from."""

from __future__ import annotations

import triton
import triton.language as tl
from fastdistil.kernels.triton.exact import scaled_expm1


@triton.jit
def load_rows(ptr, stride, rows, count, keep, SIZE: tl.constexpr, PAD: tl.constexpr):
    """Rows of a (count, SIZE) matrix as (BLOCK, PAD); rows that are not kept become zeros, whatever they hold."""
    columns = tl.arange(0, PAD)
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = (keep & (rows < count))[:, None] & (columns < SIZE)[None, :]
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def query_operands(q_s, q_t, scale_s, scale_t, DIFFERENCE: tl.constexpr):
    """The left factors of the student's part, of the rest of the difference and of the teacher's scores."""
    if DIFFERENCE:
        x_t = q_t * scale_t
        return (q_s - q_t) * scale_s + q_t * (scale_s - scale_t), x_t, x_t
    else:
        return q_s, q_t, q_t


@triton.jit
def load_mean(ptr, index, SIZE: tl.constexpr, PAD: tl.constexpr, CENTRED: tl.constexpr):
    """The mean of a head's keys (1, PAD), of a contiguous (heads, SIZE); 0, and not read, where none is taken off."""
    columns = tl.arange(0, PAD)
    if CENTRED:
        return tl.load(ptr + index * SIZE + columns, mask=columns < SIZE, other=0.0)[None, :]
    else:
        return 0.0


@triton.jit
def key_operands(k_s, k_t, mean_s, mean_t, DIFFERENCE: tl.constexpr, CENTRED: tl.constexpr):
    """The right factors, less the keys' means: what all keys have in common no softmax sees. The difference of the keys
    is that of the unrounded ones, rounded once where it is near the means' difference."""
    if DIFFERENCE and CENTRED:
        d = k_s - k_t
        back = k_s - d
        rest = (k_s - (d + back)) + (back - k_t)
        return k_s - mean_s, (d - (mean_s - mean_t)) + rest, k_t - mean_t
    elif DIFFERENCE:
        return k_s, k_s - k_t, k_t
    elif CENTRED:
        return k_s - mean_s, k_t - mean_t, k_t - mean_t
    else:
        return k_s, k_t, k_t


@triton.jit
def scores(l1, l2, l3, r1, r2, r3, scale_s, scale_t, DIFFERENCE: tl.constexpr, PRECISION: tl.constexpr):
    """The teacher's scores b and student minus teacher c of a tile, float32; either side may be the queries."""
    b = tl.dot(l3, tl.trans(r3), input_precision=PRECISION)
    c = tl.dot(l1, tl.trans(r1), input_precision=PRECISION)
    if DIFFERENCE:
        c += tl.dot(l2, tl.trans(r2), input_precision=PRECISION)
    else:
        b *= scale_t
        c = c * scale_s - b
    return b, c


@triton.jit
def load_stats(ptr, plane, inside):
    """What attention_fwd_kernel stored for these rows."""
    max_a = tl.load(ptr, mask=inside, other=0.0)
    log_mass_a = tl.load(ptr + plane, mask=inside, other=0.0)
    max_b = tl.load(ptr + 2 * plane, mask=inside, other=0.0)
    log_mass_b = tl.load(ptr + 3 * plane, mask=inside, other=0.0)
    log_ratio = tl.load(ptr + 4 * plane, mask=inside, other=0.0)
    top = tl.load(ptr + 5 * plane, mask=inside, other=0.0)
    return max_a, log_mass_a, max_b, log_mass_b, log_ratio, top


@triton.jit
def differences(
    b, c, visible, max_a, log_mass_a, max_b, log_mass_b, log_ratio, top, WIDE: tl.constexpr
):  # fmt: skip
    """q, delta, p - q and p of a tile, 0 but in delta where nothing is visible; the statistics broadcast to it. Without
    WIDE they are three: the teacher's logsumexp in the place of its maximum, D and `top`; they round p and q by 2^-24
    times the largest score, which 16-bit inputs do not see, and leave registers for the tiles.

    At a row's sharp key, the only one with so much of the probability, p - q is `top`: what these scores give has no
    digits left, and other tiles' scores are not rounded as those were that `top` comes from."""
    b = tl.where(visible, b, -float("inf"))
    delta = c - log_ratio
    if WIDE:
        q = tl.exp((b - max_b) - log_mass_b)
        log_p = (b + c - max_a) - log_mass_a
    else:
        q = tl.exp(b - max_b)
        log_p = (b - max_b) + delta
    return q, delta, tl.where(q > 0.75, top, scaled_expm1(q, delta, log_p)), tl.exp(log_p)


@triton.jit
def dscores(p, p_minus_q, at_top, mean, KIND: tl.constexpr):
    """The gradient of a row's loss in the student's scores; at_top and mean broadcast to the tile. prob_mse takes its
    slopes p - q relative to the one at the key that has nearly all of p, at_top, which the gradient does not see: else
    slope minus mean would cancel there. Without such a key at_top is 0."""
    if KIND == "prob_mse":
        return 2.0 * p * (tl.where(p > 0.75, 0.0, p_minus_q - at_top) - mean)
    else:
        return p_minus_q


@triton.jit
def dot_accumulate(acc, d, right, PRECISION: tl.constexpr):
    """acc + d @ right, d float32. For 16-bit factors d is two of them, 16 bits or more: rounded to one, the gradient
    would be rounded twice, and a row of d that sums to 0 would not, with keys that have a vector in common. float16 has
    not the range for d: each of its rows is scaled to at most 1."""
    if right.dtype == tl.float16:
        largest = tl.max(tl.abs(d), 1)
        largest = tl.where(largest > 0, largest, 1.0)
        d = d / largest[:, None]
        upper = d.to(tl.float16)
        found = tl.dot((d - upper).to(tl.float16), right)
        return acc + tl.dot(upper, right, found) * largest[:, None]
    elif right.dtype == tl.bfloat16:
        upper = d.to(tl.bfloat16)
        # Not all in `acc`: ptxas serialises that on sm_90a (C7515) and spills on sm_100a.
        return acc + tl.dot(upper, right, tl.dot((d - upper).to(tl.bfloat16), right))
    else:
        return tl.dot(d, right, acc, input_precision=PRECISION)


@triton.jit
def seen_keys(key_mask_ptr, key_end, columns, length, HAS_MASK: tl.constexpr):
    if HAS_MASK:
        return tl.load(key_mask_ptr + columns, mask=columns < key_end, other=0) != 0
    else:
        return columns < length


@triton.jit
def sequence_of(begin_ptr, end_ptr, tokens, length, PACKED: tl.constexpr):
    """First token and end of each token's own sequence, for packed ones; else the tokens themselves, never used."""
    if PACKED:
        first = tl.load(begin_ptr + tokens, mask=tokens < length, other=length)
        last = tl.load(end_ptr + tokens, mask=tokens < length, other=0)
        return first, last
    else:
        return tokens, tokens


@triton.jit
def walk(first, last, keep, end, STEP: tl.constexpr, PACKED: tl.constexpr):
    """Where a program begins and ends its walk; a block without anything that counts walks nowhere."""
    end = tl.where(tl.max(keep.to(tl.int32), 0) > 0, end, 0)
    if PACKED:
        return tl.min(first, 0) // STEP * STEP, tl.minimum(end, tl.max(last, 0))
    else:
        return 0, end
