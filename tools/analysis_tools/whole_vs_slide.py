"""Measure time and peak memory of segmenting an image whole, and in windows that slide over it.

Memory on a CPU is read as Linux reports it. Weights are random: neither depends on them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from mmseg.structures import SegDataSample
from torch import nn

from vrwkv.analysis.models import build_model, read_config

GIB = 2**30
MODES = ('whole', 'slide')


def used_bytes(device: str, peak: bool) -> int:
    """Read the memory of this process, or what it allocated on its GPU: now, or at its peak."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    # Unlike getrusage, which starts from the peak of the process that started this one.
    name = 'VmHWM' if peak else 'VmRSS'
    status = Path('/proc/self/status').read_text()
    return int(re.search(rf'{name}:\s+(\d+) kB', status)[1]) * 1024


def seconds(model: nn.Module, data: dict, device: str) -> float:
    """Time one prediction."""
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.inference_mode():
        model.test_step(data)
    if device.startswith('cuda'):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    config: str, mode: str, size: tuple[int, int], device: str, repeats: int, threads: int
) -> tuple[float, int]:
    """Measure one model and mode; called in a new process, since a peak never falls.

    Args:
        config: The config of a segmentor.
        mode: ``'whole'``, or ``'slide'`` with the windows of the config.
        size: Height and width of the image in pixels.
        device: Where to run.
        repeats: How often to run; the fastest counts.
        threads: Threads on a CPU.

    Returns:
        The time in seconds and the peak of memory in bytes, over that of the model and the image.
    """
    torch.set_num_threads(threads)
    model = build_model(read_config(config)).to(device)
    model.test_cfg.mode = mode
    sample = SegDataSample(metainfo=dict(ori_shape=size, img_shape=size))
    data = dict(inputs=[torch.zeros(3, *size, dtype=torch.uint8)], data_samples=[sample])
    before = used_bytes(device, peak=False)
    times = [seconds(model, data, device) for _ in range(repeats)]
    return min(times), used_bytes(device, peak=True) - before


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', help='configs of segmentors')
    parser.add_argument(
        '--size', nargs=2, type=int, default=(1024, 2048), metavar=('HEIGHT', 'WIDTH'),
        help='of the image in pixels (default: %(default)s)',
    )  # fmt: skip
    parser.add_argument(
        '--modes', nargs='+', default=('whole', 'slide'), choices=('whole', 'slide')
    )
    parser.add_argument('--repeats', type=int, default=1, help='default: %(default)s')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()

    where = args.device if args.device != 'cpu' else f'a CPU, {args.threads} threads'
    print(
        f'An image of {args.size[1]} x {args.size[0]} pixels on {where}, torch {torch.__version__}'
    )
    print('| config | mode | time (s) | peak memory (GiB) |')
    print('|---|---|---|---|')
    spawn = multiprocessing.get_context('spawn')
    for config in args.configs:
        for mode in args.modes:
            with ProcessPoolExecutor(1, spawn) as pool:
                time_taken, memory = pool.submit(
                    measure, config, mode, tuple(args.size), args.device, args.repeats, args.threads
                ).result()
            name = Path(config).stem
            print(f'| {name} | {mode} | {time_taken:.1f} | {memory / GIB:.2f} |', flush=True)


if __name__ == '__main__':
    main()
