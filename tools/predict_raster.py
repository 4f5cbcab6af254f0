"""Segment a raster of any size, such as a GeoTIFF, and write a map of classes.

The raster is read in windows that overlap, as large as --memory allows; in the overlaps the
probabilities of two windows are blended. The map has the raster's grid and CRS, a colour for each
class, and 255 where the raster has no data. Finished windows are kept in OUT.tif.part until the map
is whole: the same command continues a run that was stopped.

  python tools/predict_raster.py CONFIG CHECKPOINT IN.tif OUT.tif --memory 8GiB
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from mmengine.utils import ProgressBar
from torch import Tensor, nn

from vrwkv._files import write_atomically
from vrwkv.analysis.measurement import memory_in_use, peak_memory
from vrwkv.analysis.models import load_model, read_config
from vrwkv.checkpoint import CheckpointError
from vrwkv_seg.rasters import IGNORE_INDEX, import_rasterio, open_raster, read_bands

TILE = 256  # pixels of a side of a tile of the map; windows begin at tiles
MULTIPLE = 32  # of the sides that the models take
GDAL_CACHE = 64 * 2**20  # bytes; by default a twentieth of the machine's memory
UNITS = {'MiB': 2**20, 'GiB': 2**30}


def size(text: str) -> int:
    """Read a size such as 8GiB as bytes; for argparse."""
    match = re.fullmatch(r'(\d+(?:\.\d+)?)(MiB|GiB)', text)
    if not match:
        raise argparse.ArgumentTypeError(f'expected a size such as 8GiB or 500MiB, got {text!r}')
    return int(float(match[1]) * UNITS[match[2]])


# --- The model --------------------------------------------------------------------------------


class Predictor:
    """A segmentor for windows.

    Args:
        config: Path of its config.
        checkpoint: Path of its weights.
        device: The device.

    Attributes:
        classes: Number of classes.
        bands: Numbers of the bands that it takes, from 1; None for all of a raster.
        channels: How many they are.
    """

    def __init__(self, config: str, checkpoint: str, device: str) -> None:
        cfg = read_config(config)
        self.model: nn.Module = load_model(cfg, checkpoint).to(device)
        self.preprocessor = self.model.data_preprocessor
        if cfg.get('default_scope') != 'mmseg':
            raise ValueError(f'{config} is no config of a segmentor')
        loader = (cfg.get('test_pipeline') or cfg.test_dataloader.dataset.pipeline)[0]
        self.loads_raster = loader['type'] == 'LoadRaster'
        self.bands = loader.get('bands') if self.loads_raster else None
        # mmcv scales the values of other images to 8 bits, unless it is told to leave them.
        self.eight_bits = not self.loads_raster and loader.get('color_type') != 'unchanged'
        self.channels = self.preprocessor.mean.numel()
        outputs = self.model.out_channels
        self.classes = max(outputs, 2)
        # Of the probability of class 1, where mmseg has one output for two classes.
        self.threshold = self.model.decode_head.threshold if outputs == 1 else None
        if self.classes > IGNORE_INDEX:
            raise ValueError(f'a map has at most {IGNORE_INDEX} classes, got {self.classes}')
        meta = self.model.dataset_meta or {}
        self.names = meta.get('classes') or [str(index) for index in range(self.classes)]
        self.palette = meta.get('palette')

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Tensor:
        """Compute probabilities.

        Args:
            image: Of shape (height, width, bands).

        Returns:
            A tensor of shape (classes, height, width) on the CPU.
        """
        from mmseg.structures import SegDataSample

        height, width = image.shape[:2]
        if not self.loads_raster:
            image = image[..., ::-1]  # mmcv's order, which the data preprocessor expects
        pad = [(0, -side % MULTIPLE) for side in (height, width)]
        image = np.pad(image, [*pad, (0, 0)], mode='edge').transpose(2, 0, 1)
        inputs = torch.from_numpy(np.ascontiguousarray(image))
        shape = tuple(inputs.shape[1:])
        sample = SegDataSample(metainfo=dict(ori_shape=shape, img_shape=shape, pad_shape=shape))
        data = self.preprocessor(dict(inputs=[inputs], data_samples=[sample]), False)
        metas = [sample.metainfo for sample in data['data_samples']]
        logits = self.model.encode_decode(data['inputs'], metas)[0, :, :height, :width].float()
        if len(logits) == 1:
            return torch.cat([(-logits).sigmoid_(), logits.sigmoid()]).cpu()
        return logits.softmax(0).cpu()


def require_fit(predictor: Predictor, raster) -> None:
    """Require that a raster has the model's bands and the values that its pipeline loads.

    Raises:
        ValueError: If it has not.
    """
    found = len(predictor.bands) if predictor.bands else raster.count
    if found != predictor.channels:
        chosen = ' chosen in the test_pipeline' if predictor.bands else ''
        raise ValueError(
            f'{raster.name} has {found} bands{chosen}, but the model takes {predictor.channels} '
            '(mean and std of the data_preprocessor): choose bands with LoadRaster(bands=...) in '
            'the test_pipeline of the config. They keep their order: with bgr_to_rgb=True in the '
            'data_preprocessor blue comes first, such as bands=(3, 2, 1) of red, green and blue'
        )
    if predictor.bands and max(predictor.bands) > raster.count:
        raise ValueError(
            f'{raster.name} has {raster.count} bands, and the test_pipeline asks for the bands '
            f'{list(predictor.bands)}'
        )
    if predictor.eight_bits and set(raster.dtypes) != {'uint8'}:
        raise ValueError(
            f'{raster.name} has values of {raster.dtypes[0]}, but the test_pipeline loads images '
            'of 8 bits: train with LoadRaster, or scale the raster as the training images and save '
            'it as uint8'
        )


def largest_side(predictor: Predictor, memory: int, overlap: int, device: torch.device) -> int:
    """Find the largest window that fits into memory, by two trials.

    Args:
        predictor: The model.
        memory: Bytes that the process may use.
        overlap: Pixels that neighbours share.
        device: The device of the model.

    Returns:
        Pixels of a side between the beginnings of two windows, a multiple of :data:`TILE`.

    Raises:
        ValueError: If no window fits.
    """
    smallest = TILE + overlap
    for side in (smallest, 2 * smallest):
        if device.type == 'cpu':
            with contextlib.suppress(OSError):  # the peak starts anew, on Linux
                Path('/proc/self/clear_refs').write_text('5')
        else:
            torch.cuda.reset_peak_memory_stats(device)
        before = memory_in_use(device)
        predictor(np.zeros((side, side, predictor.channels), np.float32))
        peak = peak_memory(device) - before
        # A quarter more for what is not linear, and the arrays beside the model.
        per_pixel = 1.25 * peak / side**2 + 4 * predictor.channels + 16 * predictor.classes
        free = memory - memory_in_use(device) - GDAL_CACHE
        fits = math.isqrt(max(0, int(free / per_pixel))) - overlap
        if fits < TILE:
            needed = per_pixel * smallest**2 + memory - free
            raise ValueError(
                f'--memory {memory / 2**20:.0f}MiB is below what a window of {smallest} x '
                f'{smallest} pixels takes, about {needed / 2**20:.0f}MiB: give more'
            )
    return fits // TILE * TILE


# --- Windows ----------------------------------------------------------------------------------


class Grid:
    """The windows of a raster.

    Window (i, j) begins at ``(i * step, j * step)`` and shares ``overlap`` pixels with the next
    one. Its own part of the map ends where the next window begins.

    Args:
        height: Pixels of the raster.
        width: See ``height``.
        largest: The largest step.
        overlap: Pixels that neighbours share.
    """

    def __init__(self, height: int, width: int, largest: int, overlap: int) -> None:
        self.shape, self.overlap = (height, width), overlap
        self.counts, self.steps = [], []
        for length in self.shape:
            length = max(1, length - overlap)
            # About equal windows that begin at tiles.
            step = math.ceil(length / math.ceil(length / largest) / TILE) * TILE
            self.steps.append(step)
            self.counts.append(math.ceil(length / step))

    def span(self, axis: int, index: int) -> tuple[int, int, int]:
        """Return where a window begins, where its own part ends and where it ends."""
        start = index * self.steps[axis]
        if index == self.counts[axis] - 1:
            return start, self.shape[axis], self.shape[axis]
        end = start + self.steps[axis]
        return start, end, min(end + self.overlap, self.shape[axis])

    def weight(self, axis: int, index: int) -> Tensor:
        """Return the weights along an axis; with the neighbours' they sum to 1."""
        start, own_end, end = self.span(axis, index)
        weight = torch.ones(end - start)
        if index > 0:
            ramp = self._ramp(min(self.overlap, self.shape[axis] - start))
            weight[: len(ramp)] *= ramp
        if end > own_end:
            weight[own_end - start :] *= 1 - self._ramp(end - own_end)
        return weight

    def _ramp(self, length: int) -> Tensor:
        return (torch.arange(length) + 0.5) / length


