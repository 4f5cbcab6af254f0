#!/usr/bin/env python
"""Convert COCO's panoptic annotations into boxes and masks of COCO's format for detection.

SRC has a file panoptic_<split>.json for each split, beside it a folder panoptic_<split> of PNG
files, and a folder <split> of images (train2017, val2017). DST gets the folders of images and
annotations/instances_<split>.json. Regions without countable objects (sky, grass) are left out;
crowds are kept as crowds, which training ignores.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from conversion import run, write_coco
from mmengine.utils import track_iter_progress
from PIL import Image
from pycocotools import mask as coco_mask

from vrwkv._files import new_folder


def convert(src: Path, dst: Path) -> None:
    """Convert every split in the source.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a map does not fit its image or its annotation.
    """
    files = sorted(src.rglob('panoptic_*.json'))
    if not files:
        raise FileNotFoundError(f'{src} has no file panoptic_<split>.json')
    with new_folder(dst) as out:
        for file in files:
            convert_split(src, file, out)


def convert_split(src: Path, file: Path, out: Path) -> None:
    """Convert one annotation file, and copy its images."""
    split = file.stem.removeprefix('panoptic_')
    folder = next((path for path in sorted(src.rglob(split)) if any(path.glob('*.jpg'))), None)
    if folder is None:
        raise FileNotFoundError(f'{src} has no folder {split} with images, which {file} needs')
    found = json.loads(file.read_text())
    things = {entry['id']: entry for entry in found['categories'] if entry['isthing']}
    images = {entry['id']: entry for entry in found['images']}
    (out / split).mkdir()
    kept, objects, stuff, crowds = [], [], 0, 0
    for entry in track_iter_progress(found['annotations']):
        image = images[entry['image_id']]
        ids = read_ids(file.with_suffix('') / entry['file_name'], image)
        kept.append({key: image[key] for key in ('id', 'file_name', 'width', 'height')})
        for segment in entry['segments_info']:
            if segment['category_id'] not in things:
                stuff += 1
                continue
            mask = ids == segment['id']
            if not mask.any():
                raise ValueError(f'{entry["file_name"]} has no pixel of segment {segment["id"]}')
            crowds += segment['iscrowd']
            objects.append(dict(image_id=image['id'], category_id=segment['category_id'],
                                iscrowd=segment['iscrowd'], **describe(mask)))  # fmt: skip
        shutil.copyfile(folder / image['file_name'], out / split / image['file_name'])
    categories = [{key: entry[key] for key in ('id', 'name', 'supercategory')}
                  for entry in things.values()]  # fmt: skip
    write_coco(out / f'annotations/instances_{split}.json', categories, kept, objects)
    print(
        f'\n{split}: {len(kept)} images, {len(objects)} objects, {crowds} of them crowds. '
        f'Left out: {stuff} regions without countable objects, '
        f'{len(images) - len(kept)} images without annotations'
    )


def read_ids(path: Path, image: dict) -> np.ndarray:
    """Read the segment of each pixel, of shape (H, W): red + 256 green + 65536 blue."""
    colours = np.asarray(Image.open(path).convert('RGB')).astype(np.int64)
    if colours.shape[:2] != (image['height'], image['width']):
        raise ValueError(
            f'{path} has {colours.shape[0]} x {colours.shape[1]} pixels: expected '
            f'{image["height"]} x {image["width"]}, the size of {image["file_name"]}'
        )
    return colours @ np.array([1, 256, 65536])


def describe(mask: np.ndarray) -> dict:
    """Return the mask, its box and its area in COCO's form."""
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return dict(
        segmentation=dict(size=encoded['size'], counts=encoded['counts'].decode()),
        bbox=coco_mask.toBbox(encoded).tolist(),
        area=int(coco_mask.area(encoded)),
    )


def main() -> None:
    """Convert from the command line."""
    run(convert, __doc__)


if __name__ == '__main__':
    main()
