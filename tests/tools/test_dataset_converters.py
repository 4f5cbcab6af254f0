"""The converters of public data sets, on small data of the same form."""

import json

import numpy as np
import pytest
from PIL import Image

BOX = (
    '<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>'
    '<ymax>{}</ymax></bndbox></object>'
)
PANOPTIC = [  # category, crowd, columns of the image
    (1, 0, slice(0, 4)),
    (1, 1, slice(4, 6)),
    (184, 0, slice(6, 9)),
]


def write_camvid(src):
    for split in ('train', 'val', 'test'):
        for folder in (split, f'{split}annot'):
            (src / 'CamVid' / folder).mkdir(parents=True)
        for name in 'ab':
            Image.new('RGB', (8, 6)).save(src / f'CamVid/{split}/{name}.png')
        labels = np.arange(48, dtype=np.uint8).reshape(6, 8) % 12
        Image.fromarray(labels).save(src / f'CamVid/{split}annot/a.png')


def write_bccd(src):
    for folder in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (src / folder).mkdir(parents=True)
    for split in ('train', 'val', 'test'):
        (src / f'ImageSets/Main/{split}.txt').write_text(f'{split}0\n')
        Image.new('RGB', (20, 10)).save(src / f'JPEGImages/{split}0.jpg')
        boxes = BOX.format('WBC', 2, 3, 9, 30) + BOX.format('RBC', 4, 4, 4, 4)
        size = '<size><width>20</width><height>10</height></size>'
        (src / f'Annotations/{split}0.xml').write_text(f'<a>{size}{boxes}</a>')


def write_panoptic(src):
    folder = src / 'annotations/panoptic_val2017'
    folder.mkdir(parents=True)
    (src / 'val2017').mkdir()
    Image.new('RGB', (9, 5)).save(src / 'val2017/7.jpg')
    ids = np.zeros((5, 9, 3), np.uint8)
    for number, (_, _, columns) in enumerate(PANOPTIC, 1):
        ids[:, columns] = (number, 1, 0)  # 256 + number
    Image.fromarray(ids).save(folder / '7.png')
    segments = [
        dict(id=256 + number, category_id=category, iscrowd=crowd)
        for number, (category, crowd, _) in enumerate(PANOPTIC, 1)
    ]
    image = dict(file_name='7.jpg', id=7, width=9, height=5)
    thing = dict(id=1, name='person', supercategory='person', isthing=1)
    stuff = dict(id=184, name='tree', supercategory='plant', isthing=0)
    annotation = dict(image_id=7, file_name='7.png', segments_info=segments)
    found = dict(images=[image], annotations=[annotation], categories=[thing, stuff])
    folder.with_suffix('.json').write_text(json.dumps(found))


@pytest.fixture
def convert(load_script, tmp_path):
    """Run a converter on the data that a function writes."""

    def convert(name, write=None):
        if write:
            write(tmp_path / 'src')
        module = load_script(f'tools/dataset_converters/{name}.py')
        module.convert(tmp_path / 'src', tmp_path / 'dst')
        return tmp_path / 'dst'

    return convert


def test_camvid(convert, capsys):
    out = convert('camvid', write_camvid)
    labels = np.asarray(Image.open(out / 'labels/test/a.png')).flatten()
    assert labels.tolist() == [255 if i % 12 == 11 else i % 12 for i in range(48)]
    assert [path.name for path in (out / 'images/test').iterdir()] == ['a.png']
    assert '8.3 % of the pixels are void. Left out, without a counterpart: b.png' in (
        capsys.readouterr().out
    )


def test_bccd(convert, capsys):
    out = convert('bccd', write_bccd)
    found = json.loads((out / 'val.json').read_text())
    assert [entry['name'] for entry in found['categories']] == ['RBC', 'WBC', 'Platelets']
    (box,) = found['annotations']
    assert (box['category_id'], box['bbox'], box['area']) == (2, [2, 3, 7, 7], 49)
    assert (out / 'images' / found['images'][0]['file_name']).is_file()
    assert 'Left out, without an area: RBC [4, 4, 4, 4] of val0.jpg' in capsys.readouterr().out


def test_coco_panoptic(convert, capsys):
    from pycocotools.coco import COCO

    out = convert('coco_panoptic', write_panoptic)
    found = COCO(out / 'annotations/instances_val2017.json')
    first, crowd = found.anns.values()
    assert found.cats.keys() == {1}
    assert (first['bbox'], first['area'], first['iscrowd']) == ([0, 0, 4, 5], 20, 0)
    assert (crowd['bbox'], crowd['iscrowd']) == ([4, 0, 2, 5], 1)
    assert np.argwhere(found.annToMask(crowd)[0]).flatten().tolist() == [4, 5]
    assert (out / 'val2017/7.jpg').is_file()
    printed = capsys.readouterr().out
    assert '2 objects, 1 of them crowds. Left out: 1 regions' in printed


@pytest.mark.parametrize(
    ('name', 'write', 'damage', 'message'),
    [
        ('camvid', write_camvid, 'CamVid/valannot/a.png', r'no images in val with label maps'),
        ('bccd', write_bccd, 'JPEGImages/val0.jpg', r'val0\.jpg'),
        ('coco_panoptic', write_panoptic, 'val2017/7.jpg', 'no folder val2017 with images'),
    ],
)
def test_nothing_is_written_from_damaged_data(name, write, damage, message, convert, tmp_path):
    write(tmp_path / 'src')
    (tmp_path / 'src' / damage).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        convert(name)
    assert not list(tmp_path.glob('dst*'))


def test_wrong_contents(convert, tmp_path):
    write_camvid(tmp_path / 'src')
    Image.new('L', (8, 6), 12).save(tmp_path / 'src/CamVid/trainannot/a.png')
    with pytest.raises(ValueError, match=r'a\.png has the label 12: expected 0 to 11'):
        convert('camvid')
