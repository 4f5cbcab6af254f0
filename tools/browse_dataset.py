#!/usr/bin/env python
"""Check and draw a config's data sets before training: ``tools/browse_dataset.py CONFIG``.

The tool reads the training, validation and test set of a config of any task. It prints the images,
classes and sizes of each set, lists its problems with the checks that training uses, and draws a
sheet of samples with their labels, boxes or masks. It exits with 1 if there is a problem.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import mmcv
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, HOOKS, VISUALIZERS, DefaultScope
from mmengine.structures import PixelData
from mmengine.utils import track_iter_progress
from torch import nn
from torch.utils.data import Dataset

from vrwkv.analysis.drawing import picture
from vrwkv.analysis.models import build_model, read_config
from vrwkv.engine import images
from vrwkv_ops.benchmarking import markdown_table, positive_int

SPLITS = ('train', 'val', 'test')
LISTED = 10  # problems that are printed for each set
CHECKS = ('ClassCheckHook', 'NumClassCheckHook')


class Browser:
    """One data set of a config: its samples, the counts in them and its problems.

    Args:
        cfg: The config.
        split: ``train``, ``val`` or ``test``.
        model: The config's model, whose heads and preprocessor the data must fit.
        hooks: Hooks that check data before and while training.
    """

    def __init__(self, cfg: Config, split: str, model: nn.Module, hooks: list) -> None:
        self.split, self.model, self.hooks = split, model, hooks
        self.problems: list[str] = []
        self.counts: Counter[int] = Counter()  # of images, objects or pixels, by class
        self.unit = 'images'
        self.sizes: list[tuple[int, int]] = []  # height and width, as loaded
        self.inputs: Counter[str] = Counter()  # shape and type, after the pipeline
        self.values: list[tuple[float, ...]] = []  # least, greatest, mean and deviation
        self.samples: list[tuple[np.ndarray, object]] = []  # to draw
        self.read = 0
        self.dataset: Dataset | None = None
        with collect_warnings(self.problems):
            try:
                self.dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
                len(self.dataset)  # lists the files, if that is put off
            except Exception as error:  # any, since it is what the user looks for
                self.problems.append(describe(error))
        # LoadRaster keeps the order of a file, and mmcv's loaders begin with blue.
        self.is_rgb = 'LoadRaster' in str(cfg[f'{split}_dataloader'].dataset)
        self.classes = list(getattr(self.dataset, 'metainfo', {}).get('classes') or ())

    def look(self, limit: int | None, samples: int) -> None:
        """Read the samples, count and check.

        Args:
            limit: Greatest number of samples to read, evenly spaced; None reads all.
            samples: Number of samples to keep for the sheet.
        """
        if self.dataset is None:
            return
        size = len(self.dataset)
        indices = spaced(size, limit or size)
        drawn = set(spaced(len(indices), samples))
        with collect_warnings(self.problems):
            self._call_hooks(f'before_{self.split}', f'before_{self.split}_epoch')
            for position, index in enumerate(track_iter_progress(indices, file=sys.stderr)):
                try:
                    self._look_at(index, position in drawn)
                except Exception as error:
                    self.problems.append(describe(error))

    def _call_hooks(self, *names: str) -> None:
        loader = SimpleNamespace(dataset=self.dataset)
        runner = SimpleNamespace(model=self.model, logger=MMLogger.get_current_instance())
        setattr(runner, f'{self.split}_dataloader', loader)
        for hook in self.hooks:
            for name in ('before_run', *names):
                try:
                    getattr(hook, name)(runner)
                except Exception as error:
                    self.problems.append(describe(error))

    def _look_at(self, index: int, draw: bool) -> None:
        # A pipeline that gives nothing in training makes a data set try another sample.
        prepare = getattr(self.dataset, 'prepare_data', self.dataset.__getitem__)
        data = prepare(index)
        if data is None:
            raise ValueError(f'sample {index}: the pipeline returns nothing')
        sample = data['data_samples']
        image = data['inputs'][0] if isinstance(data['inputs'], list) else data['inputs']
        self.read += 1
        shape = ' x '.join(map(str, image.shape[:0:-1]))
        self.inputs[f'{shape} of {len(image)} bands, {dtype(image)}'] += 1
        if sample.get('ori_shape'):
            self.sizes.append(tuple(sample.ori_shape[:2]))
        self._count(sample)
        if draw:
            self.samples.append((images.as_picture(image, self.is_rgb), sample))
        batch = pseudo_collate([data])
        for hook in self.hooks:
            getattr(hook, f'before_{self.split}_iter')(None, index, batch)
        ready = self.model.data_preprocessor(pseudo_collate([data]), False)['inputs']
        ready = ready[0] if isinstance(ready, list | tuple) else ready
        self.values.append(
            (float(image.min()), float(image.max()), ready.mean().item(), ready.std().item())
        )

    def _count(self, sample: object) -> None:
        if 'gt_label' in sample:
            self.counts.update(sample.gt_label.flatten().tolist())
        elif 'gt_instances' in sample:
            self.unit = 'objects'
            self.counts.update(sample.gt_instances.labels.tolist())
        elif 'gt_sem_seg' in sample:
            self.unit = 'pixels'
            labels, counts = sample.gt_sem_seg.data.unique(return_counts=True)
            self.counts.update(dict(zip(labels.tolist(), counts.tolist(), strict=True)))

    def report(self) -> str:
        """Describe the data set.

        Returns:
            Lines of text, a table of classes and the problems.
        """
        lines = []
        if self.dataset is not None:
            lines.append(
                f'{type(self.dataset).__name__} of {len(self.dataset):,} samples, '
                f'{self.read:,} of them read'
            )
        if self.sizes:
            sizes = np.array(self.sizes)
            low, middle, high = (
                ' x '.join(f'{side:.0f}' for side in np.quantile(sizes, q, axis=0)[::-1])
                for q in (0, 0.5, 1)
            )
            lines.append(
                f'sizes of files (width x height): {low} to {high} pixels, median {middle}'
            )
        for text, count in self.inputs.most_common(3):
            lines.append(f'after the pipeline: {text} ({count:,} samples)')
        if len(self.inputs) > 3:
            lines.append(f'after the pipeline: {len(self.inputs) - 3} other sizes')
        if self.values:
            least, greatest, mean, deviation = np.array(self.values).T
            lines.append(
                f'values: {least.min():g} to {greatest.max():g}; after normalisation mean '
                f'{mean.mean():.2f}, standard deviation {deviation.mean():.2f}'
            )
        if self.counts and self.classes:
            total = sum(self.counts.values())
            rows = [
                [label, name, self.counts[label], f'{100 * self.counts[label] / total:.1f}']
                for label, name in enumerate(self.classes)
            ]
            others = total - sum(row[2] for row in rows)
            if others:
                rows.append([None, 'ignored or outside', others, f'{100 * others / total:.1f}'])
            if len(rows) > 30:
                rows = [*rows[:15], [None, '...', None, None], *rows[-15:]]
            lines += ['', markdown_table(['label', 'class', self.unit, '%'], rows), '']
        lines.append(f'{len(self.problems):,} problems' if self.problems else 'no problems')
        lines += [f'- {problem}' for problem in self.problems[:LISTED]]
        if len(self.problems) > LISTED:
            lines.append(f'- and {len(self.problems) - LISTED:,} more')
        return '\n'.join(lines)

    def draw(self, path: Path, visualizer: ConfigDict) -> None:
        """Draw a sheet of samples as they leave the pipeline.

        Args:
            path: The PNG file to write.
            visualizer: The config's visualizer, which draws boxes, masks and label maps.
        """
        columns = min(4, len(self.samples))
        rows = -(-len(self.samples) // columns)
        painter = VISUALIZERS.build(dict(visualizer, name=f'browse {path}', vis_backends=[]))
        painter.dataset_meta = self.dataset.metainfo
        with picture(path, rows, columns, figsize=(3.2 * columns, 3.4 * rows), squeeze=False) as (
            _,
            axes,
        ):
            for axis in axes.flat:
                axis.set_axis_off()
            for axis, (image, sample) in zip(axes.flat, self.samples, strict=False):
                title = Path(sample.get('img_path') or '').name
                if 'gt_label' in sample:
                    labels = sample.gt_label.flatten().tolist()
                    title += ': ' + ', '.join(map(self._name, labels))
                painted = paint(painter, image, sample, self.split == 'train')
                axis.imshow(painted, interpolation='nearest')
                axis.set_title(title, fontsize=8)

    def _name(self, label: int) -> str:
        return str(self.classes[label]) if 0 <= label < len(self.classes) else str(label)


class collect_warnings(logging.Handler):  # noqa: N801 (used as a function)
    """Add the warnings that are logged in a block to a list, each once.

    Args:
        messages: The list.
    """

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        """Add a message."""
        if record.levelno >= logging.WARNING and record.getMessage() not in self.messages:
            self.messages.append(record.getMessage())

    def __enter__(self) -> None:
        self.logger = MMLogger.get_current_instance()
        self.others = self.logger.handlers
        self.logger.handlers = [self]
        images.warn_again()

    def __exit__(self, *error: object) -> None:
        self.logger.handlers = self.others


def spaced(size: int, count: int) -> list[int]:
    """Choose ``count`` numbers below ``size``, evenly spaced, or all if there are fewer."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(int)).tolist()


