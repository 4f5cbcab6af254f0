"""One layer of a VRWKV stack."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .mix import ChannelMix, SpatialMix
from .residual import ResidualLayer


class VRWKVLayer(ResidualLayer):
    """A VRWKV layer: spatial mix, then channel mix, each with a residual (paper, figure 2b).

    Pre-norm computes ``x + gamma * f(ln(x))``, post-norm ``x + gamma * ln(f(x))``. The first layer
    of a stack normalises its input, too.

    Args:
        embed_dims: Channels of a token, C.
        depth: Number of layers in the stack, for the initial values.
        layer_id: Index of this layer in the stack, from 0.
        drop_path: Probability of dropping a residual branch.
        hidden_rate: Hidden channels of the channel mix per channel.
        init_values: Initial value of the layer scales ``gamma``, or None for no layer scale.
        post_norm: Whether to normalise after, and not before, each sub-layer.
        causal: Whether a token sees only itself and the tokens before it.
        with_cp: Whether to recompute the layer in the backward pass to save memory.
        **kwargs: Further arguments of both :class:`SpatialMix` and :class:`ChannelMix`:
            ``shift_mode``, ``shift_pixel``, ``channel_gamma``, ``init_mode`` and ``key_norm``.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
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
    ) -> None:
        super().__init__(embed_dims, drop_path, init_values, with_cp)
        self.post_norm = post_norm
        self.ln0 = nn.LayerNorm(embed_dims) if layer_id == 0 else None
        self.ln1 = nn.LayerNorm(embed_dims)
        self.ln2 = nn.LayerNorm(embed_dims)
        self.att = SpatialMix(embed_dims, depth, layer_id, causal=causal, **kwargs)
        self.ffn = ChannelMix(embed_dims, depth, layer_id, hidden_rate=hidden_rate, **kwargs)

    def _residual(
        self,
        x: Tensor,
        mix: nn.Module,
        norm: nn.Module,
        gamma: Tensor | None,
        resolution: tuple[int, int] | None,
    ) -> Tensor:
        y = norm(mix(x, resolution)) if self.post_norm else mix(norm(x), resolution)
        y = self.drop_path(y)
        return x + y if gamma is None else torch.addcmul(x, gamma, y)

    def _forward(self, x: Tensor, resolution: tuple[int, int] | None) -> Tensor:
        if self.ln0 is not None:
            x = self.ln0(x)
        x = self._residual(x, self.att, self.ln1, self.gamma1, resolution)
        return self._residual(x, self.ffn, self.ln2, self.gamma2, resolution)
