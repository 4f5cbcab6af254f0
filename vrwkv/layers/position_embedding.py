"""Position embeddings on a grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_pos_embed(
    pos_embed: Tensor,
    source: tuple[int, int],
    target: tuple[int, int],
    mode: str = 'bicubic',
) -> Tensor:
    """Resize a position embedding to another grid of tokens.

    Args:
        pos_embed: The embedding, of shape ``(1, h * w, C)`` in row-major order.
        source: Its grid ``(h, w)``.
        target: The new grid ``(H, W)``.
        mode: Interpolation mode of :func:`torch.nn.functional.interpolate`, with
            ``align_corners=False``.

    Returns:
        The embedding on the target grid, of shape ``(1, H * W, C)`` and of the dtype of
        ``pos_embed``; ``pos_embed`` itself if the grids are equal.

    Raises:
        ValueError: If ``source`` does not have as many tokens as ``pos_embed``.
    """
    if pos_embed.dim() != 3 or pos_embed.shape[1] != source[0] * source[1]:
        raise ValueError(
            f'pos_embed must have the shape (1, {source[0]} * {source[1]}, C) of its grid '
            f'{tuple(source)}, got {tuple(pos_embed.shape)}'
        )
    if _are_equal(source, target):
        return pos_embed
    # Half precision would round the interpolation's weights, and some backends lack it.
    acc = torch.promote_types(pos_embed.dtype, torch.float32)
    grid = pos_embed.to(acc).transpose(1, 2).unflatten(2, source)
    grid = F.interpolate(grid, size=target, mode=mode, align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)


def _are_equal(source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Return whether two grids are known to be equal.

    torch.compile and torch.export may have symbols for sizes. Comparing a symbol with a number
    would restrict the graph to one grid, so such grids count as unequal: interpolation to an equal
    grid changes nothing.
    """
    if not torch.compiler.is_compiling():
        return source == target
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return statically_known_true(source[0] == target[0]) and statically_known_true(
        source[1] == target[1]
    )
