"""Device functions shared by the softmax rules: `fastdistil.reference.exact` for one row or tile at a time."""

from __future__ import annotations

import triton
import triton.language as tl
from fastdistil.kernels.triton.numerics import expm1, expm1_minus_x, expm1_near, log1p


@triton.jit
def scaled_expm1(weight, x, log_product):
    """weight * expm1(x), as exp(log_product) - weight where |x| > 1: there the weight may underflow while exp(x)
    overflows."""
    near = tl.abs(x) <= 1.0
    return tl.where(near, weight * expm1_near(tl.where(near, x, 0.0)), tl.exp(log_product) - weight)


@triton.jit
def move_unit(largest, ref, total, difference, new, new_ref):
    """S and X relative to another maximum and reference: X + S = sum e^(a-m-ref) scales, and X stays a small number
    where the student is near. Up to the first finite b the unit is 1, and there may be mass of the student alone."""
    up = tl.where(largest == float("-inf"), 0.0, largest) - new
    r = ref - new_ref
    factor = tl.exp(up)
    both = tl.exp(up + r)
    growth = tl.where(tl.abs(r) <= 1.0, factor * expm1_near(r), both - factor)
    moved = tl.where(difference == 0.0, 0.0, difference * both)  # not 0 * inf
    return tl.where(total == 0.0, 0.0, total * factor), moved + tl.where(total == 0.0, 0.0, total * growth)


@triton.jit
def add_to_masses(b, c, max_a, mass_a, max_b, ref, mass_b, excess):
    """One more tile (rows, columns) in the running maxima, masses and sum of exp(b - max_b) * expm1(c - ref) of its
    rows, where ref is c at the largest b so far (`logit_statistics._add_masses`); b = -inf and c = 0 where nothing is
    visible. Start from -1e30 for the maxima and 0 for the rest."""
    top = tl.max(b, 1)
    at_top = tl.max(tl.where(b == top[:, None], c, float("-inf")), 1)
    at_top = tl.where(tl.abs(at_top) <= 1e6, at_top, 0.0)
    new_ref = tl.where(top > max_b, at_top, ref)
    new_b = tl.maximum(max_b, top)
    mass_b, excess = move_unit(max_b, ref, mass_b, excess, new_b, new_ref)
    new_a = tl.maximum(max_a, tl.max(b + c, 1))
    mass_a = mass_a * tl.exp(max_a - new_a) + tl.sum(tl.exp(b + c - new_a[:, None]), 1)
    weight = tl.exp(b - new_b[:, None])
    log_product = (b + c - new_b[:, None]) - new_ref[:, None]
    excess += tl.sum(scaled_expm1(weight, c - new_ref[:, None], log_product), 1)
    return new_a, mass_a, new_b, new_ref, mass_b + tl.sum(weight, 1), excess


@triton.jit
def log_mass_ratio(max_a, mass_a, max_b, ref, mass_b, excess):
    """Maximum and log(mass) of student and teacher (apart: their sum would round the small one off), D = A - B, and
    p - q at the teacher's largest column. D - ref is log1p(excess / mass_b), or its mirror image where the student has
    less mass, or the plain difference where the maxima lie too far apart for either; -(D - ref) is that column's delta,
    of which c - D would have no digits where it has nearly all of the mass. Zeros where nothing is visible."""
    seen = mass_b > 0
    max_a = tl.where(seen, max_a, 0.0)
    max_b = tl.where(seen, max_b, 0.0)
    mass_a = tl.where(seen, mass_a, 1.0)
    mass_b = tl.where(seen, mass_b, 1.0)
    ratio = tl.where(excess >= 0, excess / mass_b, -excess * tl.exp((max_b - max_a) + ref) / mass_a)
    exact = log1p(tl.where(ratio < 1e30, ratio, 0.0))
    log_mass_a = tl.log(mass_a)
    log_mass_b = tl.log(mass_b)
    plain = ((max_a - max_b) - ref) + tl.log(mass_a / mass_b)
    rest = tl.where(ratio < 1e30, tl.where(excess >= 0, exact, -exact), plain)
    return max_a, log_mass_a, max_b, log_mass_b, ref + rest, tl.exp(-log_mass_b) * expm1(-rest)


@triton.jit
def forward_kl_terms(q, delta, p_minus_q):
    """q * (expm1(delta) - delta)."""
    near = tl.abs(delta) <= 1.0
    return tl.where(near, q * expm1_minus_x(tl.where(near, delta, 0.0)), p_minus_q - q * delta)
