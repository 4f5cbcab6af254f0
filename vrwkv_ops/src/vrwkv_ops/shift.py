"""Token shifts in plain PyTorch: one slice copy per channel group, on any device."""

import torch
from torch import Tensor

from vrwkv_ops.checks import shift_bounds
from vrwkv_ops.scan import token_sum


def shift_slices(
    x: Tensor,
    height: int,
    width: int,
    shift_pixel: int,
    channel_gamma: float,
    mode: str = 'q_shift',
    heads: int = 1,
    reverse: bool = False,
) -> Tensor:
    """Shift channel groups by ``shift_pixel``: from left, right, above and below.

    Args:
        x: Tokens in row-major order, (B, height * width, C).
        height: Rows of the token grid.
        width: Columns of the token grid.
        shift_pixel: Distance in tokens.
        channel_gamma: Share of a head's channels in one group.
        mode: Selects the groups, see :func:`vrwkv_ops.checks.shift_bounds`.
        heads: Equal runs of channels, each with the same groups.
        reverse: Shift the other way, which is the adjoint.

    Returns:
        A new contiguous tensor of the shape of ``x``, with zeros from outside the grid.
    """
    grid = x.reshape(x.shape[0], height, width, heads, x.shape[2] // heads)
    out = torch.zeros_like(grid, memory_format=torch.contiguous_format)
    bounds = shift_bounds(grid.shape[4], channel_gamma, mode)
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


def forward(
    x: Tensor, mixes: Tensor, height: int, width: int, *shift: int | float | str
) -> list[Tensor]:
    """Mix every token with its shifted neighbour: ``x * mix + shift(x) * (1 - mix)``.

    Args:
        x: Tokens, (B, height * width, C).
        mixes: Weights of the tokens themselves, (n, C), in the accumulation dtype.
        height: Rows of the token grid.
        width: Columns of the token grid.
        *shift: As in :func:`shift_slices`: ``shift_pixel``, ``channel_gamma``, ``mode``
            and ``heads``.

    Returns:
        One tensor like ``x`` for each of the mixes.
    """
    own = x.to(mixes.dtype)
    shifted = shift_slices(own, height, width, *shift)
    return [torch.addcmul(shifted * (1 - mix), own, mix).to(x.dtype) for mix in mixes]


def backward(
    grads: list[Tensor],
    x: Tensor,
    mixes: Tensor,
    height: int,
    width: int,
    *shift: int | float | str,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of :func:`forward`.

    Args:
        grads: Gradients of its results.
        x: As in :func:`forward`, like all that follow.
        mixes: See ``x``.
        height: See ``x``.
        width: See ``x``.
        *shift: See ``x``.

    Returns:
        Gradients of ``x`` and ``mixes``, in their dtypes.
    """
    own = x.to(mixes.dtype)
    difference = own - shift_slices(own, height, width, *shift)
    grads = [grad.to(mixes.dtype) for grad in grads]
    stays = sum(grad * mix for grad, mix in zip(grads, mixes, strict=True))
    moves = sum(grad * (1 - mix) for grad, mix in zip(grads, mixes, strict=True))
    gx = stays + shift_slices(moves, height, width, *shift, reverse=True)
    gmixes = torch.stack([token_sum(grad * difference) for grad in grads])
    return gx.to(x.dtype), gmixes
