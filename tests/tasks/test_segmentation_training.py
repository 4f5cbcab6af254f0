"""Segmentation from images to pictures: the demo made short, and every tool on its data."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vrwkv.engine import cli

pytestmark = pytest.mark.usefixtures('training_environment')

SCENES = dict(train=8, val=3, size=64, seed=0)


@pytest.fixture
def demo(load_script):
    return load_script('demo/digits_segmentation_demo.py')


@pytest.fixture
def data_root(demo, tmp_path):
    return demo.write_ade20k(tmp_path / 'scenes', **SCENES)


@pytest.fixture
def write_config(demo, tmp_path):
    """Write a config of a still smaller model. mmengine tells runs apart by name and second."""

    def write(name, iters=4, changes='', scenes=None):
        root = str(tmp_path / 'scenes')
        data = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=root))
        path = tmp_path / f'{tmp_path.name}-{name}.py'
        path.write_text(f"""
_base_ = [{str(demo.CONFIG)!r}]
data_root = {root!r}
digit_scenes = {scenes or SCENES!r}
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(img_size=64, embed_dims=24, conv_inplane=8, deform_num_heads=3),
    decode_head=dict(in_channels=[24, 24, 24, 24], channels=16),
    auxiliary_head=dict(in_channels=24, channels=8),
    test_cfg=dict(crop_size=(64, 64), stride=(42, 42)))
train_dataloader = dict(batch_size=2, **{data!r})
val_dataloader = {data!r}
test_dataloader = {data!r}
param_scheduler = []
train_cfg = dict(max_iters={iters}, val_interval={iters})
default_hooks = dict(logger=dict(interval=2), checkpoint=dict(interval=2, max_keep_ckpts=-1))
{changes}
""")
        return path

    return write


def trained_iterations(log):
    return {int(number) for number in re.findall(r'Iter\(train\) +\[ *(\d+)/', log)}


def test_demo(demo, write_config, run_demo, tool_calls, tmp_path):
    scenes = SCENES | dict(train=40)
    config = write_config('demo', iters=30, scenes=scenes)
    out = run_demo(demo, config)
    assert tool_calls == ['train.py', 'test.py']
    assert max(trained_iterations(out)) == 30
    truths = [np.asarray(Image.open(p)) for p in tmp_path.glob('scenes/annotations/validation/*')]
    assert len(truths) == 3
    miou = float(re.search(r'mIoU \(%\) +([\d.]+)', out)[1])
    pixels = float(re.search(r'pixels \(%\) +([\d.]+)', out)[1])
    for kind in ('picture', 'checkpoint'):
        assert Path(re.search(rf'{kind} +(/.+)', out)[1]).stat().st_size > 0

    # mmseg's metric, by hand, from what its inferencer sees.
    checkpoint = tmp_path / 'work/iter_30.pth'
    results = demo.segment(config, checkpoint, tmp_path / 'scenes', count=3)
    truth, predicted = (
        np.concatenate([getattr(r, kind).ravel() for r in results])
        for kind in ('truth', 'predicted')
    )
    assert 100 * (truth == predicted).mean() == pytest.approx(pixels, abs=0.01)
    ious = [
        ((truth == c) & (predicted == c)).sum() / ((truth == c) | (predicted == c)).sum()
        for c in range(11)
        if ((truth == c) | (predicted == c)).any()
    ]
    assert 100 * np.mean(ious) == pytest.approx(miou, abs=0.01)

    again = run_demo(demo, config)
    assert tool_calls == ['train.py', 'test.py']
    assert f'mIoU (%)  {miou:.4g}\n' in again

    # As if killed on the way: it goes on, and tests and draws what is new.
    checkpoint.unlink()
    (tmp_path / 'work/last_checkpoint').write_text(str(tmp_path / 'work/iter_28.pth'))
    resumed = run_demo(demo, config)
    assert trained_iterations(resumed) == {30}
    assert tool_calls == ['train.py', 'test.py'] * 2

    with pytest.raises(SystemExit, match=r'another model.decode_head than .* has now: remove'):
        run_demo(demo, write_config('demo', 30, "model['decode_head']['channels'] = 24", scenes))


def test_picture(demo, tmp_path):
    """Colours of the truth and of the prediction are those of the palette."""
    truth = np.zeros((8, 8), np.uint8)
    truth[2:6, 2:6] = 1
    result = demo.Result(np.full((8, 8, 3), 90, np.uint8), truth, 1 - truth)
    out = tmp_path / 'picture.png'
    demo.draw([result], ['a', 'b'], [[10, 200, 30], [40, 50, 220]], 12.3, out, 'A')
    pixels = np.asarray(Image.open(out).convert('RGB')).reshape(-1, 3)
    for colour in ((10, 200, 30), (40, 50, 220), (90, 90, 90)):
        assert (pixels == colour).all(1).sum() > 500


def test_every_tool(write_config, data_root, load, tmp_path):
    """Train, resume, test whole and sliding and multi-scale and in mixed precision."""
    config = write_config('one')
    work_dir = tmp_path / 'one'
    last = work_dir / 'iter_4.pth'
    # Without dropout, whose random numbers differ after resuming.
    options = ['--work-dir', str(work_dir), '--cfg-options']
    options += [f'model.{head}_head.dropout_ratio=0.0' for head in ('decode', 'auxiliary')]
    cli.train([str(config), *options])
    trained = load(last)
    assert trained['meta']['iter'] == 4
    assert trained['meta']['dataset_meta']['classes'][:2] == ('background', '0')

    # Resumed: the same data, and the same weights to the bit.
    last.unlink()
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'iter_2.pth'))
    cli.train([str(write_config('resumed')), '--resume', *options])
    resumed = load(last)
    assert resumed['meta']['iter'] == 4
    torch.testing.assert_close(resumed['state_dict'], trained['state_dict'], rtol=0, atol=0)

    def measure(*options):
        out = tmp_path / 'metrics.json'
        arguments = [str(config), str(last), '--work-dir', str(tmp_path / 'test')]
        cli.test([*arguments, '--out', str(out), '--out-item', 'metrics', *options])
        return json.loads(out.read_text())

    whole = measure()
    # One window that covers the image.
    slide = ['--cfg-options', 'model.test_cfg.mode=slide']
    assert measure(*slide) == whole
    assert set(measure(*slide, 'model.test_cfg.crop_size=(32,32)',
                       'model.test_cfg.stride=(21,21)')) == set(whole)  # fmt: skip
    assert set(measure('--tta')) == set(whole)
    assert set(measure('--amp')) == set(whole)

    maps = tmp_path / 'maps'
    cli.test([str(config), str(last), '--work-dir', str(tmp_path / 'test'), '--out', str(maps)])
    names = sorted(path.name for path in (data_root / 'images/validation').iterdir())
    assert sorted(path.name for path in maps.iterdir()) == names
    labels = [np.asarray(Image.open(maps / name)) for name in names]
    truths = [np.asarray(Image.open(data_root / 'annotations/validation' / n)) for n in names]
    accuracy = 100 * np.mean(np.stack(labels) == np.stack(truths))
    assert accuracy == pytest.approx(whole['aAcc'], abs=0.01)


def test_mixed_precision(write_config, data_root, load, tmp_path):
    """Asked for by --amp, and by the configs of ADE20K, on a machine without a GPU."""
    for name, options, changes in (
        ('amp', ['--amp'], ''),
        ('config', [], "optim_wrapper = dict(type='AmpOptimWrapper')"),
    ):
        config = write_config(name, iters=2, changes=changes)
        cli.train([str(config), '--work-dir', str(tmp_path / name), *options])
        assert 'CPUAmpOptimWrapper' in (tmp_path / name / config.name).read_text()
        state_dict = load(tmp_path / name / 'iter_2.pth')['state_dict']
        for key, value in state_dict.items():
            assert value.isfinite().all(), key
            assert not value.is_floating_point() or value.dtype == torch.float32, key


def test_two_processes(write_config, data_root, two_processes, load, tmp_path):
    """They train together, and measure what one process measures."""
    config, work_dir = write_config('two', iters=2), tmp_path / 'work'
    checkpoint, drawn = work_dir / 'iter_2.pth', tmp_path / 'drawn'
    outs = [tmp_path / f'{number}.json' for number in (1, 2)]
    options = ['--work-dir', str(tmp_path / 'test'), '--out-item', 'metrics', '--out']
    two_processes(
        ['train', config, '--work-dir', work_dir],
        ['test', config, checkpoint, *options, outs[1], '--show-dir', drawn, '--interval', '1'],
    )
    assert load(checkpoint)['meta']['iter'] == 2
    assert 'mIoU' in next(work_dir.glob('*/*.log')).read_text()
    assert list(drawn.rglob('*.png'))  # those of the first process
    cli.test([str(config), str(checkpoint), *options, str(outs[0])])
    one, two = (json.loads(out.read_text()) for out in outs)  # three images, not even
    for name, value in one.items():
        assert two[name] == pytest.approx(value, abs=0.01, nan_ok=True), name


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_wrong_label_ends_a_run(split, write_config, data_root, tmp_path):
    """In the worker of a data loader too, with the file's name."""
    folder = data_root / 'annotations' / ('training' if split == 'train' else 'validation')
    path = sorted(folder.iterdir())[0]
    labels = np.array(Image.open(path))
    labels[:2] = 77
    Image.fromarray(labels).save(path)
    config = write_config(
        'wrong',
        iters=4,
        changes="train_dataloader['num_workers'] = 1\ntrain_cfg['val_interval'] = 1",
    )
    with pytest.raises(ValueError, match=rf'{path.name} has labels outside the 11.*77 \(128 p'):
        cli.train([str(config), '--work-dir', str(tmp_path / 'work')])