class Work:
    """The folder with the parts of a map that is not whole yet.

    Args:
        folder: The folder.
        settings: What the parts depend on; those of other settings are removed.
    """

    def __init__(self, folder: Path, settings: dict) -> None:
        self.folder = folder
        state = folder / 'settings.json'
        try:
            old = json.loads(state.read_text())
        except (OSError, ValueError):
            old = {}
        self.step = old.pop('step', None)
        self.settings = settings
        if old != json.loads(json.dumps(settings)):
            shutil.rmtree(folder, ignore_errors=True)
            self.step = None

    def begin(self, step: int) -> None:
        """Keep the step of the windows."""
        self.step = step
        text = json.dumps(dict(self.settings, step=step))
        write_atomically(self.folder / 'settings.json', text.encode())

    def path(self, kind: str, i: int, j: int) -> Path:
        """Return the path of a part of a window."""
        return self.folder / f'{kind}_{i}_{j}.npz'

    def save(self, kind: str, i: int, j: int, array: np.ndarray) -> None:
        """Write a part, completely or not at all."""
        stream = io.BytesIO()
        np.savez_compressed(stream, array)
        write_atomically(self.path(kind, i, j), stream.getbuffer())

    def load(self, kind: str, i: int, j: int) -> np.ndarray:
        """Read a part."""
        with np.load(self.path(kind, i, j)) as content:
            return content['arr_0']


