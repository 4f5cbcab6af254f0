"""The spatial mix of VRWKV6: attention with a decay that depends on the data."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrwkv_ops import bi_wkv6
from vrwkv_ops.checks import MAX_HEAD

from ._checks import check_choice, check_heads
from .mix import BaseMix
from .pieces import in_pieces

# Ranks of the low-rank products, in models of every size.
MIX_RANK, DECAY_RANK = 32, 64


class SpatialMix6(BaseMix):
    """Attention in linear time with data-dependent mixes and decays (RWKV-6, both directions).

    The inputs of receptance, key, value, gate and decay are five mixes of each token with its
    shifted neighbour. A low-rank product of the token and its neighbour changes the mixes
    (``time_maa_w1``, ``time_maa_w2``), another one the decay (``time_decay_w1``,
    ``time_decay_w2``)::

        y = bi_wkv6(receptance(x_r), key(x_k), value(x_v), w, u)
        output(group_norm(norm(y)) * silu(gate(x_g)))

    From `Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence
    <https://arxiv.org/abs/2404.05892>`_, section 4.2, and upstream's code; the Vision-RWKV paper
    does not describe it. Parameters are named as in upstream's weights. A ``time_maa`` is the
    weight of the shifted token. Decays are not divided by the number of tokens.

    Args:
        embed_dims: Channels of a token, C.
        depth: Number of layers in the stack, for the initial values.
        layer_id: Index of this layer in the stack, from 0.
        num_heads: Heads of the operator and of the shift, of at most 64 channels each.
        key_norm: Whether to normalise the result of the operator over all channels, too.
        init_mode: Initial values: only ``'fancy'``, spread over layers and channels.
        **kwargs: The shift: ``shift_mode`` and ``shift_pixel``, see
            :class:`VRWKV6 <vrwkv.backbones.VRWKV6>`.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If heads do not divide the channels, their size is above 64 or not a multiple of
            8, ``init_mode`` is another one or an argument of the shift is out of its range.
    """

    def __init__(
        self,
        embed_dims: int,
        depth: int,
        layer_id: int,
        *,
        num_heads: int,
        key_norm: bool = False,
        init_mode: str = 'fancy',
        **kwargs,
    ) -> None:
        check_choice('init_mode', init_mode, ('fancy',))
        check_heads(embed_dims, num_heads)
        head_dims = embed_dims // num_heads
        if head_dims > MAX_HEAD or head_dims % 8:
            raise ValueError(
                f'num_heads must give heads of at most {MAX_HEAD} channels, a multiple of 8, got '
                f'{num_heads} heads of {head_dims} channels for embed_dims={embed_dims}'
            )
        mixes = tuple(f'time_maa_{name}' for name in 'xwkvrg')
        super().__init__(embed_dims, depth, layer_id, mixes, num_heads=num_heads, **kwargs)
        self.time_maa_w1 = nn.Parameter(torch.empty(embed_dims, 5 * MIX_RANK))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, MIX_RANK, embed_dims))
        self.time_decay = nn.Parameter(torch.empty(1, 1, embed_dims))
        self.time_decay_w1 = nn.Parameter(torch.empty(embed_dims, DECAY_RANK))
        self.time_decay_w2 = nn.Parameter(torch.empty(DECAY_RANK, embed_dims))
        self.time_faaaa = nn.Parameter(torch.empty(num_heads, head_dims))
        self.receptance = nn.Linear(embed_dims, embed_dims, bias=False)
        self.key = nn.Linear(embed_dims, embed_dims, bias=False)
        self.value = nn.Linear(embed_dims, embed_dims, bias=False)
        self.gate = nn.Linear(embed_dims, embed_dims, bias=False)
        self.key_norm = nn.LayerNorm(embed_dims) if key_norm else None
        self.ln_x = nn.GroupNorm(num_heads, embed_dims)
        self.output = nn.Linear(embed_dims, embed_dims, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values for the position of the layer."""
        for name in 'xwkvrg':
            mix = getattr(self, f'time_maa_{name}')
            exponent = self.remainder / 2 if name in 'rg' else self.remainder
            self._init_mix(mix, exponent, offset=0.3 * self.height if name == 'v' else 0.0)
            mix.copy_(1 - mix)  # the weight of the neighbour
        for low_rank in (
            self.time_maa_w1,
            self.time_maa_w2,
            self.time_decay_w1,
            self.time_decay_w2,
        ):
            nn.init.uniform_(low_rank, -1e-4, 1e-4)
        channel = torch.arange(self.time_decay.shape[2])
        ramp = channel / (len(channel) - 1)
        self.time_decay.copy_(-6 + 5 * ramp ** (0.7 + 1.3 * self.height))
        bonus = self.height * (1 - ramp) + 0.1 * ((channel + 1) % 3 - 1)
        self.time_faaaa.copy_(bonus.view_as(self.time_faaaa))
        self._init_linears()

    def forward(
        self,
        x: Tensor,
        resolution: tuple[int, int] | None = None,
        norm: nn.Module | None = None,
    ) -> Tensor:
        """Mix over tokens.

        Args:
            x: Tokens of shape ``(B, T, C)``.
            resolution: Their grid ``(H, W)``. Only Q-Shift needs it.
            norm: Applied to ``x`` first.

        Returns:
            A tensor of the shape of ``x``.

        Raises:
            ValueError: If a Q-Shift has no grid, or one that does not match ``T``.
        """
        shift, extent = partial(self._shifted, norm), self.shift.extent(resolution)
        r, k, v, w, gate = in_pieces(self._projected, x, shift=shift, **extent)
        y = bi_wkv6(r, k, v, w, self.time_faaaa)
        del r, k, v, w  # for inference on large images
        return in_pieces(self._gated, y, gate, out=y)

    def _shifted(
        self, norm: nn.Module | None, x: Tensor, resolution: tuple[int, int] | None
    ) -> tuple[Tensor, ...]:
        """Return normalised tokens, their first mixes and their neighbours."""
        if norm is not None:
            x = norm(x)
        # The shift's weights are those of the token itself: with 0, the neighbour alone remains.
        mixes = (1 - self.time_maa_x, torch.zeros_like(self.time_maa_x))
        return x, *self.shift(x, mixes, resolution)

    def _projected(self, x: Tensor, mixed: Tensor, neighbour: Tensor) -> tuple[Tensor, ...]:
        """Return receptance, key, value, decay and gate."""
        delta = neighbour - x
        low = torch.tanh(mixed @ self.time_maa_w1).flatten(0, 1).unflatten(1, (5, MIX_RANK))
        change = torch.bmm(low.transpose(0, 1), self.time_maa_w2).unflatten(1, x.shape[:2])
        maa = torch.stack([getattr(self, f'time_maa_{name}') for name in 'wkvrg'])
        xw, xk, xv, xr, xg = torch.addcmul(x, delta, maa + change).unbind()
        w = self.time_decay + torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2
        return self.receptance(xr), self.key(xk), self.value(xv), w, self.gate(xg)

    def _gated(self, y: Tensor, gate: Tensor) -> Tensor:
        if self.key_norm is not None:
            y = self.key_norm(y)
        y = self.ln_x(y.flatten(0, 1)).view_as(y)  # over the heads of each token
        return self.output(y * F.silu(gate))
