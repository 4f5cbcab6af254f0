"""docs/photographs.md: its configs, and the way from a handful of images to the picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs'
VRWKV = {
    'cifar10': 'classification/vrwkv-nano_1xb64-15e_cifar10.py',
    'camvid': 'segmentation/upernet_vrwkv-adapter-nano_1xb4-2k_camvid-360x480.py',
    'bccd': 'detection/faster-rcnn_vrwkv-adapter-nano_fpn_1xb2-20e_bccd.py',
}
VIT = {
    'cifar10': 'classification/deit/deit-nano_1xb64-15e_cifar10.py',
    'camvid': 'segmentation/upernet_vit-adapter-nano_1xb4-2k_camvid-360x480.py',
    'bccd': 'detection/faster-rcnn_vit-adapter-nano_fpn_1xb2-20e_bccd.py',
}
SPLITS = ('train', 'val', 'test')


@pytest.mark.parametrize('name', VRWKV)
def test_the_vit_differs_in_the_model_alone_and_has_its_size(name):
    cfgs = [Config.fromfile(CONFIGS / names[name]) for names in (VRWKV, VIT)]
    counts, sizes = [], []
    for cfg in cfgs:
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
        counts.append(sum(p.numel() for p in model.parameters()))
        backbone = cfg.pop('model').backbone
        arch = backbone.get('arch', backbone)  # mmpretrain's ViT has its sizes there
        sizes.append((arch.embed_dims, arch.get('depth') or arch.num_layers))
    assert counts[1] == pytest.approx(counts[0], rel=0.05)
    assert sizes[0] == sizes[1]
    assert cfgs[0].to_dict() == cfgs[1].to_dict()


def write_images(folder, names, size, rng):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = rng.integers(256, size=(*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def write_cifar10(root, rng):
    classes = Config.fromfile(CONFIGS / VRWKV['cifar10']).model.head.num_classes
    for split in ('train', 'test'):
        for label in range(classes):
            write_images(root / split / f'c{label}', ['0000.jpg'], (32, 32), rng)


def write_camvid(root, rng):
    for split in SPLITS:
        write_images(root / 'images' / split, ['a.png', 'b.png'], (48, 64), rng)
        (root / 'labels' / split).mkdir(parents=True)
        for name in ('a.png', 'b.png'):
            labels = rng.integers(11, size=(48, 64), dtype=np.uint8)
            labels[:4] = 255
            Image.fromarray(labels).save(root / 'labels' / split / name)


def write_bccd(root, rng):
    write_images(root / 'images', [f'{split}.jpg' for split in SPLITS], (48, 64), rng)
    names = ('RBC', 'WBC', 'Platelets')
    categories = [dict(id=i, name=name) for i, name in enumerate(names, 1)]
    for split in SPLITS:
        image = dict(id=1, file_name=f'{split}.jpg', width=64, height=48)
        boxes = [
            dict(id=i, image_id=1, category_id=i, bbox=[9 * i, 8, 16, 16], area=256, iscrowd=0)
            for i in (1, 2, 3)
        ]
        content = dict(images=[image], annotations=boxes, categories=categories)
        (root / f'{split}.json').write_text(json.dumps(content))


def shorten(cfg, root):
    """Train on the images at hand, for an epoch or an iteration, with a narrow model."""
    cfg.data_root = f'{root}/'
    for split in SPLITS:
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{root}/'
        loader.batch_size = min(2, loader.batch_size)
        evaluator = cfg.get(f'{split}_evaluator', {})
        if 'ann_file' in evaluator:
            evaluator.ann_file = f'{root}/{split}.json'
    cfg.param_scheduler = []
    cfg.train_cfg.update(val_interval=1, **{
        'max_iters' if 'max_iters' in cfg.train_cfg else 'max_epochs': 1
    })  # fmt: skip
    return cfg


@pytest.mark.usefixtures('training_environment')
@pytest.mark.parametrize(
    ('name', 'write', 'metric', 'result'),
    [
        ('cifar10', write_cifar10, 'accuracy/top1', 'top-1 (%)'),
        ('camvid', write_camvid, 'mIoU', 'mIoU (%)'),
        ('bccd', write_bccd, 'coco/bbox_mAP_50', 'AP50 of boxes'),
    ],
)
def test_from_images_to_the_picture(
    name, write, metric, result, load_script, run_demo, tool_calls, tmp_path
):
    demo = load_script('demo/photographs.py')
    cfg = shorten(Config.fromfile(CONFIGS / VRWKV[name]), tmp_path / name)
    config = tmp_path / f'{tmp_path.name}.py'
    cfg.dump(config)
    with pytest.raises(SystemExit, match=r'does not exist: docs/photographs\.md says how'):
        run_demo(demo, config)
    write(tmp_path / name, np.random.default_rng(0))
    out = run_demo(demo, config)
    assert tool_calls == ['train.py', 'test.py']
    metrics = json.loads((tmp_path / 'work/metrics.json').read_text())
    assert f'  {result}  {metrics[metric]:.4g}\n' in out
    with Image.open(tmp_path / 'work/predictions.png') as picture:
        assert picture.width > 1000
    assert np.asarray(Image.open(tmp_path / 'work/predictions.png').convert('L')).std() > 10
