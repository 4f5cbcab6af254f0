"""Detection from images to pictures: the demo made short, and every tool on its data."""

import json
import mmap
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as run_length
from pycocotools.coco import COCO

from vrwkv.analysis.measurement import memory_in_use, peak_memory
from vrwkv.engine import cli

pytestmark = pytest.mark.usefixtures('training_environment')

SCENES = dict(train=8, val=4, size=64)


@pytest.fixture
def demo(load_script):
    return load_script('demo/digits_detection_demo.py')


@pytest.fixture
def data_root(demo, tmp_path):
    return demo.write_coco(tmp_path / 'scenes', **SCENES)


@pytest.fixture
def write_config(demo, tmp_path):
    """Write a config of a still smaller model. mmengine tells runs apart by name and second."""

    def write(name, epochs=2, changes=''):
        root = tmp_path / 'scenes'
        data = dict(num_workers=0, dataset=dict(data_root=f'{root}/'))
        evaluator = dict(ann_file=f'{root}/annotations/val.json')
        path = tmp_path / f'{tmp_path.name}-{name}.py'
        path.write_text(f"""
_base_ = [{str(demo.CONFIG)!r}]
data_root = {str(root)!r}
digit_scenes = {SCENES!r}
model = dict(
    backbone=dict(img_size=64, embed_dims=24, conv_inplane=8, deform_num_heads=3),
    neck=dict(in_channels=[24, 24, 24, 24]),
    train_cfg=dict(rpn_proposal=dict(max_per_img=20), rcnn=dict(sampler=dict(num=8))),
    # Nothing is sure after so little training.
    test_cfg=dict(rpn=dict(max_per_img=10), rcnn=dict(score_thr=0.0, max_per_img=5)))
train_dataloader = dict(batch_size=2, **{data!r})
val_dataloader = {data!r}
test_dataloader = {data!r}
val_evaluator = {evaluator!r}
test_evaluator = {evaluator!r}
param_scheduler = []
train_cfg = dict(max_epochs={epochs}, val_interval={epochs})
default_hooks = dict(logger=dict(interval=4))
{changes}
""")
        return path

    return write


def test_demo(demo, write_config, run_demo, tool_calls, tmp_path):
    config, work_dir = write_config('demo', epochs=8), tmp_path / 'work'

    def run():
        tool_calls.clear()
        return run_demo(demo, config).partition('On the test images:')[2]

    out = run()
    assert tool_calls == ['train.py', 'test.py']
    logs = [json.loads(line) for line in next(work_dir.glob('*/vis_data/scalars.json')).open()]
    losses = [log['loss'] for log in logs if 'loss' in log]
    assert len(losses) == 8
    assert losses[-1] < 0.9 * losses[0]
    metrics = json.loads((work_dir / 'metrics.json').read_text())
    for kind, name in (('bbox', 'boxes'), ('segm', 'masks')):
        assert f'  AP50 of {name}  {metrics[f"coco/{kind}_mAP_50"]:.4g}\n' in out
        assert f'  AP of {name}  {metrics[f"coco/{kind}_mAP"]:.4g}\n' in out
    for kind in ('picture', 'checkpoint'):
        assert Path(re.search(rf'{kind} +(/.+)', out)[1]).stat().st_size > 0
    with Image.open(work_dir / 'detections.png') as picture:
        assert picture.width == 1430
    assert run() == out
    assert tool_calls == []


def test_comparison_with_the_truth(demo, data_root):
    """Found twice, found with another label, unsure, and missed."""
    coco = COCO(data_root / 'annotations/val.json')
    truths = next(t for t in coco.imgToAnns.values() if len(t) >= 3)[:3]
    first, second, third = truths
    items = [
        (first, 0, 0.9),
        (first, 0, 0.8),
        (second, 1, 0.7),  # taken for the next digit
        (third, 0, 0.2),  # below the threshold of the picture
    ]
    result = dict(
        labels=[(t['category_id'] - 1 + shift) % 10 for t, shift, _ in items],
        scores=[score for *_, score in items],
        bboxes=[demo._corners(t) for t, *_ in items],
        masks=[run_length.encode(np.asfortranarray(coco.annToMask(t))) for t, *_ in items],
    )
    names = [str(t['category_id'] - 1) for t in truths]
    found = demo._compare(result, coco, truths)
    assert [(f.label, f.score, f.right) for f in found] == [
        (names[0], 0.9, True),
        (names[0], 0.8, False),
        (str(result['labels'][2]), 0.7, False),
        (names[1], None, False),
        (names[2], None, False),
    ]
    assert (found[0].mask == coco.annToMask(first)).all()


