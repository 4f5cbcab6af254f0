"""Train Mask R-CNN with a small VRWKV-Adapter to find handwritten digits on photographs.

Writes the images, trains, tests on held-out images, and draws what is found on some of them. What
is already done is not done again: a second run only prints the result, and an interrupted training
goes on from its last checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from digit_scenes import DIGITS, write_coco
from digits_demo import RIGHT, ROOT, WRONG, is_newer, measure, parse_arguments, train
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as run_length
from pycocotools.coco import COCO
from torchvision.ops import box_iou

CONFIG = ROOT / 'configs/detection/mask-rcnn_vrwkv-adapter-nano_fpn_1xb8-10e_digit-scenes.py'
SCORE = 0.5  # what is surer is drawn


class Found(NamedTuple):
    """One digit that the model found, or one that it missed."""

    label: str
    score: float | None  #: How sure the model is of it; None if it missed the digit.
    box: list[float]  #: Left, top, right and bottom in pixels.
    mask: np.ndarray  #: Of the size of the image, bool.
    right: bool  #: Whether a digit of that label is there.


def detect(config: Path, checkpoint: Path, data_root: Path, count: int) -> dict[Path, list[Found]]:
    """Find digits on the first held-out images with mmdet's inferencer, and compare with the truth.

    Something found is right if a digit of its label, found by nothing surer, lies in the same box:
    IoU of at least 0.5.

    Returns:
        For each image what was found and what was missed.
    """
    import vrwkv_det  # noqa: F401, I001 (before mmdet: it serves mmcv's operators)
    from mmdet.apis import DetInferencer

    coco = COCO(data_root / 'annotations/val.json')
    images = [coco.imgs[index] for index in sorted(coco.imgs)[:count]]
    paths = [data_root / 'val' / image['file_name'] for image in images]
    inferencer = DetInferencer(str(config), str(checkpoint), device='cpu', show_progress=False)
    results = inferencer([str(path) for path in paths], batch_size=8)['predictions']
    return {
        path: _compare(result, coco, coco.imgToAnns[image['id']])
        for path, result, image in zip(paths, results, images, strict=True)
    }


def _compare(result: dict, coco: COCO, truths: list[dict]) -> list[Found]:
    found = []
    for label, score, box, mask in sorted(
        zip(*(result[key] for key in ('labels', 'scores', 'bboxes', 'masks')), strict=True),
        key=lambda item: -item[1],
    ):
        if score < SCORE:
            continue
        same = [truth for truth in truths if truth['category_id'] == label + 1]
        overlaps = [_overlap(box, _corners(truth)) for truth in same]
        right = max(overlaps, default=0) >= 0.5
        if right:
            truths = [t for t in truths if t is not same[int(np.argmax(overlaps))]]
        shape = run_length.decode(mask).astype(bool)
        found.append(Found(DIGITS[label], score, box, shape, right))
    for truth in truths:
        mask = coco.annToMask(truth).astype(bool)
        found.append(Found(DIGITS[truth['category_id'] - 1], None, _corners(truth), mask, False))
    return found


def _corners(truth: dict) -> list[float]:
    left, top, width, height = truth['bbox']
    return [left, top, left + width, top + height]


def _overlap(a: list[float], b: list[float]) -> float:
    return box_iou(torch.tensor([a]), torch.tensor([b])).item()


def draw(detections: dict[Path, list[Found]], metrics: dict[str, float], out: Path) -> None:
    """Draw images with boxes, masks and labels, right ones in one colour, others in another."""
    mpl.use('Agg')
    from matplotlib import pyplot as plt

    columns = 4
    rows = -(-len(detections) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(13, 3.25 * rows + 1.3), dpi=110, layout='constrained', squeeze=False
    )
    fig.suptitle(
        'Mask R-CNN with VRWKV-Adapter on images it has not seen\n'
        f'AP50 of boxes {metrics["coco/bbox_mAP_50"]:.3f}, of masks '
        f'{metrics["coco/segm_mAP_50"]:.3f}. Red: wrong, dashed: missed',
        fontsize=15,
    )
    for ax in axes.flat:
        ax.axis('off')
    for ax, (path, found) in zip(axes.flat, detections.items(), strict=False):
        image = np.asarray(Image.open(path).convert('RGB'))
        ax.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
        for item in found:
            _draw_digit(ax, item)
    fig.savefig(out)
    plt.close(fig)


def _draw_digit(ax: mpl.axes.Axes, item: Found) -> None:
    colour = RIGHT if item.right else WRONG
    left, top, right, bottom = item.box
    missed = item.score is None
    ax.add_patch(
        mpl.patches.Rectangle(
            (left, top), right - left, bottom - top, fill=False, ec=colour, lw=2,
            ls='--' if missed else '-',
        )
    )  # fmt: skip
    if not missed:
        overlay = np.zeros((*item.mask.shape, 4))
        overlay[item.mask] = mpl.colors.to_rgba(colour, 0.65)
        ax.imshow(overlay, extent=(0, item.mask.shape[1], item.mask.shape[0], 0))
    text = f'{item.label} missed' if missed else f'{item.label}  {item.score:.2f}'
    above = top > 10
    ax.text(
        left, top - 1 if above else bottom + 1, text, color='white', fontsize=9,
        va='bottom' if above else 'top',
        bbox=dict(facecolor=colour, edgecolor='none', pad=1.2),
    )  # fmt: skip


def main() -> None:
    """Run the demo from the command line."""
    config, work_dir = parse_arguments(__doc__, CONFIG)

    cfg = Config.fromfile(config)
    data_root = ROOT / cfg.data_root
    write_coco(data_root, **cfg.digit_scenes)
    checkpoint = train(config, work_dir)
    metrics = measure(config, checkpoint)
    picture = work_dir / 'detections.png'
    if not is_newer(picture, checkpoint):
        draw(detect(config, checkpoint, data_root, count=12), metrics, picture)

    print(f"""
Average precision on {cfg.digit_scenes.val} held-out images, at an IoU of 0.5 and over 0.5 to 0.95:
  boxes  {metrics['coco/bbox_mAP_50']:.3f}, {metrics['coco/bbox_mAP']:.3f}
  masks  {metrics['coco/segm_mAP_50']:.3f}, {metrics['coco/segm_mAP']:.3f}
  picture     {picture}
  checkpoint  {checkpoint}
Next, COCO or your own images: see detection/README.md""")


if __name__ == '__main__':
    main()