def predict_window(predictor: Predictor, raster, grid: Grid, work: Work, i: int, j: int) -> None:
    """Predict a window, and write its own part of the map and what its neighbours need."""
    rasterio = import_rasterio()
    (top, own_bottom, bottom), (left, own_right, right) = grid.span(0, i), grid.span(1, j)
    window = rasterio.windows.Window(left, top, right - left, bottom - top)
    image, valid = read_bands(raster, predictor.bands, window)
    if valid.any():
        total = predictor(image)
    else:
        total = torch.full((predictor.classes, *valid.shape), 1 / predictor.classes)
    total *= grid.weight(0, i)[:, None]
    total *= grid.weight(1, j)
    # What earlier windows say about this one's pixels. They have passed on what they got.
    rows, columns = own_bottom - top, own_right - left
    if i > 0:
        above = torch.from_numpy(work.load('below', i - 1, j))
        total[:, : above.shape[1], : above.shape[2]] += above
    if j > 0:
        before = torch.from_numpy(work.load('right', i, j - 1))
        total[:, : before.shape[1], : before.shape[2]] += before
    if bottom > own_bottom:
        # The part below of this window alone; the next one in the row adds to its columns.
        work.save('below', i, j, total[:, rows:, :columns].numpy())
    if right > own_right:
        work.save('right', i, j, total[:, :, columns:].numpy())
    own = total[:, :rows, :columns]
    labels = own.argmax(0) if predictor.threshold is None else own[1] > predictor.threshold
    labels = labels.numpy().astype(np.uint8)
    labels[~valid[:rows, :columns]] = IGNORE_INDEX
    if work.settings['probabilities']:
        work.save('probabilities', i, j, (own * 255).round_().numpy().astype(np.uint8))
    work.save('labels', i, j, labels)  # last: the window counts as finished


def assemble(
    path: Path, kind: str, grid: Grid, work: Work, profile: dict, predictor: Predictor
) -> bool:
    """Write the windows to a file, read it again to be sure, and give it its name.

    Returns:
        Whether a pixel has data.
    """
    rasterio = import_rasterio()
    part = work.folder / f'{kind}.tif'
    any_valid = False

    def parts():
        for i in range(grid.counts[0]):
            for j in range(grid.counts[1]):
                (top, bottom, _), (left, right, _) = grid.span(0, i), grid.span(1, j)
                array = work.load(kind, i, j)
                window = rasterio.windows.Window(left, top, right - left, bottom - top)
                yield array.reshape(-1, *array.shape[-2:]), window

    try:
        with rasterio.open(part, 'w', **profile) as out:
            if kind == 'labels':
                if predictor.palette:
                    colours = dict(enumerate(map(tuple, predictor.palette)))
                    out.write_colormap(1, colours)
                out.update_tags(**{f'class_{k}': name for k, name in enumerate(predictor.names)})
            else:
                for band, name in enumerate(predictor.names, start=1):
                    out.set_band_description(band, name)
                out.scales = (1 / 255,) * out.count
            for array, window in parts():
                out.write(array, window=window)
        with rasterio.open(part) as written:
            for array, window in parts():
                any_valid |= bool((array != IGNORE_INDEX).any())
                if not np.array_equal(written.read(window=window), array):
                    raise OSError(f'{part} was not written whole: is the disk full?')
    except rasterio.errors.RasterioError as error:
        raise OSError(f'cannot write {part} ({error}): is the disk full?') from error
    part.replace(work.folder / f'{kind}.done.tif')
    return any_valid