def test_heads_of_other_classes_end_a_run(write_config, data_root, tmp_path):
    changes = "model['decode_head']['num_classes'] = 10"
    with pytest.raises(ValueError, match=r'num_classes=10 in its decode_head.*11 classes'):
        cli.train([str(write_config('wrong', 2, changes)), '--work-dir', str(tmp_path / 'work')])


def test_whole_vs_slide(write_config, load_script, monkeypatch, capsys):
    """The command's table for images of four channels.

    Other than lean, a peak holds at least the logits, 4 bytes for each class and pixel.
    """
    tool = load_script('tools/analysis_tools/whole_vs_slide.py')
    changes = """
model['backbone']['in_channels'] = 4
model['data_preprocessor'].update(mean=[0.0] * 4, std=[255.0] * 4, bgr_to_rgb=False)
"""
    config = write_config('size', changes=changes)
    options = ['--size', '256', '512', '--threads', '1']
    monkeypatch.setattr('sys.argv', ['whole_vs_slide.py', str(config), *options])
    tool.main()
    head, *rows = capsys.readouterr().out.strip().splitlines()
    assert head.startswith('An image of 512 x 256 pixels on a CPU, 1 threads, torch ')
    for mode, row in zip(('whole', 'lean', 'slide'), rows[2:], strict=True):
        _, name, found, seconds, gibibytes, _ = (cell.strip() for cell in row.split('|'))
        assert (name, found) == (config.stem, mode)
        assert float(seconds) > 0
        assert mode == 'lean' or float(gibibytes) * 2**30 >= 0.9 * 4 * 11 * 256 * 512
