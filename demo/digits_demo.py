"""Train a small VRWKV or VRWKV6 on handwritten digits, test it, and draw its predictions.

Finished steps are not repeated: a second run only prints the result, and an interrupted training
continues from its last checkpoint.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from demo_tools import RIGHT, ROOT, WRONG, backbone_name, data_options, run_demo

from vrwkv.analysis.drawing import picture
from vrwkv_cls.datasets import write_digits

CONFIG = ROOT / 'configs/classification/vrwkv-nano_1xb64_digits.py'


class Prediction(NamedTuple):
    """The model's prediction for one image."""

    path: Path
    label: str
    predicted: str
    confidence: float

    @property
    def right(self) -> bool:
        """Whether the predicted class is the true one."""
        return self.predicted == self.label


def predict(config: Path, checkpoint: Path, folder: Path) -> list[Prediction]:
    """Classify every image of a folder ``<label>/<name>`` with mmpretrain's inferencer."""
    from mmpretrain import ImageClassificationInferencer

    paths = sorted(folder.glob('*/*.*'))
    inferencer = ImageClassificationInferencer(str(config), pretrained=str(checkpoint))
    results = inferencer([str(path) for path in paths], batch_size=64)
    return [
        Prediction(path, path.parent.name, result['pred_class'], result['pred_score'])
        for path, result in zip(paths, results, strict=True)
    ]


def draw(
    predictions: list[Prediction],
    accuracy: float,
    out: Path,
    title: str,
) -> None:
    """Draw the hardest images for the model and, below them, a random sample.

    The hardest are the mistakes, the most confident first, then the least confident right answers.
    """
    columns = 12
    mistakes = sorted((p for p in predictions if not p.right), key=lambda p: -p.confidence)
    unsure = sorted((p for p in predictions if p.right), key=lambda p: p.confidence)
    hardest = (mistakes + unsure)[: 2 * columns]
    sample = np.random.default_rng(0).permutation(len(predictions))[: 3 * columns]
    parts = (
        (
            'Hardest: mistakes (true class in brackets), then the least sure right answers',
            hardest,
        ),
        ('Picked at random', [predictions[index] for index in sample]),
    )

    total = len(predictions)
    rows = [-(-len(chosen) // columns) for _, chosen in parts]
    with picture(out, figsize=(13, 8.8)) as (fig, _):
        fig.clear()  # subfigures instead
        fig.suptitle(
            f'{title}: {accuracy:.1f} % of {total} unseen images right',
            fontsize=20,
            fontweight='bold',
        )
        for subfigure, (heading, chosen), n in zip(
            fig.subfigures(2, 1, height_ratios=rows), parts, rows, strict=True
        ):
            subfigure.suptitle(heading, fontsize=13, x=0.012, ha='left')
            for axes in subfigure.subplots(n, columns, squeeze=False).flat:
                axes.axis('off')
            for axes, prediction in zip(subfigure.axes, chosen, strict=False):
                _draw_tile(axes, prediction)


def _draw_tile(axes: mpl.axes.Axes, prediction: Prediction) -> None:
    """Draw an image with the answer and, as a bar, its confidence."""
    image = mpl.image.imread(prediction.path)
    side = image.shape[0]
    colour = RIGHT if prediction.right else WRONG
    axes.imshow(image, cmap='gray', vmin=0, vmax=1, extent=(0, side, side, 0))
    axes.add_patch(mpl.patches.Rectangle((0, 0), side, side, fill=False, ec=colour, lw=3))
    axes.barh(1.1 * side, side, height=0.08 * side, color='#e6e6e6')
    axes.barh(1.1 * side, side * prediction.confidence, height=0.08 * side, color=colour)
    axes.set(xlim=(0, side), ylim=(1.16 * side, -0.02 * side))
    mark = '✓' if prediction.right else f'✗ ({prediction.label})'
    text = f'{prediction.predicted} {mark}  {prediction.confidence:.0%}'
    axes.set_title(textwrap.fill(text, 14), color=colour, fontsize=9)


def draw_checkpoint(
    config: Path, checkpoint: Path, data_root: Path, metrics: dict[str, float], out: Path
) -> None:
    """Draw the predictions of a checkpoint."""
    predictions = predict(config, checkpoint, data_root / 'val')
    title = f'{backbone_name(config)} on handwritten digits'
    draw(predictions, metrics['accuracy/top1'], out, title)


def main() -> None:
    """Run the demo from the command line."""
    run_demo(
        __doc__,
        CONFIG,
        lambda cfg, data_root: write_digits(data_root, **data_options(cfg, 'digits')),
        draw_checkpoint,
        'predictions.png',
        'Next, your own images: docs/own_images.md, or a larger VRWKV on ImageNet-1K:\n'
        '  python tools/train.py configs/classification/vrwkv-tiny_8xb128_in1k.py',
    )


if __name__ == '__main__':
    main()
