"""mmseg's data sets with checks of images and label maps."""

from __future__ import annotations

import mmcv
import numpy as np
from mmcv.transforms import LoadAnnotations
from mmengine import fileio
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from mmseg.registry import DATASETS

from vrwkv.engine.images import ImageChecks, size_of

from .rasters import IGNORE_INDEX, LoadRasterAnnotations


class CheckedLabels(ImageChecks):
    """Check each label map when it is first read; put it before one of mmseg's data sets.

    mmseg reads label maps as 8-bit numbers, so that 256 becomes class 0; it accepts any size; and
    its ``IoUMetric`` counts a label outside the classes neither as right nor as wrong. Here a label
    map must have one channel, the size of its image as the pipeline loads it, and no other labels
    than the classes and 255, which is ignored, like 0 with ``reduce_zero_label``. Rasters are read
    where the pipeline has ``LoadRaster`` and ``LoadRasterAnnotations``.

    Raises:
        ValueError: When the files are listed, if there is none, or if there are no or too many
            classes; when a sample is read, if its label map does not meet these conditions.
    """

    def load_data_list(self) -> list[dict]:
        """List images and label maps.

        Returns:
            One dict for each image.
        """
        classes = self.metainfo.get('classes')
        most = IGNORE_INDEX - self.reduce_zero_label
        if classes is None or not 1 <= len(classes) <= most:
            raise ValueError(
                f'{type(self).__name__} needs the names of its classes, 1 to {most} of them since '
                "a label is an 8-bit number: metainfo=dict(classes=('...', ...)), got "
                f'{classes if classes is None else len(classes)}'
            )
        data_list = super().load_data_list()
        if not data_list:
            raise ValueError(
                f'no image is listed in {self.ann_file!r}'
                if self.ann_file
                else f'no file in {self.data_prefix.get("img_path")!r} ends with img_suffix='
                f'{self.img_suffix!r}: give the suffix of your images to the data set'
            )
        self._checked: set[str] = set()
        return data_list

    def check_image(self, sample: dict) -> None:
        """Check the label map of a sample, once.

        Args:
            sample: The sample, with ``img`` of shape (height, width, ...) as loaded.
        """
        path = sample.get('seg_map_path')
        if path is not None and path not in self._checked:
            self._check(sample['img'], sample['img_path'], path)
            self._checked.add(path)

    def _check(self, image: np.ndarray, img_path: str, seg_map_path: str) -> None:
        loaders = [t for t in self.pipeline.transforms if isinstance(t, LoadAnnotations)]
        if loaders and isinstance(loaders[0], LoadRasterAnnotations):
            self._check_labels(image, img_path, loaders[0].read(seg_map_path), seg_map_path)
            return
        content = fileio.get(seg_map_path, backend_args=self.backend_args)
        backend = loaders[0].imdecode_backend if loaders else 'pillow'
        try:
            labels = mmcv.imfrombytes(content, flag='unchanged', backend=backend)
        except OSError as error:
            raise ValueError(f'cannot read the label map {seg_map_path}: {error}') from error
        if labels is None:
            raise ValueError(f'cannot read the label map {seg_map_path} with {backend}')
        if labels.ndim == 3 and labels.shape[2] == 1:
            labels = labels[..., 0]
        if labels.ndim != 2 or labels.dtype.kind not in 'uib':
            raise ValueError(
                f'the label map {seg_map_path} holds {_describe(labels)}: expected one channel of '
                'whole numbers, the indices of classes. Convert colours to indices first'
            )
        self._check_labels(image, img_path, labels, seg_map_path)

    def _check_labels(
        self, image: np.ndarray, img_path: str, labels: np.ndarray, seg_map_path: str
    ) -> None:
        if image.shape[:2] != labels.shape:
            hint = 'they must be of one size'
            if image.shape[:2] == labels.shape[::-1]:
                hint += (
                    '. An EXIF tag may have turned the image; LoadImageFromFile with '
                    "color_type='color_ignore_orientation' reads it as stored"
                )
            raise ValueError(
                f'the label map {seg_map_path} has {size_of(labels)} pixels, but its image '
                f'{img_path} has {size_of(image)}: {hint}'
            )
        # With a subset of the classes, METAINFO has those of the files.
        count = len(self.metainfo['classes'] if self.label_map is None else self.label_map)
        values, counts = np.unique(labels, return_counts=True)
        first = int(self.reduce_zero_label)
        wrong = (values < 0) | (values >= count + first) & (values != IGNORE_INDEX)
        if not wrong.any():
            return
        listed = ', '.join(
            f'{value} ({n} pixels)'
            for value, n in list(zip(values[wrong], counts[wrong], strict=True))[:5]
        )
        hint = 'correct the label map, or metainfo.classes'
        if (values[wrong] == count).all() and not first:
            hint += '. Where 0 means unlabelled and classes start at 1, set reduce_zero_label=True'
        raise ValueError(
            f'the label map {seg_map_path} has labels outside the {count} classes: {listed}'
            f'{", ..." if wrong.sum() > 5 else ""}. Expected {first} to {count + first - 1}, '
            f'or {"0 or " if first else ""}{IGNORE_INDEX} for what is ignored: {hint}'
        )


@DATASETS.register_module()
class CheckedSegDataset(CheckedLabels, BaseSegDataset):
    """A folder of images and a folder of label maps, with checks.

    Args:
        *args: As for :class:`mmseg.datasets.BaseSegDataset`.
        **kwargs: As for :class:`mmseg.datasets.BaseSegDataset`; ``metainfo`` must name the
            classes.
    """


@DATASETS.register_module()
class CheckedADE20KDataset(CheckedLabels, ADE20KDataset):
    """ADE20K with checks.

    Args:
        *args: As for :class:`mmseg.datasets.ADE20KDataset`.
        **kwargs: As for :class:`mmseg.datasets.ADE20KDataset`.
    """


def _describe(image: np.ndarray) -> str:
    channels = image.shape[2] if image.ndim == 3 else 1
    return f'{channels} channel{"s" if channels > 1 else ""} of {image.dtype}'
