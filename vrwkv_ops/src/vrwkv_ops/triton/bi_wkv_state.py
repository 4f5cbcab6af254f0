"""The arithmetic of Bi-WKV states in Triton, as in ``csrc/bi_wkv/state.h`` and docs/operator.md.

A weight e^x is stored as ``mantissa * 2^exponent`` with an integral exponent of unbounded range: no
weight overflows, and bringing two sums to a common exponent is exact. Within a tile of tokens a
state is stored in a frame that decays along with it: with n steps from the tile's edge,
``A_n e^(w n)`` is a plain prefix sum of ``e^(k_i) e^(w (n_i + 1)) v_i``. Joining two states is
associative and commutative, so that ``tl.associative_scan`` sums them in either direction.
Tiles are joined in float64.

Triton's interpreter and compiler give the same results for this code: it depends neither on fused
multiply-adds nor on the order of a combine function's arguments.
"""

import triton
import triton.language as tl

from vrwkv_ops import checks

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634074)
LN2: tl.constexpr = tl.constexpr(0.69314718055994530942)
# ln(2) in two parts, the first of 9 bits: its product with an exponent of up to 15 bits is exact.
LN2_HIGH: tl.constexpr = tl.constexpr(0.693359375)
LN2_LOW: tl.constexpr = tl.constexpr(-2.121944400546905827679e-4)
# The exponent of an empty sum: below any weight's, but finite, so that no difference is NaN.
EMPTY: tl.constexpr = tl.constexpr(-1e12)
# Keys and decays are clamped to these bounds.
MAX_KEY: tl.constexpr = tl.constexpr(checks.MAX_KEY)
MAX_DECAY: tl.constexpr = tl.constexpr(1e6)


@triton.jit
def constant(value: tl.constexpr, like):
    """Return a number in the dtype of a tensor: Triton below 3.2 rounds literals to float32."""
    return tl.full([1, 1], value, like.dtype)


@triton.jit
def power_of_two(n):
    """Return 2^n for n <= 1, integral in float32; clamp n to the normal numbers."""
    if n.dtype == tl.float64:
        return tl.exp2(tl.minimum(tl.maximum(n, -1022.0), 1.0))
    else:
        biased = (tl.minimum(tl.maximum(n, -126.0), 1.0) + 127.0).to(tl.int32)
        return (biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_scaled(x, rest):
    """Return e^(x + rest), rest far smaller than x: a mantissa in [0.7, 1.42] and an exponent."""
    bounded = tl.minimum(tl.maximum(x, -MAX_KEY), MAX_KEY)
    n = tl.floor((bounded + rest) * constant(LOG2E, x) + 0.5)
    # Far beyond |x| = 1e5 the remainder is wrong by more than 1: bounded, the result stays finite.
    remainder = (bounded - n * LN2_HIGH) - n * constant(LN2_LOW, x) + rest
    mantissa = tl.exp(tl.minimum(tl.maximum(remainder, -0.5), 0.5))
    return tl.where(x == x, mantissa, x), n  # NaN stays NaN


@triton.jit
def decay_power(w, n):
    """Return e^(w n) as (mantissa, exponent) for integral n <= 512, with one rounding error."""
    bounded = tl.minimum(tl.maximum(w, -MAX_DECAY), MAX_DECAY)  # on GPUs a number even of NaN
    if w.dtype == tl.float64:
        mantissa, exponent = exp_scaled(bounded * n, 0.0 * n)
    else:
        # The product of the upper 14 bits of w with n is exact, and the rest is small.
        high = (bounded.to(tl.int32, bitcast=True) & -1024).to(tl.float32, bitcast=True)
        mantissa, exponent = exp_scaled(high * n, (bounded - high) * n)
    return tl.where(w == w, mantissa, w), exponent


@triton.jit
def join_wkv(a0, c0, e0, a1, c1, e1):
    """Add (a0, c0) 2^e0 and (a1, c1) 2^e1: weighted sums of values and of ones.

    In float64 the exponents may be any real numbers.
    """
    top = tl.maximum(e0, e1)
    s0, s1 = power_of_two(e0 - top), power_of_two(e1 - top)
    return a0 * s0 + a1 * s1, c0 * s0 + c1 * s1, top


@triton.jit
def join_grad(g0, h0, dg0, dh0, e0, n0, g1, h1, dg1, dh1, e1, n1):
    """Add sums of g and h, and the same weighted by distance, dg and dh, all times 2^e.

    Distances are counted from n, in steps along the scan; the result has the larger n.
    """
    top = tl.maximum(e0, e1)
    s0, s1 = power_of_two(e0 - top), power_of_two(e1 - top)
    n = tl.maximum(n0, n1)
    g0, h0, g1, h1 = g0 * s0, h0 * s0, g1 * s1, h1 * s1
    dg = dg0 * s0 + (n - n0) * g0 + dg1 * s1 + (n - n1) * g1
    dh = dh0 * s0 + (n - n0) * h0 + dh1 * s1 + (n - n1) * h1
    return g0 + g1, h0 + h1, dg, dh, top, n