def run(args: argparse.Namespace) -> None:
    """Predict the raster."""
    rasterio = import_rasterio()
    device = torch.device(args.device)
    outputs = [args.output, *([args.probabilities] if args.probabilities else [])]
    for path in outputs:
        if path.exists():
            raise FileExistsError(f'{path} exists: remove it, or name another file')
        path.parent.mkdir(parents=True, exist_ok=True)
    predictor = Predictor(args.config, args.checkpoint, args.device)
    files = [str(args.config), str(args.checkpoint), str(args.raster)]
    stamps = [Path(name).stat().st_mtime if Path(name).exists() else None for name in files]
    settings = dict(
        files=files,
        stamps=stamps,
        memory=args.memory,
        overlap=args.overlap,
        probabilities=args.probabilities is not None,
    )
    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE // 2**20), open_raster(args.raster) as raster:
        require_fit(predictor, raster)
        work = Work(args.output.with_name(f'{args.output.name}.part'), settings)
        if work.step is None:
            work.begin(largest_side(predictor, args.memory, args.overlap, device))
        grid = Grid(raster.height, raster.width, work.step, args.overlap)
        cells = [(i, j) for i in range(grid.counts[0]) for j in range(grid.counts[1])]
        left = [cell for cell in cells if not work.path('labels', *cell).exists()]
        if len(left) < len(cells):
            print(f'Continuing: {len(cells) - len(left)} of {len(cells)} windows are finished')
        progress = ProgressBar(len(left)) if left else None
        for i, j in left:
            predict_window(predictor, raster, grid, work, i, j)
            for kind, cell in (('below', (i - 1, j)), ('right', (i, j - 1))):
                work.path(kind, *cell).unlink(missing_ok=True)
            progress.update()
        print()
        points, points_crs = raster.gcps  # ground control points, in place of a transform
        profile = dict(
            driver='GTiff',
            height=raster.height,
            width=raster.width,
            count=1,
            dtype='uint8',
            crs=raster.crs or points_crs,
            **(dict(gcps=points) if points else dict(transform=raster.transform)),
            tiled=True,
            blockxsize=TILE,
            blockysize=TILE,
            compress='deflate',
            bigtiff='if_safer',
        )
        labels = dict(profile, nodata=IGNORE_INDEX)
        found = assemble(args.output, 'labels', grid, work, labels, predictor)
        if not found:
            shutil.rmtree(work.folder)
            raise ValueError(f'{args.raster} has no pixel with data: all are nodata')
        if args.probabilities:
            many = dict(profile, count=predictor.classes, interleave='band')
            assemble(args.probabilities, 'probabilities', grid, work, many, predictor)
            shutil.move(work.folder / 'probabilities.done.tif', args.probabilities)
    shutil.move(work.folder / 'labels.done.tif', args.output)
    shutil.rmtree(work.folder)
    print(f'Wrote {", ".join(map(str, outputs))}')


def main(argv: list[str] | None = None) -> int:
    """Predict a raster; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of a segmentor')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument('raster', help='the raster')
    parser.add_argument('output', type=Path, help='the map of classes to write')
    parser.add_argument(
        '--memory', type=size, default='4GiB', help='for the process (default: %(default)s)'
    )
    parser.add_argument(
        '--overlap', type=int, default=128, help='of windows, in pixels (default: %(default)s)'
    )
    parser.add_argument(
        '--probabilities', type=Path, metavar='TIF',
        help='write a band of probabilities for each class, too, as 8-bit numbers of 1/255',
    )  # fmt: skip
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args(argv)
    if not 0 <= args.overlap <= TILE:
        parser.error(f'--overlap must lie between 0 and {TILE}, got {args.overlap}')
    if args.probabilities == args.output:
        parser.error(f'--probabilities needs another file than the map, got {args.output}')
    try:
        run(args)
    except (CheckpointError, ValueError, OSError, ImportError) as error:
        print(f'{parser.prog}: {error}', file=sys.stderr)
        if getattr(error, 'errno', None) == errno.ENOSPC:
            print('Free some space and start again: finished windows are kept', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        parser.exit(130, '\nInterrupted. The same command continues.\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
