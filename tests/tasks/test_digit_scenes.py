"""The small sets for detection and segmentation, read back by the libraries' own readers."""

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

SIZES = dict(train=4, val=3, size=64)


@pytest.fixture
def digit_scenes(load_script):
    return load_script('demo/digit_scenes.py')


def test_coco_holds_the_drawn_scenes(digit_scenes, tmp_path):
    root = digit_scenes.write_coco(tmp_path / 'coco', **SIZES)
    for split, count in (('train', 4), ('val', 3)):
        coco = COCO(root / 'annotations' / f'{split}.json')
        drawn = list(digit_scenes.scenes(split, count, 64))
        assert len(coco.imgs) == count
        for image_id, scene in enumerate(drawn):
            info = coco.imgs[image_id]
            assert (np.array(Image.open(root / split / info['file_name'])) == scene.image).all()
            objects = coco.imgToAnns[image_id]
            names = [coco.cats[item['category_id']]['name'] for item in objects]
            assert names == [str(label) for label in scene.labels]
            for item, mask in zip(objects, scene.masks, strict=True):
                assert (coco.annToMask(item) == mask).all()
                ys, xs = mask.nonzero()
                box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
                assert item['bbox'] == box
                assert item['area'] == mask.sum() > 0


def test_ade20k_holds_the_drawn_scenes(digit_scenes, tmp_path):
    root = digit_scenes.write_ade20k(tmp_path / 'ade', **SIZES)
    for split, folder, count in (('train', 'training', 4), ('val', 'validation', 3)):
        paths = sorted((root / 'images' / folder).iterdir())
        assert len(paths) == count
        for path, scene in zip(paths, digit_scenes.scenes(split, count, 64), strict=True):
            assert (np.array(Image.open(path)) == scene.image).all()
            labels = np.array(Image.open(root / 'annotations' / folder / path.name))
            assert labels.shape == (64, 64)
            assert (labels > 0).sum() == scene.masks.sum()  # visible parts do not overlap
            for label, mask in zip(scene.labels, scene.masks, strict=True):
                assert (labels[mask] == label + 1).all()


def test_splits_share_nothing(digit_scenes):
    from sklearn.datasets import load_sample_images

    train, val = (digit_scenes._digits(split)[0].reshape(-1, 64) for split in ('train', 'val'))
    shared = {digit.tobytes() for digit in train} & {digit.tobytes() for digit in val}
    assert not shared
    assert (len(train), len(val)) == (1437, 360)
    for photograph in load_sample_images().images:
        widths = [digit_scenes._part(photograph, s).shape[1] for s in ('train', 'val')]
        assert sum(widths) == photograph.shape[1]


def test_written_once(digit_scenes, tmp_path):
    root = digit_scenes.write_coco(tmp_path / 'coco', **SIZES)
    stamp = (root / 'train/00000.png').stat().st_mtime_ns
    assert digit_scenes.write_coco(root, **SIZES) == root
    assert (root / 'train/00000.png').stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match='does not hold the digit scenes'):
        digit_scenes.write_coco(root, train=5, val=3, size=64)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('test', 1), "split must be one of .* got 'test'"),
        (('val', 1, 32), 'size must be at least 64 pixels, got 32'),
    ],
)
def test_wrong_arguments(digit_scenes, arguments, message):
    with pytest.raises(ValueError, match=message):
        next(digit_scenes.scenes(*arguments))
