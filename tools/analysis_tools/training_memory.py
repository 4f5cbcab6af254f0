"""Measure the memory of a training step of a backbone, with and without recomputation.

The result is the peak over a forward and a backward pass minus the memory in use before it:
activations, gradients and work space. On a GPU this counts PyTorch's allocations, on a CPU resident
memory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vrwkv.analysis import input_channels
from vrwkv.analysis.measurement import memory_in_use, peak_memory, run_in_new_process
from vrwkv.analysis.models import load_model, read_config
from vrwkv_ops.benchmarking import markdown_table, seconds


def step(
    config: str, with_cp: bool, batch_size: int, size: tuple[int, int], device: str
) -> tuple[float, float]:
    """Train a config's backbone for one step.

    Args:
        config: Path of the config.
        with_cp: Whether to recompute layers in the backward pass.
        batch_size: Number of images.
        size: Height and width of the images in pixels.
        device: The device, such as ``'cuda'`` or ``'cpu'``.

    Returns:
        The peak in MB and the time in seconds.
    """
    cfg = read_config(config)
    cfg.model.backbone.with_cp = with_cp
    backbone = load_model(cfg).backbone.to(device).train()
    images = torch.randn(batch_size, input_channels(backbone), *size, device=device)
    before = memory_in_use(device)

    def run() -> None:
        sum(out.float().square().mean() for out in backbone(images)).backward()

    time_taken = seconds(run, torch.device(device))
    return (peak_memory(device) - before) / 1e6, time_taken


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

    height, width = args.size
    print(
        f'Training step of the backbone, {args.batch_size} image(s) of {height} x {width} pixels, '
        f'on {args.device}'
    )
    rows = []
    for config in args.config:
        (plain, fast), (saved, slow) = (
            run_in_new_process(step, config, with_cp, args.batch_size, args.size, args.device)
            for with_cp in (False, True)
        )
        memory = (f'{plain:,.0f} MB', f'{saved:,.0f} MB', f'{1 - saved / plain:.0%}')
        rows.append((Path(config).stem, *memory, f'{fast:.1f} s', f'{slow:.1f} s'))
    header = ('config', 'memory', 'with_cp', 'saved', 'time', 'with_cp')
    print(markdown_table(header, rows))


if __name__ == '__main__':
    main()
