"""The Vision-RWKV backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule, ModuleList
from torch import Tensor, nn

from ..layers import PatchEmbed, VRWKVLayer, resize_pos_embed
from ..layers._checks import check_choice, check_int, check_rate
from ..weights import fit_pos_embed, record_grid, rename_mlp_head, require_fit

INTERPOLATE_MODES = ('bicubic', 'bilinear')


class VRWKV(BaseModule):
    """Vision-RWKV: a plain backbone with global attention at linear cost.

    From `Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures
    <https://arxiv.org/abs/2403.02308>`_. Parameters are named as in the released weights. Loading
    weights resizes the position embedding where the grids differ, and raises an error where the
    weights are another model's, with ``strict=False`` too.

    Args:
        img_size: Height and width of the training images in pixels, or one number for both.
            Images of other sizes are accepted: the position embedding is resized.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the images.
        out_indices: Layer or layers whose outputs are returned, from 0; negative ones count from
            the end. The outputs come in the order of the layers.
        drop_rate: Dropout after the position embedding, in [0, 1].
        embed_dims: Channels of a token, C.
        depth: Number of layers.
        drop_path_rate: Stochastic depth of the last layer, in [0, 1]; it rises linearly from 0 in
            the first one.
        channel_gamma: Fraction of the channels in each group of the token shift, at most 1/4.
        shift_pixel: Distance of the token shift in tokens. 0 is ``shift_mode='none'``.
        shift_mode: The token shift: ``'q_shift'``, ``'single_shift'``, ``'double_shift'`` or
            ``'none'``, see :class:`~vrwkv.layers.TokenShift`.
        init_mode: How decay, bonus and mixes start: ``'fancy'``, ``'local'`` or ``'global'``, see
            :class:`~vrwkv.layers.SpatialMix`.
        post_norm: Whether to normalise after, and not before, each sub-layer.
        key_norm: Whether to normalise inside the sub-layers.
        init_values: Start of the layer scales, or None for no layer scale.
        hidden_rate: Hidden channels of the channel mix per channel.
        final_norm: Whether to normalise the output of the last layer.
        interpolate_mode: How the position embedding is resized: ``'bicubic'`` or ``'bilinear'``.
        with_cp: Whether to recompute each layer in the backward pass to save memory.
        init_cfg: mmengine's initialisation config, such as ``dict(type='Pretrained',
            checkpoint=..., prefix='backbone.')``.
        causal: Whether attention sees only the tokens before, as RWKV's own does (paper, table 5).

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of its range.
    """

    #: mmpretrain's class-activation maps ask: all tokens lie on the grid.
    num_extra_tokens = 0

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        drop_rate: float = 0.0,
        embed_dims: int = 256,
        depth: int = 12,
        drop_path_rate: float = 0.0,
        channel_gamma: float | None = 1 / 4,
        shift_pixel: int = 1,
        shift_mode: str = 'q_shift',
        init_mode: str = 'fancy',
        post_norm: bool = False,
        key_norm: bool = False,
        init_values: float | None = None,
        hidden_rate: float = 4,
        final_norm: bool = True,
        interpolate_mode: str = 'bicubic',
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__(init_cfg)
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
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.patch_resolution), embed_dims))
        self.drop_after_pos = nn.Dropout(drop_rate)
        self.layers = ModuleList(
            VRWKVLayer(
                embed_dims,
                depth,
                layer_id,
                shift_mode=shift_mode,
                shift_pixel=shift_pixel,
                channel_gamma=channel_gamma,
                drop_path=drop_path_rate * layer_id / max(depth - 1, 1),
                hidden_rate=hidden_rate,
                init_mode=init_mode,
                init_values=init_values,
                post_norm=post_norm,
                key_norm=key_norm,
                causal=causal,
                with_cp=with_cp,
            )
            for layer_id in range(depth)
        )
        self.ln1 = nn.LayerNorm(embed_dims) if final_norm else None

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
        x = x + resize_pos_embed(
            self.pos_embed, self.patch_resolution, resolution, self.interpolate_mode
        )
        return self.drop_after_pos(x), resolution

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute feature maps.

        Args:
            x: Images of shape ``(B, in_channels, H, W)``. Pixels beyond the last whole patch are
                left out.

        Returns:
            For each of ``out_indices`` a map of shape ``(B, C, H // patch_size,
            W // patch_size)``.

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
                # Contiguous: mmcv's RoIAlign reads memory as if every map were.
                outs.append(x.transpose(1, 2).unflatten(2, resolution).contiguous())
        return tuple(outs)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Say how deep a parameter lies, for layer-wise decay of the learning rate.

        Args:
            param_name: The parameter's full name.
            prefix: What precedes this backbone's own names in it, such as ``'backbone.'``.

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

    @staticmethod
    def _checkpoint_filter(state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        """Let a classifier load the released Large: mmpretrain's calls this before it loads."""
        rename_mlp_head(state_dict, prefix)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs
    ) -> None:
        fit_pos_embed(self, state_dict, prefix)
        require_fit(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        record_grid(self, destination, prefix)


def _layer_indices(out_indices: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Make ``out_indices`` an ascending tuple of indices from 0."""
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
    """Make ``img_size`` a pair (height, width) of at least a patch each."""
    sides = tuple(img_size) if isinstance(img_size, Sequence) else (img_size, img_size)
    if len(sides) != 2:
        raise ValueError(f'img_size must be one number or (height, width), got {img_size!r}')
    for side in sides:
        check_int('img_size', side, 1)
        if side < patch_size:
            raise ValueError(f'img_size={img_size!r} is smaller than patch_size={patch_size}')
    return sides
