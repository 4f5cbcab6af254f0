"""Bi-WKV in Triton: tiles of tokens are scanned, joined, and then give the outputs.

A program takes ``BLOCK_T`` tokens and ``BLOCK_C`` channels of an image. Direction 0 runs from left
to right, direction 1 from right to left; ``n`` counts the steps from a tile's edge in that
direction, starting at 0. The leaf of a row in a scan is the token before it; the leaf of the first
row is the state that enters the tile. An inclusive scan then gives every row the sum over all
tokens before it. A short sequence is a single tile and takes a single launch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrwkv_ops.checks import accumulation_dtype
from vrwkv_ops.triton.bi_wkv_state import (
    EMPTY,
    LN2,
    LOG2E,
    MAX_DECAY,
    constant,
    decay_power,
    exp_scaled,
    join_grad,
    join_wkv,
    power_of_two,
)
from vrwkv_ops.triton.common import locate, store_sum

WKV_FIELDS = tl.constexpr(3)  # a, c, exponent
GRAD_FIELDS = tl.constexpr(5)  # g, h, dg, dh, exponent
# Elements of a float32 tile that registers hold; half as many in float64.
_FORWARD_ELEMENTS = 2048
_BACKWARD_ELEMENTS = 1024
_WARPS = 8  # with 4, ptxas spills registers (sm_90)
_HALF = (torch.float16, torch.bfloat16)


class Tiling(NamedTuple):
    """How the work is split, from sizes and dtype alone, so that results depend on nothing else.

    Attributes:
        tokens: Tokens of a tile, at most 512. All three are powers of two.
        channels: Channels of a tile.
        joined: Tiles that are joined at the same time.
    """

    tokens: int
    channels: int
    joined: int


def choose_tiling(tokens: int, elements: int) -> Tiling:
    """Choose tiles of ``elements``: one tile up to 256 tokens, else tiles of 64 tokens."""
    block = triton.next_power_of_2(tokens) if tokens <= 256 else 64
    joined = min(triton.next_power_of_2(triton.cdiv(tokens, block)), 128)
    return Tiling(block, min(elements // block, 64), joined)


# --- Shared by both passes -------------------------------------------------------------------


@triton.jit
def _read(ptr, b, t, c, stride_b, stride_t, stride_c, valid, ACC: tl.constexpr):
    """Load the elements (b, t, c) of a (B, T, C) tensor; 0 where not valid."""
    return tl.load(ptr + b * stride_b + t * stride_t + c * stride_c, mask=valid, other=0.0).to(ACC)


@triton.jit
def _steps(r, DIRECTION: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return the steps n from the tile's edge to its rows."""
    return r if DIRECTION == 0 else BLOCK_T - 1 - r


@triton.jit
def _state(ptr, b, tile, direction, c, C, tiles, FIELDS: tl.constexpr):
    """Return the address of the first field of a state, in (B, tiles, directions, FIELDS, C)."""
    return ptr + ((b * tiles + tile) * 2 + direction) * FIELDS * C + c


