"""Stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn

from ._checks import check_rate


class DropPath(nn.Module):
    """Drop a residual branch for whole samples, as in `Deep Networks with Stochastic Depth`_.

    In training each sample of the batch is set to zero with probability ``drop_prob``, and the
    others are divided by ``1 - drop_prob``, which keeps the expectation. In evaluation the input is
    returned.

    Args:
        drop_prob: Probability in [0, 1] with which a sample's branch is dropped.

    Raises:
        TypeError: If ``drop_prob`` is not a number.
        ValueError: If ``drop_prob`` lies outside [0, 1].

    .. _Deep Networks with Stochastic Depth: https://arxiv.org/abs/1603.09382
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        check_rate('drop_prob', drop_prob)
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Drop samples along the first dimension of ``x``; returns a tensor of its shape."""
        if self.drop_prob == 0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep_prob)
        if keep_prob > 0:
            mask = mask / keep_prob
        return x * mask

    def extra_repr(self) -> str:
        """Return the part of the module's printed form that shows the rate."""
        return f'drop_prob={self.drop_prob:.3g}'
