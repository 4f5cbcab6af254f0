"""Checks of images: in the file, as loaded, and as the model takes them; pictures to look at.

This module needs mmcv, so :mod:`vrwkv.engine` does not import it.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
from typing import NamedTuple

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.logging import print_log
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torch import nn

#: One for all data sets and the processes that load for them: whether a warning was given.
_warned: torch.Tensor | None = None


class ImageHeader(NamedTuple):
    """Contents of an image file: bands without an alpha channel, alpha channel, type of a value."""

    bands: int
    alpha: bool
    dtype: str

    def __str__(self) -> str:
        count = self.bands + self.alpha
        return f'{count} band{"s" if count > 1 else ""} of {self.dtype}'


def read_header(path: str | os.PathLike) -> ImageHeader | None:
    """Read the bands and the type of an image without decoding it.

    Args:
        path: A local file.

    Returns:
        The header; None for other formats than PNG, TIFF, PNM and JPEG 2000, which are the formats
        of more than three bands or 8 bits.
    """
    with open(path, 'rb') as file:
        head = file.read(26)
        if head.startswith(b'\x89PNG') and len(head) == 26:
            depth, kind = head[24], head[25]
            # Colour types 0: grey, 2: RGB, 3: palette, 4 and 6: the first two with alpha.
            return ImageHeader(
                3 if kind in (2, 3, 6) else 1,
                kind in (4, 6),
                'uint16' if depth == 16 else 'uint8',
            )
        if head[:4] in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'):
            try:
                tags = ImageFileDirectory_v2(head[: 16 if b'+' in head[:4] else 8])
                file.seek(tags.next)
                tags.load(file)
                return _tiff_header(tags)
            except (SyntaxError, OSError, struct.error):
                return None  # a broken file, which the decoder reports
    if head[:2] in (b'P5', b'P6') or head[4:8] == b'jP  ':
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if image is not None:
            return ImageHeader(image.shape[2] if image.ndim == 3 else 1, False, str(image.dtype))
    return None


def _tiff_header(tags: ImageFileDirectory_v2) -> ImageHeader:
    bits, samples, extra, sample_format = 258, 277, 338, 339
    bands = tags.get(samples, 1)
    alpha = any(kind in (1, 2) for kind in tags.get(extra) or ())
    if tags.get(262) == 5:  # CMYK becomes RGB
        bands -= 1
    depth = max(tags.get(bits) or (1,))
    kind = {2: 'int', 3: 'float'}.get((tags.get(sample_format) or (1,))[0], 'uint')
    return ImageHeader(bands - alpha, alpha, f'{kind}{max(depth, 8)}')


class CheckedLoadImageFromFile(LoadImageFromFile):
    """mmcv's ``LoadImageFromFile``, with an error where it would drop bands.

    mmcv makes three bands of 8 bits of every file unless ``color_type='unchanged'``: other bands
    are lost, and 16-bit values are divided by 256. If that loses most of the differences, a warning
    says so once. An alpha channel may be lost. Files in an object store or on a server are not
    checked, since that would read them twice.

    Args:
        *args: As for :class:`mmcv.transforms.LoadImageFromFile`.
        **kwargs: As for :class:`mmcv.transforms.LoadImageFromFile`.

    Raises:
        ValueError: If a file has more bands than would be read, or values other than 8-bit and
            16-bit numbers that would become 8-bit ones.
    """

    def __init__(self, *args, **kwargs) -> None:
        global _warned
        super().__init__(*args, **kwargs)
        if _warned is None:
            _warned = torch.zeros(1, dtype=torch.bool).share_memory_()

    def transform(self, results: dict) -> dict | None:
        """Check the file and load it.

        Args:
            results: A sample with ``img_path``.

        Returns:
            The sample with ``img``, ``img_shape`` and ``ori_shape``.
        """
        path = results['img_path']
        header = None
        if self.imdecode_backend != 'tifffile' and os.path.isfile(path):
            header = read_header(path)
            if header is not None:
                require_readable(path, header, self.color_type, self.imdecode_backend)
        results = super().transform(results)
        if results is not None and header is not None and not _warned[0]:
            problem = lost_values(
                path, header, results['img'], self.color_type, self.imdecode_backend
            )
            if problem:
                _warned[0] = True
                print_log(problem, logger='current', level=logging.WARNING)
        return results


def warn_again() -> None:
    """Give the warning about a loss of values once more."""
    if _warned is not None:
        _warned[0] = False


def require_readable(path: str, header: ImageHeader, color_type: str, backend: str) -> None:
    """Require that mmcv reads all bands of a file, and its values as they are or divided by 256.

    Args:
        path: The file.
        header: Its contents.
        color_type: As for :func:`mmcv.imfrombytes`.
        backend: As for :func:`mmcv.imfrombytes`.

    Raises:
        ValueError: If it would not.
    """
    unchanged = color_type == 'unchanged'
    if not unchanged and header.dtype not in ('uint8', 'uint16'):
        raise ValueError(
            f'{path} has {header}, which color_type={color_type!r} cannot turn into 8 bits: load '
            "it with color_type='unchanged' and give the data_preprocessor mean and std in its "
            'units, or scale its values to 0 to 255 and save it as uint8'
        )
    most = 4 if unchanged else 3
    alpha = header.alpha
    if alpha and header.dtype != 'uint8' and not unchanged:
        # Rasters of four bands are often saved as RGBA. A mask is 0 or the largest value.
        image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        values = np.unique(image[..., -1]) if image is not None and image.ndim == 3 else []
        alpha = all(value in (0, np.iinfo(image.dtype).max) for value in values)
    bands = header.bands + (header.alpha and not alpha)
    if bands > most or bands == 2:
        raise ValueError(
            f'{path} has {header}, but the {backend or "cv2"} backend with color_type='
            f'{color_type!r} reads {"1, 3 or 4" if unchanged else "1 or 3"}. For a model that '
            'takes all bands, load them with '
            + (
                "imdecode_backend='tifffile', a transform of your own, or LoadRaster in mmseg"
                if header.bands + header.alpha not in (3, 4)
                else "color_type='unchanged'"
            )
            + ', and set in_channels of the backbone, and mean and std of the data_preprocessor, '
            f'to {header.bands + header.alpha} bands. For a model of three bands, write three of '
            'them to a file'
        )


def lost_values(
    path: str, header: ImageHeader, image: np.ndarray, color_type: str, backend: str
) -> str | None:
    """Describe a loss of values in an image of 16 bits that was read as one of 8 bits.

    Args:
        path: The file.
        header: Its contents.
        image: The image as loaded, of 8 bits.
        color_type: As for :func:`mmcv.imfrombytes`.
        backend: As for :func:`mmcv.imfrombytes`.

    Returns:
        The problem and its remedy; None if there is none.
    """
    if header.dtype != 'uint16':
        return None
    # Pillow keeps the values of 16-bit grey images and cuts them at 255; the rest divides by 256.
    cut = backend == 'pillow' and header.bands == 1 and not header.alpha
    if color_type == 'unchanged' and (backend != 'pillow' or cut):
        return None
    if not cut and image.max() >= 64:
        return None
    whole = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if whole is None or (cut and whole.max() <= 255):
        return None
    largest = int(whole.max())
    now = 255 if cut else largest // 256
    return (
        f'{path} has 16 bits and values up to {largest:,} of 65,535, which are read as 0 to {now} '
        f'of 8 bits{", larger ones as 255" if cut else ""}: most of the differences are lost. '
        'Scale the values before training, all images by one factor: multiply by 255 / (largest '
        'value of the data) and save as uint8. Or load them with '
        "color_type='unchanged' (cv2 backend) and give the data_preprocessor mean and std in "
        'units of the file. This warning is given once'
    )


class ImageChecks:
    """Call ``check_image`` with each image as the pipeline loads it; put it before a data set."""

    def prepare_data(self, idx: int) -> dict | None:
        """Run the pipeline on a sample, and check the sample when its image is loaded.

        Args:
            idx: Index of the sample.

        Returns:
            The result of the pipeline.
        """
        results = self.get_data_info(idx)
        checked = False
        for transform in self.pipeline.transforms:
            results = transform(results)
            if results is None:
                return None
            if not checked and 'img' in results:
                self.check_image(results)
                checked = True
        return results


def size_of(image: np.ndarray) -> str:
    """Write the size of an image.

    Args:
        image: Of shape (height, width, ...).

    Returns:
        Width and height, in this order.
    """
    return f'{image.shape[1]} x {image.shape[0]}'


def check_bands(preprocessor: type[nn.Module], drops_alpha: bool) -> None:
    """Make a data preprocessor name an image whose number of bands is not the model's.

    mmpretrain, mmdet and mmseg (all versions so far) fail in a subtraction that names no file, or
    mmdet drops the bands after the third. An image of one band becomes equal bands, as mmpretrain
    and mmseg have it.

    Args:
        preprocessor: Class of the data preprocessor; its ``mean`` has a value for each band.
        drops_alpha: Whether it drops the alpha channel of RGBA arrays, as mmdet's does.
    """
    forward = preprocessor.forward

    @functools.wraps(forward)
    def checked(self, data: dict, training: bool = False) -> dict | list:
        mean = getattr(self, 'mean', None)
        images = data.get('inputs') if isinstance(data, dict) else None
        if mean is not None and mean.numel() > 1 and images is not None:
            drops = drops_alpha and self._channel_conversion
            _require_bands(images, data.get('data_samples'), mean.numel(), drops)
            if isinstance(images, list):
                bands = mean.numel()
                data = dict(data, inputs=[_repeat(image, bands) for image in images])
        return forward(self, data, training)

    preprocessor.forward = checked


def _repeat(image: torch.Tensor, bands: int) -> torch.Tensor:
    single = isinstance(image, torch.Tensor) and image.ndim == 3 and len(image) == 1
    return image.expand(bands, -1, -1) if single else image


def _require_bands(
    images: torch.Tensor | list, samples: list | None, expected: int, drops: bool
) -> None:
    for index, image in enumerate(images):
        if not isinstance(image, torch.Tensor) or image.ndim != 3:
            continue
        path = samples[index].get('img_path') if samples else None
        if len(image) in (1, expected) or (drops and path is None and len(image) > expected):
            continue
        raise ValueError(
            f'{path or "the image given as an array"} has {len(image)} bands of '
            f'{str(image.dtype).removeprefix("torch.")}, but the model takes {expected} (mean and '
            'std of the data_preprocessor): convert the image, or load it with '
            "color_type='color'; for a model of other bands set in_channels of the backbone, and "
            'mean and std'
        )


def imread(img_or_path, *args, **kwargs) -> np.ndarray:
    """Read an image as :func:`mmcv.imread`, after the check of a local file."""
    if isinstance(img_or_path, str) and os.path.isfile(img_or_path):
        header = read_header(img_or_path)
        if header is not None:
            require_readable(img_or_path, header, 'color', 'cv2')
    return mmcv.imread(img_or_path, *args, **kwargs)


def as_picture(image: torch.Tensor, is_rgb: bool) -> np.ndarray:
    """Turn an image of any bands and type into one to look at.

    Args:
        image: Of shape (bands, height, width).
        is_rgb: Whether its colours are in the order red, green, blue, and not in the reverse.

    Returns:
        Of shape (height, width, 3), RGB, uint8; values of other types are stretched to 0 to 255.
    """
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    image = (image if is_rgb else image.flip(0)).permute(1, 2, 0).numpy()
    if image.dtype != np.uint8:
        image = image.astype(np.float32)
        low, high = image.min(), image.max()
        image = ((image - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)
    return np.ascontiguousarray(image)
