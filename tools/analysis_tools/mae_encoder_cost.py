"""Measure what an MAE encoder costs at several mask ratios, relative to the dense encoder."""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from torch import Tensor, nn

import vrwkv_cls  # noqa: F401

RATIOS = (0.0, 0.5, 0.75, 0.9)


def saved_bytes(encoder: nn.Module, images: Tensor) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, parameters left out.

    Exact, and the same on every device, unlike what an allocator reports.
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
    del features  # held until here, so that no storage was freed and its address reused
    return sum(sizes.values())


def step_seconds(encoder: nn.Module, images: Tensor) -> float:
    """Time one forward and backward pass."""
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    encoder(images)[0].square().mean().backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of a masked pre-training')
    parser.add_argument('--batch-size', type=int, default=8, help='default: %(default)s')
    parser.add_argument('--repeats', type=int, default=5, help='default: %(default)s')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()

    cfg = Config.fromfile(args.config).model.backbone
    with DefaultScope.overwrite_default_scope('mmpretrain'), torch.device(args.device):
        encoders = {r: MODELS.build(cfg | dict(mask_ratio=r)).train() for r in RATIOS}
        images = torch.randn(args.batch_size, 3, cfg.img_size, cfg.img_size)
    memory = {r: saved_bytes(encoder, images) for r, encoder in encoders.items()}
    # Interleaved, so that a change of the machine's load meets all ratios; the first warms up.
    rounds = [
        {r: step_seconds(encoder, images) for r, encoder in encoders.items()}
        for _ in range(args.repeats + 1)
    ][1:]

    print(f'{args.batch_size} images of {cfg.img_size} pixels on {args.device}, training step')
    print('| mask | kept | time (s) | time / dense | saved for backward (MB) | memory / dense |')
    print('|---|---|---|---|---|---|')
    seconds = {r: statistics.median(times[r] for times in rounds) for r in RATIOS}
    for r in RATIOS:
        print(
            f'| {r:g} | {1 - r:.2f} | {seconds[r]:.3f} | {seconds[r] / seconds[0]:.2f} '
            f'| {memory[r] / 1e6:.1f} | {memory[r] / memory[0]:.2f} |'
        )


if __name__ == '__main__':
    main()
