"""From an image to tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._checks import check_int
from .pieces import piece_size


class PatchEmbed(nn.Module):
    """Cut an image into square patches and project each to a token.

    Rows at the bottom and columns at the right that do not fill a patch are left out, as in
    mmpretrain's ``VisionTransformer``. Pad the images if these pixels matter.

    Args:
        in_channels: Channels of the image.
        embed_dims: Channels of a token.
        patch_size: Side of a patch in pixels.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If an argument is smaller than 1.
    """

    def __init__(self, in_channels: int = 3, embed_dims: int = 256, patch_size: int = 16) -> None:
        super().__init__()
        check_int('in_channels', in_channels, 1)
        check_int('embed_dims', embed_dims, 1)
        check_int('patch_size', patch_size, 1)
        self.patch_size = patch_size
        self.projection = nn.Conv2d(in_channels, embed_dims, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed a batch of images.

        Args:
            x: Images of shape ``(B, in_channels, H, W)``, floating point.

        Returns:
            Tokens of shape ``(B, h * w, embed_dims)`` in row-major order, and their grid
            ``(h, w)``, the image's sides divided by ``patch_size`` and rounded down.

        Raises:
            TypeError: If ``x`` is not floating point.
            ValueError: If ``x`` is not a batch of images with ``in_channels`` channels, or is
                smaller than a patch.
        """
        if x.dim() != 4 or x.shape[1] != self.projection.in_channels:
            raise ValueError(
                f'expected images of shape (B, {self.projection.in_channels}, H, W), '
                f'got {tuple(x.shape)}'
            )
        if min(x.shape[2:]) < self.patch_size:
            raise ValueError(
                f'the image must be at least one patch high and wide ({self.patch_size} pixels), '
                f'got height {x.shape[2]} and width {x.shape[3]}'
            )
        if not x.is_floating_point():
            raise TypeError(
                f'expected floating-point images, got {x.dtype}: normalise them first, for '
                'instance with the data_preprocessor'
            )
        size = piece_size(x)
        if size is not None and x.shape[2] * x.shape[3] > size * self.patch_size**2:
            return self._embed_strips(x, size)
        x = self.projection(x)
        height, width = x.shape[2:]
        if torch.jit.is_tracing():
            # In a trace, as for FLOP counts, shapes are tensors; operators take integers.
            height, width = int(height), int(width)
        return x.flatten(2).transpose(1, 2), (height, width)

    def _embed_strips(self, x: Tensor, tokens: int) -> tuple[Tensor, tuple[int, int]]:
        """Embed strips of the image of about so many tokens; a convolution may copy its input."""
        height, width = (side // self.patch_size for side in x.shape[2:])
        rows, side = max(1, tokens // width), self.patch_size
        out = None
        for top in range(0, height, rows):
            strip = self.projection(x[:, :, top * side : min(top + rows, height) * side])
            if out is None:
                out = strip.new_empty(len(x), height * width, strip.shape[1])
            out[:, top * width : (top + rows) * width] = strip.flatten(2).transpose(1, 2)
        return out, (height, width)
