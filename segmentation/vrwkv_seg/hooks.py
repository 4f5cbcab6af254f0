"""Hooks: a comparison of a model with its data before a run, and pictures of rasters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.engine.hooks import SegVisualizationHook
from mmseg.models.decode_heads import Mask2FormerHead, MaskFormerHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import HOOKS
from mmseg.structures import SegDataSample
from torch.utils.data import DataLoader

from vrwkv.engine.images import as_picture

from .rasters import open_raster, read_bands

# The last two are mmdet's heads with mmseg's losses.
HEADS = (BaseDecodeHead, MaskFormerHead, Mask2FormerHead)


@HOOKS.register_module()
class NumClassCheckHook(Hook):
    """Require that each head has as many classes as the data set, like mmdet's hook of this name.

    With fewer classes a loss fails at some label, on a GPU without its number. With more classes
    mmseg's ``IoUMetric`` leaves out predictions of the classes that the data set lacks.
    """

    def before_train(self, runner: Runner) -> None:
        """Check the training set.

        Args:
            runner: The runner.

        Raises:
            ValueError: If a head has another number of classes.
        """
        _check(runner, runner.train_dataloader)

    def before_val(self, runner: Runner) -> None:
        """Check the validation set, as :meth:`before_train`."""
        _check(runner, runner.val_dataloader)

    def before_test(self, runner: Runner) -> None:
        """Check the test set, as :meth:`before_train`."""
        _check(runner, runner.test_dataloader)


@HOOKS.register_module()
class RasterVisualizationHook(SegVisualizationHook):
    """Draw predictions on the first three bands of rasters, stretched to 0 to 255.

    mmseg's hook reads a file as an image of 8 bits.
    """

    def _after_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict,
        outputs: Sequence[SegDataSample],
        mode: str = 'val',
    ) -> None:
        if (
            not self.draw
            or mode == 'train'
            or not self.every_n_inner_iters(batch_idx, self.interval)
        ):
            return
        for sample in outputs:
            with open_raster(sample.img_path) as raster:
                image, _ = read_bands(raster, raster.indexes[:3])
            self._visualizer.add_datasample(
                f'{mode}_{Path(sample.img_path).name}',
                as_picture(torch.from_numpy(image).permute(2, 0, 1), is_rgb=True),
                data_sample=sample,
                show=self.show,
                wait_time=self.wait_time,
                step=runner.iter,
            )


def _check(runner: Runner, loader: DataLoader) -> None:
    dataset = loader.dataset
    classes = dataset.metainfo.get('classes')
    if classes is None:
        return
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    for name, head in model.named_modules():
        if isinstance(head, HEADS) and head.num_classes != len(classes):
            raise ValueError(
                f'the model has num_classes={head.num_classes} in its {name}, but the '
                f'{type(dataset).__name__} has {len(classes)} classes ({", ".join(classes[:5])}'
                f'{", ..." if len(classes) > 5 else ""}): set model.{name}.num_classes='
                f"{len(classes)}, or the data set's metainfo.classes"
            )
