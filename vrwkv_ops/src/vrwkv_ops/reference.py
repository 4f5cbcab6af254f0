"""The operators as plain loops: slow, easy to read, and the reference for all kernels.

All are differentiable by PyTorch's autograd and work in any floating dtype and on any device.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vrwkv_ops.checks import (
    MAX_KEY,
    accumulation_dtype,
    check_bi_wkv,
    check_bi_wkv6,
    check_ms_deform_attn,
    check_pointwise,
    check_q_shift,
    check_token_shift,
    shift_bounds,
)


def _states_before(w: Tensor, k: Tensor, v: Tensor, order: range) -> list[tuple]:
    """Sum, for every token, over the tokens that come before it in ``order``.

    Returns:
        One tuple (a, c, p) per token, each (B, C): numerator ``a e^p`` and denominator ``c e^p``.
    """
    states = [None] * len(order)
    a = torch.zeros_like(k[:, 0])  # (B, C)
    c = torch.zeros_like(a)
    p = torch.full_like(a, float('-inf'))
    for t in order:
        states[t] = (a, c, p)
        # (a, c) e^p  <-  e^-w (a, c) e^p + e^k (v, 1), under the larger of the two exponents
        k_t, v_t = k[:, t], v[:, t]
        q = torch.maximum(p - w, k_t)
        decay, gain = torch.exp(p - w - q), torch.exp(k_t - q)
        a, c, p = decay * a + gain * v_t, decay * c + gain, q
    return states


def bi_wkv_reference(w: Tensor, u: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Compute Bi-WKV token by token; arguments and result as for :func:`vrwkv_ops.bi_wkv`."""
    check_bi_wkv(w, u, k, v, causal)
    out_dtype = k.dtype
    dtype = accumulation_dtype(k.dtype)
    w, u, v = w.to(dtype), u.to(dtype), v.to(dtype)
    k = k.to(dtype).clamp(-MAX_KEY, MAX_KEY)
    tokens = k.shape[1]

    past = _states_before(w, k, v, range(tokens))  # A, C of the paper
    future = _states_before(w, k, v, range(tokens - 1, -1, -1))  # B, D
    y = []
    for t in range(tokens):
        # The exponent of the current token is u + k_t.
        parts = [past[t], (v[:, t], torch.ones_like(v[:, t]), u + k[:, t])]
        if not causal:
            parts.append(future[t])
        q = torch.stack([p for _, _, p in parts]).amax(0)
        numerator = sum(torch.exp(p - q) * a for a, _, p in parts)
        denominator = sum(torch.exp(p - q) * c for _, c, p in parts)
        y.append(numerator / denominator)
    return torch.stack(y, dim=1).to(out_dtype)  # (B, T, C)


