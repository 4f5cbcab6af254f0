"""Train UperNet with a small VRWKV- or VRWKV6-Adapter to segment handwritten digits on photographs.

Write the images, train, test on held-out images, and draw some of them with truth and prediction.
Finished steps are not repeated: a second run only prints the result, and an interrupted training
continues from its last checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from demo_tools import ROOT, backbone_name, data_options, run_demo
from digit_scenes import write_ade20k
from mmengine.config import Config
from PIL import Image

from vrwkv.analysis.drawing import picture

CONFIG = ROOT / 'configs/segmentation/upernet_vrwkv-adapter-nano_1xb8-1k_digit-scenes-96x96.py'


class Result(NamedTuple):
    """An image with its truth and its prediction."""

    image: np.ndarray  #: RGB of shape (H, W, 3), uint8.
    truth: np.ndarray  #: Indices of classes, of shape (H, W).
    predicted: np.ndarray  #: Likewise.


def segment(config: Path, checkpoint: Path, data_root: Path, count: int) -> list[Result]:
    """Segment test images, evenly chosen, with mmseg's inferencer."""
    import vrwkv_seg  # noqa: F401, I001 (before mmseg: it serves mmcv's operators)
    from mmseg.apis import MMSegInferencer

    folders = Config.fromfile(config).test_dataloader.dataset.data_prefix
    paths = sorted((data_root / folders.img_path).iterdir())
    paths = paths[:: max(1, len(paths) // count)][:count]
    inferencer = MMSegInferencer(str(config), str(checkpoint), device='cpu')
    predictions = inferencer([str(path) for path in paths])['predictions']
    return [
        Result(
            np.asarray(Image.open(path).convert('RGB')),
            np.asarray(Image.open(data_root / folders.seg_map_path / path.name)),
            predicted,
        )
        for path, predicted in zip(paths, predictions, strict=True)
    ]


def draw(
    results: list[Result],
    classes: list[str],
    palette: list[list[int]],
    miou: float,
    out: Path,
    model: str,
) -> None:
    """Draw images, truths and predictions side by side."""
    side_by_side = 2
    rows, columns = -(-len(results) // side_by_side), 3 * side_by_side
    height, width = results[0].truth.shape
    size = (13, 13 * rows / columns * height / width + 1.6)
    colours = np.zeros((256, 3), np.uint8)  # ignored pixels are black
    colours[: len(palette)] = palette
    with picture(out, rows, columns, figsize=size, dpi=110, squeeze=False) as (fig, axes):
        fig.suptitle(f'UperNet with {model} on unseen images: mIoU {miou:.1f} %', fontsize=15)
        for ax in axes.flat:
            ax.axis('off')
        for ax, title in zip(axes[0], ('image', 'truth', 'prediction') * side_by_side, strict=True):
            ax.set_title(title, fontsize=12)
        for panels, result in zip(axes.reshape(-1, 3), results, strict=False):
            panels[0].imshow(result.image)
            panels[1].imshow(colours[result.truth])
            panels[2].imshow(colours[result.predicted])
        fig.legend(
            handles=[
                mpl.patches.Patch(facecolor=colour / 255, label=name)
                for name, colour in zip(classes, colours, strict=False)
            ],
            loc='outside lower center', ncols=len(classes), fontsize=11, handlelength=1.2,
            columnspacing=1.2,
        )  # fmt: skip


def draw_checkpoint(
    config: Path, checkpoint: Path, data_root: Path, metrics: dict[str, float], out: Path
) -> None:
    """Draw the predictions of a checkpoint."""
    meta = Config.fromfile(config).metainfo
    results = segment(config, checkpoint, data_root, count=12)
    draw(results, meta.classes, meta.palette, metrics['mIoU'], out, backbone_name(config))


def main() -> None:
    """Run the demo from the command line."""
    run_demo(
        __doc__,
        CONFIG,
        lambda cfg, data_root: write_ade20k(data_root, **data_options(cfg, 'digit_scenes')),
        draw_checkpoint,
        'segmentation.png',
        'Next, your own images: docs/own_images.md, or ADE20K: segmentation/README.md',
    )


if __name__ == '__main__':
    main()
