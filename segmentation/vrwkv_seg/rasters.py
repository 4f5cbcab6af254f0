"""Rasters such as GeoTIFF through rasterio: reading, and transforms for mmseg's pipelines."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import TRANSFORMS

if TYPE_CHECKING:
    from rasterio import DatasetReader
    from rasterio.windows import Window

#: mmseg's label for pixels that do not count.
IGNORE_INDEX = 255


def import_rasterio() -> ModuleType:
    """Return rasterio.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import rasterio
        import rasterio.windows
    except ImportError as error:
        raise ImportError(
            f"rasters need the package 'rasterio' ({error}). In the root of the Vision-RWKV "
            "checkout: pip install -e '.[raster]'",
            name=error.name,
        ) from error
    return rasterio


def open_raster(path: str | os.PathLike) -> DatasetReader:
    """Open a raster.

    Args:
        path: The file, or any other name of a raster that GDAL knows.

    Returns:
        rasterio's data set, to be closed by the caller.

    Raises:
        ValueError: If there is no such raster.
    """
    rasterio = import_rasterio()
    try:
        return rasterio.open(path)
    except rasterio.errors.RasterioIOError as error:
        raise ValueError(f'cannot read {path} as a raster: {error}') from error


def read_bands(
    raster: DatasetReader, bands: Sequence[int] | None = None, window: Window | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read bands of a raster.

    Args:
        raster: The open raster.
        bands: Numbers of the bands, from 1, in the order of the result; None for all.
        window: The part to read; None for all.

    Returns:
        Values of shape ``(height, width, bands)``, uint8 as they are and others as float32, and
        whether each pixel is valid, of shape ``(height, width)``. In pixels where a band has the
        file's nodata value, or which its mask or alpha channel hides, all bands are 0.

    Raises:
        ValueError: If there is no such band, if the file is damaged, or if a value is NaN or
            infinite and not the nodata value.
    """
    rasterio = import_rasterio()
    bands = list(raster.indexes if bands is None else bands)
    if not bands or not set(bands) <= set(raster.indexes):
        raise ValueError(f'{raster.name} has the bands 1 to {raster.count}, not {bands}')
    try:
        values = raster.read(bands, window=window)
        valid = _mask(raster, bands, window)
    except rasterio.errors.RasterioIOError as error:
        raise ValueError(
            f'cannot read the pixels of {raster.name}: the file may be truncated or damaged '
            f'({error.__cause__ or error})'
        ) from error
    for band, number in zip(values, bands, strict=True):
        nodata = raster.nodatavals[number - 1]
        if nodata is not None:
            valid &= ~np.isnan(band) if np.isnan(nodata) else band != nodata
    if values.dtype.kind not in 'iuf':
        raise ValueError(f'{raster.name} holds {values.dtype}: expected real numbers')
    if values.dtype != np.uint8:
        values = values.astype(np.float32)
    values[:, ~valid] = 0
    wrong = ~np.isfinite(values)
    if wrong.any():
        band = bands[int(wrong.any((1, 2)).argmax())]
        raise ValueError(
            f'{raster.name} has {int(wrong.sum())} values in band {band} and others that are NaN '
            'or infinite, and its nodata value is another one: if they stand for missing pixels, '
            'write it into the file, for example: rio edit-info --nodata nan FILE'
        )
    return np.ascontiguousarray(values.transpose(1, 2, 0)), valid


def _mask(raster: DatasetReader, bands: list[int], window: Window | None) -> np.ndarray:
    """Read the mask of a raster, such as an orthophoto's; nodata values are not part of it."""
    enums = import_rasterio().enums
    flags = raster.mask_flag_enums[0]
    alpha = {n for n, kind in enumerate(raster.colorinterp, 1) if kind == enums.ColorInterp.alpha}
    # An alpha channel among the bands holds values: rasters of four bands are often saved as RGBA.
    if enums.MaskFlags.per_dataset in flags and not alpha & set(bands):
        return raster.dataset_mask(window=window) != 0
    height, width = raster.shape if window is None else (window.height, window.width)
    return np.ones((height, width), bool)


def windows(height: int, width: int, side: int) -> Iterator[Window]:
    """Cut a raster into windows, row after row.

    Args:
        height: Pixels of the raster.
        width: See ``height``.
        side: Pixels of a window; the last ones of a row and of a column are smaller.

    Yields:
        The windows.
    """
    window = import_rasterio().windows.Window
    for top in range(0, height, side):
        for left in range(0, width, side):
            yield window(left, top, min(side, width - left), min(side, height - top))


@TRANSFORMS.register_module()
class LoadRaster(BaseTransform):
    """Load an image with any number of bands of 8 or 16 bits or of floating point.

    Bands keep their order and their units: set ``bgr_to_rgb=False``, ``mean`` and ``std`` of the
    data preprocessor (``tools/analysis_tools/band_statistics.py`` writes them) and ``in_channels``
    of the backbone. Pixels with the file's nodata value are 0; ``LoadRasterAnnotations`` ignores
    them.

    Args:
        bands: Numbers of the bands to load, from 1; None for all.
    """

    def __init__(self, bands: Sequence[int] | None = None) -> None:
        import_rasterio()
        self.bands = None if bands is None else tuple(bands)

    def transform(self, results: dict) -> dict:
        """Load the image.

        Args:
            results: A sample with ``img_path``.

        Returns:
            The sample with ``img`` of shape (height, width, bands), uint8 or float32,
            ``img_shape``, ``ori_shape`` and ``valid``, which is False for pixels without data.

        Raises:
            ValueError: If the file cannot be read, or has no pixel with data.
        """
        with open_raster(results['img_path']) as raster:
            image, valid = read_bands(raster, self.bands)
        if not valid.any():
            raise ValueError(f'{results["img_path"]} has no pixel with data: all are nodata')
        results.update(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2], valid=valid)
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(bands={self.bands})'


