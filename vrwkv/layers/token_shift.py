"""Token shifts and the mix of each token with its shifted neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vrwkv_ops import q_shift
from vrwkv_ops.checks import shift_bounds

from ._checks import check_channel_gamma, check_choice, check_int

SHIFT_MODES = ('none', 'q_shift', 'single_shift', 'double_shift')


def single_shift(x: Tensor, shift_pixel: int = 1) -> Tensor:
    """Give every token the one before it in the sequence, as RWKV does.

    Args:
        x: Tokens of shape ``(B, T, C)``.
        shift_pixel: How many tokens to reach back.

    Returns:
        The shifted tokens, of the shape of ``x``; zero where there is none before.
    """
    step = min(shift_pixel, x.shape[1])
    return F.pad(x, (0, 0, step, -step))


def double_shift(x: Tensor, shift_pixel: int = 1, channel_gamma: float = 1 / 4) -> Tensor:
    """Q-Shift without its vertical half, for tokens that lie on no grid.

    A first group of channels takes the token before, a second one the token after, the other
    channels stay. The groups are those of Q-Shift, so that each channel keeps its meaning when
    fine-tuning turns to Q-Shift (section 4.5 of `the paper <https://arxiv.org/abs/2403.02308>`_,
    "MAE Pre-training").

    Args:
        x: Tokens of shape ``(B, T, C)``.
        shift_pixel: How many tokens to reach back and forth.
        channel_gamma: Fraction of the channels in each group, at most 1/4.

    Returns:
        The shifted tokens, of the shape of ``x``; zero beyond the sequence's ends.
    """
    step = min(shift_pixel, x.shape[1])
    _, first, second, *_ = shift_bounds(x.shape[2], channel_gamma)
    return torch.cat(
        [
            F.pad(x[..., :first], (0, 0, step, -step)),
            F.pad(x[..., first:second], (0, 0, -step, step)),
            x[..., second:],
        ],
        dim=2,
    )


class TokenShift(nn.Module):
    """Mix each token with its shifted neighbours (paper, section 3.3).

    It holds no parameters: the learnt mixes belong to the layer that calls it, under the names
    that released weights have.

    Args:
        embed_dims: Channels of a token.
        shift_mode: ``'q_shift'``, the neighbours on the image grid; ``'single_shift'``, the
            previous token; ``'double_shift'``, the previous and the next token; ``'none'``.
        shift_pixel: Distance to the neighbour in tokens. 0 means no shift.
        channel_gamma: Fraction of the channels in each group of a Q-Shift or double shift.

    Raises:
        TypeError: If ``shift_pixel`` is not an integer, or ``channel_gamma`` not a number where
            it is used.
        ValueError: If ``shift_mode`` is unknown, ``shift_pixel`` negative, ``channel_gamma``
            outside (0, 1/4], or ``embed_dims`` too small for groups of a channel.
    """

    def __init__(
        self,
        embed_dims: int,
        shift_mode: str = 'q_shift',
        shift_pixel: int = 1,
        channel_gamma: float | None = 1 / 4,
    ) -> None:
        super().__init__()
        check_choice('shift_mode', shift_mode, SHIFT_MODES)
        check_int('shift_pixel', shift_pixel, 0)
        self.shift_mode = shift_mode if shift_pixel else 'none'
        self.shift_pixel = shift_pixel
        self.channel_gamma = channel_gamma
        if self.shift_mode in ('q_shift', 'double_shift'):
            check_channel_gamma(channel_gamma, embed_dims)

    @property
    def enabled(self) -> bool:
        """Whether there is a shift, and so a mix to learn."""
        return self.shift_mode != 'none'

    def shift(self, x: Tensor, resolution: tuple[int, int] | None = None) -> Tensor:
        """Shift tokens.

        Args:
            x: Tokens of shape ``(B, T, C)``.
            resolution: Their grid ``(H, W)`` with ``H * W == T``. Only Q-Shift needs it.

        Returns:
            The shifted tokens, of the shape of ``x``.

        Raises:
            ValueError: If a Q-Shift has no grid.
        """
        if self.shift_mode == 'none':
            return x
        if self.shift_mode == 'single_shift':
            return single_shift(x, self.shift_pixel)
        if self.shift_mode == 'double_shift':
            return double_shift(x, self.shift_pixel, self.channel_gamma)
        if resolution is None:
            raise ValueError(
                "shift_mode='q_shift' needs the tokens' grid: resolution must be (H, W), got "
                "None. For tokens without a grid use shift_mode='double_shift' or 'single_shift'"
            )
        return q_shift(x, resolution, self.shift_pixel, self.channel_gamma)

    def forward(
        self, x: Tensor, mixes: tuple[Tensor | None, ...], resolution: tuple[int, int] | None = None
    ) -> tuple[Tensor, ...]:
        """Compute ``x * mix + shift(x) * (1 - mix)`` for each mix.

        Args:
            x: Tokens of shape ``(B, T, C)``.
            mixes: Tensors of shape ``(1, 1, C)``. Not looked at where there is no shift.
            resolution: The tokens' grid ``(H, W)``. Only Q-Shift needs it.

        Returns:
            One mixed tensor of the shape of ``x`` for each of ``mixes``.

        Raises:
            ValueError: If a Q-Shift has no grid.
        """
        if not self.enabled:
            return (x,) * len(mixes)
        shifted = self.shift(x, resolution)
        return tuple(x * mix + shifted * (1 - mix) for mix in mixes)

    def extra_repr(self) -> str:
        """Show the shift where the module is printed."""
        return (
            f'shift_mode={self.shift_mode!r}, shift_pixel={self.shift_pixel}, '
            f'channel_gamma={self.channel_gamma}'
        )
