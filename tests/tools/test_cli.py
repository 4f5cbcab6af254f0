"""The options of tools/train.py and tools/test.py."""

import json
import os
import pickle

import pytest
import torch
from mmengine.config import Config

from vrwkv.engine import VRWKVRunner, cli


class Built(Exception):  # noqa: N818
    """Carries the config that a runner was to be built from."""


@pytest.fixture
def final_config(monkeypatch):
    """Give the config that a command line leads to."""

    def from_cfg(cfg):
        raise Built(cfg)

    monkeypatch.setattr(VRWKVRunner, 'from_cfg', from_cfg)

    def final_config(command, *args):
        with pytest.raises(Built) as built:
            command([str(arg) for arg in args])
        return built.value.args[0]

    return final_config


def test_train_defaults(toy_config, final_config):
    config = toy_config()
    cfg = final_config(cli.train, config)
    assert cfg.work_dir == os.path.join('work_dirs', config.stem)
    assert cfg.launcher == 'none'
    assert cfg.get('resume', False) is False
    assert cfg.default_hooks.checkpoint.type == 'AtomicCheckpointHook'
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 2
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook', 'EpochSeedHook']
    assert cfg.optim_wrapper.type == 'OptimWrapper'


def test_train_options(toy_config, final_config):
    config = toy_config(changes='auto_scale_lr = dict(base_batch_size=8)')
    cfg = final_config(
        cli.train, config, '--work-dir', 'w', '--resume', 'x.pth',
        '--no-validate', '--auto-scale-lr', '--launcher', 'slurm', '--local-rank', '3',
        '--cfg-options', 'optim_wrapper.optimizer.lr=0.5', 'custom_hooks.0.momentum=0.25',
    )  # fmt: skip
    assert (cfg.work_dir, cfg.resume, cfg.load_from, cfg.launcher) == ('w', True, 'x.pth', 'slurm')
    assert cfg.val_cfg is cfg.val_dataloader is cfg.val_evaluator is None
    assert cfg.auto_scale_lr.enable is True
    assert cfg.optim_wrapper.optimizer.lr == 0.5
    assert cfg.custom_hooks[0].momentum == 0.25
    assert os.environ.pop('LOCAL_RANK') == '3'
    assert final_config(cli.train, toy_config(), '--resume').resume == 'auto'


def test_auto_scale_lr_needs_a_base(toy_config):
    with pytest.raises(
        ValueError, match=r'--auto-scale-lr needs auto_scale_lr=dict\(base_batch_size'
    ):
        cli.train([str(toy_config()), '--auto-scale-lr'])


def test_auto_scale_lr_scales(toy_config, load, tmp_path):
    config = toy_config(
        changes="""
    auto_scale_lr = dict(base_batch_size=8)
    param_scheduler = None
    train_cfg = dict(by_epoch=True, max_epochs=1)
    """
    )
    cli.train([str(config), '--work-dir', str(tmp_path / 'w'), '--no-validate', '--auto-scale-lr'])
    optimizer = load(tmp_path / 'w' / 'epoch_1.pth')['optimizer']
    assert optimizer['param_groups'][0]['lr'] == pytest.approx(0.05 * 4 / 8)


def test_loaders_without_workers(toy_config, final_config):
    changes = 'train_dataloader.update(num_workers=2, persistent_workers=True, prefetch_factor=4)'
    config = toy_config(changes=changes)
    assert final_config(cli.train, config).train_dataloader.persistent_workers is True
    loader = final_config(
        cli.train, config, '--cfg-options', 'train_dataloader.num_workers=0'
    ).train_dataloader
    assert 'persistent_workers' not in loader
    assert 'prefetch_factor' not in loader


