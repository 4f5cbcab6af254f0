"""Measure what a training step of a backbone needs in memory, with and without recomputation.

The peak over a forward and a backward pass, less what the process held before: activations,
gradients and work space. On a GPU that is what PyTorch allocated; on a CPU, resident memory. Each
measurement has a process of its own.
"""

from __future__ import annotations

import argparse
import re
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from vrwkv.analysis.models import load_model, read_config


def step(config: str, with_cp: bool, shape: tuple[int, ...], device: str) -> tuple[float, float]:
    """Train a config's backbone for one step.

    Args:
        config: Path of the config.
        with_cp: Whether to recompute layers in the backward pass.
        shape: Shape of the images, ``(B, 3, H, W)``.
        device: Where, such as ``'cuda'`` or ``'cpu'``.

    Returns:
        The peak in MB and the seconds that it took.
    """
    cfg = read_config(config)
    cfg.model.backbone.with_cp = with_cp
    backbone = load_model(cfg).backbone.to(device).train()
    images = torch.randn(shape, device=device)
    before = _memory(device, 'VmRSS')
    start = time.perf_counter()
    sum(out.float().square().mean() for out in backbone(images)).backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return (_memory(device, 'VmHWM') - before) / 1e6, seconds


def _memory(device: str, kind: str) -> int:
    """Return bytes in use now (``'VmRSS'``) or at the peak (``'VmHWM'``)."""
    if torch.device(device).type == 'cuda':
        now = kind == 'VmRSS'
        return (torch.cuda.memory_allocated if now else torch.cuda.max_memory_allocated)(device)
    return 1024 * int(re.search(rf'{kind}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('config', nargs='+', help='configs of detectors or segmentors')
    parser.add_argument(
        '--size', type=int, nargs=2, default=(800, 1344), metavar=('HEIGHT', 'WIDTH'),
        help='pixels of the images (default: 800 1344)',
    )  # fmt: skip
    parser.add_argument('--batch-size', type=int, default=1, help='default: %(default)s')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()

    shape = (args.batch_size, 3, *args.size)
    print(f'Training step of the backbone, images of shape {shape}, on {args.device}')
    print('| config | memory | with_cp | less | time | with_cp |')
    print('|---|---|---|---|---|---|')
    for config in args.config:
        results = []
        for with_cp in (False, True):
            with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
                results.append(pool.submit(step, config, with_cp, shape, args.device).result())
        (plain, fast), (saved, slow) = results
        print(
            f'| {Path(config).stem} | {plain:,.0f} MB | {saved:,.0f} MB | {1 - saved / plain:.0%} '
            f'| {fast:.1f} s | {slow:.1f} s |'
        )


if __name__ == '__main__':
    main()
