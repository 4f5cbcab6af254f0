"""Measure the cost of an MAE encoder at several mask ratios, relative to the dense encoder."""

from __future__ import annotations

import argparse
from functools import partial

import torch
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from torch import Tensor, nn

import vrwkv_cls  # noqa: F401
from vrwkv.analysis import input_channels
from vrwkv.analysis.models import read_config
from vrwkv_ops.benchmarking import markdown_table, time_calls

RATIOS = (0.0, 0.5, 0.75, 0.9)


def saved_bytes(encoder: nn.Module, images: Tensor) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, without parameters.

    The count is exact and the same on every device, unlike an allocator's.
    """
    parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = encoder(images)[0]
    del features  # alive until here, so that no storage was freed and its address reused
    return sum(sizes.values())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of a masked pre-training')
    parser.add_argument('--batch-size', type=int, default=8, help='default: %(default)s')
    parser.add_argument('--repeats', type=int, default=5, help='default: %(default)s')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()

    cfg = read_config(args.config).model.backbone
    with DefaultScope.overwrite_default_scope('mmpretrain'), torch.device(args.device):
        encoders = {r: MODELS.build(cfg | dict(mask_ratio=r)).train() for r in RATIOS}
        channels = input_channels(encoders[0.0])
        images = torch.randn(args.batch_size, channels, cfg.img_size, cfg.img_size)
    memory = {r: saved_bytes(encoder, images) for r, encoder in encoders.items()}

    def step(encoder: nn.Module) -> None:
        encoder(images)[0].square().mean().backward()

    calls = {r: partial(step, encoder) for r, encoder in encoders.items()}
    times = time_calls(calls, images.device, args.repeats, patience=60.0)
    rows = [
        (
            f'{r:g}',
            f'{1 - r:.2f}',
            f'{times[r]:.3f}',
            f'{times[r] / times[0]:.2f}',
            f'{memory[r] / 1e6:.1f}',
            f'{memory[r] / memory[0]:.2f}',
        )
        for r in RATIOS
    ]
    print(f'{args.batch_size} images of {cfg.img_size} pixels on {args.device}, training step')
    header = ('mask', 'kept', 'time (s)', 'time / dense', 'saved for backward (MB)')
    print(markdown_table((*header, 'memory / dense'), rows))


if __name__ == '__main__':
    main()
