"""The tool that checks and draws data sets, on small data of all tasks, good and bad."""

import json
import re

import cv2
import numpy as np
import pytest
from PIL import Image

SIZES = dict(
    classification='model = dict(backbone=dict(embed_dims=32, depth=1), '
    'head=dict(num_classes=2, in_channels=32))\ndata_preprocessor = dict(num_classes=2)',
    detection='model = dict(roi_head=dict(bbox_head=dict(num_classes=2), '
    'mask_head=dict(num_classes=2)))',
    segmentation='h = dict(num_classes=2, loss_decode=dict(class_weight=None))\n'
    'model = dict(decode_head=h, auxiliary_head=h)',
)
CONFIGS = dict(
    classification='classification/vrwkv-nano_1xb64_digits.py',
    detection='detection/mask-rcnn_vrwkv-adapter-nano_fpn_1xb8-10e_digit-scenes.py',
    segmentation='segmentation/upernet_vrwkv-adapter-nano_1xb8-1k_digit-scenes-96x96.py',
)
FOLDERS = dict(
    classification='dict(data_root={root!r})',
    detection="dict(data_root={root!r}, metainfo=dict(classes=('cup', 'jug')), "
    "ann_file='{split}.json', data_prefix=dict(img='{split}'))",
    segmentation="dict(data_root={root!r}, metainfo=dict(classes=('cup', 'jug'), palette=[[0] * 3, "
    "[200] * 3]), data_prefix=dict(img_path='{split}', seg_map_path='labels/{split}'))",
)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_images(root, task):
    """Three images of 48 x 32 pixels in each of two sets, with two classes, or objects on each."""
    for split in ('train', 'val'):
        for folder in (split, f'labels/{split}', f'{split}/cup', f'{split}/jug'):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(3):
            image = Image.fromarray(noise(32, 48, 3))
            if task == 'classification':
                image.save(root / split / ('jug' if index else 'cup') / f'{index}.png')
                continue
            image.save(root / split / f'{index}.png')
            labels = np.zeros((32, 48), np.uint8)
            labels[:8] = 1
            labels[-1, -1] = 255
            Image.fromarray(labels).save(root / f'labels/{split}/{index}.png')
        boxes = [
            dict(
                id=3 * index + k,
                image_id=index,
                category_id=k,
                bbox=[10 * k, 4, 9, 9],
                area=81,
                iscrowd=0,
                segmentation=[[10 * k, 4, 10 * k + 9, 4, 10 * k + 9, 13]],
            )
            for index in range(3)
            for k in (1, 2)
        ]
        names = [dict(id=1, name='cup'), dict(id=2, name='jug')]
        images = [dict(id=i, file_name=f'{i}.png', width=48, height=32) for i in range(3)]
        content = dict(images=images, annotations=boxes, categories=names)
        (root / f'{split}.json').write_text(json.dumps(content))
    return root


@pytest.fixture(params=CONFIGS)
def task(request):
    return request.param


@pytest.fixture
def browse(load_script, repository, tmp_path, task, capsys):
    """Run the tool on the task's data; returns its exit status and output, and writes sheets."""
    root = write_images(tmp_path / 'data', task)
    tool = load_script('tools/browse_dataset.py')

    def run(*args, more=''):
        lines = [
            f'_base_ = {str(repository / "configs" / CONFIGS[task])!r}',
            SIZES[task],
            *(
                f'{split}_dataloader = dict(dataset='
                f'{FOLDERS[task].format(root=str(root), split=split)})'
                for split in ('train', 'val')
            ),
            'test_dataloader = val_dataloader',
            more,
        ]
        config = tmp_path / 'config.py'
        config.write_text('\n'.join(lines))
        status = tool.main([str(config), '--out', str(tmp_path / 'out'), *args])
        captured = capsys.readouterr()
        assert '3/3' in captured.err or '1/1' in captured.err or status  # the progress bar
        return status, captured.out

    run.root = root
    return run