def bi_wkv6_reference(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, causal: bool = False
) -> Tensor:
    """Compute Bi-WKV6 token by token; arguments and result as for :func:`vrwkv_ops.bi_wkv6`."""
    check_bi_wkv6(r, k, v, w, u, causal)
    out_dtype, dtype = v.dtype, accumulation_dtype(v.dtype)
    # (B, T, heads, channels of a head)
    r, k, v, w = (x.to(dtype).unflatten(2, u.shape) for x in (r, k, v, w))
    decay, u = torch.exp(-torch.exp(w)), u.to(dtype)
    tokens = range(r.shape[1])
    y = [((r[:, t] * u * k[:, t]).sum(-1, keepdim=True) * v[:, t]) for t in tokens]
    for order in (tokens,) if causal else (tokens, reversed(tokens)):
        state = r.new_zeros(r.shape[0], *u.shape, u.shape[1])
        for t in order:
            y[t] = y[t] + (r[:, t].unsqueeze(-2) @ state).squeeze(-2)
            new = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
            state = decay[:, t].unsqueeze(-1) * state + new
    return torch.stack(y, dim=1).flatten(2).to(out_dtype)


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sample point by point; arguments and result as for :func:`vrwkv_ops.ms_deform_attn`."""
    check_ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)
    batch, queries, heads, _, points, _ = sampling_locations.shape
    dtype = accumulation_dtype(value.dtype)
    locations, weights = sampling_locations.to(dtype), attention_weights.to(dtype)
    # Zeros that depend on the values: a result without any sample can be differentiated, too.
    out = value[:, :0].to(dtype).sum(1)[:, None].repeat(1, queries, 1, 1)
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        grid = value[:, start : start + height * width].unflatten(1, (height, width)).to(dtype)
        start += height * width
        for b, q, h, n in itertools.product(*map(range, (batch, queries, heads, points))):
            x, y = locations[b, q, h, level, n]
            # The steps of grid_sample: a rounding may decide which pixel a gradient sees.
            x, y = (2 * x - 1 + 1) * (width / 2) - 0.5, (2 * y - 1 + 1) * (height / 2) - 0.5
            if not (-1 <= x < width and -1 <= y < height):
                continue
            column, row = math.floor(x.item()), math.floor(y.item())
            for r, weight_y in ((row, row + 1 - y), (row + 1, y - row)):
                for c, weight_x in ((column, column + 1 - x), (column + 1, x - column)):
                    if 0 <= r < height and 0 <= c < width:
                        weight = weights[b, q, h, level, n] * weight_y * weight_x
                        out[b, q, h] = out[b, q, h] + weight * grid[b, r, c, h]
    return out.flatten(2).to(value.dtype)


def q_shift_reference(
    x: Tensor,
    resolution: tuple[int, int],
    shift_pixel: int = 1,
    channel_gamma: float = 1 / 4,
    heads: int = 1,
) -> Tensor:
    """Compute Q-Shift token by token; arguments and result as for :func:`vrwkv_ops.q_shift`."""
    check_q_shift(x, resolution, shift_pixel, channel_gamma, heads)
    return _shift(x, resolution, shift_pixel, channel_gamma, 'q_shift', heads)


def squared_relu_reference(x: Tensor) -> Tensor:
    """Compute ``relu(x) ** 2``; argument and result as for :func:`vrwkv_ops.squared_relu`."""
    check_pointwise('squared_relu', x=x)
    positive = x.to(accumulation_dtype(x.dtype)).clamp(min=0)
    return (positive * positive).to(x.dtype)


def sigmoid_gate_reference(r: Tensor, x: Tensor) -> Tensor:
    """Compute ``x / (1 + e^-r)``; arguments and result as for :func:`vrwkv_ops.sigmoid_gate`."""
    check_pointwise('sigmoid_gate', r=r, x=x)
    out_dtype = torch.promote_types(r.dtype, x.dtype)
    dtype = accumulation_dtype(out_dtype)
    return (x.to(dtype) / (1 + torch.exp(-r.to(dtype)))).to(out_dtype)


def token_shift_reference(
    x: Tensor,
    mixes: Tensor | Sequence[Tensor],
    resolution: tuple[int, int] | None = None,
    shift_pixel: int = 1,
    channel_gamma: float | None = 1 / 4,
    mode: str = 'q_shift',
    heads: int = 1,
) -> tuple[Tensor, ...]:
    """Mix tokens with neighbours; arguments and results as for :func:`vrwkv_ops.token_shift`."""
    check_token_shift(x, mixes, resolution, shift_pixel, channel_gamma, mode, heads)
    dtype = accumulation_dtype(x.dtype)
    grid = resolution if mode == 'q_shift' else (1, x.shape[1])
    own = x.to(dtype)
    shifted = _shift(own, grid, shift_pixel, channel_gamma, mode, heads)
    mixes = [mix.to(dtype).reshape(-1) for mix in mixes]
    return tuple((own * mix + shifted * (1 - mix)).to(x.dtype) for mix in mixes)


def _shift(
    x: Tensor,
    grid: tuple[int, int],
    shift_pixel: int,
    channel_gamma: float | None,
    mode: str,
    heads: int,
) -> Tensor:
    height, width = grid
    x = x.unflatten(2, (heads, x.shape[2] // heads))
    bounds = shift_bounds(x.shape[3], channel_gamma, mode)
    s = shift_pixel
    sources = ((0, -s), (0, s), (-s, 0), (s, 0))  # (rows, columns): left, right, above, below

    tokens = []
    for h in range(height):
        for w in range(width):
            groups = []
            for n, (dh, dw) in enumerate(sources):
                row, column = h + dh, w + dw
                inside = 0 <= row < height and 0 <= column < width
                group = x[:, row * width + column if inside else 0, :, bounds[n] : bounds[n + 1]]
                groups.append(group if inside else torch.zeros_like(group))
            # Channels past the groups are not shifted.
            groups.append(x[:, h * width + w, :, bounds[4] :])
            tokens.append(torch.cat(groups, dim=-1).flatten(1))
    return torch.stack(tokens, dim=1)  # (B, T, C)
