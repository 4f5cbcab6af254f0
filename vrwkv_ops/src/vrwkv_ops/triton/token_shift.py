"""Token shifts in Triton: a program takes ``BLOCK_T`` tokens and ``BLOCK_C`` channels."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrwkv_ops.checks import MAX_MIXES, SHIFT_MODES, accumulation_dtype, shift_bounds
from vrwkv_ops.triton.common import locate, store_sum

_BLOCKS = dict(BLOCK_T=32, BLOCK_C=64)


@triton.jit
def _shifted(
    ptr, b, t, c, stride_b, stride_t, stride_c, height, width, step, head, b1, b2, b3, b4, valid
):
    """Load the neighbours of tokens t (BLOCK_T, 1) for each group of channels; 0 from outside.

    In each head of ``head`` channels, group 1, up to b1, takes the token ``step`` to the left, 2
    the one to the right, 3 the one above, 4 the one below.
    """
    n = c % head
    right = tl.where(n < b1, -1, tl.where(n < b2, 1, 0)) * step
    down = tl.where((n >= b2) & (n < b3), -1, tl.where((n >= b3) & (n < b4), 1, 0)) * step
    row, column = t // width + down, t % width + right
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & valid
    at = b * stride_b + (row * width + column) * stride_t + c * stride_c
    return tl.load(ptr + at, mask=inside, other=0.0)


@triton.jit
def _own_and_shifted(
    ptr, b, t, c, stride_b, stride_t, stride_c, height, width, step, head, b1, b2, b3, b4, valid,
    ACC: tl.constexpr,
):  # fmt: skip
    """Load the elements (b, t, c) and their neighbours."""
    own = tl.load(ptr + b * stride_b + t * stride_t + c * stride_c, mask=valid, other=0.0)
    other = _shifted(
        ptr, b, t, c, stride_b, stride_t, stride_c, height, width, step, head, b1, b2, b3, b4, valid
    )
    return own.to(ACC), other.to(ACC)


@triton.jit
def q_shift_kernel(
    x_ptr, out_ptr, T, C, blocks, height, width, step, head, b1, b2, b3, b4, x_b, x_t, x_c,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Shift the groups of channels of x (B, T, C), T = height * width."""
    b, _, _, t, c, valid = locate(T, C, blocks, BLOCK_T, BLOCK_C)
    x = _shifted(x_ptr, b, t, c, x_b, x_t, x_c, height, width, step, head, b1, b2, b3, b4, valid)
    tl.store(out_ptr + (b * T + t) * C + c, x, mask=valid)


