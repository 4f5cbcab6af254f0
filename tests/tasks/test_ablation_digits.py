"""The digits ladder of the paper's ablation, made short."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from vrwkv_cls.datasets import write_digits


@pytest.fixture
def ladder(load_script):
    return load_script('demo/ablation_digits.py')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    write_digits(root / 'digits')
    return root


def test_scattered_digits(ladder, data):
    root = ladder.scatter(data / 'digits', data / 'scattered_digits')
    sources = {split: list((data / f'digits/{split}').glob('*/*.png')) for split in ladder.PLACES}
    for split, places in ladder.PLACES.items():
        assert len(list((root / split).glob('*/*.png'))) == places * len(sources[split])
    corners = set()
    for path in sorted((root / 'val/3').glob('*.png')):
        pixels = np.array(Image.open(path))
        assert pixels.shape == (48, 48)
        ys, xs = (pixels > 60).nonzero()
        assert 12 < np.ptp(ys) < 32
        corners.add((ys.min(), xs.min()))
    assert len(corners) > 50
    stamp = (root / 'val').stat().st_mtime_ns
    assert ladder.scatter(data / 'digits', root) == root
    assert (root / 'val').stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match=r'holds 1797 digits, not 3954: remove it'):
        ladder.scatter(data / 'digits', data / 'digits')


def test_variants_are_those_of_the_imagenet_configs(ladder):
    assert {name: ladder.settings(name) for name in ladder.VARIANTS} == {
        'RWKV': {'model.backbone.shift_mode': 'single_shift', 'model.backbone.causal': True},
        'Variant 1': {'model.backbone.shift_mode': 'none'},
        'Variant 2': {'model.backbone.shift_mode': 'single_shift'},
        'Variant 3': {'model.backbone.causal': True},
        'VRWKV': {},
    }


def test_rows(ladder):
    results = {name: [90.0, 92.0] for name in ladder.VARIANTS} | {'VRWKV': [96.0, 96.0]}
    lines = ladder.rows(results)
    expected = ('none', 'yes', '90.00', '92.00', '91.00 ± 1.41', '-5.00 ± 1.41', '71.5', '-3.6')
    assert lines[1] == ('Variant 1', *expected)
    assert lines[4][-4:] == ('96.00 ± 0.00', '', '75.1', '')


def test_ladder(ladder, data, tool_calls, tmp_path, capsys):
    """Train the five for an epoch of 64 images; then find nothing left to do."""

    def options(root):
        changes = {
            'model.backbone.embed_dims': 8,
            'model.backbone.depth': 1,
            'model.head.in_channels': 8,
            'param_scheduler': [],
            'train_cfg.max_epochs': 1,
            'train_cfg.val_interval': 1,
            'default_hooks.checkpoint.interval': 1,
        }
        for split in ('train', 'val', 'test'):
            changes[f'{split}_dataloader.num_workers'] = 0
            changes[f'{split}_dataloader.dataset.indices'] = 64
        return changes

    def run():
        ladder.run(tmp_path, data, [5], options)
        return re.findall(r'^\| (RWKV|Variant \d|VRWKV) .*', capsys.readouterr().out, re.MULTILINE)

    assert run() == list(ladder.VARIANTS)
    assert tool_calls == 5 * ['train.py', 'test.py']
    weights = {}
    for name in ladder.VARIANTS:
        run_dir = tmp_path / f'{name.lower().replace(" ", "-")}-seed5'
        config = ladder.Config.fromfile(tmp_path / f'configs/{run_dir.name}.py')
        assert config.randomness.seed == 5
        assert config.train_dataloader.dataset.data_root == str(data / 'scattered_digits')
        weights[name] = torch.load(run_dir / 'epoch_1.pth', weights_only=True)['state_dict']
    # Without a shift there is nothing to mix.
    mixes = {name: any('spatial_mix' in key for key in w) for name, w in weights.items()}
    assert mixes == dict.fromkeys(ladder.VARIANTS, True) | {'Variant 1': False}
    results = json.loads((tmp_path / 'ablation.json').read_text())
    assert results['seeds'] == [5]
    assert all(0 <= value <= 100 for (value,) in results['top1'].values())
    assert results['environment']['torch'] == torch.__version__
    assert Image.open(tmp_path / 'ablation.png').width > 1000

    tool_calls.clear()
    run()
    assert tool_calls == []
