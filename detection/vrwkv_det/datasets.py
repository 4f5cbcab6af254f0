"""COCO's format, read with the mistakes in it named."""

from __future__ import annotations

from collections.abc import Sequence

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """mmdet's ``CocoDataset``, with errors where that one goes on with wrong or no labels.

    mmdet leaves out annotations of unknown categories, and numbers the classes in the order of the
    file's categories, whatever the order of ``metainfo['classes']``: a class that the file lacks
    shifts all that follow it. A training set of which nothing is left trains for zero iterations.

    Args:
        *args: As for :class:`mmdet.datasets.CocoDataset`.
        **kwargs: As for :class:`mmdet.datasets.CocoDataset`.

    Raises:
        ValueError: When the annotations are read, if an annotation's category is not among the
            file's ``categories``, if ``metainfo['classes']`` has a class that is not there, or has
            them in another order, or if no image is left to train on.
    """

    def load_data_list(self) -> list[dict]:
        """Read the annotation file and check it.

        Returns:
            One dict for each image.
        """
        self._checked = False
        return super().load_data_list()

    def parse_data_info(self, raw_data_info: dict) -> dict | list[dict]:
        """Check an image's annotations and bring them into mmdet's form.

        Args:
            raw_data_info: ``raw_img_info`` and ``raw_ann_info`` of one image, as in the file.

        Returns:
            What mmdet makes of them.
        """
        if not self._checked:  # here, since mmdet drops the file's content when it has been read
            self._check_classes()
            self._checked = True
        for annotation in raw_data_info['raw_ann_info']:
            if annotation['category_id'] not in self.coco.cats:
                raise ValueError(
                    f'{self.ann_file}: annotation {annotation["id"]} of image '
                    f'{annotation["image_id"]} has the category_id {annotation["category_id"]}, '
                    f"which is not among the file's categories, {_ids(self.coco.cats)}: correct "
                    'the annotation, or add the category'
                )
        return super().parse_data_info(raw_data_info)

    def _check_classes(self) -> None:
        """Require that classes are numbered as their names say."""
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


def _ids(categories: Sequence[int], most: int = 10) -> str:
    ids = sorted(categories)
    return f'{ids[:most]}' if len(ids) <= most else f'{ids[:most]} and {len(ids) - most} more'
