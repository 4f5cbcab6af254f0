"""Train Mask R-CNN with a small VRWKV- or VRWKV6-Adapter to detect digits on photographs.

Write the images, train, test on held-out images, and draw the detections on some of them. Finished
steps are not repeated: a second run only prints the result, and an interrupted training continues
from its last checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from demo_tools import RIGHT, ROOT, WRONG, backbone_name, data_options, run_demo
from digit_scenes import write_coco
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as run_length
from pycocotools.coco import COCO
from torchvision.ops import box_iou

from vrwkv.analysis.drawing import picture

CONFIG = ROOT / 'configs/detection/mask-rcnn_vrwkv-adapter-nano_fpn_1xb8-10e_digit-scenes.py'
SCORE = 0.3  # detections with a higher score are drawn
CROWDED = 10  # more objects than this leave little room for labels


class Found(NamedTuple):
    """A detected or a missed object."""

    label: str
    score: float | None  #: The detection's score; None for a missed object.
    box: list[float]  #: Left, top, right and bottom in pixels.
    mask: np.ndarray | None  #: Of shape (H, W), bool; None for a detector of boxes alone.
    right: bool  #: Whether it matches an object of that label.


def detect(config: Path, checkpoint: Path, data_root: Path, count: int) -> dict[Path, list[Found]]:
    """Detect objects on the first test images with mmdet's inferencer; compare with the truth.

    A detection is right if its box has an IoU of at least 0.5 with an object of its label that no
    detection with a higher score matches.

    Returns:
        The detected and the missed objects of each image.
    """
    import vrwkv_det  # noqa: F401, I001 (before mmdet: it serves mmcv's operators)
    from mmdet.apis import DetInferencer

    dataset = Config.fromfile(config).test_dataloader.dataset
    coco = COCO(data_root / dataset.ann_file)
    images = [coco.imgs[index] for index in sorted(coco.imgs)[:count]]
    paths = [data_root / dataset.data_prefix.img / image['file_name'] for image in images]
    inferencer = DetInferencer(str(config), str(checkpoint), device='cpu', show_progress=False)
    results = inferencer([str(path) for path in paths], batch_size=8)['predictions']
    return {
        path: _compare(result, coco, coco.imgToAnns[image['id']])
        for path, result, image in zip(paths, results, images, strict=True)
    }


def _compare(result: dict, coco: COCO, truths: list[dict]) -> list[Found]:
    found = []
    names = [category['name'] for category in coco.loadCats(coco.getCatIds())]
    masks = result.get('masks', [None] * len(result['labels']))
    for label, score, box, mask in sorted(
        zip(*(result[key] for key in ('labels', 'scores', 'bboxes')), masks, strict=True),
        key=lambda item: -item[1],
    ):
        if score < SCORE:
            continue
        same = [truth for truth in truths if truth['category_id'] == label + 1]
        overlaps = [_overlap(box, _corners(truth)) for truth in same]
        right = max(overlaps, default=0) >= 0.5
        if right:
            truths = [t for t in truths if t is not same[int(np.argmax(overlaps))]]
        shape = None if mask is None else run_length.decode(mask).astype(bool)
        found.append(Found(names[label], score, box, shape, right))
    for truth in truths:
        found.append(Found(names[truth['category_id'] - 1], None, _corners(truth), None, False))
    return found


def _corners(truth: dict) -> list[float]:
    left, top, width, height = truth['bbox']
    return [left, top, left + width, top + height]


def _overlap(a: list[float], b: list[float]) -> float:
    return box_iou(torch.tensor([a]), torch.tensor([b])).item()


def draw(
    detections: dict[Path, list[Found]],
    metrics: dict[str, float],
    out: Path,
    model: str,
) -> None:
    """Draw images with boxes, labels and, if there are some, masks: right and wrong ones."""
    kinds = [
        f'of {name} {metrics[key]:.3f}'
        for name, key in (('boxes', 'coco/bbox_mAP_50'), ('masks', 'coco/segm_mAP_50'))
        if key in metrics
    ]
    images = [np.asarray(Image.open(path).convert('RGB')) for path in detections]
    crowded = max(map(len, detections.values())) > CROWDED
    columns = 3 if crowded else 4
    rows = -(-len(images) // columns)
    height, width, _ = images[0].shape
    size = (13, 13 * rows / columns * height / width + 1.3)
    with picture(out, rows, columns, figsize=size, dpi=110, squeeze=False) as (fig, axes):
        fig.suptitle(
            f'{model} on unseen images\nAP50 {", ".join(kinds)}. Red: wrong, dashed: missed',
            fontsize=15,
        )
        for ax in axes.flat:
            ax.axis('off')
        for ax, image, found in zip(axes.flat, images, detections.values(), strict=False):
            ax.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
            for item in found:
                _draw_object(ax, item, crowded)


def _draw_object(ax: mpl.axes.Axes, item: Found, crowded: bool) -> None:
    colour = RIGHT if item.right else WRONG
    left, top, right, bottom = item.box
    missed = item.score is None
    ax.add_patch(
        mpl.patches.Rectangle(
            (left, top), right - left, bottom - top, fill=False, ec=colour, lw=2,
            ls='--' if missed else '-',
        )
    )  # fmt: skip
    if item.mask is not None:
        overlay = np.zeros((*item.mask.shape, 4))
        overlay[item.mask] = mpl.colors.to_rgba(colour, 0.65)
        ax.imshow(overlay, extent=(0, item.mask.shape[1], item.mask.shape[0], 0))
    if missed and crowded:
        return
    text = f'{item.label} missed' if missed else f'{item.label}  {item.score:.2f}'
    above = top > 10
    ax.text(
        left, top - 1 if above else bottom + 1, text, color='white', fontsize=6.5 if crowded else 9,
        va='bottom' if above else 'top',
        bbox=dict(facecolor=colour, edgecolor='none', pad=1.2),
    )  # fmt: skip


def draw_checkpoint(
    config: Path, checkpoint: Path, data_root: Path, metrics: dict[str, float], out: Path
) -> None:
    """Draw the detections of a checkpoint."""
    detections = detect(config, checkpoint, data_root, count=12)
    detector = dict(MaskRCNN='Mask R-CNN', FasterRCNN='Faster R-CNN')[
        Config.fromfile(config).model.type
    ]
    draw(detections, metrics, out, f'{detector} with {backbone_name(config)}')


def main() -> None:
    """Run the demo from the command line."""
    run_demo(
        __doc__,
        CONFIG,
        lambda cfg, data_root: write_coco(data_root, **data_options(cfg, 'digit_scenes')),
        draw_checkpoint,
        'detections.png',
        'Next, your own images: docs/own_images.md, or COCO: detection/README.md',
    )


if __name__ == '__main__':
    main()
