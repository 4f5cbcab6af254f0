"""Train UperNet with a small VRWKV-Adapter to segment handwritten digits on photographs.

Writes the images, trains, tests on held-out images, and draws some of them beside the truth and
what is predicted. What is already done is not done again: a second run only prints the result, and
an interrupted training goes on from its last checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from digit_scenes import write_ade20k
from digits_demo import ROOT, is_newer, measure, parse_arguments, train
from mmengine.config import Config
from PIL import Image

CONFIG = ROOT / 'configs/segmentation/upernet_vrwkv-adapter-nano_1xb8-1k_digit-scenes-96x96.py'


class Result(NamedTuple):
    """An image with what is on it and what the model makes of it."""

    image: np.ndarray  #: RGB of shape (H, W, 3), uint8.
    truth: np.ndarray  #: Indices of classes, of shape (H, W).
    predicted: np.ndarray  #: The same.


def segment(config: Path, checkpoint: Path, data_root: Path, count: int) -> list[Result]:
    """Segment the first held-out images with mmseg's inferencer."""
    import vrwkv_seg  # noqa: F401, I001 (before mmseg: it serves mmcv's operators)
    from mmseg.apis import MMSegInferencer

    names = sorted(path.name for path in (data_root / 'images/validation').iterdir())[:count]
    paths = [data_root / 'images/validation' / name for name in names]
    inferencer = MMSegInferencer(str(config), str(checkpoint), device='cpu')
    predictions = inferencer([str(path) for path in paths])['predictions']
    return [
        Result(
            np.asarray(Image.open(path).convert('RGB')),
            np.asarray(Image.open(data_root / 'annotations/validation' / path.name)),
            predicted,
        )
        for path, predicted in zip(paths, predictions, strict=True)
    ]


def draw(
    results: list[Result], classes: list[str], palette: list[list[int]], miou: float, out: Path
) -> None:
    """Draw images, truths and predictions side by side."""
    mpl.use('Agg')
    from matplotlib import pyplot as plt

    side_by_side = 2
    rows = -(-len(results) // side_by_side)
    fig, axes = plt.subplots(
        rows, 3 * side_by_side, figsize=(13, 2.15 * rows + 1.6), dpi=110, layout='constrained',
        squeeze=False,
    )  # fmt: skip
    fig.suptitle(
        f'UperNet with VRWKV-Adapter on images it has not seen: mIoU {miou:.1f} %', fontsize=15
    )
    for ax in axes.flat:
        ax.axis('off')
    colours = np.array(palette, np.uint8)
    for ax, title in zip(axes[0], ('image', 'truth', 'prediction') * side_by_side, strict=True):
        ax.set_title(title, fontsize=12)
    for panels, result in zip(axes.reshape(-1, 3), results, strict=False):
        panels[0].imshow(result.image)
        panels[1].imshow(colours[result.truth])
        panels[2].imshow(colours[result.predicted])
    fig.legend(
        handles=[
            mpl.patches.Patch(facecolor=colour / 255, label=name)
            for name, colour in zip(classes, colours, strict=True)
        ],
        loc='outside lower center', ncols=len(classes), frameon=False, fontsize=11,
        handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip
    fig.savefig(out)
    plt.close(fig)


def main() -> None:
    """Run the demo from the command line."""
    config, work_dir = parse_arguments(__doc__, CONFIG)

    cfg = Config.fromfile(config)
    data_root = ROOT / cfg.data_root
    write_ade20k(data_root, **cfg.digit_scenes)
    checkpoint = train(config, work_dir)
    metrics = measure(config, checkpoint)
    picture = work_dir / 'segmentation.png'
    if not is_newer(picture, checkpoint):
        results = segment(config, checkpoint, data_root, count=12)
        draw(results, cfg.metainfo.classes, cfg.metainfo.palette, metrics['mIoU'], picture)

    print(f"""
On {cfg.digit_scenes.val} held-out images, in percent:
  mIoU        {metrics['mIoU']:.2f}
  pixels      {metrics['aAcc']:.2f}
  picture     {picture}
  checkpoint  {checkpoint}
Next, ADE20K or your own images: see segmentation/README.md""")


if __name__ == '__main__':
    main()