@triton.jit
def _before(
    w, entering_ptr, b, tile, r, t, c, T, C, tiles,
    FIELDS: tl.constexpr, DIRECTION: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Locate the leaves of a scan.

    Returns:
        Steps n; e^(w n) as mantissa and exponent; the tokens before the rows, and which exist;
        the address of the entering state, and the row that takes it.
    """
    n = _steps(r, DIRECTION, BLOCK_T)
    mantissa, exponent = decay_power(w, n.to(w.dtype))
    before = t - 1 if DIRECTION == 0 else t + 1
    inside = (n > 0) & (before < T) & (c < C)
    enters = tile > 0 if DIRECTION == 0 else tile < tiles - 1
    at = _state(entering_ptr, b, tile, DIRECTION, c, C, tiles, FIELDS) + 0 * r
    return n, mantissa, exponent, before, inside, at, (n == 0) & enters & (c < C)


@triton.jit
def _read_wide(ptr, valid):
    return tl.load(ptr, mask=valid, other=0.0).to(tl.float64)


@triton.jit
def _hand_on(ptr, x, scale, stored, is_last):
    """Store a field of the states that enter the next tiles; return the last tile's."""
    tl.store(ptr, (x * scale).to(ptr.dtype.element_ty), mask=stored)
    return tl.sum(tl.where(is_last, x, 0.0), axis=0, keep_dims=True)


@triton.jit
def join_tiles(
    w_ptr, own_ptr, entering_ptr, C, tiles,
    FIELDS: tl.constexpr, FIRST_DIRECTION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute the states that enter each tile from the tiles' own states.

    A program takes one direction, one image and BLOCK_C channels, BLOCK_N tiles at a time. It uses
    float64 and real exponents of base 2. FIELDS selects the kind of state: the last field is the
    exponent, the others are sums.
    """
    GRAD: tl.constexpr = FIELDS == GRAD_FIELDS
    direction = tl.program_id(1).to(tl.int64) + FIRST_DIRECTION
    b, _, row, _, c, _ = locate(tiles, C, 1, BLOCK_N, BLOCK_C)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0).to(tl.float64)
    # A tile's decay.
    x = tl.minimum(tl.maximum(w, -MAX_DECAY), MAX_DECAY) * constant(LOG2E * BLOCK_T, w)
    length = tl.where(w < 0, 0.0, 1.0 * BLOCK_T).to(tl.float64)  # steps that a tile counts
    zero = tl.zeros([1, BLOCK_C], tl.float64)
    last0, last1, last2, last3, last_p = zero, zero, zero, zero, zero + EMPTY
    for first in range(0, tiles, BLOCK_N):
        j = first + row
        valid = (j < tiles) & (c < C)
        at = _state(
            own_ptr, b, tl.where(direction == 0, j, tiles - 1 - j), direction, c, C, tiles, FIELDS
        )
        x0, x1 = _read_wide(at, valid), _read_wide(at + C, valid)
        p = tl.load(at + (FIELDS - 1) * C, mask=valid, other=EMPTY).to(tl.float64) + x * row
        if GRAD:
            x2, x3 = _read_wide(at + 2 * C, valid), _read_wide(at + 3 * C, valid)
            x0, x1, x2, x3, p, n = tl.associative_scan(
                (x0, x1, x2, x3, p, length * (row + 1)), 0, join_grad
            )
            x0, x1, x2, x3, p, n = join_grad(
                last0, last1, last2, last3, last_p, zero, x0, x1, x2, x3, p, n
            )
        else:
            x0, x1, p = tl.associative_scan((x0, x1, p), 0, join_wkv)
            x0, x1, p = join_wkv(last0, last1, last_p, x0, x1, p)
        p -= x * (row + 1)
        whole = tl.floor(p)
        scale = power_of_two(p - whole)
        next_tile = tl.where(direction == 0, j + 1, tiles - 2 - j)
        at = _state(entering_ptr, b, next_tile, direction, c, C, tiles, FIELDS)
        stored, is_last = valid & (j + 1 < tiles), row == BLOCK_N - 1
        last0 = _hand_on(at, x0, scale, stored, is_last)
        last1 = _hand_on(at + C, x1, scale, stored, is_last)
        if GRAD:
            last2 = _hand_on(at + 2 * C, x2, scale, stored, is_last)
            last3 = _hand_on(at + 3 * C, x3, scale, stored, is_last)
        tl.store(at + (FIELDS - 1) * C, whole.to(at.dtype.element_ty), mask=stored)
        last_p = tl.sum(tl.where(is_last, p, 0.0), axis=0, keep_dims=True)


# --- Forward ----------------------------------------------------------------------------------


@triton.jit
def _wkv_leaves(k, v, mantissa, exponent, valid):
    """Compute e^k e^(w n) (v, 1) of tokens, where mantissa * 2^exponent is e^(w n)."""
    key, key_exponent = exp_scaled(k, 0.0)
    weight = tl.where(valid, key * mantissa, 0.0)
    return weight * v, weight, tl.where(valid, key_exponent + exponent, EMPTY)


@triton.jit
def wkv_own_states(
    w_ptr, k_ptr, v_ptr, own_ptr, T, C, tiles, headroom, k_b, k_t, k_c, v_b, v_t, v_c,
    CAUSAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute each tile's own state, (B, tiles, directions, WKV_FIELDS, C).

    It is in the frame of the tile; e^(-w BLOCK_T) moves it to the edge of the next one.
    """
    ACC: tl.constexpr = w_ptr.dtype.element_ty
    b, tile, r, t, c, valid = locate(T, C, tiles, BLOCK_T, BLOCK_C)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0)
    k = _read(k_ptr, b, t, c, k_b, k_t, k_c, valid, ACC)
    v = _read(v_ptr, b, t, c, v_b, v_t, v_c, valid, ACC) * headroom
    for direction in tl.static_range(1 if CAUSAL else 2):
        step = _steps(r, direction, BLOCK_T) + 1  # to the row that the token contributes to
        mantissa, exponent = decay_power(w, step.to(ACC))
        a, weight, exponent = _wkv_leaves(k, v, mantissa, exponent, valid)
        top = tl.max(exponent, axis=0, keep_dims=True)
        scale = power_of_two(exponent - top)
        at = _state(own_ptr, b, tile, direction, c, C, tiles, WKV_FIELDS)
        store_sum(at, a * scale, c, C)
        store_sum(at + C, weight * scale, c, C)
        tl.store(at + 2 * C, top, mask=c < C)


@triton.jit
def _wkv_neighbours(
    w, k_ptr, v_ptr, entering_ptr, b, tile, r, t, c, T, C, tiles, headroom,
    k_b, k_t, k_c, v_b, v_t, v_c, DIRECTION: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sum all tokens before (after, in direction 1) each row; return (a, c) * 2^exponent."""
    _, mantissa, exponent, before, inside, at, edge = _before(
        w, entering_ptr, b, tile, r, t, c, T, C, tiles, WKV_FIELDS, DIRECTION, BLOCK_T
    )
    k = _read(k_ptr, b, before, c, k_b, k_t, k_c, inside, w.dtype)
    v = _read(v_ptr, b, before, c, v_b, v_t, v_c, inside, w.dtype) * headroom
    a, weight, top = _wkv_leaves(k, v, mantissa, exponent, inside)
    a += tl.load(at, mask=edge, other=0.0)
    weight += tl.load(at + C, mask=edge, other=0.0)
    top = tl.maximum(top, tl.load(at + 2 * C, mask=edge, other=EMPTY))
    a, weight, top = tl.associative_scan((a, weight, top), 0, join_wkv, reverse=DIRECTION == 1)
    return a / mantissa, weight / mantissa, top - exponent


@triton.jit
def wkv_outputs(
    w_ptr, u_ptr, k_ptr, v_ptr, entering_ptr, y_ptr, residual_ptr, z_ptr,
    T, C, tiles, headroom, k_b, k_t, k_c, v_b, v_t, v_c,
    CAUSAL: tl.constexpr, SAVE: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute y; if SAVE, z = log(denominator); if RESIDUAL, y minus its rounding: (B, T, C)."""
    ACC: tl.constexpr = w_ptr.dtype.element_ty
    b, tile, r, t, c, valid = locate(T, C, tiles, BLOCK_T, BLOCK_C)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0)
    u = tl.load(u_ptr + c, mask=c < C, other=0.0)
    k = _read(k_ptr, b, t, c, k_b, k_t, k_c, valid, ACC)
    v = _read(v_ptr, b, t, c, v_b, v_t, v_c, valid, ACC)
    key, exponent = exp_scaled(k, 0.0)
    bonus, bonus_exponent = exp_scaled(u, 0.0)
    own = key * bonus
    exponent += bonus_exponent
    numerator, denominator = own * (v * headroom), own
    for direction in tl.static_range(1 if CAUSAL else 2):
        a, weight, top = _wkv_neighbours(
            w, k_ptr, v_ptr, entering_ptr, b, tile, r, t, c, T, C, tiles, headroom,
            k_b, k_t, k_c, v_b, v_t, v_c, direction, BLOCK_T,
        )  # fmt: skip
        own *= power_of_two(exponent - tl.maximum(exponent, top))
        numerator, denominator, exponent = join_wkv(
            numerator, denominator, exponent, a, weight, top
        )
    # The output of a token that sees only itself is exactly its value: weights get no gradient.
    y = tl.where(denominator == own, v, numerator / denominator * (1.0 / headroom))
    at = (b * T + t) * C + c
    rounded = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, rounded, mask=valid)
    if RESIDUAL:
        tl.store(residual_ptr + at, (y - rounded.to(ACC)).to(y_ptr.dtype.element_ty), mask=valid)
    if SAVE:
        tl.store(z_ptr + at, tl.log(denominator) + exponent * constant(LN2, w), mask=valid)


