"""A plain ViT, the paper's baseline in detection and segmentation."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import ResidualLayer
from ..layers._checks import check_heads, check_int, hidden_channels
from ._plain import PlainBackbone

# As in DeiT and mmpretrain.
NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of an image or within square windows.

    Queries, keys and values are padded with zeros at the bottom and at the right to whole windows.
    Tokens attend to the padding too, as in ViT-Adapter.

    Args:
        embed_dims: Channels of a token, C.
        num_heads: Number of heads.
        window_size: Side of the windows in tokens; None for global attention.
    """

    def __init__(self, embed_dims: int, num_heads: int, window_size: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x: Tensor, resolution: tuple[int, int]) -> Tensor:
        """Run the attention.

        Args:
            x: Tokens of shape ``(B, T, C)``.
            resolution: Their grid ``(H, W)`` with ``H * W == T``.

        Returns:
            A tensor of the shape of ``x``.
        """
        qkv = self.qkv(x)
        if self.window_size is not None:
            qkv = _to_windows(qkv.unflatten(1, resolution), self.window_size)
        # (B, T, 3 * C) -> three of (B, heads, T, C / heads).
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.window_size is not None:
            x = _from_windows(x, self.window_size, resolution).flatten(1, 2)
        return self.proj(x)


def _to_windows(x: Tensor, size: int) -> Tensor:
    """Pad ``(B, H, W, C)`` and cut it into ``(B * windows, size * size, C)``."""
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _from_windows(x: Tensor, size: int, resolution: tuple[int, int]) -> Tensor:
    """Undo :func:`_to_windows`."""
    height, width = resolution
    rows, columns = -(-height // size), -(-width // size)
    x = x.unflatten(0, (-1, rows, columns)).unflatten(3, (size, size))
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, :height, :width]


class ViTLayer(ResidualLayer):
    """A pre-norm transformer layer with optional layer scale.

    Args:
        embed_dims: Channels of a token, C.
        num_heads: Number of heads.
        mlp_ratio: Hidden channels of the feed-forward network per channel.
        drop_path: Probability of dropping a residual branch.
        init_values: Initial value of the layer scales, or None for no layer scale.
        window_size: Side of the attention windows in tokens; None for global attention.
        with_cp: Whether to recompute the layer in the backward pass to save memory.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        mlp_ratio: float = 4,
        drop_path: float = 0.0,
        init_values: float | None = None,
        window_size: int | None = None,
        with_cp: bool = False,
    ) -> None:
        super().__init__(embed_dims, drop_path, init_values, with_cp)
        hidden_dims = hidden_channels('mlp_ratio', mlp_ratio, embed_dims)
        self.ln1 = nn.LayerNorm(embed_dims, eps=NORM_EPS)
        self.attn = Attention(embed_dims, num_heads, window_size)
        self.ln2 = nn.LayerNorm(embed_dims, eps=NORM_EPS)
        # Nested so that the weights have mmpretrain's names, ffn.layers.0.0 and ffn.layers.1.
        mlp = nn.Sequential(
            nn.Sequential(nn.Linear(embed_dims, hidden_dims), nn.GELU()),
            nn.Linear(hidden_dims, embed_dims),
        )
        self.ffn = nn.Sequential(OrderedDict(layers=mlp))

    def _residual(self, x: Tensor, y: Tensor, gamma: Tensor | None) -> Tensor:
        return x + self.drop_path(y if gamma is None else gamma * y)

    def _forward(self, x: Tensor, resolution: tuple[int, int]) -> Tensor:
        x = self._residual(x, self.attn(self.ln1(x), resolution), self.gamma1)
        return self._residual(x, self.ffn(self.ln2(x)), self.gamma2)


class ViT(PlainBackbone):
    """A plain ViT without a class token, with global or window attention in each layer.

    The baseline of the paper's tables 3 and 4. Parameters are named as in mmpretrain's
    ``VisionTransformer``, so that its DeiT and ViT weights load; for them ``pos_embed`` has the
    slot of a class token, which is not used. Loading weights resizes the position embedding if the
    grids differ, and raises an error if the weights are those of another model.

    Args:
        img_size: Height and width of the training images in pixels, or one number for both.
            Images of other sizes are accepted: the position embedding is resized.
        patch_size: Side of a patch in pixels.
        in_channels: Channels of the images.
        drop_rate: Dropout after the position embedding, in [0, 1].
        embed_dims: Channels of a token, C.
        depth: Number of layers.
        num_heads: Heads of attention.
        mlp_ratio: Hidden channels of the feed-forward networks per channel.
        drop_path_rate: Stochastic depth of the last layer, in [0, 1]; it rises linearly from 0 in
            the first one.
        init_values: Initial value of the layer scales, or None for no layer scale. With 1, weights
            that were trained without layer scale give the same outputs.
        window_size: Side of the attention windows in tokens.
        window_block_indexes: Layers with window attention, from 0; the others have global
            attention.
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
        drop_rate: float = 0.0,
        embed_dims: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
        window_size: int = 14,
        window_block_indexes: Collection[int] = (),
        final_norm: bool = True,
        interpolate_mode: str = 'bicubic',
        with_cp: bool = False,
    ) -> None:
        check_int('depth', depth, 1)
        check_int('window_size', window_size, 1)
        check_heads(embed_dims, num_heads)
        if not set(window_block_indexes) <= set(range(depth)):
            raise ValueError(
                f'window_block_indexes must lie in [0, {depth - 1}] for depth={depth}, got '
                f'{window_block_indexes!r}'
            )

        def make_layer(layer_id: int, drop_path: float) -> nn.Module:
            return ViTLayer(
                embed_dims,
                num_heads,
                mlp_ratio=mlp_ratio,
                drop_path=drop_path,
                init_values=init_values,
                window_size=window_size if layer_id in window_block_indexes else None,
                with_cp=with_cp,
            )

        super().__init__(
            make_layer,
            img_size=img_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_indices=-1,
            drop_rate=drop_rate,
            embed_dims=embed_dims,
            depth=depth,
            drop_path_rate=drop_path_rate,
            final_norm=final_norm,
            interpolate_mode=interpolate_mode,
            norm_eps=NORM_EPS,
            class_token_slot=True,
        )
        self._reset_parameters()

    @torch.no_grad()
    def _reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
