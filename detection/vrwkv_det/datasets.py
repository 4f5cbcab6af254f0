"""mmdet's COCO data set with checks of annotations and images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from vrwkv.engine.images import ImageChecks, size_of


class _CheckedCOCO(CocoDataset.COCOAPI):
    """The annotation file as pycocotools indexes it, after a check of its entries."""

    def __init__(self, annotation_file: str) -> None:
        self.annotation_file = annotation_file
        super().__init__(annotation_file)

    def createIndex(self) -> None:  # noqa: N802 (pycocotools calls it)
        """Check images, categories and annotations, and index them."""
        for kind in ('images', 'categories'):
            if not isinstance(self.dataset.get(kind), list):
                raise ValueError(
                    f"{self.annotation_file} has no list of {kind}: expected COCO's format, a "
                    'dict of the lists "images", "categories" and "annotations"'
                )
        known = {'image_id': set(), 'category_id': set()}
        for image in self.dataset['images']:
            self._require('image', image, 'id', _is_id)
            self._require('image', image, 'file_name', _is_text)
            self._require('image', image, 'width', _is_number)
            self._require('image', image, 'height', _is_number)
            known['image_id'].add(image['id'])
        for category in self.dataset['categories']:
            self._require('category', category, 'id', _is_whole)
            self._require('category', category, 'name', _is_text)
            known['category_id'].add(category['id'])
        for annotation in self.dataset.get('annotations', ()):
            self._require('annotation', annotation, 'id', _is_id)
            self._require('annotation', annotation, 'bbox', _is_box)
            self._require('annotation', annotation, 'area', _is_number)
            for key, ids in known.items():
                value = annotation.get(key)
                if _is_id(value) and value in ids:
                    continue
                kind, plural = ('image', 'images') if 'image' in key else ('category', 'categories')
                raise ValueError(
                    f'{self._locate("annotation", annotation)} has the {key} {_describe(value)}, '
                    f"which is not among the file's {plural}, {_shorten(_sort(ids))}: correct the "
                    f'annotation, or add the {kind}'
                )
        super().createIndex()

    def _require(self, kind: str, entry: dict, key: str, valid: Callable) -> None:
        if key not in entry or not valid(entry[key]):
            raise ValueError(
                f'{self._locate(kind, entry)} has the {key} {_describe(entry.get(key))}: expected '
                f'{_EXPECTED[valid]}. Correct or remove the {kind}'
            )

    def _locate(self, kind: str, entry: dict) -> str:
        of = f' of image {entry["image_id"]}' if 'image_id' in entry else ''
        return f'{self.annotation_file}: {kind} {entry.get("id", "without id")}{of}'


@DATASETS.register_module()
class CheckedCocoDataset(ImageChecks, CocoDataset):
    """mmdet's ``CocoDataset``, with errors where that one continues with wrong or missing labels.

    mmdet leaves out annotations of unknown categories and images, numbers the classes in the order
    of the file's categories whatever the order of ``metainfo['classes']``, accepts boxes outside
    the images, and trains for zero iterations if no annotation is left.

    Args:
        *args: As for :class:`mmdet.datasets.CocoDataset`.
        **kwargs: As for :class:`mmdet.datasets.CocoDataset`.

    Raises:
        ValueError: When the annotations are read, if an entry lacks a value or has one of another
            type than COCO's format, if an annotation's image or category is not in the file, if
            ``metainfo['classes']`` has a class that is not there, or has them in another order, if
            the pipeline loads masks and an object has none, or if no image is left to train on.
            When an image is loaded, if its size is not the file's ``width`` and ``height``.
    """

    COCOAPI = _CheckedCOCO

    def load_data_list(self) -> list[dict]:
        """Read the annotation file and check it.

        Returns:
            One dict for each image.
        """
        self._checked = False
        return super().load_data_list()

    def parse_data_info(self, raw_data_info: dict) -> dict | list[dict]:
        """Bring an image's annotations into mmdet's form and check the masks.

        Args:
            raw_data_info: ``raw_img_info`` and ``raw_ann_info`` of one image, as in the file.

        Returns:
            mmdet's dict for the image.
        """
        if not self._checked:  # here, since mmdet drops the file's content when it has been read
            self._check_classes()
            self._checked = True
        data_info = super().parse_data_info(raw_data_info)
        if any(getattr(t, 'with_mask', False) for t in self.pipeline.transforms):
            self._check_masks(data_info, raw_data_info)
        return data_info

    def _check_masks(self, data_info: dict, raw_data_info: dict) -> None:
        image = raw_data_info['raw_img_info']
        size = [image['height'], image['width']]
        if all(_is_mask(instance.get('mask'), size) for instance in data_info['instances']):
            return
        # mmdet's instances have no id, and leave out objects that are of no use.
        boxes = [
            instance['bbox']
            for instance in data_info['instances']
            if not _is_mask(instance.get('mask'), size)
        ]
        for annotation in raw_data_info['raw_ann_info']:
            x, y, w, h = annotation['bbox']
            mask = annotation.get('segmentation')
            if [x, y, x + w, y + h] in boxes and not _is_mask(mask, size):
                raise ValueError(
                    f'{self.ann_file}: annotation {annotation["id"]} of image {image["id"]} has '
                    f'the segmentation {_shorten(mask)}, but the pipeline loads masks: expected '
                    'a list of polygons, each [x1, y1, x2, y2, x3, y3, ...], or a run-length '
                    f'encoding of size {size}, the height and width of the image. Add the mask, '
                    'remove the annotation, or train a detector without mask head, with '
                    "with_mask=False in the pipeline's LoadAnnotations"
                )

    def _check_classes(self) -> None:
        """Require that the numbers of the classes follow their names."""
        expected = list(self.metainfo['classes'])
        found = [self.coco.cats[i]['name'] for i in self.cat_ids]
        if found == expected:
            return
        names = [category['name'] for category in self.coco.cats.values()]
        missing = [name for name in expected if name not in names]
        if missing:
            problem = f'does not have the classes {missing}, but {names}'
        else:
            problem = f'has the classes in another order, {found}, than the config, {expected}'
        raise ValueError(
            f'{self.ann_file} {problem}. Name the classes as in the file and in its order: '
            "metainfo=dict(classes=('...', ...)) of the dataset, and as many num_classes in the "
            'heads'
        )

    def filter_data(self) -> list[dict]:
        """Leave out images as ``filter_cfg`` says.

        Returns:
            One dict for each image that is left.
        """
        data_list = super().filter_data()
        if not data_list:
            raise ValueError(
                f'{self.ann_file} has {len(self.data_list)} images, of which filter_cfg='
                f'{self.filter_cfg} leaves none: an image needs annotations of the classes '
                f'{list(self.metainfo["classes"])}, and sides of min_size'
            )
        return data_list

    def check_image(self, sample: dict) -> None:
        """Require that an image has the size that the annotation file gives.

        Args:
            sample: The sample, with ``img`` of shape (height, width, ...) as loaded, and the file's
                ``height`` and ``width`` in pixels.
        """
        image, expected = sample['img'], (sample['height'], sample['width'])
        if image.shape[:2] == expected:
            return
        hint = 'the boxes are of images of another size. Annotate or scale one of the two anew'
        if image.shape[:2] == expected[::-1]:
            hint = (
                'width and height are exchanged, or an EXIF tag turned the image. Correct the '
                "file, or load images with color_type='color_ignore_orientation'"
            )
        raise ValueError(
            f'{sample["img_path"]} has a size of {size_of(image)} pixels, but {self.ann_file} says '
            f'width {expected[1]} and height {expected[0]}: {hint}'
        )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # JSON has no other numbers


def _is_whole(value: object) -> bool:
    return _is_number(value) and value == int(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_id(value: object) -> bool:
    return _is_whole(value) or _is_text(value)


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


_EXPECTED = {
    _is_number: 'a finite number',
    _is_whole: 'a whole number',
    _is_text: 'text',
    _is_id: 'a whole number or text',
    _is_box: 'four finite numbers, [left, top, width, height] in pixels',
}


def _is_mask(mask: object, size: list) -> bool:
    """Tell whether there is an area in a segmentation of COCO's format for an image of a size."""
    if isinstance(mask, dict):
        return isinstance(mask.get('counts'), str | list) and list(mask.get('size', ())) == size
    if not isinstance(mask, list):
        return False
    return any(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in mask)


def _describe(value: object) -> str:
    if isinstance(value, str):
        return f'{_shorten(value)} (text; numbers have no quotation marks)'
    return 'missing' if value is None else _shorten(value)


def _shorten(value: object, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f'{text[:most]}...'


def _sort(ids: Iterable[int | str]) -> list[int | str]:
    return sorted(ids, key=lambda value: (isinstance(value, str), value))