def test_resume_goes_on_as_if_unbroken(write_config, data_root, load, tmp_path):
    work_dir = tmp_path / 'work'
    cli.train([str(write_config('unbroken')), '--work-dir', str(work_dir)])
    last = work_dir / 'epoch_2.pth'
    unbroken = load(last)
    # As if killed in the second epoch.
    last.unlink()
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_1.pth'))
    cli.train([str(write_config('resumed')), '--work-dir', str(work_dir), '--resume'])
    resumed = load(last)
    for key in ('state_dict', 'optimizer'):
        torch.testing.assert_close(resumed[key], unbroken[key], rtol=0, atol=0)
    first = load(work_dir / 'epoch_1.pth')['state_dict']
    name = 'backbone.layers.0.att.key.weight'
    assert (first[name] != resumed['state_dict'][name]).any()


def test_mixed_precision(write_config, data_root, load, tmp_path):
    """On a CPU that is bfloat16, which mmcv's operators do not know."""
    config, work_dir = str(write_config('amp', epochs=1)), tmp_path / 'work'
    cli.train([config, '--work-dir', str(work_dir), '--amp'])
    weights = load(work_dir / 'epoch_1.pth')['state_dict']
    assert all(w.isfinite().all() for w in weights.values())
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}
    out = tmp_path / 'metrics.json'
    options = ('--work-dir', str(work_dir), '--out', str(out), '--out-item', 'metrics')
    cli.test([config, str(work_dir / 'epoch_1.pth'), '--amp', *options])
    assert 'coco/segm_mAP_50' in json.loads(out.read_text())


def test_two_processes(write_config, data_root, two_processes, load, tmp_path):
    """They share the images out, train one model, and measure what one process measures."""
    # One of them gets images without a single object: every parameter still takes part.
    content = json.loads((data_root / 'annotations/train.json').read_text())
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] % 2]
    (data_root / 'annotations/train.json').write_text(json.dumps(content))
    changes = """
train_dataloader['dataset']['filter_cfg'] = dict(filter_empty_gt=False)
train_dataloader['sampler'] = dict(type='DefaultSampler', shuffle=False)
"""
    config, work_dir = write_config('two', epochs=1, changes=changes), tmp_path / 'work'
    checkpoint = work_dir / 'epoch_1.pth'
    outs = [tmp_path / f'{number}.json' for number in (1, 2)]
    options = ['--work-dir', str(work_dir), '--out-item', 'metrics', '--out']
    two_processes(
        ['train', config, '--work-dir', work_dir, '--no-validate'],
        ['test', config, checkpoint, *options, outs[1]],
    )
    saved = load(checkpoint)
    assert saved['meta']['iter'] == SCENES['train'] / (2 * 2)
    assert all(w.isfinite().all() for w in saved['state_dict'].values())
    cli.test([str(config), str(checkpoint), *options, str(outs[0])])
    one, two = (json.loads(out.read_text()) for out in outs)
    # Averages over the same detections, in one process of which batches are smaller.
    assert one == pytest.approx(two, abs=1e-3)


def test_predictions_and_pictures(write_config, data_root, tmp_path):
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    config = write_config('pictures')
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(Config.fromfile(config).model)
    weights = tmp_path / 'weights.pth'
    torch.save(model.state_dict(), weights)
    work_dir = tmp_path / 'work'
    cli.test([
        str(config), str(weights), '--work-dir', str(work_dir),
        '--out', str(tmp_path / 'predictions.pkl'), '--show-dir', str(tmp_path / 'drawn'),
    ])  # fmt: skip
    assert (tmp_path / 'predictions.pkl').stat().st_size > 0
    assert len(list(tmp_path.glob('drawn/*.png'))) == SCENES['val']


def test_memory():
    size = 2**26
    held = mmap.mmap(-1, size)  # fresh memory, which an allocator may have left over from before
    before = memory_in_use('cpu')
    held.write(b'1' * size)
    grown = memory_in_use('cpu') - before
    assert grown == pytest.approx(size, rel=0.05)
    assert peak_memory('cpu') >= before + grown


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_training_memory(write_config, load_script, channels):
    """A step of a model for that many channels runs."""
    training_memory = load_script('tools/analysis_tools/training_memory.py')
    changes = f"model['backbone']['in_channels'] = {channels}"
    config = str(write_config('memory', changes=changes))
    training_memory.step(config, True, 1, (64, 96), 'cpu')
