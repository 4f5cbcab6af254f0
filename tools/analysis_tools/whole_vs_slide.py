"""Measure time and peak memory of segmenting an image whole, lean and in sliding windows.

Weights are random: neither time nor memory depends on them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vrwkv.analysis import input_channels
from vrwkv.analysis.measurement import memory_in_use, peak_memory, run_in_new_process
from vrwkv.analysis.models import build_model, read_config
from vrwkv_ops.benchmarking import markdown_table, seconds

MODES = ('whole', 'lean', 'slide')


def measure(
    config: str, mode: str, size: tuple[int, int], device: str, repeats: int, threads: int
) -> tuple[float, int]:
    """Measure one model in one mode.

    Args:
        config: The config of a segmentor.
        mode: ``'whole'``; ``'lean'``, the same by ``LeanEncoderDecoder`` and ``LeanUPerHead``; or
            ``'slide'`` with the windows of the config.
        size: Height and width of the image in pixels.
        device: The device.
        repeats: Number of runs; the fastest counts.
        threads: Threads on a CPU.

    Returns:
        The time in seconds, and the peak of memory minus that of model and image, in bytes.
    """
    torch.set_num_threads(threads)
    cfg = read_config(config)
    if mode == 'lean':
        cfg.model.type, cfg.model.decode_head.type = 'LeanEncoderDecoder', 'LeanUPerHead'
    model = build_model(cfg).to(device)
    from mmseg.structures import SegDataSample  # needs mmcv's operators, which the config brings

    model.test_cfg.mode = 'slide' if mode == 'slide' else 'whole'
    sample = SegDataSample(metainfo=dict(ori_shape=size, img_shape=size))
    image = torch.zeros(input_channels(model), *size, dtype=torch.uint8)
    data = dict(inputs=[image], data_samples=[sample])
    before = memory_in_use(device)
    with torch.inference_mode():
        where = torch.device(device)
        times = [seconds(lambda: model.test_step(data), where) for _ in range(repeats)]
    return min(times), peak_memory(device) - before


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', help='configs of segmentors')
    parser.add_argument(
        '--size', nargs=2, type=int, default=(1024, 2048), metavar=('HEIGHT', 'WIDTH'),
        help='of the image in pixels (default: %(default)s)',
    )  # fmt: skip
    parser.add_argument('--modes', nargs='+', default=MODES, choices=MODES)
    parser.add_argument('--repeats', type=int, default=1, help='default: %(default)s')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()

    where = args.device if args.device != 'cpu' else f'a CPU, {args.threads} threads'
    print(
        f'An image of {args.size[1]} x {args.size[0]} pixels on {where}, torch {torch.__version__}'
    )
    rows = []
    for config in args.configs:
        for mode in args.modes:
            time_taken, memory = run_in_new_process(
                measure, config, mode, tuple(args.size), args.device, args.repeats, args.threads
            )
            rows.append((Path(config).stem, mode, f'{time_taken:.2f}', f'{memory / 2**30:.2f}'))
    print(markdown_table(('config', 'mode', 'time (s)', 'peak memory (GiB)'), rows))


if __name__ == '__main__':
    main()
