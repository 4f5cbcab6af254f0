"""One layer of a VRWKV or VRWKV6 stack."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .mix import ChannelMix, SpatialMix
from .residual import ResidualLayer


class VRWKVLayer(ResidualLayer):
    """A layer of a spatial mix and a channel mix, each with a residual (paper, figure 2b).

    Pre-norm computes ``x + gamma * f(ln(x))``, post-norm ``x + gamma * ln(f(x))``. The first layer
    of a stack normalises its input, too.

    Args:
        embed_dims: Channels of a token, C.
        att: The spatial mix, called with tokens, their grid and, with pre-norm, the norm layer.
        ffn: The channel mix, likewise.
        first: Whether this is the first layer of the stack.
        drop_path: Probability of dropping a residual branch.
        init_values: Initial value of the layer scales ``gamma``, or None for no layer scale.
        post_norm: Whether to normalise after, and not before, each sub-layer.
        with_cp: Whether to recompute the layer in the backward pass to save memory.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        embed_dims: int,
        att: nn.Module,
        ffn: nn.Module,
        *,
        first: bool = False,
        drop_path: float = 0.0,
        init_values: float | None = None,
        post_norm: bool = False,
        with_cp: bool = False,
    ) -> None:
        super().__init__(embed_dims, drop_path, init_values, with_cp)
        self.post_norm = post_norm
        self.ln0 = nn.LayerNorm(embed_dims) if first else None
        self.ln1 = nn.LayerNorm(embed_dims)
        self.ln2 = nn.LayerNorm(embed_dims)
        self.att = att
        self.ffn = ffn

    def _residual(
        self,
        x: Tensor,
        mix: nn.Module,
        norm: nn.Module,
        gamma: Tensor | None,
        resolution: tuple[int, int] | None,
    ) -> Tensor:
        y = norm(mix(x, resolution)) if self.post_norm else mix(x, resolution, norm)
        y = self.drop_path(y)
        if not torch.is_grad_enabled() and y.dtype == x.dtype:
            # In place: y is new, and inference on large images needs its memory.
            return y.add_(x) if gamma is None else torch.addcmul(x, gamma, y, out=y)
        return x + y if gamma is None else torch.addcmul(x, gamma, y)

    def _forward(self, x: Tensor, resolution: tuple[int, int] | None) -> Tensor:
        if self.ln0 is not None:
            x = self.ln0(x)
        x = self._residual(x, self.att, self.ln1, self.gamma1, resolution)
        return self._residual(x, self.ffn, self.ln2, self.gamma2, resolution)


def vrwkv_layer(
    embed_dims: int,
    depth: int,
    layer_id: int,
    *,
    drop_path: float = 0.0,
    hidden_rate: float = 4,
    init_values: float | None = None,
    post_norm: bool = False,
    causal: bool = False,
    with_cp: bool = False,
    **kwargs,
) -> VRWKVLayer:
    """Build a layer of VRWKV.

    Args:
        embed_dims: Channels of a token, C.
        depth: Number of layers in the stack, for the initial values.
        layer_id: Index of this layer in the stack, from 0.
        drop_path: As for :class:`VRWKVLayer`, like ``init_values``, ``post_norm`` and ``with_cp``.
        hidden_rate: Hidden channels of the channel mix per channel.
        init_values: See ``drop_path``.
        post_norm: See ``drop_path``.
        causal: Whether a token sees only itself and the tokens before it.
        with_cp: See ``drop_path``.
        **kwargs: Further arguments of both :class:`SpatialMix` and :class:`ChannelMix`:
            ``shift_mode``, ``shift_pixel``, ``channel_gamma``, ``init_mode`` and ``key_norm``.

    Returns:
        The layer.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of its range.
    """
    return VRWKVLayer(
        embed_dims,
        SpatialMix(embed_dims, depth, layer_id, causal=causal, **kwargs),
        ChannelMix(embed_dims, depth, layer_id, hidden_rate=hidden_rate, **kwargs),
        first=layer_id == 0,
        drop_path=drop_path,
        init_values=init_values,
        post_norm=post_norm,
        with_cp=with_cp,
    )
