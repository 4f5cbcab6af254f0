"""The common part of the plain backbones: everything but the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..layers import PatchEmbed, resize_pos_embed
from ..layers._checks import check_choice, check_int, check_rate
from ..weights import GRID_KEY, fit_channels, fit_pos_embed, require_fit

# For torch.fx, resizing is one step: it depends on sizes that a symbolic trace does not have.
torch.fx.wrap('resize_pos_embed')

INTERPOLATE_MODES = ('bicubic', 'bilinear')


class PlainBackbone(nn.Module):
    """A plain backbone: patch and position embedding, layers of one width, a final norm layer.

    Loading weights resizes the position embedding if the grids differ, adapts a first convolution
    for three channels to ``in_channels`` (with a warning), and raises an error if the weights are
    those of another model, with ``strict=False`` too. If the grid is not square, the
    state dict has it as ``pos_embed_grid``.

    Args:
        make_layer: Returns a layer for its index, from 0, and its drop path rate. The layer is
            called with tokens and their grid.
        img_size: Height and width of the training images in pixels, or one number for both.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the images.
        out_indices: Layer or layers whose outputs are returned, from 0; negative ones count from
            the end.
        drop_rate: Dropout after the position embedding, in [0, 1].
        embed_dims: Channels of a token, C.
        depth: Number of layers.
        drop_path_rate: Stochastic depth of the last layer, in [0, 1]; it rises linearly from 0 in
            the first one.
        final_norm: Whether to normalise the output of the last layer.
        interpolate_mode: How the position embedding is resized: ``'bicubic'`` or ``'bilinear'``.
        norm_eps: Epsilon of the final norm layer.
        class_token_slot: Whether ``pos_embed`` begins with the slot of a class token, which is not
            used.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of its range.
    """

    #: For mmpretrain's class-activation maps: all tokens lie on the grid.
    num_extra_tokens = 0

    def __init__(
        self,
        make_layer: Callable[[int, float], nn.Module],
        *,
        img_size: int | Sequence[int],
        patch_size: int,
        in_channels: int,
        out_indices: int | Sequence[int],
        drop_rate: float,
        embed_dims: int,
        depth: int,
        drop_path_rate: float,
        final_norm: bool,
        interpolate_mode: str,
        norm_eps: float = 1e-5,
        class_token_slot: bool = False,
    ) -> None:
        super().__init__()
        check_int('depth', depth, 1)
        check_rate('drop_rate', drop_rate)
        check_rate('drop_path_rate', drop_path_rate)
        check_choice('interpolate_mode', interpolate_mode, INTERPOLATE_MODES)
        self.embed_dims = embed_dims
        self.depth = depth
        self.interpolate_mode = interpolate_mode
        self.out_indices = _layer_indices(out_indices, depth)

        self.patch_embed = PatchEmbed(in_channels, embed_dims, patch_size)
        self.img_size = _image_size(img_size, patch_size)
        self.patch_resolution = tuple(side // patch_size for side in self.img_size)
        self.num_slots = int(class_token_slot)
        tokens = self.num_slots + math.prod(self.patch_resolution)
        if self.patch_resolution[0] != self.patch_resolution[1]:
            # The number of tokens does not tell 2 x 8 from 4 x 4.
            self.register_buffer(GRID_KEY, torch.tensor(self.patch_resolution))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dims))
        self.drop_after_pos = nn.Dropout(drop_rate)
        self.layers = nn.ModuleList(
            make_layer(layer_id, drop_path_rate * layer_id / max(depth - 1, 1))
            for layer_id in range(depth)
        )
        self.ln1 = nn.LayerNorm(embed_dims, eps=norm_eps) if final_norm else None

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Turn images into tokens with their position embedding.

        Args:
            x: Images of shape ``(B, in_channels, H, W)``.

        Returns:
            Tokens of shape ``(B, h * w, C)`` in row-major order and their grid ``(h, w)``.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If their rank, channels or size do not fit.
        """
        x, resolution = self.patch_embed(x)
        embedding = resize_pos_embed(
            self.pos_embed[:, self.num_slots :],
            self.patch_resolution,
            resolution,
            self.interpolate_mode,
        )
        if not torch.is_grad_enabled() and x.dtype == embedding.dtype:
            x += embedding  # in place: inference on large images needs its memory
        else:
            x = x + embedding
        return self.drop_after_pos(x), resolution

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute feature maps.

        Args:
            x: Images of shape ``(B, in_channels, H, W)``. Pixels beyond the last whole patch are
                left out.

        Returns:
            For each of ``out_indices``, in ascending order, a map of shape ``(B, C,
            H // patch_size, W // patch_size)``.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If their rank, channels or size do not fit.
        """
        x, resolution = self.embed(x)
        outs = []
        for i, layer in enumerate(self.layers):
            x = layer(x, resolution)
            if i == self.depth - 1 and self.ln1 is not None:
                x = self.ln1(x)
            if i in self.out_indices:
                outs.append(self.to_map(x, resolution))
        return tuple(outs)

    @staticmethod
    def to_map(x: Tensor, resolution: tuple[int, int]) -> Tensor:
        """Turn tokens ``(B, h * w, C)`` of a grid ``(h, w)`` into a map ``(B, C, h, w)``."""
        # Contiguous: mmcv's RoIAlign reads memory as if every map were.
        return x.transpose(1, 2).unflatten(2, resolution).contiguous()

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Return the depth of a parameter, for layer-wise decay of the learning rate.

        Args:
            param_name: The parameter's full name.
            prefix: The prefix of this backbone's own names in it, such as ``'backbone.'``.

        Returns:
            The parameter's depth and the number of depths, ``depth + 2``: 0 for the position and
            patch embedding, N + 1 for layer N, and ``depth + 1`` for everything else.
        """
        num_layers = self.depth + 2
        name = param_name.removeprefix(prefix)
        if param_name.startswith(prefix):
            if name == 'pos_embed' or name.startswith('patch_embed.'):
                return 0, num_layers
            if name.startswith('layers.'):
                return int(name.split('.')[1]) + 1, num_layers
        return num_layers - 1, num_layers

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs
    ) -> None:
        fit_pos_embed(self, state_dict, prefix)
        fit_channels(self, state_dict, prefix)
        require_fit(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _layer_indices(out_indices: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Turn ``out_indices`` into an ascending tuple of indices from 0."""
    given = tuple(out_indices) if isinstance(out_indices, Sequence) else (out_indices,)
    if not given:
        raise ValueError('out_indices must name at least one layer, got none')
    for index in given:
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f'out_indices must be integers, got {out_indices!r}')
        if not -depth <= index < depth:
            raise ValueError(
                f'out_indices must lie in [{-depth}, {depth - 1}] for depth={depth}, got {index}'
            )
    indices = sorted({index % depth for index in given})
    if len(indices) != len(given):
        raise ValueError(f'out_indices must name each layer once, got {out_indices!r}')
    return tuple(indices)


def _image_size(img_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Turn ``img_size`` into a pair (height, width) of at least one patch each."""
    sides = tuple(img_size) if isinstance(img_size, Sequence) else (img_size, img_size)
    if len(sides) != 2:
        raise ValueError(f'img_size must be one number or (height, width), got {img_size!r}')
    for side in sides:
        check_int('img_size', side, 1)
        if side < patch_size:
            raise ValueError(f'img_size={img_size!r} is smaller than patch_size={patch_size}')
    return sides