def test_amp_without_gpu(toy_config, final_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    config = toy_config()
    assert final_config(cli.train, config, '--amp').optim_wrapper.type == 'CPUAmpOptimWrapper'
    changes = "optim_wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic', dtype='float16')"
    wrapper = final_config(cli.train, toy_config('amp', changes)).optim_wrapper
    assert wrapper.type == 'CPUAmpOptimWrapper'
    assert not {'loss_scale', 'dtype'} & set(wrapper)


def test_amp_with_gpu(toy_config, final_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    wrapper = final_config(cli.train, toy_config(), '--amp').optim_wrapper
    assert (wrapper.type, wrapper.loss_scale) == ('AmpOptimWrapper', 'dynamic')


def test_amp_refuses_other_wrappers(toy_config):
    config = toy_config(changes="optim_wrapper['type'] = 'ApexOptimWrapper'")
    with pytest.raises(ValueError, match=r"--amp takes the place of .* has 'ApexOptimWrapper'"):
        cli.train([str(config), '--amp'])


@pytest.fixture
def weights(tmp_path):
    import toy

    torch.manual_seed(0)
    path = tmp_path / 'weights.pth'
    torch.save(toy.ToyModel().state_dict(), path)
    return path


def test_out(toy_config, weights, tmp_path):
    out = tmp_path / 'predictions.pkl'
    cli.test(
        [str(toy_config('one')), str(weights), '--work-dir', str(tmp_path / 'w'), '--out', str(out)]
    )
    predictions = pickle.loads(out.read_bytes())
    import toy

    model = toy.ToyModel().eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    points = toy.ToyDataset(augment=False)
    expected = model(points.points, points.labels)
    for actual, sample in zip(predictions, expected, strict=True):
        torch.testing.assert_close(
            actual['score'], sample['score'].detach()
        )  # batches of other sizes
        assert actual['label'] == sample['label']


def test_out_must_be_a_pickle(toy_config, weights):
    with pytest.raises(
        ValueError, match=r"--out 'p\.json' must end in \.pkl .* --out-item metrics"
    ):
        cli.test([str(toy_config()), str(weights), '--out', 'p.json'])


def test_out_folder_of_mmseg():
    cfg = Config(dict(default_scope='mmseg', test_evaluator=dict(type='IoUMetric')))
    assert cli._prediction_writer(cfg, 'labels') is None
    assert cfg.test_evaluator.output_dir == 'labels'
    assert cfg.test_evaluator.keep_results is True


@pytest.mark.parametrize(
    ('hook', 'expected', 'save_dir'),
    [
        ('VisualizationHook', dict(enable=True, out_dir='d', interval=1), None),
        ('DetVisualizationHook', dict(draw=True, test_out_dir='d'), None),
        ('SegVisualizationHook', dict(draw=True), 'd'),
    ],
)
def test_show_dir(hook, expected, save_dir, toy_config, final_config):
    config = toy_config(
        changes=f"""
    default_hooks['visualization'] = dict(type='{hook}')
    visualizer = dict(type='Visualizer')
    """
    )
    cfg = final_config(cli.test, config, 'x.pth', '--show-dir', 'd')
    assert cfg.default_hooks.visualization == dict(type=hook, **expected)
    assert cfg.visualizer.get('save_dir') == save_dir
    cfg = final_config(cli.test, config, 'x.pth', '--show', '--interval', '7', '--wait-time', '3')
    shown = cfg.default_hooks.visualization
    assert (shown.show, shown.interval, shown.wait_time) == (True, 7, 3)


def test_show_needs_a_hook(toy_config):
    with pytest.raises(ValueError, match=r'need default_hooks\.visualization'):
        cli.test([str(toy_config()), 'x.pth', '--show'])


def test_tta(toy_config, final_config):
    config = toy_config(
        changes="""
    tta_model = dict(type='Averaging')
    tta_pipeline = [dict(type='Flips')]
    test_dataloader['dataset'] = dict(type='Wrapper', dataset=dict(type='ToyDataset', pipeline=[]))
    """
    )
    cfg = final_config(cli.test, config, 'x.pth', '--tta')
    assert cfg.model == dict(type='Averaging', module=dict(type='ToyModel'))
    assert cfg.test_dataloader.dataset.dataset.pipeline == [dict(type='Flips')]
    assert (cfg.load_from, cfg.resume) == ('x.pth', False)
    with pytest.raises(ValueError, match='--tta needs tta_model and tta_pipeline in the config'):
        cli.test([str(toy_config('plain')), 'x.pth', '--tta'])


def test_runner_of_the_config(toy_config, tmp_path):
    from mmengine.registry import RUNNERS

    @RUNNERS.register_module(force=True)
    class OtherRunner(VRWKVRunner):
        pass

    cfg = Config.fromfile(toy_config(changes="runner_type = 'OtherRunner'"))
    cfg.work_dir = str(tmp_path / 'w')
    assert type(cli.build_runner(cfg)).__name__ == 'OtherRunner'


def test_classifier_from_training_to_drawings(image_folder, load, tmp_path):
    """A VRWKV in mmpretrain, through both tools."""
    config = tmp_path / 'classifier.py'
    config.write_text(f"""
_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['vrwkv_cls'], allow_failed_imports=False)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VRWKV', img_size=32, patch_size=8, embed_dims=16, depth=2, out_indices=[1]),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead', num_classes=2, in_channels=16, topk=(1,),
        loss=dict(type='CrossEntropyLoss')))
data_preprocessor = dict(num_classes=2, mean=[128] * 3, std=[50] * 3, to_rgb=True)
loader = dict(batch_size=8, num_workers=0)
train_dataloader = dict(
    dataset=dict(type='CustomDataset', data_root='{image_folder}/train', pipeline=[
        dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=0.5),
        dict(type='PackInputs')]),
    sampler=dict(type='DefaultSampler', shuffle=True), **loader)
val_dataloader = dict(
    dataset=dict(type='CustomDataset', data_root='{image_folder}/val', pipeline=[
        dict(type='LoadImageFromFile'), dict(type='PackInputs')]),
    sampler=dict(type='DefaultSampler', shuffle=False), **loader)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1,))
val_cfg = test_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=3)
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.01))
randomness = dict(seed=0)
tta_model = dict(type='AverageClsScoreTTA')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='RandomFlip', prob=1.), dict(type='RandomFlip', prob=0.)],
        [dict(type='PackInputs')]])]
del loader
""")
    work = ['--work-dir', str(tmp_path / 'work')]
    cli.train([str(config), *work])
    checkpoint = tmp_path / 'work' / 'epoch_3.pth'
    assert load(checkpoint)['meta']['epoch'] == 3
    out, drawn = tmp_path / 'out.pkl', tmp_path / 'drawn'
    copies = [config.with_name(f'classifier{index}.py') for index in range(2)]  # told apart by name
    for copy in copies:
        copy.write_text(config.read_text())
    cli.test([str(copies[0]), str(checkpoint), *work, '--show-dir', str(drawn), '--out', str(out)])
    assert len(list(drawn.rglob('*.png'))) == 16
    assert len(pickle.loads(out.read_bytes())) == 16
    metrics = tmp_path / 'metrics.json'
    options = ['--tta', '--out', str(metrics), '--out-item', 'metrics']
    cli.test([str(copies[1]), str(checkpoint), *work, *options])
    assert json.loads(metrics.read_text()) == {'accuracy/top1': 100}
    with pytest.raises(ValueError, match='mmpretrain cannot draw the merged predictions of --tta'):
        cli.test([str(config), str(checkpoint), '--tta', '--show-dir', str(drawn)])
