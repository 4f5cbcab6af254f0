#!/usr/bin/env python
"""Convert CamVid, in the form of the SegNet tutorial, for segmentation.

SRC is the tutorial's repository or its folder CamVid. It has images in the folders train, val and
test, and label maps in trainannot, valannot and testannot: classes 0 to 10, and 11 for void. DST
gets images/{train,val,test} and labels/{train,val,test}, where void is 255, which mmseg ignores.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from conversion import run
from mmengine.utils import track_iter_progress
from PIL import Image

from vrwkv._files import new_folder

VOID, IGNORED, CLASSES = 11, 255, 11


def convert(src: Path, dst: Path) -> None:
    """Convert all three splits.

    Raises:
        FileNotFoundError: If a folder is missing or empty.
        ValueError: If a label map does not fit its image or has other labels.
    """
    root = src / 'CamVid' if (src / 'CamVid').is_dir() else src
    with new_folder(dst) as out:
        for split in ('train', 'val', 'test'):
            images = {path.name: path for path in sorted((root / split).glob('*.png'))}
            maps = {path.name: path for path in sorted((root / f'{split}annot').glob('*.png'))}
            both = sorted(images.keys() & maps.keys())
            if not both:
                raise FileNotFoundError(
                    f'{root} has no images in {split} with label maps of the same names in '
                    f'{split}annot: expected the folder CamVid of the SegNet tutorial'
                )
            for kind in ('images', 'labels'):
                (out / kind / split).mkdir(parents=True)
            sizes, void = set(), []
            for name in track_iter_progress(both):
                labels = read_labels(maps[name], images[name])
                void.append((labels == IGNORED).mean())
                sizes.add('{1}x{0}'.format(*labels.shape))
                Image.fromarray(labels).save(out / 'labels' / split / name)
                shutil.copyfile(images[name], out / 'images' / split / name)
            left = sorted(images.keys() ^ maps.keys())
            print(
                f'\n{split}: {len(both)} images of {", ".join(sorted(sizes))} pixels; '
                f'{100 * np.mean(void):.1f} % of the pixels are void. Left out, without a '
                f'counterpart: {", ".join(left) or "none"}'
            )


def read_labels(path: Path, image: Path) -> np.ndarray:
    """Read a label map of shape (H, W), with void as 255."""
    labels = np.asarray(Image.open(path))
    width, height = Image.open(image).size
    if labels.shape != (height, width):
        raise ValueError(
            f'{path} has the shape {labels.shape}: expected one channel of {height} x {width} '
            f'pixels, the size of {image}'
        )
    if labels.max() > VOID:
        raise ValueError(f'{path} has the label {labels.max()}: expected 0 to {VOID}')
    return np.where(labels == VOID, IGNORED, labels).astype(np.uint8)


def main() -> None:
    """Convert from the command line."""
    run(convert, __doc__)


if __name__ == '__main__':
    main()