# --- Backward ---------------------------------------------------------------------------------


@triton.jit
def _read_saved(
    gy_ptr, y_ptr, residual_ptr, z_ptr, b, t, c, T, C, headroom, g_b, g_t, g_c, valid,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Load the gradient of the output, the output times headroom, and z."""
    ACC: tl.constexpr = z_ptr.dtype.element_ty
    at = (b * T + t) * C + c
    gy = _read(gy_ptr, b, t, c, g_b, g_t, g_c, valid, ACC)
    y = tl.load(y_ptr + at, mask=valid, other=0.0).to(ACC)
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=valid, other=0.0).to(ACC)
    return gy, y * headroom, tl.load(z_ptr + at, mask=valid, other=0.0)


@triton.jit
def _far(t, T, CAUSAL: tl.constexpr):
    """Distance from token t to the farthest end of what it sees."""
    if CAUSAL:
        return t
    else:
        return tl.maximum(t, T - 1 - t)


@triton.jit
def _grad_leaves(
    w, gy, y, z, t, T, mantissa, exponent, valid, CAUSAL: tl.constexpr, DIRECTION: tl.constexpr
):
    """Terms g = gy e^(-z) e^(w n), h = g y, and both times the origin of their distances.

    Where w grows with distance, all distances that matter are alike, and their sums would cancel:
    they count from the farthest end, see Distances in csrc/bi_wkv/state.h.
    """
    shrink, shrink_exponent = exp_scaled(-z, 0.0)
    g = tl.where(valid, shrink * mantissa * gy, 0.0)
    origin = (t if DIRECTION == 1 else T - 1 - t) - _far(t, T, CAUSAL)
    origin = tl.where(w < 0, origin.to(w.dtype), 0.0)
    return g, g * y, origin * g, origin * g * y, tl.where(valid, shrink_exponent + exponent, EMPTY)


@triton.jit
def grad_own_states(
    w_ptr, gy_ptr, y_ptr, residual_ptr, z_ptr, own_ptr, T, C, tiles, headroom, g_b, g_t, g_c,
    CAUSAL: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute each tile's own sums of g and h, (B, tiles, directions, GRAD_FIELDS, C).

    If causal, there is direction 1 only, because tokens contribute to later outputs only.
    """
    ACC: tl.constexpr = w_ptr.dtype.element_ty
    b, tile, r, t, c, valid = locate(T, C, tiles, BLOCK_T, BLOCK_C)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0)
    gy, y, z = _read_saved(
        gy_ptr, y_ptr, residual_ptr, z_ptr, b, t, c, T, C, headroom, g_b, g_t, g_c, valid, RESIDUAL
    )
    for direction in tl.static_range(1 if CAUSAL else 0, 2):
        step = _steps(r, direction, BLOCK_T) + 1
        mantissa, exponent = decay_power(w, step.to(ACC))
        g, h, dg, dh, exponent = _grad_leaves(
            w, gy, y, z, t, T, mantissa, exponent, valid, CAUSAL, direction
        )
        steps = tl.where(w < 0, 0.0, (BLOCK_T - step).to(ACC))
        top = tl.max(exponent, axis=0, keep_dims=True)
        scale = power_of_two(exponent - top)
        at = _state(own_ptr, b, tile, direction, c, C, tiles, GRAD_FIELDS)
        store_sum(at, g * scale, c, C)
        store_sum(at + C, h * scale, c, C)
        store_sum(at + 2 * C, (dg + steps * g) * scale, c, C)
        store_sum(at + 3 * C, (dh + steps * h) * scale, c, C)
        tl.store(at + 4 * C, top, mask=c < C)


