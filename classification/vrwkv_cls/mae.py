"""Masked pre-training: encoder and decoder for mmpretrain's ``MAE``, and a frozen backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from mmengine.model import BaseModule
from mmpretrain.models.selfsup.mae import MAEViT
from mmpretrain.models.utils import build_2d_sincos_position_embedding
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from vrwkv.backbones import VRWKV, VRWKV6
from vrwkv.layers import resize_pos_embed, vrwkv_layer
from vrwkv.layers._checks import check_choice, check_int, check_number, check_rate
from vrwkv.weights import LOAD_BACKBONE, require_fit

# Masked tokens have no grid, so there is no Q-Shift.
SHIFT_MODES = ('double_shift', 'single_shift', 'none')


class MAEEncoderMixin:
    """Turn a backbone into the encoder of MAE: it runs on the patches that the mask keeps.

    Put it before the backbone among the bases of a class. Implementation of `Masked Autoencoders
    Are Scalable Vision Learners <https://arxiv.org/abs/2111.06377>`_ with `Vision-RWKV <https://arxiv.org/abs/2403.02308>`_
    (section 4.4, "MAE Pre-training"). The parameters are those of the backbone, which fine-tunes
    them, also with Q-Shift.

    Args:
        img_size: Side of the images in pixels, a multiple of ``patch_size``. Masked images must
            have this size; :meth:`forward` without a mask takes any.
        patch_size: Side of a patch in pixels.
        mask_ratio: Fraction of the patches to mask, in [0, 1).
        shift_mode: The token shift: ``'double_shift'``, ``'single_shift'`` (as in upstream's code)
            or ``'none'``.
        shuffle: Whether the kept patches have a random order, as in upstream's code, and not the
            order of the image, which they have in fine-tuning.
        pos_embed_twice: Whether to add the position embedding twice, as upstream's code does. For
            upstream's weights only.
        **kwargs: Further arguments of the backbone.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of its range, or if the mask would keep no patch.
    """

    random_masking = MAEViT.random_masking

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        mask_ratio: float = 0.75,
        shift_mode: str = 'double_shift',
        shuffle: bool = False,
        pos_embed_twice: bool = False,
        **kwargs,
    ) -> None:
        check_choice('shift_mode', shift_mode, SHIFT_MODES)
        check_int('img_size', img_size, 1)
        super().__init__(img_size, patch_size, shift_mode=shift_mode, **kwargs)
        if img_size % patch_size:
            raise ValueError(
                f'img_size={img_size} is not a multiple of patch_size={patch_size}: the pixels '
                'beyond the last whole patch could not be reconstructed'
            )
        check_number('mask_ratio', mask_ratio)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f'mask_ratio must lie in [0, 1), got {mask_ratio}')
        num_patches = math.prod(self.patch_resolution)
        # As random_masking counts them.
        if int(num_patches * (1 - mask_ratio)) < 1:
            raise ValueError(
                f'mask_ratio={mask_ratio} keeps none of the {num_patches} patches of an image of '
                f'{img_size} pixels: lower it, or use larger images or smaller patches'
            )
        self.mask_ratio = mask_ratio
        self.shuffle = shuffle
        self.pos_embed_twice = pos_embed_twice

    def init_weights(self) -> None:
        """Set 2-d sine-cosine positions and Xavier-uniform linear layers, as MAE does."""
        super().init_weights()
        if isinstance(self.init_cfg, Mapping) and self.init_cfg['type'] == 'Pretrained':
            return
        _init_linears(self)
        # The projection is a linear layer of flattened patches.
        nn.init.xavier_uniform_(self.patch_embed.projection.weight.data.flatten(1))
        _init_pos_embed(self.pos_embed)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Turn images into tokens, as the backbone does."""
        x, resolution = super().embed(x)
        if self.pos_embed_twice:
            x = x + resize_pos_embed(
                self.pos_embed, self.patch_resolution, resolution, self.interpolate_mode
            )
        return x, resolution

    def forward(
        self, x: Tensor, mask: bool | None = True
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, ...]:
        """Encode all patches, or those that a new random mask keeps.

        Args:
            x: Images of shape ``(B, in_channels, H, W)``.
            mask: Whether to draw a mask.

        Returns:
            With a mask: the features of the ``K`` kept patches, of shape ``(B, K, C)``; the mask of
            shape ``(B, L)``, 1 for each of the ``L`` patches that is removed; and the indices, of
            shape ``(B, L)``, that restore the order of the image from the kept patches followed by
            the removed ones. Without a mask: feature maps, as from the backbone.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If their rank, channels or size do not fit.
        """
        if not mask:
            return super().forward(x)
        if x.shape[2:] != self.img_size:
            raise ValueError(
                f'expected images of {self.img_size[0]}x{self.img_size[1]} pixels, got '
                f'{"x".join(map(str, x.shape[2:]))}: change img_size, or the pipeline'
            )
        tokens, _ = self.embed(x)
        x, mask, ids_restore = self.random_masking(tokens, self.mask_ratio)
        if not self.shuffle:
            order = mask.argsort(dim=1, stable=True)
            x = _take(tokens, order[:, : x.shape[1]])
            ids_restore = order.argsort(dim=1)
        for layer in self.layers:
            x = layer(x)
        if self.ln1 is not None:
            x = self.ln1(x)
        return x, mask, ids_restore


@MODELS.register_module()
class MAEVRWKV(MAEEncoderMixin, VRWKV):
    """:class:`~vrwkv.backbones.VRWKV` as the encoder of MAE, see :class:`MAEEncoderMixin`."""


@MODELS.register_module()
class MAEVRWKV6(MAEEncoderMixin, VRWKV6):
    """:class:`~vrwkv.backbones.VRWKV6` as the encoder of MAE; ours, upstream has none."""


@MODELS.register_module()
class MAEVRWKVDecoder(BaseModule):
    """The decoder of MAE with VRWKV layers: it predicts the pixels of every patch.

    Parameters are named as in upstream's code.

    Args:
        num_patches: Number of patches of an image, a square.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the images.
        embed_dims: Channels of the encoder's tokens.
        decoder_embed_dims: Channels of the decoder's tokens, D.
        decoder_depth: Number of layers.
        drop_path_rate: Stochastic depth of the last layer, in [0, 1]; it rises linearly from 0 in
            the first one.
        shift_mode: The token shift: ``'double_shift'``, ``'single_shift'`` (as in upstream's code)
            or ``'none'``.
        init_cfg: mmengine's initialisation config.
        **kwargs: Further arguments of :func:`~vrwkv.layers.vrwkv_layer`.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        num_patches: int = 196,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dims: int = 768,
        decoder_embed_dims: int = 512,
        decoder_depth: int = 8,
        drop_path_rate: float = 0.0,
        shift_mode: str = 'double_shift',
        init_cfg: dict | list[dict] | None = None,
        **kwargs,
    ) -> None:
        super().__init__(init_cfg)
        check_choice('shift_mode', shift_mode, SHIFT_MODES)
        check_int('num_patches', num_patches, 1)
        check_int('decoder_depth', decoder_depth, 1)
        check_rate('drop_path_rate', drop_path_rate)
        if math.isqrt(num_patches) ** 2 != num_patches:
            raise ValueError(f'num_patches must be a square, got {num_patches}')
        self.decoder_embed = nn.Linear(embed_dims, decoder_embed_dims)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dims))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, num_patches, decoder_embed_dims))
        self.decoder_blocks = nn.ModuleList(
            vrwkv_layer(
                decoder_embed_dims,
                decoder_depth,
                layer_id,
                shift_mode=shift_mode,
                drop_path=drop_path_rate * layer_id / max(decoder_depth - 1, 1),
                **kwargs,
            )
            for layer_id in range(decoder_depth)
        )
        self.ln2 = nn.LayerNorm(decoder_embed_dims)
        self.decoder_pred = nn.Linear(decoder_embed_dims, patch_size**2 * in_channels)

    def init_weights(self) -> None:
        """Set 2-d sine-cosine positions and Xavier-uniform linear layers, as MAE does."""
        super().init_weights()
        if isinstance(self.init_cfg, Mapping) and self.init_cfg['type'] == 'Pretrained':
            return
        _init_linears(self)
        _init_pos_embed(self.decoder_pos_embed)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict the pixels of all patches from the features of the kept ones.

        Args:
            x: The encoder's features of the kept patches, of shape ``(B, K, embed_dims)``.
            ids_restore: The indices, of shape ``(B, L)``, that restore the order of the image from
                the kept patches followed by the removed ones.

        Returns:
            Predictions of shape ``(B, L, patch_size ** 2 * in_channels)``.

        Raises:
            ValueError: If ``L`` is not ``num_patches``, or if no patch is masked in training.
        """
        length, num_patches = ids_restore.shape[1], self.decoder_pos_embed.shape[1]
        if length != num_patches:
            raise ValueError(
                f'the decoder has num_patches={num_patches}, but the encoder has {length} '
                'patches, (img_size / patch_size) ** 2'
            )
        if self.training and x.shape[1] == length:
            raise ValueError(
                'the mask keeps every patch, so the loss has no pixels: train with a mask_ratio '
                'above 0'
            )
        x = self.decoder_embed(x)
        masked = self.mask_token.expand(x.shape[0], length - x.shape[1], -1)
        x = _take(torch.cat([x, masked], dim=1), ids_restore)
        x = x + self.decoder_pos_embed
        for layer in self.decoder_blocks:
            x = layer(x)
        return self.decoder_pred(self.ln2(x))

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs
    ) -> None:
        require_fit(self, state_dict, prefix, f'To load the encoder alone: {LOAD_BACKBONE}')
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@MODELS.register_module()
class FrozenVRWKV(VRWKV):
    """A VRWKV whose weights are not trained, for linear probing.

    Args:
        *args: As for :class:`~vrwkv.backbones.VRWKV`.
        **kwargs: As for :class:`~vrwkv.backbones.VRWKV`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenVRWKV:
        """Keep evaluation mode, without dropout and drop path; ``mode`` is ignored."""
        return super().train(False)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Select tokens: ``x[b, index[b]]``, of shape ``(B, *index.shape[1:], C)``."""
    return x.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))


def _init_linears(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


@torch.no_grad()
def _init_pos_embed(pos_embed: nn.Parameter) -> None:
    side = math.isqrt(pos_embed.shape[1])
    pos_embed.copy_(build_2d_sincos_position_embedding(side, pos_embed.shape[2]))