@TRANSFORMS.register_module()
class LoadRasterAnnotations(LoadAnnotations):
    """Load a label map from the first band of a raster.

    Pixels with the file's nodata value, and those without data in the image, are ignored.
    ``reduce_zero_label`` is the data set's.
    """

    def __init__(self) -> None:
        import_rasterio()
        super().__init__()

    @staticmethod
    def read(path: str | os.PathLike) -> np.ndarray:
        """Read a label map.

        Args:
            path: The file.

        Returns:
            Whole numbers of shape (height, width), with nodata as 255.

        Raises:
            ValueError: If the file cannot be read, or does not hold whole numbers.
        """
        with open_raster(path) as raster:
            if raster.count != 1 or np.dtype(raster.dtypes[0]).kind not in 'iu':
                raise ValueError(
                    f'the label map {path} has {raster.count} band(s) of {raster.dtypes[0]}: '
                    'expected one band of whole numbers, the indices of classes'
                )
            labels, valid = read_bands(raster)
        labels = labels[..., 0].astype(np.int64)
        labels[~valid] = IGNORE_INDEX
        return labels

    def _load_seg_map(self, results: dict) -> None:
        labels = self.read(results['seg_map_path'])
        if results.get('reduce_zero_label'):
            labels = np.where((labels == 0) | (labels == IGNORE_INDEX), IGNORE_INDEX, labels - 1)
        if results.get('label_map') is not None:
            labels = np.vectorize(lambda x: results['label_map'].get(x, x))(labels)
        if 'valid' in results:
            if labels.shape != results['valid'].shape:
                raise ValueError(
                    f'the label map {results["seg_map_path"]} of shape {labels.shape} is for an '
                    f'image of shape {results["valid"].shape}: expected equal heights and widths'
                )
            labels[~results['valid']] = IGNORE_INDEX
        results['gt_seg_map'] = labels.astype(np.uint8)
        results['seg_fields'].append('gt_seg_map')