def describe(error: Exception) -> str:
    """Write an error as one line."""
    text = ' '.join(str(error).split())
    # mmengine puts the class that was built before the message.
    return text if isinstance(error, ValueError) and text else f'{type(error).__name__}: {text}'


def dtype(tensor: torch.Tensor) -> str:
    """Name a tensor's type without its package."""
    return str(tensor.dtype).removeprefix('torch.')


def paint(
    painter: object, image: np.ndarray, sample: object, training: bool, side: int = 384
) -> np.ndarray:
    """Draw boxes, masks or a label map over an image.

    Args:
        painter: The library's visualizer.
        image: Of shape (height, width, 3).
        sample: The sample.
        training: Whether boxes are in the size of the image. Pipelines of validation load boxes,
            masks and label maps after they resize the image, so these are in the size of the file.
        side: Small images are enlarged to about this many pixels, so that names are legible.

    Returns:
        The picture, of shape (height, width, 3).
    """
    if 'gt_instances' in sample:
        objects = sample.gt_instances
        masks = objects.get('masks')
        height, width = image.shape[:2] if training else sample.ori_shape[:2]
        if masks is not None:
            height, width = masks.height, masks.width
    elif 'gt_sem_seg' in sample:
        height, width = sample.gt_sem_seg.shape[-2:]
    else:
        return image
    factor = max(1, side // max(height, width))
    size = factor * height, factor * width
    image = mmcv.imresize(image, size[::-1], interpolation='nearest')
    sample = sample.clone()
    if 'gt_instances' in sample:
        boxes = objects.bboxes
        sample.gt_instances.bboxes = factor * getattr(boxes, 'tensor', boxes)
        if masks is not None:
            sample.gt_instances.masks = masks.resize(size)
    else:
        labels = sample.gt_sem_seg.data
        labels = labels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
        sample.gt_sem_seg = PixelData(data=labels)
    with TemporaryDirectory() as folder:
        path = f'{folder}/painted.png'
        painter.add_datasample('', image, sample, draw_gt=True, draw_pred=False, out_file=path)
        return mmcv.imread(path, channel_order='rgb')


def build_hooks(cfg: Config) -> list:
    """Build the hooks of a config that check data."""
    hooks = [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or [])]
    return [HOOKS.build(hook) for hook in hooks if hook and hook.get('type') in CHECKS]


