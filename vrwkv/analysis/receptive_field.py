"""Effective receptive fields, as in the paper's figure 3a."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def effective_receptive_field(
    model: Callable[[Tensor], Tensor | tuple[Tensor, ...]], images: Iterable[Tensor]
) -> Tensor:
    """Measure the influence of each pixel on the central token of the last feature map.

    This is the measure of `Ding et al. (2022) <https://arxiv.org/abs/2203.06717>`_: the gradient of
    the sum of the token's positive channels with respect to the image; its positive part is summed
    over the channels of the image and averaged over images.

    Args:
        model: Maps images to features of shape ``(B, C, h, w)``, or to a tuple that ends in them.
        images: Batches of shape ``(B, in_channels, H, W)``, all of the same height and width.

    Returns:
        The field, float64 of shape ``(H, W)``, scaled to sum to 1.

    Raises:
        ValueError: If there is no image or no feature map, or no pixel has influence.
    """
    total, count = 0.0, 0
    for batch in images:
        batch = batch.detach().requires_grad_()
        output = model(batch)
        features = output[-1] if isinstance(output, (tuple, list)) else output
        if not isinstance(features, Tensor) or features.dim() != 4:
            found = tuple(getattr(features, 'shape', ())) or type(features).__name__
            raise ValueError(
                f'expected a feature map of shape (B, C, h, w) from the model, got {found}. A '
                "mmpretrain ViT returns one with out_type='featmap'"
            )
        height, width = features.shape[2:]
        centre = features[:, :, height // 2, width // 2].relu().sum()
        (gradient,) = torch.autograd.grad(centre, batch)
        total = total + gradient.double().relu().sum((0, 1))
        count += len(batch)
    if not count:
        raise ValueError('expected at least one image, got none')
    if not (total.isfinite().all() and total.sum() > 0):
        raise ValueError('no pixel has a finite, positive influence on the centre of the map')
    return total / total.sum()


def area_of_share(field: Tensor, share: float) -> float:
    """Compute the smallest area that holds a share of a receptive field.

    Args:
        field: The field, of shape ``(H, W)`` and not negative.
        share: The share, in (0, 1].

    Returns:
        The number of strongest pixels that together hold the share, as a fraction of all pixels.

    Raises:
        ValueError: If ``share`` lies outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f'share must lie in (0, 1], got {share}')
    ordered = field.double().flatten().sort(descending=True).values.cumsum(0)
    # The tolerance keeps rounding from adding pixels without influence.
    needed = int((ordered < share * ordered[-1] * (1 - 1e-12)).sum()) + 1
    return min(needed, len(ordered)) / len(ordered)
