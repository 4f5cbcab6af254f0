"""The two sub-layers of a VRWKV layer: spatial mix and channel mix."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from vrwkv_ops import bi_wkv, sigmoid_gate, squared_relu

from ._checks import check_choice, hidden_channels
from .pieces import in_pieces
from .recompute import Recompute, autocast_dtype
from .token_shift import TokenShift

INIT_MODES = ('fancy', 'local', 'global')


class BaseMix(nn.Module):
    """The base of both sub-layers: the token shift, its mixes and their initial values.

    Args:
        embed_dims: Channels of a token, C.
        depth: Number of layers in the stack, for the initial values.
        layer_id: Index of this layer in the stack, from 0.
        mixes: Names of the mix parameters.
        shift_mode: The token shift, see :class:`TokenShift`.
        shift_pixel: Distance of the shift in tokens.
        channel_gamma: Fraction of the channels in each group of the shift.
        init_mode: Initial values of decay, bonus and mixes: ``'fancy'``, spread over layers and
            channels; ``'local'``, all ones; ``'global'``, no decay and no bonus, even mixes.
        num_heads: Heads of the shift, for VRWKV6.

    Raises:
        TypeError: If an argument of the shift has a wrong type.
        ValueError: If ``init_mode`` is unknown or an argument of the shift is out of its range.
    """

    def __init__(
        self,
        embed_dims: int,
        depth: int,
        layer_id: int,
        mixes: tuple[str, ...],
        shift_mode: str = 'q_shift',
        shift_pixel: int = 1,
        channel_gamma: float | None = 1 / 4,
        init_mode: str = 'fancy',
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        check_choice('init_mode', init_mode, INIT_MODES)
        self.init_mode = init_mode
        # Layer l of L: its relative height l / (L - 1), and 1 - l / L, the rest of the stack.
        self.height = layer_id / max(depth - 1, 1)
        self.remainder = 1 - layer_id / depth
        self.shift = TokenShift(embed_dims, shift_mode, shift_pixel, channel_gamma, num_heads)
        for name in mixes:
            mix = nn.Parameter(torch.empty(1, 1, embed_dims)) if self.shift.enabled else None
            self.register_parameter(name, mix)

    def _init_mix(self, mix: nn.Parameter | None, exponent: float, offset: float = 0.0) -> None:
        """Set a mix; if fancy, to ``(c / C) ** exponent + offset`` for channel c of C."""
        if mix is None:
            return
        if self.init_mode == 'fancy':
            channels = mix.shape[-1]
            mix.copy_((torch.arange(channels) / channels) ** exponent + offset)
        else:
            mix.fill_(1.0 if self.init_mode == 'local' else 0.5)

    def _shifted(
        self,
        recompute: Recompute,
        norm: nn.Module | None,
        mixes: tuple[Tensor | None, ...],
        x: Tensor,
        resolution: tuple[int, int] | None,
    ) -> tuple[Tensor, ...]:
        """Normalise tokens and mix them with their shifted neighbours."""

        def shift(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
            results = self.shift(x, mixes, resolution)
            dtype = autocast_dtype(x.device) if recompute.enabled else None
            if dtype is None or x.dtype == torch.float64:
                return results
            # As each linear layer would convert by itself; autograd would then keep the copies.
            return tuple(y.to(dtype) for y in results)

        if norm is not None:
            x = recompute.cheap(norm, x)
        # As inputs, too: if a mix is changed before the backward pass, that is an error.
        return recompute.cheap(shift, x, *(mix for mix in mixes if mix is not None))

    def _init_linears(self) -> None:
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)


class SpatialMix(BaseMix):
    """Attention in linear time: token shift, Bi-WKV, gate (paper, equations 1, 2 and 5).

    ``output(sigmoid(receptance(x_r)) * norm(bi_wkv(key(x_k), value(x_v))))``. The decay and the
    bonus are divided by the number of tokens. Equation 5 divides only the decay; upstream's code
    divides both, and the released weights depend on it.

    Args:
        embed_dims: Channels of a token, C.
        depth: Number of layers in the stack, for the initial values.
        layer_id: Index of this layer in the stack, from 0.
        key_norm: Whether to normalise the result of Bi-WKV.
        causal: Whether a token sees only itself and the tokens before it.
        **kwargs: The shift and the initial values: ``shift_mode``, ``shift_pixel``,
            ``channel_gamma`` and ``init_mode``, see :class:`VRWKV <vrwkv.backbones.VRWKV>`.

    Raises:
        TypeError: If an argument of the shift has a wrong type.
        ValueError: If ``init_mode`` is unknown or an argument of the shift is out of its range.
    """

    def __init__(
        self,
        embed_dims: int,
        depth: int,
        layer_id: int,
        *,
        key_norm: bool = False,
        causal: bool = False,
        **kwargs,
    ) -> None:
        mixes = ('spatial_mix_k', 'spatial_mix_v', 'spatial_mix_r')
        super().__init__(embed_dims, depth, layer_id, mixes, **kwargs)
        self.causal = causal
        self.spatial_decay = nn.Parameter(torch.empty(embed_dims))
        self.spatial_first = nn.Parameter(torch.empty(embed_dims))
        self.key = nn.Linear(embed_dims, embed_dims, bias=False)
        self.value = nn.Linear(embed_dims, embed_dims, bias=False)
        self.receptance = nn.Linear(embed_dims, embed_dims, bias=False)
        self.key_norm = nn.LayerNorm(embed_dims) if key_norm else None
        self.output = nn.Linear(embed_dims, embed_dims, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values for ``init_mode`` and the position of the layer."""
        self._init_mix(self.spatial_mix_k, self.remainder)
        self._init_mix(self.spatial_mix_v, self.remainder, offset=0.3 * self.height)
        self._init_mix(self.spatial_mix_r, self.remainder / 2)
        if self.init_mode == 'fancy':
            channels = len(self.spatial_decay)
            channel = torch.arange(channels)
            ramp = channel / max(channels - 1, 1)
            self.spatial_decay.copy_(-5 + 8 * ramp ** (0.7 + 1.3 * self.height))
            self.spatial_first.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        else:
            self.spatial_decay.fill_(1.0 if self.init_mode == 'local' else 0.0)
            self.spatial_first.fill_(1.0 if self.init_mode == 'local' else 0.0)
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
            norm: Applied to ``x`` first. Its result is not kept, as it would be by the caller.

        Returns:
            A tensor of the shape of ``x``.

        Raises:
            ValueError: If a Q-Shift has no grid, or one that does not match ``T``.
        """
        tokens = x.shape[1]
        mixes = (self.spatial_mix_k, self.spatial_mix_v, self.spatial_mix_r)
        recompute = Recompute(x)
        shift = partial(self._shifted, recompute, norm, mixes)
        project = partial(self._projected, recompute)
        k, v, r = in_pieces(project, x, shift=shift, **self.shift.extent(resolution))
        decay, first = self.spatial_decay / tokens, self.spatial_first / tokens
        y = bi_wkv(decay, first, k, v, causal=self.causal)
        del k, v  # for inference on large images
        return in_pieces(partial(self._gated, recompute), r, y, out=y)

    def _projected(self, recompute: Recompute, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(recompute.use, (self.key, self.value, self.receptance), inputs))

    def _gated(self, recompute: Recompute, r: Tensor, y: Tensor) -> Tensor:
        if self.key_norm is not None:
            y = recompute.cheap(self.key_norm, y)
        return recompute.use(self.output, recompute.cheap(sigmoid_gate, r, y))


class ChannelMix(BaseMix):
    """Feed-forward network with token shift and gate (paper, equations 3 and 4).

    ``sigmoid(receptance(x_r)) * value(norm(relu(key(x_k)) ** 2))``.

    Args:
        embed_dims: Channels of a token, C.
        depth: Number of layers in the stack, for the initial values.
        layer_id: Index of this layer in the stack, from 0.
        hidden_rate: Hidden channels per channel.
        key_norm: Whether to normalise the hidden channels.
        **kwargs: The shift and the initial values, see :class:`SpatialMix`; for VRWKV6
            ``num_heads``, see :class:`TokenShift`.

    Raises:
        TypeError: If ``hidden_rate`` is not a number or an argument of the shift has a wrong type.
        ValueError: If ``hidden_rate`` leaves no hidden channel, ``init_mode`` is unknown or an
            argument of the shift is out of its range.
    """

    def __init__(
        self,
        embed_dims: int,
        depth: int,
        layer_id: int,
        *,
        hidden_rate: float = 4,
        key_norm: bool = False,
        **kwargs,
    ) -> None:
        mixes = ('spatial_mix_k', 'spatial_mix_r')
        super().__init__(embed_dims, depth, layer_id, mixes, **kwargs)
        hidden_dims = hidden_channels('hidden_rate', hidden_rate, embed_dims)
        self.key = nn.Linear(embed_dims, hidden_dims, bias=False)
        self.key_norm = nn.LayerNorm(hidden_dims) if key_norm else None
        self.receptance = nn.Linear(embed_dims, embed_dims, bias=False)
        self.value = nn.Linear(hidden_dims, embed_dims, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the initial values for ``init_mode`` and the position of the layer."""
        self._init_mix(self.spatial_mix_k, self.remainder)
        self._init_mix(self.spatial_mix_r, self.remainder)
        self._init_linears()

    def forward(
        self,
        x: Tensor,
        resolution: tuple[int, int] | None = None,
        norm: nn.Module | None = None,
    ) -> Tensor:
        """Mix over channels.

        Args:
            x: Tokens of shape ``(B, T, C)``.
            resolution: Their grid ``(H, W)``. Only Q-Shift needs it.
            norm: Applied to ``x`` first.

        Returns:
            A tensor of the shape of ``x``.

        Raises:
            ValueError: If a Q-Shift has no grid, or one that does not match ``T``.
        """
        mixes = (self.spatial_mix_k, self.spatial_mix_r)
        recompute = Recompute(x)
        shift = partial(self._shifted, recompute, norm, mixes)
        mix = partial(self._gated, recompute)
        return in_pieces(mix, x, shift=shift, **self.shift.extent(resolution))

    def _gated(self, recompute: Recompute, xk: Tensor, xr: Tensor) -> Tensor:
        hidden = recompute.use(self.key, xk)
        if type(hidden) is Tensor and not torch.is_grad_enabled() and hidden.is_cpu:
            # In place, in inference: on a CPU a new tensor takes longer than a second pass.
            hidden = hidden.relu_().square_()
        else:
            hidden = recompute.cheap(squared_relu, hidden)
        if self.key_norm is not None:
            hidden = recompute.cheap(self.key_norm, hidden)
        return sigmoid_gate(recompute.use(self.receptance, xr), recompute.use(self.value, hidden))
