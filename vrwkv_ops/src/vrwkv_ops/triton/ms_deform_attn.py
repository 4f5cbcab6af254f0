"""Multi-scale deformable attention in Triton.

A place is a query and head of an image. A program has some places and all of their channels.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrwkv_ops.checks import accumulation_dtype

_ELEMENTS = 1024  # places times channels of a program


@triton.jit
def _point(locations_ptr, weights_ptr, i, valid, height, width, ACC: tl.constexpr):
    """Find points in a map.

    Returns:
        Column and row of the pixel to the upper left, distances to the right and down from it,
        attention weights, and which points see the map; all (places, 1).
    """
    x = tl.load(locations_ptr + 2 * i, mask=valid, other=-9.0).to(ACC)
    y = tl.load(locations_ptr + 2 * i + 1, mask=valid, other=-9.0).to(ACC)
    # The steps of grid_sample: a rounding may decide which pixel a gradient sees.
    x = (2.0 * x - 1.0 + 1.0) * (width * 0.5) - 0.5
    y = (2.0 * y - 1.0 + 1.0) * (height * 0.5) - 0.5
    inside = valid & (x >= -1) & (y >= -1) & (x < width) & (y < height)
    x, y = tl.where(inside, x, 0.0), tl.where(inside, y, 0.0)
    column, row = tl.floor(x).to(tl.int64), tl.floor(y).to(tl.int64)
    attention = tl.load(weights_ptr + i, mask=inside, other=0.0).to(ACC)
    return column, row, x - column, y - row, attention, inside


@triton.jit
def _corner(
    column, row, inside, height, width, start, image, head, S, H, D, N: tl.constexpr
):  # fmt: skip
    """Find pixel N (row by row) around points: the offset of its first channel, if it exists."""
    c, r = column + N % 2, row + N // 2
    exists = inside & (c >= 0) & (c < width) & (r >= 0) & (r < height)
    return ((image * S + start + r * width + c) * H + head) * D, exists


@triton.jit
def forward_kernel(
    value_ptr, locations_ptr, weights_ptr, shapes_ptr, out_ptr, places, Q, S, H, D, L, P,
    ACC: tl.constexpr, PLACES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the samples of each place."""
    place = (tl.program_id(0).to(tl.int64) * PLACES + tl.arange(0, PLACES))[:, None]
    valid = place < places
    image, head = place // H // Q, place % H
    d = tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros([PLACES, BLOCK_D], ACC)
    for level in range(L):
        height = tl.load(shapes_ptr + 3 * level)
        width = tl.load(shapes_ptr + 3 * level + 1)
        start = tl.load(shapes_ptr + 3 * level + 2)
        for n in range(P):
            column, row, right, down, attention, inside = _point(
                locations_ptr, weights_ptr, (place * L + level) * P + n, valid, height, width, ACC
            )
            for corner in tl.static_range(4):
                at, exists = _corner(
                    column, row, inside, height, width, start, image, head, S, H, D, corner
                )
                weight = (right if corner % 2 else 1 - right) * (down if corner // 2 else 1 - down)
                v = tl.load(value_ptr + at + d, mask=exists & (d < D), other=0.0).to(ACC)
                total += attention * weight * v
    tl.store(out_ptr + place * D + d, total.to(out_ptr.dtype.element_ty), mask=valid & (d < D))


@triton.jit
def backward_kernel(
    grad_ptr, value_ptr, locations_ptr, weights_ptr, shapes_ptr, sums_ptr, gpoints_ptr,
    gweights_ptr, places, Q, S, H, D, L, P,
    IN_ORDER: tl.constexpr, ACC: tl.constexpr, PLACES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of points and weights, and add up those of values.

    With IN_ORDER a program has all queries of one image and head, and adds in their order.
    """
    program = tl.program_id(0).to(tl.int64)
    first = (program * PLACES + tl.arange(0, PLACES))[:, None]
    if IN_ORDER:
        first = first // H * Q * H + first % H
    d = tl.arange(0, BLOCK_D)[None, :]
    for step in range(Q if IN_ORDER else 1):
        place = first + step * H
        valid = place < places
        image, head = place // H // Q, place % H
        g = tl.load(grad_ptr + place * D + d, mask=valid & (d < D), other=0.0).to(ACC)
        for level in range(L):
            height = tl.load(shapes_ptr + 3 * level)
            width = tl.load(shapes_ptr + 3 * level + 1)
            start = tl.load(shapes_ptr + 3 * level + 2)
            for n in range(P):
                i = (place * L + level) * P + n
                column, row, right, down, attention, inside = _point(
                    locations_ptr, weights_ptr, i, valid, height, width, ACC
                )
                gweight = tl.zeros([PLACES, 1], ACC)
                gx = tl.zeros([PLACES, 1], ACC)
                gy = tl.zeros([PLACES, 1], ACC)
                for corner in tl.static_range(4):
                    at, exists = _corner(
                        column, row, inside, height, width, start, image, head, S, H, D, corner
                    )
                    weight_x = right if corner % 2 else 1 - right
                    weight_y = down if corner // 2 else 1 - down
                    exists_d = exists & (d < D)
                    v = tl.load(value_ptr + at + d, mask=exists_d, other=0.0).to(ACC)
                    dot = tl.sum(g * v, axis=1, keep_dims=True)
                    gweight += weight_x * weight_y * dot
                    gx += weight_y * dot if corner % 2 else -weight_y * dot
                    gy += weight_x * dot if corner // 2 else -weight_x * dot
                    term = attention * weight_x * weight_y * g
                    tl.atomic_add(sums_ptr + at + d, term, mask=exists_d)
                to = gpoints_ptr.dtype.element_ty
                tl.store(gweights_ptr + i, gweight.to(to), mask=valid)
                tl.store(gpoints_ptr + 2 * i, (attention * width * gx).to(to), mask=valid)
                tl.store(gpoints_ptr + 2 * i + 1, (attention * height * gy).to(to), mask=valid)


@functools.lru_cache(64)
def _maps(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return height, width and first value of each map."""
    rows, start = [], 0
    for height, width in zip(shapes[::2], shapes[1::2], strict=True):
        rows.append((height, width, start))
        start += height * width
    return torch.tensor(rows, device=device)


def _arguments(
    value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict]:
    """Check direct calls through torch.ops; return the tensors, the sizes and the tile.

    Raises:
        RuntimeError: If shapes, dtypes or devices do not fit.
    """
    wide = accumulation_dtype(value.dtype)
    if (
        value.dim() != 4
        or locations.shape != (*weights.shape, 2)
        or weights.dim() != 5
        or (weights.shape[0], weights.shape[2]) != (value.shape[0], value.shape[2])
        or len(shapes) != 2 * weights.shape[3]
        or min(shapes, default=1) < 1
        or sum(h * w for h, w in zip(shapes[::2], shapes[1::2], strict=True)) != value.shape[1]
        or locations.dtype not in (value.dtype, wide)
        or (weights.dtype, weights.device) != (locations.dtype, value.device)
        or locations.device != value.device
    ):
        raise RuntimeError(
            'ms_deform_attn: expected value (B, S, H, D), height and width of L maps with S values '
            'in all, locations (B, Q, H, L, P, 2) and weights (B, Q, H, L, P) of the dtype of '
            f'value or of {wide}; got {tuple(value.shape)}, {list(shapes)}, '
            f'{tuple(locations.shape)} and {tuple(weights.shape)}'
        )
    _, queries, heads, levels, points = weights.shape
    maps = _maps(tuple(shapes), value.device)
    tensors = (*(x.contiguous() for x in (value, locations, weights)), maps)
    places, channels = weights.shape[:3].numel(), value.shape[3]
    sizes = (places, queries, value.shape[1], heads, channels, levels, points)
    block = triton.next_power_of_2(max(1, channels))
    acc = tl.float64 if wide == torch.float64 else tl.float32
    return tensors, sizes, dict(ACC=acc, PLACES=max(1, _ELEMENTS // block), BLOCK_D=block)


def ms_deform_attn(
    value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> Tensor:
    """Run ``vrwkv_ops::ms_deform_attn``."""
    tensors, sizes, tile = _arguments(value, shapes, locations, weights)
    out = value.new_empty(*weights.shape[:2], value.shape[2] * value.shape[3])
    if out.numel():
        with torch.cuda.device_of(value):
            grid = (triton.cdiv(sizes[0], tile['PLACES']),)
            forward_kernel[grid](*tensors, out, *sizes, **tile)
    return out


def ms_deform_attn_backward(
    grad: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run ``vrwkv_ops::ms_deform_attn_backward``.

    Raises:
        RuntimeError: If shapes, dtypes or devices do not fit.
    """
    tensors, sizes, tile = _arguments(value, shapes, locations, weights)
    expected = (*weights.shape[:2], value.shape[2] * value.shape[3])
    if grad.shape != expected or (grad.dtype, grad.device) != (value.dtype, value.device):
        raise RuntimeError(
            f'ms_deform_attn_backward: expected a gradient of shape {expected}, dtype and device '
            f'of value, got {tuple(grad.shape)}, {grad.dtype}, {grad.device}'
        )
    wide = accumulation_dtype(value.dtype)
    sums = torch.zeros(value.shape, dtype=wide, device=value.device)
    glocations = torch.zeros(locations.shape, dtype=locations.dtype, device=value.device)
    gweights = torch.zeros(weights.shape, dtype=weights.dtype, device=value.device)
    if grad.numel():
        in_order = torch.are_deterministic_algorithms_enabled()
        if in_order:
            tile['PLACES'], grid = 1, (value.shape[0] * value.shape[2],)
        else:
            grid = (triton.cdiv(sizes[0], tile['PLACES']),)
        with torch.cuda.device_of(value):
            backward_kernel[grid](
                grad.contiguous(), *tensors, sums, glocations, gweights, *sizes,
                IN_ORDER=in_order, **tile,
            )  # fmt: skip
    return sums.to(value.dtype), glocations, gweights
