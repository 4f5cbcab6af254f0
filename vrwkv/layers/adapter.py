"""The blocks that a ViT-Adapter adds to a plain backbone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vrwkv_ops import ms_deform_attn

from ._checks import hidden_channels
from .drop_path import DropPath

# As in ViT-Adapter; the plain backbone's own layer norms keep torch's default.
ADAPTER_NORM_EPS = 1e-6


def init_adapter_weights(module: nn.Module) -> None:
    """Set the initial values of a convolution or linear layer of the adapter.

    The weights of convolutions, transposed ones too, are normal with variance 2 / fan_out, those of
    linear layers truncated normal with standard deviation 0.02; biases are 0. For
    :meth:`torch.nn.Module.apply`.

    Args:
        module: A module. Modules of other kinds are not changed.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


class DeformableInputs(NamedTuple):
    """The geometry for deformable attention.

    Attributes:
        reference_points: The position of each query, of shape ``(1, queries, 1, 2)``: x and y as
            fractions of the image.
        spatial_shapes: Height and width of each map of values.
        sizes: Width and height of each map, of shape ``(levels, 2)``.
    """

    reference_points: Tensor
    spatial_shapes: tuple[tuple[int, int], ...]
    sizes: Tensor

    @classmethod
    def build(
        cls,
        query_grids: Sequence[tuple[int, int]],
        value_grids: Sequence[tuple[int, int]],
        like: Tensor,
    ) -> DeformableInputs:
        """Describe queries and values that lie on grids over the same image.

        Args:
            query_grids: Height and width of each map of queries.
            value_grids: Height and width of each map of values.
            like: A tensor on the same device; the points have its dtype, but at least float32.

        Returns:
            The description.
        """
        # In half precision, neighbouring points of a large map would be equal.
        dtype = torch.promote_types(like.dtype, torch.float32)
        options = dict(dtype=dtype, device=like.device)
        points = []
        for height, width in query_grids:
            y = (torch.arange(height, **options) + 0.5) / height
            x = (torch.arange(width, **options) + 0.5) / width
            grid = torch.stack(torch.meshgrid(y, x, indexing='ij')[::-1], dim=-1)
            points.append(grid.flatten(0, 1))
        return cls(
            reference_points=torch.cat(points)[None, :, None],
            spatial_shapes=tuple(map(tuple, value_grids)),
            sizes=torch.tensor([grid[::-1] for grid in value_grids], device=like.device),
        )


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (`Deformable DETR <https://arxiv.org/abs/2010.04159>`_).

    Parameters and their initial values are those of mmcv's ``MultiScaleDeformableAttention``. The
    sampling points are computed in float32 at least, whatever autocast and the weights' dtype are:
    in half precision, neighbouring points of a large map would be equal.

    Args:
        embed_dims: Channels of a query and of a value, C.
        num_heads: Heads; they divide the channels.
        num_levels: Maps of values.
        num_points: Points that each query samples in each head and map.
        value_ratio: Channels of the projected values per channel.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        value_ratio: float = 1.0,
    ) -> None:
        super().__init__()
        self.samples = (num_heads, num_levels, num_points)
        value_dims = int(embed_dims * value_ratio)
        self.sampling_offsets = nn.Linear(embed_dims, 2 * math.prod(self.samples))
        self.attention_weights = nn.Linear(embed_dims, math.prod(self.samples))
        self.value_proj = nn.Linear(embed_dims, value_dims)
        self.output_proj = nn.Linear(value_dims, embed_dims)
        self.init_weights()

    def init_weights(self) -> None:
        """Let each head look into its own direction, point n at a distance of n pixels."""
        heads, _, points = self.samples
        angles = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().max(-1, keepdim=True)[0]
        steps = torch.arange(1, points + 1, dtype=torch.float32)[:, None]
        offsets = (directions[:, None, None] * steps).expand(*self.samples, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, value: Tensor, geometry: DeformableInputs) -> Tensor:
        """Attend.

        Args:
            query: Queries, of shape ``(B, Q, C)``.
            value: Values of all maps, of shape ``(B, S, C)``.
            geometry: The positions of queries and values.

        Returns:
            A tensor of shape ``(B, Q, C)``.
        """
        heads, levels, points = self.samples
        values = self.value_proj(value)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        offsets = self.sampling_offsets(query).unflatten(-1, (*self.samples, 2))
        weights = self.attention_weights(query).unflatten(-1, (heads, levels * points))
        weights = weights.softmax(-1).unflatten(-1, (levels, points))
        offsets = offsets / geometry.sizes[:, None]
        locations = geometry.reference_points[:, :, None, :, None] + offsets
        sampled = ms_deform_attn(
            values.unflatten(-1, (heads, -1)), geometry.spatial_shapes, locations, weights
        )
        return self.output_proj(sampled.to(self.output_proj.weight.dtype))