def main(argv: list[str] | None = None) -> int:
    """Run the tool.

    Args:
        argv: The arguments. Defaults to those of the process.

    Returns:
        0 if no data set has a problem, else 1.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of any task')
    parser.add_argument(
        '--split', nargs='+', choices=SPLITS, default=SPLITS, help='data sets (default: all three)'
    )
    parser.add_argument(
        '--out', type=Path, help='folder of the sheets (default: work_dirs/CONFIG/data)'
    )
    parser.add_argument(
        '--samples', type=int, default=12, help='samples on a sheet; 0 draws none (default: 12)'
    )
    parser.add_argument(
        '--limit', type=positive_int, help='read at most so many samples of a set (default: all)'
    )
    args = parser.parse_args(argv)
    cfg = read_config(args.config)
    out = args.out or Path('work_dirs', Path(args.config).stem, 'data')
    found, seen = 0, {}
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        model = build_model(cfg)
        hooks = build_hooks(cfg)
        for split in args.split:
            loader = cfg.get(f'{split}_dataloader')
            if not loader:
                print(f'\n## {split}: none in the config')
                continue
            same = next((name for name, other in seen.items() if other == loader.dataset), None)
            if same:
                print(f'\n## {split}: the data set of {same}')
                continue
            seen[split] = loader.dataset
            browser = Browser(cfg, split, model, hooks)
            browser.look(args.limit, args.samples)
            print(f'\n## {split}\n{browser.report()}')
            found += len(browser.problems)
            if not (browser.samples and args.samples):
                continue
            if cfg.get('visualizer'):
                browser.draw(out / f'{split}.png', cfg.visualizer)
                print(f'sheet: {out / f"{split}.png"}')
            else:
                print('no sheet: the config has no visualizer')
    return int(found > 0)


if __name__ == '__main__':
    sys.exit(main())
