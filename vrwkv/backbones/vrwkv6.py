"""The VRWKV6 backbone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..layers import SHIFT_MODES, ChannelMix, SpatialMix6, VRWKVLayer
from ..layers._checks import check_choice
from ._plain import PlainBackbone

Q_SHIFT = 'q_shift_multihead'


class VRWKV6(PlainBackbone):
    """VRWKV6: VRWKV with heads, data-dependent mixes and a data-dependent decay.

    Upstream's backbone of that name, which the paper does not describe. It differs from
    :class:`VRWKV` in the spatial mix (:class:`~vrwkv.layers.SpatialMix6`) and in the token shift,
    whose groups repeat in each head. Parameters are named as in upstream's weights. Loading weights
    resizes the position embedding if the grids differ, and raises an error if the weights are those
    of another model, with ``strict=False`` too.

    Args:
        img_size: Height and width of the training images in pixels, or one number for both.
            Images of other sizes are accepted: the position embedding is resized. Decays are in
            tokens and do not change with the size.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the images.
        out_indices: Layer or layers whose outputs are returned, from 0; negative ones count from
            the end. The outputs come in the order of the layers.
        drop_rate: Dropout after the position embedding, in [0, 1].
        embed_dims: Channels of a token, C.
        num_heads: Heads of ``C / num_heads`` channels, at most 64 and a multiple of 8. Upstream's
            models have 64.
        depth: Number of layers.
        drop_path_rate: Stochastic depth of the last layer, in [0, 1]; it rises linearly from 0 in
            the first one.
        shift_pixel: Distance of the token shift in tokens. With 0 the mixes have no effect.
        shift_mode: The token shift: ``'q_shift_multihead'``, a Q-Shift in each head, for which
            ``'q_shift'`` is another name; ``'single_shift'``, ``'double_shift'`` or ``'none'`` (a
            distance of 0), see :class:`~vrwkv.layers.TokenShift`.
        init_mode: Initial values: only ``'fancy'``, spread over layers and channels.
        post_norm: Whether to normalise after, and not before, each sub-layer.
        key_norm: Whether to normalise inside the sub-layers.
        init_values: Initial value of the layer scales, or None for no layer scale.
        hidden_rate: Hidden channels of the channel mix per channel.
        final_norm: Whether to normalise the output of the last layer.
        interpolate_mode: How the position embedding is resized: ``'bicubic'`` or ``'bilinear'``.
        with_cp: Whether to recompute each layer in the backward pass to save memory.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        drop_rate: float = 0.0,
        embed_dims: int = 192,
        num_heads: int = 3,
        depth: int = 12,
        drop_path_rate: float = 0.0,
        shift_pixel: int = 1,
        shift_mode: str = Q_SHIFT,
        init_mode: str = 'fancy',
        post_norm: bool = False,
        key_norm: bool = False,
        init_values: float | None = None,
        hidden_rate: float = 4,
        final_norm: bool = True,
        interpolate_mode: str = 'bicubic',
        with_cp: bool = False,
    ) -> None:
        check_choice('shift_mode', shift_mode, (Q_SHIFT, *SHIFT_MODES))
        mix = dict(
            shift_mode={Q_SHIFT: 'q_shift', 'none': 'single_shift'}.get(shift_mode, shift_mode),
            shift_pixel=0 if shift_mode == 'none' else shift_pixel,
            num_heads=num_heads,
            init_mode=init_mode,
            key_norm=key_norm,
        )

        def make_layer(layer_id: int, drop_path: float) -> nn.Module:
            return VRWKVLayer(
                embed_dims,
                SpatialMix6(embed_dims, depth, layer_id, **mix),
                ChannelMix(embed_dims, depth, layer_id, hidden_rate=hidden_rate, **mix),
                first=layer_id == 0,
                drop_path=drop_path,
                init_values=init_values,
                post_norm=post_norm,
                with_cp=with_cp,
            )

        super().__init__(
            make_layer,
            img_size=img_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_indices=out_indices,
            drop_rate=drop_rate,
            embed_dims=embed_dims,
            depth=depth,
            drop_path_rate=drop_path_rate,
            final_norm=final_norm,
            interpolate_mode=interpolate_mode,
        )
