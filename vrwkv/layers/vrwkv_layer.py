"""One layer of a VRWKV stack."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._checks import check_number
from .drop_path import DropPath
from .mix import ChannelMix, SpatialMix


class VRWKVLayer(nn.Module):
    """A VRWKV layer: spatial mix, then channel mix, each with a residual (paper, figure 2b).

    Pre-norm computes ``x + gamma * f(ln(x))``, post-norm ``x + gamma * ln(f(x))``. The first layer
    of a stack normalises its input too.

    Args:
        embed_dims: Channels of a token, C.
        depth: Number of layers in the stack, for the initial values.
        layer_id: Index of this layer in the stack, from 0.
        shift_mode: The token shift, see :class:`TokenShift`.
        shift_pixel: Distance of the shift in tokens.
        channel_gamma: Fraction of the channels in each group of the shift.
        drop_path: Probability of dropping a residual branch.
        hidden_rate: Hidden channels of the channel mix per channel.
        init_mode: How decay, bonus and mixes start, see :class:`SpatialMix`.
        init_values: Start of the layer scales ``gamma``, or None for no layer scale.
        post_norm: Whether to normalise after, and not before, each sub-layer.
        key_norm: Whether to normalise inside the sub-layers.
        causal: Whether a token sees only itself and the tokens before it.
        with_cp: Whether to recompute the layer in the backward pass to save memory.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        embed_dims: int,
        depth: int,
        layer_id: int,
        shift_mode: str = 'q_shift',
        shift_pixel: int = 1,
        channel_gamma: float | None = 1 / 4,
        drop_path: float = 0.0,
        hidden_rate: float = 4,
        init_mode: str = 'fancy',
        init_values: float | None = None,
        post_norm: bool = False,
        key_norm: bool = False,
        causal: bool = False,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        if init_values is not None:
            check_number('init_values', init_values)
        self.post_norm = post_norm
        self.with_cp = with_cp
        self.ln0 = nn.LayerNorm(embed_dims) if layer_id == 0 else None
        self.ln1 = nn.LayerNorm(embed_dims)
        self.ln2 = nn.LayerNorm(embed_dims)
        shared = dict(
            embed_dims=embed_dims,
            depth=depth,
            layer_id=layer_id,
            shift_mode=shift_mode,
            shift_pixel=shift_pixel,
            channel_gamma=channel_gamma,
            init_mode=init_mode,
            key_norm=key_norm,
        )
        self.att = SpatialMix(causal=causal, **shared)
        self.ffn = ChannelMix(hidden_rate=hidden_rate, **shared)
        self.drop_path = DropPath(drop_path)
        for name in ('gamma1', 'gamma2'):
            gamma = None
            if init_values is not None:
                gamma = nn.Parameter(torch.full((embed_dims,), float(init_values)))
            self.register_parameter(name, gamma)

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

    def forward(self, x: Tensor, resolution: tuple[int, int] | None = None) -> Tensor:
        """Run the layer.

        Args:
            x: Tokens of shape ``(B, T, C)``.
            resolution: Their grid ``(H, W)`` with ``H * W == T``. Only Q-Shift needs it.

        Returns:
            A tensor of the shape of ``x``.

        Raises:
            ValueError: If a Q-Shift has no grid, or one that does not match ``T``.
        """
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(self._forward, x, resolution, use_reentrant=False)
        return self._forward(x, resolution)
