"""Q-Shift in plain PyTorch: one slice copy per channel group, on any device."""

import torch
from torch import Tensor

from vrwkv_ops.checks import q_shift_bounds


def q_shift_slices(
    x: Tensor,
    height: int,
    width: int,
    shift_pixel: int,
    channel_gamma: float,
    reverse: bool = False,
) -> Tensor:
    """Shifts four channel groups by ``shift_pixel``: from left, right, above and below.

    Args:
        x: Tokens in row-major order, (B, height * width, C).
        height: Rows of the token grid.
        width: Columns of the token grid.
        shift_pixel: Distance in tokens.
        channel_gamma: Share of the channels in one group.
        reverse: Shift the other way, which is the adjoint.

    Returns:
        A new contiguous tensor of the shape of ``x``; zero came in from outside the grid.
    """
    grid = x.reshape(x.shape[0], height, width, x.shape[2])
    out = torch.zeros_like(grid, memory_format=torch.contiguous_format)
    bounds = q_shift_bounds(x.shape[2], channel_gamma)
    # Group 1 takes from the column to the left, 2 right, 3 from the row above, 4 below.
    for group, (axis, size, step) in enumerate(
        ((2, width, 1), (2, width, -1), (1, height, 1), (1, height, -1))
    ):
        length = size - shift_pixel
        if length <= 0:
            continue
        forward = (step > 0) is not reverse
        source, target = (0, shift_pixel) if forward else (shift_pixel, 0)
        channels = slice(bounds[group], bounds[group + 1])
        out[..., channels].narrow(axis, target, length).copy_(
            grid[..., channels].narrow(axis, source, length)
        )
    out[..., bounds[4] :] = grid[..., bounds[4] :]
    return out.reshape(x.shape)