@triton.jit
def token_shift_kernel(
    x_ptr, mixes_ptr, out0_ptr, out1_ptr, out2_ptr,
    T, C, blocks, height, width, step, head, b1, b2, b3, b4, x_b, x_t, x_c,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute x * mix + shift(x) * (1 - mix) for N mixes (N, C), each (B, T, C)."""
    b, _, _, t, c, valid = locate(T, C, blocks, BLOCK_T, BLOCK_C)
    own, other = _own_and_shifted(
        x_ptr, b, t, c, x_b, x_t, x_c, height, width, step, head, b1, b2, b3, b4, valid,
        mixes_ptr.dtype.element_ty,
    )  # fmt: skip
    for i in tl.static_range(N):
        mix = tl.load(mixes_ptr + i * C + c, mask=c < C, other=0.0)
        out_ptr = out0_ptr if i == 0 else (out1_ptr if i == 1 else out2_ptr)
        out = (own * mix + other * (1.0 - mix)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (b * T + t) * C + c, out, mask=valid)


@triton.jit
def token_shift_backward_kernel(
    g0_ptr, g1_ptr, g2_ptr, x_ptr, mixes_ptr, gx_ptr, gmixes_ptr,
    T, C, blocks, height, width, step, head, b1, b2, b3, b4, x_b, x_t, x_c,
    g0_b, g0_t, g0_c, g1_b, g1_t, g1_c, g2_b, g2_t, g2_c, pieces,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute gx (B, T, C) and this program's part of gmixes (N, pieces, C)."""
    ACC: tl.constexpr = mixes_ptr.dtype.element_ty
    b, block, _, t, c, valid = locate(T, C, blocks, BLOCK_T, BLOCK_C)
    own, other = _own_and_shifted(
        x_ptr, b, t, c, x_b, x_t, x_c, height, width, step, head, b1, b2, b3, b4, valid, ACC
    )
    gx = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    for i in tl.static_range(N):
        mix = tl.load(mixes_ptr + i * C + c, mask=c < C, other=0.0)
        ptr = g0_ptr if i == 0 else (g1_ptr if i == 1 else g2_ptr)
        g_b = g0_b if i == 0 else (g1_b if i == 1 else g2_b)
        g_t = g0_t if i == 0 else (g1_t if i == 1 else g2_t)
        g_c = g0_c if i == 0 else (g1_c if i == 1 else g2_c)
        # The adjoint of a shift is the reverse shift.
        g, back = _own_and_shifted(
            ptr, b, t, c, g_b, g_t, g_c, height, width, -step, head, b1, b2, b3, b4, valid, ACC
        )
        gx += g * mix + back * (1.0 - mix)
        store_sum(gmixes_ptr + (i * pieces + b * blocks + block) * C + c, g * (own - other), c, C)
    tl.store(gx_ptr + (b * T + t) * C + c, gx.to(gx_ptr.dtype.element_ty), mask=valid)


def _check(
    x: Tensor,
    height: int,
    width: int,
    shift_pixel: int,
    gamma: float,
    mode: str,
    heads: int,
) -> None:
    """Check direct calls through torch.ops, which could read out of bounds."""
    if x.dim() != 3 or height < 0 or width < 0 or x.shape[1] != height * width:
        raise RuntimeError(
            f'token shift: expected x of shape (B, height * width, C) with a grid of {height} x '
            f'{width}, got {tuple(x.shape)}'
        )
    if shift_pixel < 0:
        raise RuntimeError(f'token shift: expected shift_pixel >= 0, got {shift_pixel}')
    if not 0 < gamma <= 1 / 4:
        raise RuntimeError(f'token shift: expected channel_gamma in (0, 1/4], got {gamma}')
    if mode not in SHIFT_MODES or (mode != 'q_shift' and height != 1):
        raise RuntimeError(
            f'token shift: expected one of {SHIFT_MODES}, on a grid of one row unless '
            f"'q_shift', got {mode!r} and {height} rows"
        )
    if heads < 1 or x.shape[2] % heads:
        raise RuntimeError(
            f'token shift: expected heads that divide the {x.shape[2]} channels, got {heads}'
        )


def _check_mixes(x: Tensor, mixes: Tensor, grads: Sequence[Tensor] | None = None) -> None:
    dtype = accumulation_dtype(x.dtype)
    fits = mixes.dim() == 2 and 1 <= len(mixes) <= MAX_MIXES and mixes.shape[1] == x.shape[2]
    if not fits or mixes.dtype != dtype or mixes.device != x.device or not mixes.is_contiguous():
        raise RuntimeError(
            f'token_shift: expected mixes of shape (1 to {MAX_MIXES}, {x.shape[2]}), contiguous, '
            f'{dtype}, on {x.device}; got {tuple(mixes.shape)}, {mixes.dtype}, on {mixes.device}'
        )
    if grads is not None and (
        len(grads) != len(mixes)
        or any((g.shape, g.dtype, g.device) != (x.shape, x.dtype, x.device) for g in grads)
    ):
        raise RuntimeError(
            f'token_shift_backward: expected {len(mixes)} gradients of shape {tuple(x.shape)}, '
            f'{x.dtype}, on {x.device}; got {[(tuple(g.shape), g.dtype) for g in grads]}'
        )


def _sizes(
    x: Tensor,
    height: int,
    width: int,
    shift_pixel: int,
    gamma: float,
    mode: str,
    heads: int,
    reverse: bool = False,
) -> tuple[tuple[int], int, tuple[int, ...]]:
    """Return the grid, the blocks of an image's tokens, and the kernel arguments from T to x_c."""
    batch, tokens, channels = x.shape
    blocks = triton.cdiv(tokens, _BLOCKS['BLOCK_T'])
    grid = (batch * blocks * triton.cdiv(channels, _BLOCKS['BLOCK_C']),)
    step = min(shift_pixel, max(height, width)) * (-1 if reverse else 1)
    head = channels // heads
    bounds = shift_bounds(head, gamma, mode)[1:]
    return grid, blocks, (tokens, channels, blocks, height, width, step, head, *bounds, *x.stride())


def q_shift(
    x: Tensor,
    height: int,
    width: int,
    shift_pixel: int,
    channel_gamma: float,
    reverse: bool,
    heads: int = 1,
) -> Tensor:
    """Run ``vrwkv_ops::q_shift``."""
    shift = (height, width, shift_pixel, channel_gamma, 'q_shift', heads)
    _check(x, *shift)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    grid, _, sizes = _sizes(x, *shift, reverse)
    with torch.cuda.device_of(x):
        q_shift_kernel[grid](x, out, *sizes, **_BLOCKS)
    return out


def forward(
    x: Tensor,
    mixes: Tensor,
    height: int,
    width: int,
    shift_pixel: int,
    channel_gamma: float,
    mode: str,
    heads: int = 1,
) -> list[Tensor]:
    """Run ``vrwkv_ops::token_shift_forward``."""
    shift = (height, width, shift_pixel, channel_gamma, mode, heads)
    _check(x, *shift)
    _check_mixes(x, mixes)
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in mixes]
    if x.numel() == 0:
        return outs
    grid, _, sizes = _sizes(x, *shift)
    with torch.cuda.device_of(x):
        token_shift_kernel[grid](x, mixes, *_padded(outs), *sizes, N=len(mixes), **_BLOCKS)
    return outs


def backward(
    grads: Sequence[Tensor],
    x: Tensor,
    mixes: Tensor,
    height: int,
    width: int,
    shift_pixel: int,
    channel_gamma: float,
    mode: str,
    heads: int = 1,
) -> tuple[Tensor, Tensor]:
    """Run ``vrwkv_ops::token_shift_backward``."""
    shift = (height, width, shift_pixel, channel_gamma, mode, heads)
    _check(x, *shift)
    _check_mixes(x, mixes, grads)
    gx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return gx, torch.zeros_like(mixes)
    grid, blocks, sizes = _sizes(x, *shift)
    pieces = x.shape[0] * blocks
    gmixes = mixes.new_empty(len(mixes), pieces, x.shape[2])
    grads = _padded(grads)
    strides = [stride for g in grads for stride in g.stride()]
    with torch.cuda.device_of(x):
        token_shift_backward_kernel[grid](
            *grads, x, mixes, gx, gmixes, *sizes, *strides, pieces, N=len(mixes), **_BLOCKS
        )
        # In a fixed order and without atomics.
        gmixes = gmixes.sum(1, dtype=torch.float64).to(mixes.dtype)
    return gx, gmixes


def _padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Repeat the first tensor up to the number of kernel arguments; the copies are not used."""
    return [*tensors, *[tensors[0]] * (MAX_MIXES - len(tensors))]
