"""ViT-Adapter around plain backbones: feature pyramids for detection and segmentation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._imports import explain_missing
from ..layers._checks import check_choice, check_int
from ..layers.adapter import (
    DeformableAttention,
    DeformableInputs,
    Extractor,
    Injector,
    InteractionBlock,
    SpatialPriorModule,
    init_adapter_weights,
)
from ..weights import require_whole
from ._openmmlab import VRWKV, VRWKV6, ViT

with explain_missing('the adapter', extra='detection', brings=('mmcv',)):
    from mmcv.cnn import build_norm_layer

FUSE_MODES = ('last', 'stages')
PATCH_SIZE = 16
SIZE_DIVISOR = 32


class AdapterMixin:
    """Turn a plain backbone into one that returns a feature pyramid.

    The `ViT-Adapter <https://arxiv.org/abs/2205.08534>`_: a convolutional spatial prior and the
    backbone's tokens exchange features by deformable attention several times over the depth. Put
    it before the backbone among the bases of a class. The backbone is a ``PlainBackbone``, such as
    VRWKV and ViT, and takes ``with_cp``, too.

    Args:
        pretrain_size: The released configs' name for ``img_size``; one of the two is enough.
        conv_inplane: Channels of the first convolutions of the spatial prior.
        n_points: Points that each query samples in each head and level of deformable attention.
        deform_num_heads: Heads of deformable attention.
        init_values_inject: Initial value of the injectors' scales. With 0, the injectors change
            nothing at first.
        interaction_indexes: First and last layer, from 0, of each interaction, such as ``[[0, 2],
            [3, 5], [6, 8], [9, 11]]``: every layer once, in order. None for four interactions of
            equal length.
        with_cffn: Whether extractors have a feed-forward network.
        cffn_ratio: Hidden channels of that network per channel.
        deform_ratio: Channels of the values in deformable attention per channel.
        add_rwkv_feature: Whether to add the backbone's features to the output maps.
        use_extra_extractor: Whether the last interaction has two more extractors.
        fuse: The features of the backbone that are added: ``'last'``, the features of the last
            layer to all four maps, as in upstream's detection; ``'stages'``, the features after
            interaction n to map n, as in upstream's segmentation; this needs four interactions.
        norm_cfg: Config of the norm layers in the spatial prior and after the four maps; None for
            ``dict(type='SyncBN')``. SyncBN is plain batch norm in a single process, on a CPU too;
            with several processes it needs GPUs, where ``dict(type='BN')`` does not.
        frozen_stages: The parts that are not trained and stay in evaluation mode: -1 none, 0 the
            patch and position embedding, n the first n layers, too.
        **kwargs: The backbone's arguments. ``drop_path_rate`` rises linearly over its layers;
            the extractors' networks use the full rate. ``with_cp`` covers injectors and
            extractors too.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of its range or does not fit another one.
    """

    def __init__(
        self,
        *,
        pretrain_size: int | Sequence[int] | None = None,
        conv_inplane: int = 64,
        n_points: int = 4,
        deform_num_heads: int = 6,
        init_values_inject: float = 0.0,
        interaction_indexes: Sequence[Sequence[int]] | None = None,
        with_cffn: bool = True,
        cffn_ratio: float = 0.25,
        deform_ratio: float = 1.0,
        add_rwkv_feature: bool = True,
        use_extra_extractor: bool = True,
        fuse: str = 'last',
        norm_cfg: dict | None = None,
        frozen_stages: int = -1,
        **kwargs,
    ) -> None:
        _check_backbone_arguments(kwargs)
        if pretrain_size is not None:
            img_size = kwargs.setdefault('img_size', pretrain_size)
            if _pair(img_size) != _pair(pretrain_size):
                raise ValueError(
                    'pretrain_size and img_size name the same size, that of the position '
                    f'embedding, but got {pretrain_size!r} and {img_size!r}: give one of them'
                )
        super().__init__(final_norm=False, **kwargs)
        check_int('conv_inplane', conv_inplane, 1)
        check_int('n_points', n_points, 1)
        check_int('frozen_stages', frozen_stages, -1)
        check_choice('fuse', fuse, FUSE_MODES)
        if frozen_stages > self.depth:
            raise ValueError(
                f'frozen_stages must be at most the depth, {self.depth}, got {frozen_stages}'
            )
        self.interaction_indexes = _interaction_indexes(interaction_indexes, self.depth)
        if fuse == 'stages' and len(self.interaction_indexes) != 4:
            raise ValueError(
                "fuse='stages' adds the feature after interaction n to map n of four, so it needs "
                f'four interaction_indexes, got {len(self.interaction_indexes)}; '
                "fuse='last' takes any number"
            )
        self.fuse = fuse if add_rwkv_feature else None
        self.frozen_stages = frozen_stages
        self.drop_path_rate = kwargs.get('drop_path_rate', 0.0)
        with_cp = kwargs.get('with_cp', False)
        dims = self.embed_dims
        _check_heads(dims, deform_num_heads, deform_ratio)

        def norm_layer(channels: int) -> nn.Module:
            return build_norm_layer(norm_cfg or dict(type='SyncBN'), channels)[1]

        def attention(num_levels: int) -> DeformableAttention:
            return DeformableAttention(
                dims, deform_num_heads, num_levels, n_points, value_ratio=deform_ratio
            )

        def extractor() -> Extractor:
            return Extractor(
                dims,
                attention(num_levels=1),
                cffn_ratio=cffn_ratio if with_cffn else None,
                drop_path=self.drop_path_rate,
                with_cp=with_cp,
            )

        self.level_embed = nn.Parameter(torch.randn(3, dims))
        self.spm = SpatialPriorModule(
            conv_inplane, dims, norm_layer, self.patch_embed.projection.in_channels
        )
        last = len(self.interaction_indexes) - 1
        self.interactions = nn.ModuleList(
            InteractionBlock(
                Injector(dims, attention(num_levels=3), init_values_inject, with_cp),
                extractor(),
                (extractor() for _ in range(2 if use_extra_extractor and i == last else 0)),
            )
            for i in range(last + 1)
        )
        self.up = nn.ConvTranspose2d(dims, dims, 2, stride=2)
        init_adapter_weights(self.up)
        self.norm1 = norm_layer(dims)
        self.norm2 = norm_layer(dims)
        self.norm3 = norm_layer(dims)
        self.norm4 = norm_layer(dims)
        self._freeze_stages()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute a feature pyramid.

        Args:
            x: Images of shape ``(B, in_channels, H, W)``; H and W are multiples of 32.

        Returns:
            Four maps of shape ``(B, C, H / s, W / s)`` for the strides s = 4, 8, 16, 32.

        Raises:
            TypeError: If the images are not floating point.
            ValueError: If their rank, channels or size do not fit.
        """
        if any(side % SIZE_DIVISOR for side in x.shape[2:]):
            raise ValueError(
                f'the adapter needs an image whose sides are multiples of {SIZE_DIVISOR}, got '
                f'{" x ".join(map(str, x.shape[2:]))}: pad it, for instance with '
                f'pad_size_divisor={SIZE_DIVISOR} (detection) or size_divisor={SIZE_DIVISOR} '
                '(segmentation) of the data_preprocessor'
            )
        tokens, resolution = self.embed(x)
        height, width = resolution
        grids = ((2 * height, 2 * width), resolution, (height // 2, width // 2))
        geometry = (
            DeformableInputs.build([resolution], grids, tokens),
            DeformableInputs.build(grids, [resolution], tokens),
        )

        c1, *levels = self.spm(x)
        c = torch.cat(
            [
                level.flatten(2).transpose(1, 2) + embedding
                for level, embedding in zip(levels, self.level_embed, strict=True)
            ],
            dim=1,
        )
        features = []
        for interaction, (first, last) in zip(
            self.interactions, self.interaction_indexes, strict=True
        ):
            layers = self.layers[first : last + 1]
            tokens, c = interaction(tokens, c, layers, resolution, grids, *geometry)
            features.append(tokens)

        maps = [
            tokens.transpose(1, 2).unflatten(2, grid)
            for tokens, grid in zip(c.split([h * w for h, w in grids], dim=1), grids, strict=True)
        ]
        maps.insert(0, self.up(maps[0]) + c1)
        if self.fuse == 'last':
            features = features[-1:] * len(maps)
        if self.fuse is not None:
            maps = [
                m + _resize(feature.transpose(1, 2).unflatten(2, resolution), m.shape[2:])
                for m, feature in zip(maps, features, strict=True)
            ]
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        # Contiguous: mmcv's RoIAlign reads memory as if every map were.
        return tuple(norm(m.contiguous()) for norm, m in zip(norms, maps, strict=True))

    def train(self, mode: bool = True) -> AdapterMixin:
        """Set the mode of all parts but the frozen ones."""
        super().train(mode)
        self._freeze_stages()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        require_whole(self, state_dict, prefix)

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        self.pos_embed.requires_grad_(False)
        for module in (
            self.patch_embed,
            self.drop_after_pos,
            *self.layers[: self.frozen_stages],
        ):
            module.eval()
            module.requires_grad_(False)


class VRWKVAdapter(AdapterMixin, VRWKV):
    """Vision-RWKV with a ViT-Adapter, the paper's backbone for detection and segmentation.

    It takes the arguments of :class:`AdapterMixin` and of :class:`~vrwkv.backbones.VRWKV`, all by
    name, but neither ``out_indices`` nor ``final_norm``, and returns maps at strides 4, 8, 16 and
    32. Parameters are named as in the released weights. The weights of a classifier's VRWKV load,
    too; the adapter's own parameters then keep their initial values.
    """


class VRWKV6Adapter(AdapterMixin, VRWKV6):
    """VRWKV6 with a ViT-Adapter, for detection and segmentation.

    Ours: upstream has VRWKV6 for classification only, and no such weights. It takes the arguments
    of :class:`AdapterMixin` and of :class:`~vrwkv.backbones.VRWKV6` as :class:`VRWKVAdapter` does,
    and loads the weights of a classifier's VRWKV6.
    """


class ViTAdapter(AdapterMixin, ViT):
    """A plain ViT with a ViT-Adapter, the baseline of the paper's tables 3 and 4.

    It takes the arguments of :class:`AdapterMixin` and of :class:`~vrwkv.backbones.ViT`, all by
    name, but not ``final_norm``, and returns maps at strides 4, 8, 16 and 32.
    """


def _check_backbone_arguments(kwargs: dict) -> None:
    """Raise an error for arguments of the backbone that an adapter does not have."""
    for name in ('out_indices', 'final_norm'):
        if name in kwargs:
            raise TypeError(
                f'an adapter has no {name}: it returns four maps, each with its own norm layer, '
                f'got {name}={kwargs[name]!r}'
            )
    if kwargs.get('patch_size', PATCH_SIZE) != PATCH_SIZE:
        raise ValueError(
            f'the adapter pairs tokens with a map at stride {PATCH_SIZE}, so patch_size must be '
            f'{PATCH_SIZE}, got {kwargs["patch_size"]!r}'
        )


def _pair(size: int | Sequence[int]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _check_heads(embed_dims: int, num_heads: int, ratio: float) -> None:
    """Require a number of heads that divides the channels of queries and of values."""
    check_int('deform_num_heads', num_heads, 1)
    value_dims = int(embed_dims * ratio)
    if embed_dims % num_heads or value_dims % num_heads or value_dims < 1:
        raise ValueError(
            f'deform_num_heads must divide embed_dims={embed_dims} and the {value_dims} channels '
            f'of the values (embed_dims * deform_ratio, with deform_ratio={ratio}), got '
            f'{num_heads}'
        )


def _interaction_indexes(
    indexes: Sequence[Sequence[int]] | None, depth: int
) -> tuple[tuple[int, int], ...]:
    """Require pairs (first, last) that cover each layer once, in order."""
    if indexes is None:
        if depth % 4:
            raise ValueError(
                f'a depth of {depth} does not divide into four equal interactions: give '
                'interaction_indexes'
            )
        run = depth // 4
        return tuple((first, first + run - 1) for first in range(0, depth, run))
    expected = 0
    for pair in indexes:
        if len(pair) != 2 or pair[0] != expected or pair[1] < pair[0]:
            break
        expected = pair[1] + 1
    else:
        if expected == depth:
            return tuple((first, last) for first, last in indexes)
    raise ValueError(
        f'interaction_indexes must be pairs [first layer, last layer] that hold each of the layers '
        f'0 to {depth - 1} once, in order, got {indexes!r}'
    )


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if x.shape[2:] == tuple(size):
        return x
    return F.interpolate(x, size=size, mode='bilinear', align_corners=False)
