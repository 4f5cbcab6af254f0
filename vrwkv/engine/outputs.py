"""Pictures and label maps of a test set, in the sub-folders that its images come from."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from PIL import Image
from torch.utils.data import Dataset


class OutputNames:
    """Name output files after images, below the folder that holds all images of a data set.

    The libraries use an image's file name alone, so that outputs of images with the same name in
    several folders overwrite each other.

    Args:
        dataset: The data set.
    """

    def __init__(self, dataset: Dataset) -> None:
        info = getattr(dataset, 'get_data_info', lambda index: {})
        paths = [info(index).get('img_path') for index in range(len(dataset))]
        files = [Path(os.path.abspath(path)) for path in paths if path is not None]
        self._root = os.path.commonpath([file.parent for file in files]) if files else '/'
        self._stems = Counter(file.with_suffix('') for file in files)

    def __call__(self, sample: Any, number: int) -> Path:
        """Return the output file of a sample, without a folder in front and ending in .png.

        The image's own suffix stays in the name where another image would have the same name.

        Args:
            sample: A data sample of the library.
            number: Its number, which names an image that comes from no file.
        """
        path = sample.get('img_path')
        if path is None:
            return Path(f'{number}.png')
        file = Path(os.path.abspath(path))
        name = f'{file.stem if self._stems[file.with_suffix("")] <= 1 else file.name}.png'
        return file.relative_to(self._root).with_name(name)


class _OutputHook(Hook):
    """Base of hooks that write a file for each sample of a test set."""

    def before_test(self, runner: Runner) -> None:
        """Name the files after the images of the test set.

        Args:
            runner: The runner of the testing process.
        """
        self._number = -1
        self._names = OutputNames(runner.test_dataloader.dataset)

    def _next_name(self, sample: Any) -> Path:
        self._number += 1
        return self._names(sample, self._number)


@HOOKS.register_module()
class PicturesHook(_OutputHook):
    """Let a library's visualization hook draw test images into files of their own.

    By themselves these hooks name pictures after the images' file names alone, and mmseg's draws
    the images of every 50th batch.

    Args:
        hook: Config of the library's hook.
        out_dir: Folder for the pictures.
        interval: Draw each n-th sample.
    """

    def __init__(self, hook: dict, out_dir: str, interval: int = 1) -> None:
        self.hook = HOOKS.build({**hook, 'interval': 1})
        self.out_dir = out_dir
        self.interval = interval

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[Any]
    ) -> None:
        """Draw the samples of a batch.

        Args:
            runner: The runner of the testing process.
            batch_idx: Index of the batch.
            data_batch: The batch, with its images under ``'inputs'``.
            outputs: Its data samples with predictions.
        """
        folder = Path(self.out_dir)
        for index, sample in enumerate(outputs):
            name = self._next_name(sample)
            if self._number % self.interval == 0:
                with _drawing_to(runner.visualizer, folder / name):
                    # mmpretrain draws on the network's input, of which --tta has several.
                    batch = {**data_batch, 'inputs': data_batch['inputs'][index : index + 1]}
                    self.hook.after_test_iter(runner, 0, batch, [sample])


@contextmanager
def _drawing_to(visualizer: Visualizer, path: Path) -> Iterator[None]:
    """Have a library's visualizer write the samples that it draws to ``path``."""
    method = 'visualize_cls' if hasattr(visualizer, 'visualize_cls') else 'add_datasample'
    draw = getattr(visualizer, method)
    setattr(visualizer, method, lambda *args, **kw: draw(*args, **{**kw, 'out_file': str(path)}))
    try:
        yield
    finally:
        delattr(visualizer, method)


@HOOKS.register_module()
class LabelMapsHook(_OutputHook):
    """Write the label maps that a segmentor predicts for a test set, as PNG images.

    Labels are those of the annotations: one is added where the data set has
    ``reduce_zero_label``, as mmseg does.

    Args:
        out_dir: Folder for the label maps.
    """

    def __init__(self, out_dir: str) -> None:
        self.out_dir = Path(out_dir)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict, outputs: Sequence[Any]
    ) -> None:
        """Write the label maps of a batch.

        Args:
            runner: The runner of the testing process.
            batch_idx: Index of the batch.
            data_batch: The batch.
            outputs: Its data samples, with label maps of shape (1, H, W).
        """
        for sample in outputs:
            labels = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
            if sample.get('reduce_zero_label', False):
                labels = labels + 1
            path = self.out_dir / self._next_name(sample)
            path.parent.mkdir(parents=True, exist_ok=True)
            dtype = np.uint8 if labels.max() < 256 else np.uint16
            Image.fromarray(labels.astype(dtype)).save(path)