@triton.jit
def grad_outputs(
    w_ptr, u_ptr, k_ptr, v_ptr, gy_ptr, y_ptr, residual_ptr, z_ptr, entering_ptr,
    gk_ptr, gv_ptr, gw_ptr, gu_ptr, T, C, tiles, headroom,
    k_b, k_t, k_c, v_b, v_t, v_c, g_b, g_t, g_c,
    CAUSAL: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute gk and gv, (B, T, C), and this tile's parts of gw and gu, (B, tiles, C)."""
    ACC: tl.constexpr = w_ptr.dtype.element_ty
    b, tile, r, t, c, valid = locate(T, C, tiles, BLOCK_T, BLOCK_C)
    w = tl.load(w_ptr + c, mask=c < C, other=0.0)
    u = tl.load(u_ptr + c, mask=c < C, other=0.0)
    k = _read(k_ptr, b, t, c, k_b, k_t, k_c, valid, ACC)
    v = _read(v_ptr, b, t, c, v_b, v_t, v_c, valid, ACC) * headroom
    key, key_exponent = exp_scaled(k, 0.0)
    bonus, bonus_exponent = exp_scaled(u, 0.0)
    gy, y, z = _read_saved(
        gy_ptr, y_ptr, residual_ptr, z_ptr, b, t, c, T, C, headroom, g_b, g_t, g_c, valid, RESIDUAL
    )
    shrink, shrink_exponent = exp_scaled(-z, 0.0)

    # The token's own output.
    gv = power_of_two(key_exponent + bonus_exponent + shrink_exponent) * key * bonus * shrink * gy
    gv = tl.where(valid, gv, 0.0)
    gu = gv * (v - y)
    gk = gu
    gw = tl.where(w < 0, (_far(t, T, CAUSAL) - 1).to(ACC), 0.0) * gu

    # The parts from the outputs before the token (sums from the left) and after it.
    for direction in tl.static_range(1 if CAUSAL else 0, 2):
        n, mantissa, exponent, before, inside, entering, edge = _before(
            w, entering_ptr, b, tile, r, t, c, T, C, tiles, GRAD_FIELDS, direction, BLOCK_T
        )
        from_gy, from_y, from_z = _read_saved(
            gy_ptr, y_ptr, residual_ptr, z_ptr, b, before, c, T, C, headroom, g_b, g_t, g_c, inside,
            RESIDUAL,
        )  # fmt: skip
        g, h, dg, dh, top = _grad_leaves(
            w, from_gy, from_y, from_z, before, T, mantissa, exponent, inside, CAUSAL, direction
        )
        g += tl.load(entering, mask=edge, other=0.0)
        h += tl.load(entering + C, mask=edge, other=0.0)
        dg += tl.load(entering + 2 * C, mask=edge, other=0.0)
        dh += tl.load(entering + 3 * C, mask=edge, other=0.0)
        top = tl.maximum(top, tl.load(entering + 4 * C, mask=edge, other=EMPTY))
        steps = tl.where(w < 0, 0.0, n.to(ACC))
        g, h, dg, dh, top, _ = tl.associative_scan(
            (g, h, dg, dh, top, steps), 0, join_grad, reverse=direction == 1
        )
        # e^(k_i - z_t - w d) <= 1
        e = power_of_two(top - exponent + key_exponent) * key / mantissa
        e = tl.where(valid, e, 0.0)
        own_distance = (-t if direction == 1 else t - (T - 1)).to(ACC)
        part = e * (g * v - h)
        gv += e * g
        gk += part
        gw -= e * (dg * v - dh) + tl.where(w < 0, own_distance, 0.0) * part

    lift = 1.0 / headroom
    at = (b * T + t) * C + c
    tl.store(gk_ptr + at, (gk * lift).to(gk_ptr.dtype.element_ty), mask=valid)
    tl.store(gv_ptr + at, gv.to(gv_ptr.dtype.element_ty), mask=valid)
    at = (b * tiles + tile) * C + c
    tl.store(gw_ptr + at, tl.sum(gw, axis=0, keep_dims=True) * lift, mask=c < C)
    tl.store(gu_ptr + at, tl.sum(gu, axis=0, keep_dims=True) * lift, mask=c < C)


# --- Launches ---------------------------------------------------------------------------------


def _check(
    w: Tensor, u: Tensor, like: Tensor, saved: dict[str, Tensor], strided: dict[str, Tensor]
):
    """Check direct calls through torch.ops, which could read out of bounds.

    Raises:
        RuntimeError: If a shape, dtype, layout or device does not fit.
    """
    acc = accumulation_dtype(like.dtype)
    if like.dim() != 3:
        raise RuntimeError(f'bi_wkv: expected k of shape (B, T, C), got {tuple(like.shape)}')
    expected = dict.fromkeys('wu', ((like.shape[2],), acc))
    expected |= {name: (like.shape, acc if name == 'z' else like.dtype) for name in saved | strided}
    if 'y_residual' in saved and like.dtype not in _HALF:
        expected['y_residual'] = ((0,), like.dtype)
    for name, x in {'w': w, 'u': u, **saved, **strided}.items():
        shape, dtype = expected[name]
        contiguous = name in strided or x.is_contiguous()
        if (x.shape, x.dtype, x.device) != (
            torch.Size(shape),
            dtype,
            like.device,
        ) or not contiguous:
            raise RuntimeError(
                f'bi_wkv: expected {name} of shape {tuple(shape)}, {dtype}, on {like.device}'
                f'{"" if name in strided else ", contiguous"}; got {tuple(x.shape)}, {x.dtype}, on '
                f'{x.device}{"" if x.is_contiguous() else ", not contiguous"}'
            )


class _Launch:
    """Sizes, grid and shared memory of the kernels of one call."""

    def __init__(self, k: Tensor, w: Tensor, tiling: Tiling, fields: int) -> None:
        self.batch, tokens, self.channels = k.shape
        self.tiling = tiling
        self.tiles = triton.cdiv(tokens, tiling.tokens)
        # A term is below 16 times its value, see csrc/bi_wkv/host.h. A power of two rounds nothing.
        self.headroom = 2.0 ** (-4 - (tokens - 1).bit_length())
        self.sizes = (tokens, self.channels, self.tiles, self.headroom)
        self.blocks = dict(BLOCK_T=tiling.tokens, BLOCK_C=tiling.channels, num_warps=_WARPS)
        self.grid = (self.batch * self.tiles * triton.cdiv(self.channels, tiling.channels),)
        self.fields = fields
        count = self.batch * self.tiles * 2 * fields * self.channels if self.tiles > 1 else 0
        self.own, self.entering = w.new_empty(count), w.new_empty(count)

    def join(self, w: Tensor, first: int, last: int) -> None:
        """Join the states of all tiles, in the directions from first to last."""
        # Few channels per program, so that many programs run; each has many float64 rows.
        channels = min(self.tiling.channels, 4)
        grid = (self.batch * triton.cdiv(self.channels, channels), last - first + 1)
        join_tiles[grid](
            w, self.own, self.entering, self.channels, self.tiles,
            FIELDS=self.fields, FIRST_DIRECTION=first,
            BLOCK_T=self.tiling.tokens, BLOCK_N=self.tiling.joined, BLOCK_C=channels,
            num_warps=_WARPS,
        )  # fmt: skip


def forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, causal: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``vrwkv_ops::bi_wkv_forward``."""
    _check(w, u, k, {}, {'v': v})
    half = k.dtype in _HALF
    y = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    y_residual = k.new_empty(k.shape if save and half else (0,))
    z = w.new_empty(k.shape if save else (0,))
    if k.numel() == 0:
        return y, y_residual, z
    tiling = choose_tiling(k.shape[1], _FORWARD_ELEMENTS * 4 // w.element_size())
    with torch.cuda.device_of(k):
        launch = _Launch(k, w, tiling, WKV_FIELDS.value)
        strides = (*k.stride(), *v.stride())
        flags = dict(CAUSAL=causal, **launch.blocks)
        if launch.tiles > 1:
            wkv_own_states[launch.grid](w, k, v, launch.own, *launch.sizes, *strides, **flags)
            launch.join(w, 0, 0 if causal else 1)
        wkv_outputs[launch.grid](
            w, u, k, v, launch.entering, y, y_residual, z, *launch.sizes, *strides,
            SAVE=save, RESIDUAL=save and half, **flags,
        )  # fmt: skip
    return y, y_residual, z


def backward(
    gy: Tensor,
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    y_residual: Tensor,
    z: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run ``vrwkv_ops::bi_wkv_backward``."""
    _check(w, u, k, {'y': y, 'y_residual': y_residual, 'z': z}, {'v': v, 'gy': gy})
    gk, gv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    if k.numel() == 0:
        return torch.zeros_like(w), torch.zeros_like(u), gk, gv
    tiling = choose_tiling(k.shape[1], _BACKWARD_ELEMENTS * 4 // w.element_size())
    with torch.cuda.device_of(k):
        launch = _Launch(k, w, tiling, GRAD_FIELDS.value)
        gw, gu = (w.new_empty(launch.batch * launch.tiles, launch.channels) for _ in range(2))
        flags = dict(CAUSAL=causal, RESIDUAL=k.dtype in _HALF, **launch.blocks)
        if launch.tiles > 1:
            grad_own_states[launch.grid](
                w, gy, y, y_residual, z, launch.own, *launch.sizes, *gy.stride(), **flags
            )
            launch.join(w, 1 if causal else 0, 1)
        grad_outputs[launch.grid](
            w, u, k, v, gy, y, y_residual, z, launch.entering, gk, gv, gw, gu, *launch.sizes,
            *k.stride(), *v.stride(), *gy.stride(), **flags,
        )  # fmt: skip
        # In a fixed order and without atomics.
        gw, gu = (x.sum(0, dtype=torch.float64).to(w.dtype) for x in (gw, gu))
    return gw, gu, gk, gv
