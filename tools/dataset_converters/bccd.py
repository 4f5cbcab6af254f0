#!/usr/bin/env python
"""Convert BCCD, boxes around blood cells in Pascal VOC's form, into COCO's format for detection.

SRC is the repository or its folder BCCD, with Annotations, JPEGImages and ImageSets/Main. DST gets
images, train.json, val.json and test.json. Boxes without an area are left out.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from conversion import run, write_coco
from mmengine.utils import track_iter_progress
from PIL import Image

from vrwkv._files import new_folder

CLASSES = ('RBC', 'WBC', 'Platelets')


def convert(src: Path, dst: Path) -> None:
    """Convert all three splits.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If an annotation does not fit its image or has another class.
    """
    root = src / 'BCCD' if (src / 'BCCD').is_dir() else src
    categories = [dict(id=number, name=name) for number, name in enumerate(CLASSES, 1)]
    with new_folder(dst) as out:
        (out / 'images').mkdir()
        for split in ('train', 'val', 'test'):
            names = (root / f'ImageSets/Main/{split}.txt').read_text().split()
            images, objects, left = [], [], []
            for number, name in enumerate(track_iter_progress(names), 1):
                file = root / f'JPEGImages/{name}.jpg'
                size, boxes = read_annotation(root / f'Annotations/{name}.xml', file)
                images.append(dict(id=number, file_name=file.name, width=size[0], height=size[1]))
                for label, (x1, y1, x2, y2) in boxes:
                    if x2 <= x1 or y2 <= y1:
                        left.append(f'{label} [{x1}, {y1}, {x2}, {y2}] of {file.name}')
                        continue
                    width, height = x2 - x1, y2 - y1
                    objects.append(
                        dict(
                            image_id=number,
                            category_id=CLASSES.index(label) + 1,
                            bbox=[x1, y1, width, height],
                            area=width * height,
                            iscrowd=0,
                        )
                    )
                shutil.copyfile(file, out / 'images' / file.name)
            write_coco(out / f'{split}.json', categories, images, objects)
            counts = Counter(CLASSES[entry['category_id'] - 1] for entry in objects)
            print(
                f'\n{split}: {len(images)} images, '
                f'{", ".join(f"{counts[name]} {name}" for name in CLASSES)}. '
                f'Left out, without an area: {"; ".join(left) or "none"}'
            )


def read_annotation(path: Path, image: Path) -> tuple[tuple[int, int], list]:
    """Read the size of an image, and its boxes, cut at its borders, with their classes."""
    size = Image.open(image).size
    found = ElementTree.parse(path).getroot()
    noted = tuple(int(found.find(f'size/{side}').text) for side in ('width', 'height'))
    if noted != size:
        raise ValueError(f'{path} notes {noted} pixels, and {image} has {size}')
    boxes = []
    for entry in found.iter('object'):
        label = entry.findtext('name')
        if label not in CLASSES:
            raise ValueError(f'{path} has the class {label!r}: expected {", ".join(CLASSES)}')
        corners = [
            int(entry.find(f'bndbox/{key}').text) for key in ('xmin', 'ymin', 'xmax', 'ymax')
        ]
        limits = (*size, *size)
        boxes.append(
            (label, [min(max(n, 0), most) for n, most in zip(corners, limits, strict=True)])
        )
    return size, boxes


def main() -> None:
    """Convert from the command line."""
    run(convert, __doc__)


if __name__ == '__main__':
    main()
