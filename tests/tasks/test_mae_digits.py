"""The digits comparison of masked pre-training, shortened, and the tool that measures its cost."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from PIL import Image
from torch import nn

from vrwkv_cls.datasets import write_digits
from vrwkv_cls.mae import MAEVRWKV

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def demo(load_script):
    return load_script('demo/mae_digits.py')


@pytest.fixture
def cost(load_script):
    return load_script('tools/analysis_tools/mae_encoder_cost.py')


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp('data') / 'digits')


def test_labels(demo, digits):
    lists = [demo.write_labels(digits, seed).read_text().split('\n') for seed in (0, 0, 1)]
    assert lists[0] == lists[1]
    assert lists[0] != lists[2]
    drawn = [line.split() for line in lists[0][:-1]]
    assert len({path for path, _ in drawn}) == 100
    assert Counter(label for _, label in drawn) == {str(digit): 10 for digit in range(10)}
    for path, label in drawn:
        assert Path(path).parent.name == label
        assert (digits / 'train' / path).is_file()
    # What the config names for the first seed.
    name = demo.Config.fromfile(demo.path_of(demo.SCRATCH)).train_dataloader.dataset.ann_file
    assert (digits / name).is_file()


def test_table(demo):
    lines = demo.table({0: (80.0, 90.0), 1: (84.0, 91.0), 2: (82.0, 89.0)}).split('\n')
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]]
    assert rows == [
        ['0', '80.00', '90.00', '+10.00'],
        ['1', '84.00', '91.00', '+7.00'],
        ['2', '82.00', '89.00', '+7.00'],
        ['mean ± sd', '82.00 ± 2.00', '90.00 ± 1.00', '8.00 ± 1.73'],
    ]


def test_demo(demo, digits, tool_calls, tmp_path, capfd):
    """Train the six networks of two seeds for an epoch; then find nothing left to do."""

    def options(name):
        pretrain = name == demo.PRETRAIN
        changes = {
            'model.backbone.embed_dims': 16,
            'model.backbone.depth': 1,
            'model.neck.embed_dims' if pretrain else 'model.head.in_channels': 16,
            'train_cfg.max_epochs': 1,
            'param_scheduler': [],
        }
        for split in ('train',) if pretrain else ('train', 'val', 'test'):
            changes[f'{split}_dataloader.dataset.data_root'] = str(digits)
            changes[f'{split}_dataloader.num_workers'] = 0
            changes[f'{split}_dataloader.dataset.indices'] = 100
        return changes

    def run():
        demo.run(tmp_path, digits, (0, 1), options)
        return re.findall(r'^\| \d .*', capfd.readouterr().out, re.MULTILINE)

    rows = run()
    assert tool_calls == 2 * ['train.py', 'train.py', 'test.py', 'train.py', 'test.py']
    assert len(rows) == 2
    for seed in (0, 1):
        folder = tmp_path / f'seed{seed}'
        weights = [
            torch.load(folder / name / 'epoch_1.pth', weights_only=True)['state_dict']
            for name in (demo.PRETRAIN, demo.FINETUNE, demo.SCRATCH)
        ]
        # An epoch changes little: the one stays near the pre-trained weights, the other does not.
        key = 'backbone.pos_embed'
        pretrained, tuned, scratch = (w[key].flatten() for w in weights)
        assert torch.cosine_similarity(pretrained, tuned, dim=0) > 0.99
        assert torch.cosine_similarity(pretrained, scratch, dim=0) < 0.5
        for name in (demo.PRETRAIN, demo.SCRATCH, demo.FINETUNE):
            config = demo.Config.fromfile(folder / f'configs/{name}.py')
            assert config.randomness.seed == seed
            if name != demo.PRETRAIN:
                ann_file = Path(config.train_dataloader.dataset.ann_file)
                assert ann_file == digits / f'digits-100-seed{seed}.txt'
    picture = tmp_path / 'reconstruction.png'
    assert Image.open(picture).size == (1344, 420)

    tool_calls.clear()
    written = picture.stat().st_mtime_ns
    assert run() == rows
    assert tool_calls == []
    assert picture.stat().st_mtime_ns == written

    # As if killed before the last training's end.
    last = tmp_path / 'seed1' / demo.FINETUNE
    (last / 'epoch_1.pth').unlink()
    assert run() == rows
    assert tool_calls == ['train.py', 'test.py']


def test_reconstruction_shows_the_kept_patches_unchanged(demo, digits, tmp_path):
    config = demo.path_of(demo.PRETRAIN)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(demo.Config.fromfile(config).model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'mae.pth')
    paths = sorted((digits / 'val/3').glob('*.png'))[:2]
    masked, filled, original = demo.reconstruct(config, tmp_path / 'mae.pth', paths)
    for image, source in zip(original, paths, strict=True):
        pixels = torch.tensor(list(Image.open(source).getdata())).reshape(32, 32) / 255
        torch.testing.assert_close(image, pixels.expand(3, 32, 32), atol=1e-6, rtol=0)
    tiles = [x.unfold(2, 4, 4).unfold(3, 4, 4) for x in (masked, filled, original)]
    grey = (tiles[0] - 0.5).abs().amax((1, 4, 5)) < 1e-6
    same = (tiles[1] == tiles[2]).all(1).all(-1).all(-1)
    # 16 of 64 patches are kept; a kept one may be of that grey by chance, but no digit is.
    assert grey.sum((1, 2)).tolist() == [48, 48]
    assert torch.equal(same, ~grey)


def test_cost_counts_what_the_backward_pass_needs(cost):
    # x and the output of exp; the weight of the linear layer is a parameter.
    layer = nn.Linear(3, 5)
    images = torch.randn(7, 3, requires_grad=True)

    class Exp(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return (self.layer(x).exp(),)

    assert cost.saved_bytes(Exp(), images) == 4 * (7 * 3 + 7 * 5)


def test_memory_is_proportional_to_what_is_kept(cost):
    images = torch.randn(2, 3, 64, 64)
    used = {}
    for ratio in (0, 0.5, 0.75):
        encoder = MAEVRWKV(64, patch_size=4, mask_ratio=ratio, embed_dims=64, depth=4)
        used[ratio] = cost.saved_bytes(encoder, images)
    # Beside the layers' share there is the image and the embedding of all patches.
    assert used[0.5] / used[0] == pytest.approx(0.5, abs=0.02)
    assert used[0.75] / used[0] == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize('channels', [1, 3])
def test_cost_prints_a_table(cost, channels, tmp_path, monkeypatch, capsys):
    base = ROOT / 'configs/classification/mae/mae_vrwkv-nano_1xb64-30e_digits.py'
    config = tmp_path / 'mae.py'
    backbone = f'dict(in_channels={channels}, embed_dims=16, depth=1)'
    config.write_text(f'_base_ = [{str(base)!r}]\nmodel = dict(backbone={backbone})')
    args = ['cost', str(config), '--batch-size', '2', '--repeats', '1', '--device', 'cpu']
    monkeypatch.setattr('sys.argv', args)
    cost.main()
    lines = capsys.readouterr().out.split('\n')
    assert lines[0] == '2 images of 32 pixels on cpu, training step'
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines[3:7]]
    assert [row[0] for row in rows] == ['0', '0.5', '0.75', '0.9']
    assert rows[0][3] == rows[0][5] == '1.00'
