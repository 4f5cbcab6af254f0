"""The Vision-RWKV backbone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers import vrwkv_layer
from ..weights import rename_mlp_head
from ._plain import PlainBackbone


class VRWKV(PlainBackbone):
    """Vision-RWKV: a plain backbone with global attention at linear cost.

    From `Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures
    <https://arxiv.org/abs/2403.02308>`_. Parameters are named as in the released weights. Loading
    weights resizes the position embedding if the grids differ, and raises an error if the weights
    are those of another model, with ``strict=False`` too.

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
        init_mode: Initial values of decay, bonus and mixes: ``'fancy'``, spread over layers and
            channels; ``'local'``, all ones; ``'global'``, no decay and no bonus, even mixes.
        post_norm: Whether to normalise after, and not before, each sub-layer.
        key_norm: Whether to normalise inside the sub-layers.
        init_values: Initial value of the layer scales, or None for no layer scale.
        hidden_rate: Hidden channels of the channel mix per channel.
        final_norm: Whether to normalise the output of the last layer.
        interpolate_mode: How the position embedding is resized: ``'bicubic'`` or ``'bilinear'``.
        with_cp: Whether to recompute each layer in the backward pass to save memory.
        causal: Whether attention sees only the tokens before, as RWKV's own does (paper, table 5).

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
        causal: bool = False,
    ) -> None:

        def make_layer(layer_id: int, drop_path: float) -> nn.Module:
            return vrwkv_layer(
                embed_dims,
                depth,
                layer_id,
                shift_mode=shift_mode,
                shift_pixel=shift_pixel,
                channel_gamma=channel_gamma,
                drop_path=drop_path,
                hidden_rate=hidden_rate,
                init_mode=init_mode,
                init_values=init_values,
                post_norm=post_norm,
                key_norm=key_norm,
                causal=causal,
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

    @staticmethod
    def _checkpoint_filter(state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        """Rename the head of the released Large; mmpretrain's classifiers call this function."""
        rename_mlp_head(state_dict, prefix)
