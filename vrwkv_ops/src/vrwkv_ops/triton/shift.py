"""Token shifts in Triton: a program takes ``BLOCK_T`` tokens of ``BLOCK_C`` channels."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrwkv_ops.checks import MAX_MIXES, SHIFT_MODES, accumulation_dtype, shift_bounds
from vrwkv_ops.triton.bi_wkv import locate

_BLOCKS = dict(BLOCK_T=32, BLOCK_C=64)


@triton.jit
def _shifted(
    ptr, b, t, c, stride_b, stride_t, stride_c, height, width, step, b1, b2, b3, b4, valid
):
    """The neighbours that the channels' groups take, of tokens t (BLOCK_T, 1): 0 from outside.

    Group 1, channels up to b1, takes the token ``step`` to the left, 2 the one to the right, 3 the
    one above, 4 the one below.
    """
    right = tl.where(c < b1, -1, tl.where(c < b2, 1, 0)) * step
    down = tl.where((c >= b2) & (c < b3), -1, tl.where((c >= b3) & (c < b4), 1, 0)) * step
    row, column = t // width + down, t % width + right
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & valid
    at = b * stride_b + (row * width + column) * stride_t + c * stride_c
    return tl.load(ptr + at, mask=inside, other=0.0)


@triton.jit
def q_shift_kernel(
    x_ptr, out_ptr, C, blocks, height, width, step, b1, b2, b3, b4, x_b, x_t, x_c,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Shifts the groups of channels of x (B, height * width, C)."""
    b, block, r, c = locate(C, blocks, BLOCK_T, BLOCK_C)
    t, tokens = block * BLOCK_T + r, height * width
    valid = (t < tokens) & (c < C)
    x = _shifted(x_ptr, b, t, c, x_b, x_t, x_c, height, width, step, b1, b2, b3, b4, valid)
    tl.store(out_ptr + (b * tokens + t) * C + c, x, mask=valid)