class SpatialPriorModule(nn.Module):
    """Convolutional features of the image at strides 4, 8, 16 and 32.

    The spatial prior module of `ViT-Adapter <https://arxiv.org/abs/2205.08534>`_.

    Args:
        inplane: Channels of the first convolutions; deeper ones have up to four times as many.
        embed_dims: Channels of the feature maps, C.
        norm_layer: Returns a norm layer for a number of channels.
        in_channels: Channels of the image.
    """

    def __init__(
        self,
        inplane: int,
        embed_dims: int,
        norm_layer: Callable[[int], nn.Module],
        in_channels: int = 3,
    ) -> None:
        super().__init__()

        def unit(channels: int, out_channels: int, stride: int = 2) -> list[nn.Module]:
            conv = nn.Conv2d(channels, out_channels, 3, stride=stride, padding=1, bias=False)
            return [conv, norm_layer(out_channels), nn.ReLU(inplace=True)]

        self.stem = nn.Sequential(
            *unit(in_channels, inplane),
            *unit(inplane, inplane, stride=1),
            *unit(inplane, inplane, stride=1),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.conv2 = nn.Sequential(*unit(inplane, 2 * inplane))
        self.conv3 = nn.Sequential(*unit(2 * inplane, 4 * inplane))
        self.conv4 = nn.Sequential(*unit(4 * inplane, 4 * inplane))
        self.fc1 = nn.Conv2d(inplane, embed_dims, 1)
        self.fc2 = nn.Conv2d(2 * inplane, embed_dims, 1)
        self.fc3 = nn.Conv2d(4 * inplane, embed_dims, 1)
        self.fc4 = nn.Conv2d(4 * inplane, embed_dims, 1)
        self.apply(init_adapter_weights)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the feature maps.

        Args:
            x: Images of shape ``(B, in_channels, H, W)``.

        Returns:
            Maps of ``C`` channels at strides 4, 8, 16 and 32.
        """
        c1 = self.stem(x)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return self.fc1(c1), self.fc2(c2), self.fc3(c3), self.fc4(c4)


class TokenMapsDWConv(nn.Module):
    """A depth-wise 3x3 convolution on each of the three token maps of the adapter.

    Args:
        channels: Channels of a token.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Convolve each map.

        Args:
            x: The tokens of all maps, of shape ``(B, T, channels)``.
            grids: Height and width of each map.

        Returns:
            A tensor of the shape of ``x``.
        """
        maps = x.transpose(1, 2).split([height * width for height, width in grids], dim=2)
        maps = [
            self.dwconv(tokens.unflatten(2, grid)).flatten(2)
            for tokens, grid in zip(maps, grids, strict=True)
        ]
        return torch.cat(maps, dim=2).transpose(1, 2)


class ConvFFN(nn.Module):
    """A feed-forward network with a depth-wise convolution between its linear layers.

    Args:
        embed_dims: Channels of a token, C.
        hidden_dims: Channels inside.
    """

    def __init__(self, embed_dims: int, hidden_dims: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dims, hidden_dims)
        self.dwconv = TokenMapsDWConv(hidden_dims)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dims, embed_dims)
        self.apply(init_adapter_weights)

    def forward(self, x: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Run the network.

        Args:
            x: The tokens of all maps, of shape ``(B, T, C)``.
            grids: Height and width of each map.

        Returns:
            A tensor of the shape of ``x``.
        """
        return self.fc2(self.act(self.dwconv(self.fc1(x), grids)))


class Injector(nn.Module):
    """Bring the spatial prior into the backbone's tokens by deformable attention.

    ``x + gamma * attn(norm(x), norm(c))`` (ViT-Adapter, "Spatial Feature
    Injector").

    Args:
        embed_dims: Channels of a token, C.
        attn: Deformable attention with a level for each map of the spatial prior.
        init_values: Initial value of ``gamma``. With 0, the injector changes nothing at first.
        with_cp: Whether to recompute in the backward pass to save memory.
    """

    def __init__(
        self,
        embed_dims: int,
        attn: DeformableAttention,
        init_values: float = 0.0,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.query_norm = nn.LayerNorm(embed_dims, eps=ADAPTER_NORM_EPS)
        self.feat_norm = nn.LayerNorm(embed_dims, eps=ADAPTER_NORM_EPS)
        self.attn = attn
        self.gamma = nn.Parameter(torch.full((embed_dims,), float(init_values)))

    def _forward(self, x: Tensor, c: Tensor, geometry: DeformableInputs) -> Tensor:
        attn = self.attn(self.query_norm(x), self.feat_norm(c), geometry)
        return x + self.gamma * attn

    def forward(self, x: Tensor, c: Tensor, geometry: DeformableInputs) -> Tensor:
        """Run the injector.

        Args:
            x: The backbone's tokens, of shape ``(B, T, C)``, the queries.
            c: The tokens of the spatial prior, of shape ``(B, S, C)``, the values.
            geometry: The positions of queries and values.

        Returns:
            A tensor of the shape of ``x``.
        """
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(self._forward, x, c, geometry, use_reentrant=False)
        return self._forward(x, c, geometry)


class Extractor(nn.Module):
    """Bring the backbone's tokens into the spatial prior by deformable attention.

    ``c + attn(norm(c), norm(x))``, then a :class:`ConvFFN` with a residual (ViT-Adapter,
    "Multi-Scale Feature Extractor").

    Args:
        embed_dims: Channels of a token, C.
        attn: Deformable attention with one level.
        cffn_ratio: Hidden channels of the feed-forward network per channel; None for no network.
        drop_path: Probability of dropping the network's branch.
        with_cp: Whether to recompute in the backward pass to save memory.

    Raises:
        ValueError: If ``cffn_ratio`` is too small for one hidden channel.
    """

    def __init__(
        self,
        embed_dims: int,
        attn: DeformableAttention,
        cffn_ratio: float | None = 0.25,
        drop_path: float = 0.0,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.query_norm = nn.LayerNorm(embed_dims, eps=ADAPTER_NORM_EPS)
        self.feat_norm = nn.LayerNorm(embed_dims, eps=ADAPTER_NORM_EPS)
        self.attn = attn
        self.ffn = None
        if cffn_ratio is not None:
            hidden_dims = hidden_channels('cffn_ratio', cffn_ratio, embed_dims)
            self.ffn = ConvFFN(embed_dims, hidden_dims)
            self.ffn_norm = nn.LayerNorm(embed_dims, eps=ADAPTER_NORM_EPS)
            self.drop_path = DropPath(drop_path)

    def _forward(
        self, c: Tensor, x: Tensor, geometry: DeformableInputs, grids: Sequence[tuple[int, int]]
    ) -> Tensor:
        c = c + self.attn(self.query_norm(c), self.feat_norm(x), geometry)
        if self.ffn is not None:
            c = c + self.drop_path(self.ffn(self.ffn_norm(c), grids))
        return c

    def forward(
        self, c: Tensor, x: Tensor, geometry: DeformableInputs, grids: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Run the extractor.

        Args:
            c: The tokens of the spatial prior, of shape ``(B, S, C)``, the queries.
            x: The backbone's tokens, of shape ``(B, T, C)``, the values.
            geometry: The positions of queries and values.
            grids: Height and width of each map of the spatial prior.

        Returns:
            A tensor of the shape of ``c``.
        """
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(self._forward, c, x, geometry, grids, use_reentrant=False)
        return self._forward(c, x, geometry, grids)


class InteractionBlock(nn.Module):
    """One exchange between backbone and spatial prior, around some of the backbone's layers.

    Args:
        injector: Brings the spatial prior into the tokens, before the layers.
        extractor: Brings the tokens into the spatial prior, after the layers.
        extra_extractors: Further extractors, in the last block only.
    """

    def __init__(
        self, injector: Injector, extractor: Extractor, extra_extractors: Iterable[Extractor] = ()
    ) -> None:
        super().__init__()
        self.injector = injector
        self.extractor = extractor
        self.extra_extractors = nn.ModuleList(extra_extractors)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        layers: Iterable[nn.Module],
        resolution: tuple[int, int],
        grids: Sequence[tuple[int, int]],
        inject_geometry: DeformableInputs,
        extract_geometry: DeformableInputs,
    ) -> tuple[Tensor, Tensor]:
        """Run the block and the backbone's layers within it.

        Args:
            x: The backbone's tokens, of shape ``(B, T, C)``.
            c: The tokens of the spatial prior, of shape ``(B, S, C)``.
            layers: The backbone's layers; each is called with the tokens and their grid.
            resolution: The grid ``(H, W)`` of ``x``.
            grids: Height and width of each map of ``c``.
            inject_geometry: The positions of ``x`` as queries and ``c`` as values.
            extract_geometry: The positions of ``c`` as queries and ``x`` as values.

        Returns:
            The new ``x`` and ``c``.
        """
        x = self.injector(x, c, inject_geometry)
        for layer in layers:
            x = layer(x, resolution)
        for extractor in (self.extractor, *self.extra_extractors):
            c = extractor(c, x, extract_geometry, grids)
        return x, c
