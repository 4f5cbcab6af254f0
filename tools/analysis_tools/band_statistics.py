"""Compute mean and standard deviation of each band of rasters, and write them to a config.

Rasters are read in windows; pixels with the nodata value do not count. Put the config among the
_base_ of yours, and its settings into the model: model = dict(_base_.pop('bands'), ...).

  python tools/analysis_tools/band_statistics.py data/train/*.tif --out configs/my_bands.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.utils import ProgressBar

from vrwkv._files import write_atomically
from vrwkv_seg.rasters import open_raster, read_bands, windows

SIDE = 1024


class Statistics:
    """Mean and variance over pieces (`Chan et al. <https://doi.org/10.1007/978-3-642-51461-6_3>`_).

    Attributes:
        count: Number of pixels.
        mean: Mean of each band.
        squares: Sum of squared deviations from the mean, for each band.
    """

    def __init__(self, bands: int) -> None:
        self.count, self.mean, self.squares = 0, np.zeros(bands), np.zeros(bands)

    def add(self, pixels: np.ndarray) -> None:
        """Add pixels of shape ``(pixels, bands)``."""
        if not len(pixels):
            return
        pixels = pixels.astype(np.float64)
        mean, total = pixels.mean(0), self.count + len(pixels)
        delta = mean - self.mean
        self.squares += ((pixels - mean) ** 2).sum(0)
        self.squares += delta**2 * (self.count * len(pixels) / total)
        self.mean += delta * (len(pixels) / total)
        self.count = total


def compute(paths: Sequence[str], bands: Sequence[int] | None = None) -> Statistics:
    """Compute the statistics of rasters.

    Args:
        paths: The files.
        bands: Numbers of the bands, from 1; None for all.

    Returns:
        The statistics over all pixels with data.

    Raises:
        ValueError: If the files differ in their number of bands, cannot be read, have no data, or
            if a band is constant.
    """
    counts = {}
    total = 0
    for path in paths:
        with open_raster(path) as raster:
            counts.setdefault(raster.count, path)
            total += len(list(windows(raster.height, raster.width, SIDE)))
    if bands is None and len(counts) > 1:
        found = ', '.join(f'{count} ({path})' for count, path in counts.items())
        raise ValueError(f'the rasters have different numbers of bands: {found}. Choose --bands')
    statistics = Statistics(len(bands) if bands else next(iter(counts)))
    progress = ProgressBar(total)
    for path in paths:
        with open_raster(path) as raster:
            for window in windows(raster.height, raster.width, SIDE):
                pixels, valid = read_bands(raster, bands, window)
                statistics.add(pixels[valid])
                progress.update()
    print()
    if not statistics.count:
        raise ValueError('the rasters have no pixel with data: all are nodata')
    constant = np.flatnonzero(statistics.squares == 0)
    if len(constant):
        raise ValueError(
            f'band {constant[0] + 1} of those chosen has the same value in all pixels: leave it '
            'out with --bands'
        )
    return statistics


def main(argv: list[str] | None = None) -> None:
    """Compute, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('rasters', nargs='+', help='the training images')
    parser.add_argument(
        '--bands', nargs='+', type=int, metavar='BAND',
        help='numbers of the bands, from 1, in the order of the model (default: all)',
    )  # fmt: skip
    parser.add_argument('--out', type=Path, required=True, help='the config to write')
    args = parser.parse_args(argv)

    try:
        statistics = compute(args.rasters, args.bands)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f'Error: {error}')
    mean = [float(f'{value:.6g}') for value in statistics.mean]
    deviation = [float(f'{v:.6g}') for v in np.sqrt(statistics.squares / statistics.count)]
    text = (
        f'# Statistics of {statistics.count} pixels; bands: {args.bands or "all"}.\n'
        f'bands = dict(\n'
        f'    data_preprocessor=dict(mean={mean}, std={deviation}, bgr_to_rgb=False),\n'
        f'    backbone=dict(in_channels={len(mean)}),\n'
        f')\n'
    )
    write_atomically(args.out, text.encode())
    print(f'{text}\nWrote {args.out}')


if __name__ == '__main__':
    main()
