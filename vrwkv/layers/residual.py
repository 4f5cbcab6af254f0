"""The common part of VRWKV's and ViT's layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._checks import check_number
from .drop_path import DropPath


class ResidualLayer(nn.Module):
    """A layer of two residual branches with optional layer scales ``gamma1`` and ``gamma2``.

    Subclasses compute the layer in ``_forward(x, resolution)``.

    Args:
        embed_dims: Channels of a token, C.
        drop_path: Probability of dropping a residual branch.
        init_values: Initial value of the layer scales, or None for no layer scale.
        with_cp: Whether to recompute the layer in the backward pass to save memory.

    Raises:
        TypeError: If ``init_values`` or ``drop_path`` is not a number.
        ValueError: If ``drop_path`` lies outside [0, 1].
    """

    def __init__(
        self, embed_dims: int, drop_path: float, init_values: float | None, with_cp: bool
    ) -> None:
        super().__init__()
        if init_values is not None:
            check_number('init_values', init_values)
        self.with_cp = with_cp
        self.drop_path = DropPath(drop_path)
        for name in ('gamma1', 'gamma2'):
            gamma = None
            if init_values is not None:
                gamma = nn.Parameter(torch.full((embed_dims,), float(init_values)))
            self.register_parameter(name, gamma)

    def forward(self, x: Tensor, resolution: tuple[int, int] | None = None) -> Tensor:
        """Run the layer.

        Args:
            x: Tokens of shape ``(B, T, C)``.
            resolution: Their grid ``(H, W)`` with ``H * W == T``. Only Q-Shift and window
                attention need it.

        Returns:
            A tensor of the shape of ``x``.

        Raises:
            ValueError: If Q-Shift has no grid, or one that does not match ``T``.
        """
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(self._forward, x, resolution, use_reentrant=False)
        return self._forward(x, resolution)
