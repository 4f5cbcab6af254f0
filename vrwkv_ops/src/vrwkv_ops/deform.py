"""Multi-scale deformable attention in plain PyTorch, on any device, a few queries at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vrwkv_ops.checks import accumulation_dtype


def _chunks(queries: int, points: int) -> Iterator[slice]:
    """Yield ranges of queries whose samples take less memory than the output."""
    step = max(1, queries // (4 * max(1, points)))
    for first in range(0, queries, step):
        yield slice(first, first + step)


def _corners(locations: Tensor, height: int, width: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield, for each of the four pixels around points, what an interpolation needs.

    Args:
        locations: x and y as fractions of the map, shape (..., 2).
        height: Rows of the map.
        width: Columns of the map.

    Yields:
        The pixel's index, whether it is inside the map, its weight, and the derivatives of the
        weight by x and y; all of shape (...).
    """
    # The steps of grid_sample: a rounding may decide which pixel a gradient sees.
    x, y = (
        (2 * locations[..., n] - 1 + 1) * (size / 2) - 0.5 for n, size in ((0, width), (1, height))
    )
    column, row = x.floor(), y.floor()
    right, down = x - column, y - row
    for below, weight_y, sign_y in ((0, 1 - down, -height), (1, down, height)):
        for beside, weight_x, sign_x in ((0, 1 - right, -width), (1, right, width)):
            c, r = column + beside, row + below
            inside = (c >= 0) & (c < width) & (r >= 0) & (r < height)
            c, r = (torch.where(inside, n, 0).long() for n in (c, r))
            yield (
                r * width + c,
                inside,
                weight_y * weight_x,
                sign_x * weight_y,
                sign_y * weight_x,
            )


def _levels(shapes: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Yield level, first value, height and width of each map."""
    start = 0
    for level, (height, width) in enumerate(zip(shapes[::2], shapes[1::2], strict=True)):
        yield level, start, height, width
        start += height * width


def _places(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of images and heads, to index (B, Q, H, P) samples."""
    images = torch.arange(value.shape[0], device=value.device)[:, None, None, None]
    heads = torch.arange(value.shape[2], device=value.device)[:, None]
    return images, heads


def forward(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Run :func:`vrwkv_ops.ms_deform_attn`; ``shapes`` are height and width of every map, flat."""
    dtype = accumulation_dtype(value.dtype)
    images, heads = _places(value)
    out = value.new_empty(*locations.shape[:3], value.shape[3])
    for rows in _chunks(out.shape[1], locations.shape[4]):
        total = out.new_zeros(out[:, rows].shape, dtype=dtype)
        for level, start, height, width in _levels(shapes):
            attention = weights[:, rows, :, level].to(dtype)
            points = locations[:, rows, :, level].to(dtype)
            for index, inside, weight, *_ in _corners(points, height, width):
                pixels = value[images, start + index, heads].to(dtype)
                pixels.mul_((attention * weight)[..., None]).masked_fill_(~inside[..., None], 0)
                total += pixels.sum(3)
        out[:, rows] = total
    return out.flatten(2)


def backward(
    grad: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights through :func:`forward`."""
    dtype = accumulation_dtype(value.dtype)
    images, heads = _places(value)
    grad = grad.unflatten(2, value.shape[2:])
    gvalue = value.new_zeros(value.shape[:3].numel(), value.shape[3], dtype=dtype)
    glocations = locations.new_zeros(locations.shape)
    gweights = weights.new_zeros(weights.shape)
    for rows in _chunks(grad.shape[1], locations.shape[4]):
        part = grad[:, rows, :, None].to(dtype)
        for level, start, height, width in _levels(shapes):
            attention = weights[:, rows, :, level].to(dtype)
            points = locations[:, rows, :, level].to(dtype)
            sums = torch.zeros(3, *attention.shape, dtype=dtype, device=value.device)
            for index, inside, *factors in _corners(points, height, width):
                pixels = value[images, start + index, heads].to(dtype)
                dot = pixels.mul_(part).sum(-1).masked_fill_(~inside, 0)
                for total, factor in zip(sums, factors, strict=True):
                    total += factor * dot
                # In a fixed order on the CPU; elsewhere PyTorch's switch decides.
                source = part * (attention * factors[0])[..., None]
                source.masked_fill_(~inside[..., None], 0)
                place = (
                    (images * value.shape[1] + start + index) * value.shape[2] + heads
                ).flatten()
                source = source.flatten(0, 3)
                if value.device.type == 'cpu':
                    gvalue.scatter_add_(0, place[:, None].expand_as(source), source)
                else:
                    gvalue.index_add_(0, place, source)
            gweights[:, rows, :, level] = sums[0].to(weights.dtype)
            by_place = torch.stack([attention * sums[1], attention * sums[2]], -1)
            glocations[:, rows, :, level] = by_place.to(locations.dtype)
    return gvalue.view(value.shape).to(value.dtype), glocations, gweights
