"""The mix of each token with its shifted neighbours."""

from __future__ import annotations

from torch import Tensor, nn

from vrwkv_ops import token_shift
from vrwkv_ops.checks import SHIFT_MODES as SHIFTS

from ._checks import check_channel_gamma, check_choice, check_heads, check_int

SHIFT_MODES = ('none', *SHIFTS)


class TokenShift(nn.Module):
    """Mix each token with its shifted neighbours (paper, section 3.3, equation 9).

    It has no parameters: the learnt mixes belong to the layer that calls it, as in the released
    weights.

    Args:
        embed_dims: Channels of a token.
        shift_mode: ``'q_shift'``, the neighbours on the image grid; ``'single_shift'``, the
            previous token, as in RWKV; ``'double_shift'``, the previous and the next token: the
            horizontal half of Q-Shift, for tokens without a grid. Its groups of channels are those
            of Q-Shift, which replaces it in fine-tuning (section 4.4 of `the paper
            <https://arxiv.org/abs/2403.02308>`_, "MAE Pre-training"). ``'none'``: no shift.
        shift_pixel: Distance to the neighbour in tokens. 0 means no shift.
        channel_gamma: Fraction of a head's channels in each group of a Q-Shift or double shift.
        num_heads: Equal runs of channels, each with its own groups, for VRWKV6; None for one. The
            layers of VRWKV6 have mixes without a shift, too: with heads, a distance of 0 is a shift
            to the token itself.

    Raises:
        TypeError: If ``shift_pixel`` or ``num_heads`` is not an integer, or if ``channel_gamma`` is
            used and is not a number.
        ValueError: If ``shift_mode`` is unknown, ``shift_pixel`` negative, ``channel_gamma``
            outside (0, 1/4], ``embed_dims`` not a multiple of ``num_heads``, or a head too small
            for groups of a channel.
    """

    def __init__(
        self,
        embed_dims: int,
        shift_mode: str = 'q_shift',
        shift_pixel: int = 1,
        channel_gamma: float | None = 1 / 4,
        num_heads: int | None = None,
    ) -> None:
        super().__init__()
        check_choice('shift_mode', shift_mode, SHIFT_MODES)
        check_int('shift_pixel', shift_pixel, 0)
        self.shift_mode = shift_mode if shift_pixel or num_heads else 'none'
        self.shift_pixel = shift_pixel
        self.channel_gamma = channel_gamma
        self.num_heads = 1 if num_heads is None else num_heads
        check_heads(embed_dims, self.num_heads)
        if self.shift_mode in ('q_shift', 'double_shift'):
            check_channel_gamma(channel_gamma, embed_dims // self.num_heads)

    @property
    def enabled(self) -> bool:
        """Whether there is a shift, and therefore a mix to learn."""
        return self.shift_mode != 'none'

    def extent(self, resolution: tuple[int, int] | None) -> dict[str, object]:
        """Return the grid on which the shift works and how many of its rows a token sees across."""
        on_grid = self.shift_mode == 'q_shift'
        return dict(grid=resolution if on_grid else None, reach=self.shift_pixel)

    def forward(
        self, x: Tensor, mixes: tuple[Tensor | None, ...], resolution: tuple[int, int] | None = None
    ) -> tuple[Tensor, ...]:
        """Compute ``x * mix + shift(x) * (1 - mix)`` for each mix.

        Args:
            x: Tokens of shape ``(B, T, C)``.
            mixes: Tensors of shape ``(1, 1, C)``. Ignored without a shift.
            resolution: The tokens' grid ``(H, W)``. Only Q-Shift needs it.

        Returns:
            One mixed tensor of the shape of ``x`` for each of ``mixes``.

        Raises:
            ValueError: If a Q-Shift has no grid.
        """
        if not self.enabled:
            return (x,) * len(mixes)
        if self.shift_mode == 'q_shift' and resolution is None:
            raise ValueError(
                "shift_mode='q_shift' needs the tokens' grid: resolution must be (H, W), got "
                "None. For tokens without a grid use shift_mode='double_shift' or 'single_shift'"
            )
        return token_shift(
            x,
            mixes,
            resolution,
            self.shift_pixel,
            self.channel_gamma,
            self.shift_mode,
            self.num_heads,
        )

    def extra_repr(self) -> str:
        """Return the part of the module's printed form that shows the shift."""
        return (
            f'shift_mode={self.shift_mode!r}, shift_pixel={self.shift_pixel}, '
            f'channel_gamma={self.channel_gamma}, num_heads={self.num_heads}'
        )