EXPECTED = dict(
    classification=('|     0 | cup   |      1 | 33.3 |', '|     1 | jug   |      2 | 66.7 |'),
    detection=('|     0 | cup   |       3 | 50.0 |', '|     1 | jug   |       3 | 50.0 |'),
    # 8 of 32 rows are of the second class; a corner is ignored.
    segmentation=('|   3453 | 74.9 |', '|   1152 | 25.0 |', 'ignored or outside |      3 |'),
)


def test_good_data(browse, task, tmp_path):
    status, out = browse()
    assert status == 0
    assert out.count('no problems') == 2
    assert out.count('3 samples, 3 of them read') == 2
    assert '## test: the data set of val' in out
    assert 'sizes of files (width x height): 48 x 32 to 48 x 32 pixels' in out
    assert re.search(r'after the pipeline: \d+ x \d+ of 3 bands, \w+ \(3 samples\)', out)
    for text in EXPECTED[task]:
        assert out.count(text) == 2, out
    for split in ('train', 'val'):
        assert np.asarray(Image.open(tmp_path / f'out/{split}.png')).std() > 20


def test_limit_and_split(browse, tmp_path):
    status, out = browse('--split', 'val', '--limit', '1', '--samples', '0')
    assert status == 0
    assert '## train' not in out
    assert '3 samples, 1 of them read' in out
    assert not (tmp_path / 'out').exists()


def test_configs_without_hooks_and_visualizer(browse, task):
    """As for training."""
    status, out = browse(more='default_hooks = custom_hooks = visualizer = None')
    assert status == 0 and 'no sheet: the config has no visualizer' in out


def test_every_problem_of_a_set_is_listed(browse, task):
    """Not the first alone: a file that is no image, and one of four bands; training is good."""
    paths = sorted((browse.root / 'val').rglob('*.png'))
    paths[0].write_bytes(b'no image')
    cv2.imwrite(str(paths[2]), np.ones((32, 48, 4), np.uint16))
    status, out = browse()
    assert status == 1
    good, bad = out.split('## val')
    assert 'no problems' in good
    assert '2 problems' in bad
    assert f'failed to load image: {paths[0]}' in bad
    assert f'{paths[2]} has 4 bands of uint16' in bad
    assert '3 samples, 1 of them read' in bad


def test_labels_that_do_not_fit(browse, task):
    if task == 'classification':
        (browse.root / 'val/mug').mkdir()
        Image.fromarray(noise(32, 48, 3)).save(browse.root / 'val/mug/0.png')
        expected = ['data set has 3 classes', 'has the label [2], but the model has num_classes=2']
    elif task == 'detection':
        path = browse.root / 'val.json'
        content = json.loads(path.read_text())
        content['annotations'][1]['category_id'] = '2'
        path.write_text(json.dumps(content))
        expected = ["annotation 2 of image 0 has the category_id '2' (text"]
    else:
        for index in range(2):
            labels = np.full((32, 48), 7, np.uint8)
            Image.fromarray(labels).save(browse.root / f'labels/val/{index}.png')
        expected = [f'labels/val/{index}.png has labels outside the 2' for index in range(2)]
    status, out = browse('--samples', '0')
    assert status == 1
    good, bad = out.split('## val')
    assert 'no problems' in good
    for text in expected:
        assert text in bad
    assert f'\n{len(expected)} problems\n' in bad, bad


def test_many_problems_are_counted(browse, task, load_script, monkeypatch):
    monkeypatch.setattr(load_script('tools/browse_dataset.py'), 'LISTED', 1)
    for path in (browse.root / 'train').rglob('*.png'):
        path.write_bytes(b'no image')
    status, out = browse('--split', 'train')
    assert status == 1
    assert '3 problems\n- ' in out
    assert '- and 2 more' in out


def test_no_data(browse, task):
    status, out = browse(more='train_dataloader["dataset"]["data_root"] = "/nowhere"')
    assert status == 1
    assert '1 problems' in out.split('## val')[0]
    assert '/nowhere' in out