@triton.jit
def token_shift_kernel(
    x_ptr, mixes_ptr, out0_ptr, out1_ptr, out2_ptr,
    C, blocks, height, width, step, b1, b2, b3, b4, x_b, x_t, x_c,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gives x * mix + shift(x) * (1 - mix) for N mixes (N, C), each (B, height * width, C)."""
    ACC: tl.constexpr = mixes_ptr.dtype.element_ty
    b, block, r, c = locate(C, blocks, BLOCK_T, BLOCK_C)
    t, tokens = block * BLOCK_T + r, height * width
    valid = (t < tokens) & (c < C)
    own = tl.load(x_ptr + b * x_b + t * x_t + c * x_c, mask=valid, other=0.0).to(ACC)
    other = _shifted(x_ptr, b, t, c, x_b, x_t, x_c, height, width, step, b1, b2, b3, b4, valid).to(
        ACC
    )
    for i in tl.static_range(N):
        mix = tl.load(mixes_ptr + i * C + c, mask=c < C, other=0.0)
        out_ptr = out0_ptr if i == 0 else (out1_ptr if i == 1 else out2_ptr)
        out = (own * mix + other * (1.0 - mix)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (b * tokens + t) * C + c, out, mask=valid)


@triton.jit
def token_shift_backward_kernel(
    g0_ptr, g1_ptr, g2_ptr, x_ptr, mixes_ptr, gx_ptr, gmixes_ptr,
    C, blocks, height, width, step, b1, b2, b3, b4, x_b, x_t, x_c,
    g0_b, g0_t, g0_c, g1_b, g1_t, g1_c, g2_b, g2_t, g2_c, pieces,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gives gx (B, height * width, C), and what this program gives to gmixes (N, pieces, C)."""
    ACC: tl.constexpr = mixes_ptr.dtype.element_ty
    b, block, r, c = locate(C, blocks, BLOCK_T, BLOCK_C)
    t, tokens = block * BLOCK_T + r, height * width
    valid = (t < tokens) & (c < C)
    own = tl.load(x_ptr + b * x_b + t * x_t + c * x_c, mask=valid, other=0.0).to(ACC)
    other = _shifted(x_ptr, b, t, c, x_b, x_t, x_c, height, width, step, b1, b2, b3, b4, valid).to(
        ACC
    )
    gx = tl.zeros([BLOCK_T, BLOCK_C], ACC)
    for i in tl.static_range(N):
        mix = tl.load(mixes_ptr + i * C + c, mask=c < C, other=0.0)
        ptr = g0_ptr if i == 0 else (g1_ptr if i == 1 else g2_ptr)
        g_b = g0_b if i == 0 else (g1_b if i == 1 else g2_b)
        g_t = g0_t if i == 0 else (g1_t if i == 1 else g2_t)
        g_c = g0_c if i == 0 else (g1_c if i == 1 else g2_c)
        g = tl.load(ptr + b * g_b + t * g_t + c * g_c, mask=valid, other=0.0).to(ACC)
        # A shift's adjoint is the shift the other way.
        back = _shifted(ptr, b, t, c, g_b, g_t, g_c, height, width, -step, b1, b2, b3, b4, valid)
        gx += g * mix + back.to(ACC) * (1.0 - mix)
        piece = tl.sum(g * (own - other), axis=0, keep_dims=True)
        tl.store(gmixes_ptr + (i * pieces + b * blocks + block) * C + c, piece, mask=c < C)
    tl.store(gx_ptr + (b * tokens + t) * C + c, gx.to(gx_ptr.dtype.element_ty), mask=valid)


def _check(
    x: Tensor, height: int, width: int, shift_pixel: int, gamma: float, mode: str = 'q_shift'
) -> None:
    """Guards direct calls through torch.ops, which would read foreign memory."""
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


def _grid(x: Tensor) -> tuple[tuple[int], int]:
    """Programs, and pieces that the tokens of an image are cut into."""
    blocks = triton.cdiv(x.shape[1], _BLOCKS['BLOCK_T'])
    return (x.shape[0] * blocks * triton.cdiv(x.shape[2], _BLOCKS['BLOCK_C']),), blocks


def q_shift(
    x: Tensor, height: int, width: int, shift_pixel: int, channel_gamma: float, reverse: bool
) -> Tensor:
    """The operator ``vrwkv_ops::q_shift``."""
    _check(x, height, width, shift_pixel, channel_gamma)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    bounds = shift_bounds(x.shape[2], channel_gamma)[1:]
    step = min(shift_pixel, max(height, width))
    grid, blocks = _grid(x)
    with torch.cuda.device_of(x):
        q_shift_kernel[grid](
            x, out, x.shape[2], blocks, height, width, -step if reverse else step, *bounds,
            *x.stride(), **_BLOCKS,
        )  # fmt: skip
    return out


def token_shift(
    x: Tensor,
    mixes: Tensor,
    height: int,
    width: int,
    shift_pixel: int,
    channel_gamma: float,
    mode: str,
) -> list[Tensor]:
    """The operator ``vrwkv_ops::token_shift``."""
    _check(x, height, width, shift_pixel, channel_gamma, mode)
    _check_mixes(x, mixes)
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in mixes]
    if x.numel() == 0:
        return outs
    grid, blocks = _grid(x)
    bounds = shift_bounds(x.shape[2], channel_gamma, mode)[1:]
    step = min(shift_pixel, max(height, width))
    with torch.cuda.device_of(x):
        token_shift_kernel[grid](
            x, mixes, *_padded(outs), x.shape[2], blocks, height, width, step, *bounds, *x.stride(),
            N=len(mixes), **_BLOCKS,
        )  # fmt: skip
    return outs


def token_shift_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    mixes: Tensor,
    height: int,
    width: int,
    shift_pixel: int,
    channel_gamma: float,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """The operator ``vrwkv_ops::token_shift_backward``."""
    _check(x, height, width, shift_pixel, channel_gamma, mode)
    _check_mixes(x, mixes, grads)
    gx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return gx, torch.zeros_like(mixes)
    grid, blocks = _grid(x)
    pieces = x.shape[0] * blocks
    gmixes = mixes.new_empty(len(mixes), pieces, x.shape[2])
    bounds = shift_bounds(x.shape[2], channel_gamma, mode)[1:]
    step = min(shift_pixel, max(height, width))
    strides = [stride for g in _padded(grads) for stride in g.stride()]
    with torch.cuda.device_of(x):
        token_shift_backward_kernel[grid](
            *_padded(grads), x, mixes, gx, gmixes, x.shape[2], blocks, height, width, step, *bounds,
            *x.stride(), *strides, pieces, N=len(mixes), **_BLOCKS,
        )  # fmt: skip
        # In a fixed order and without atomics.
        gmixes = gmixes.sum(1, dtype=torch.float64).to(mixes.dtype)
    return gx, gmixes


def _padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As many as the kernels take; they do not look at what is too many."""
    return [*tensors, *[tensors[0]] * (MAX_MIXES - len(tensors))]
