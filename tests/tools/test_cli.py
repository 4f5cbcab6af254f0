"""The options of tools/train.py and tools/test.py."""

import json
import logging
import os
import pickle
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from PIL import Image
from torch import nn

from vrwkv.engine import LabelMapsHook, PicturesHook, VRWKVRunner, cli, patches
from vrwkv.engine.outputs import OutputNames
from vrwkv.engine.screen import QuietScreen
from vrwkv.mmcv_ops import installed
from vrwkv.weights import fit_channels


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


def test_train_options(toy_config, final_config, monkeypatch):
    monkeypatch.setenv('SLURM_PROCID', '0')
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


def test_launchers(toy_config, final_config, monkeypatch, capsys):
    monkeypatch.setenv('OMPI_COMM_WORLD_LOCAL_RANK', '5')
    final_config(cli.train, toy_config(), '--launcher', 'mpi')
    assert os.environ.pop('LOCAL_RANK') == '5'
    monkeypatch.undo()
    for launcher, starter in dict(pytorch='torchrun', slurm='srun', mpi="Open MPI's").items():
        with pytest.raises(SystemExit):
            cli.train([str(toy_config()), '--launcher', launcher])
        assert f'--launcher {launcher} needs {starter}' in capsys.readouterr().err


def test_interrupt(toy_config, tmp_path, monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(VRWKVRunner, 'train', interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.train([str(toy_config()), '--work-dir', str(tmp_path / 'w')])
    assert ended.value.code == 130
    assert 'with --resume continues' in capsys.readouterr().err


def test_auto_scale_lr_needs_a_base(toy_config):
    with pytest.raises(
        ValueError, match=r'--auto-scale-lr needs auto_scale_lr=dict\(base_batch_size'
    ):
        cli.train([str(toy_config()), '--auto-scale-lr'])


@pytest.mark.parametrize('counts', [1, 2])
def test_auto_scale_lr_scales(counts, toy_config, load, tmp_path):
    config = toy_config(
        changes=f"""
    auto_scale_lr = dict(base_batch_size=8)
    optim_wrapper['accumulative_counts'] = {counts}
    param_scheduler = None
    train_cfg = dict(by_epoch=True, max_epochs=1)
    """
    )
    cli.train([str(config), '--work-dir', str(tmp_path / 'w'), '--no-validate', '--auto-scale-lr'])
    optimizer = load(tmp_path / 'w' / 'epoch_1.pth')['optimizer']
    assert optimizer['param_groups'][0]['lr'] == pytest.approx(0.05 * 4 * counts / 8)


def compile_toy(toy_config, options):
    return toy_config(
        'compiled',
        f"""
    model = dict(type='ToyBackboneModel')
    compile = {options}
    train_cfg = dict(by_epoch=True, max_epochs=1)
    param_scheduler = None
    """,
    )


def test_compile(toy_config, load, tmp_path):
    """The backbone is compiled in training, validation and test, with the results of eager mode."""
    import toy
    from torch._dynamo.testing import CompileCounter

    toy.BACKEND = CompileCounter()
    config = compile_toy(toy_config, "dict(backend='toy_counter')")
    cli.train([str(config), '--work-dir', str(tmp_path / 'w')])
    trained, toy.BACKEND = toy.BACKEND, CompileCounter()
    assert trained.frame_count >= 2  # training and validation
    checkpoint = tmp_path / 'w' / 'epoch_1.pth'
    assert 'backbone.weight' in load(checkpoint)['state_dict']
    out = tmp_path / 'metrics.json'
    options = ['--work-dir', str(tmp_path / 'w'), '--out', str(out), '--out-item', 'metrics']
    scores = []
    for changes in ([], ['--cfg-options', 'compile=False']):
        torch._dynamo.reset()
        cli.test([str(config), str(checkpoint), *options, *changes])
        scores.append(json.loads(out.read_text())['toy/likelihood'])
    assert toy.BACKEND.frame_count == 1
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)  # float32


@pytest.mark.parametrize('options', ['3', "'inductor'"])
def test_compile_refuses(options, toy_config, tmp_path):
    with pytest.raises(ValueError, match=r'compile takes True, False or the options of torch'):
        cli.train([str(compile_toy(toy_config, options)), '--work-dir', str(tmp_path)])


def test_loaders_without_workers(toy_config, final_config):
    changes = 'train_dataloader.update(num_workers=2, persistent_workers=True, prefetch_factor=4)'
    config = toy_config(changes=changes)
    assert final_config(cli.train, config).train_dataloader.persistent_workers is True
    loader = final_config(
        cli.train, config, '--cfg-options', 'train_dataloader.num_workers=0'
    ).train_dataloader
    assert 'persistent_workers' not in loader
    assert 'prefetch_factor' not in loader


@pytest.mark.parametrize(
    ('text', 'value'),
    {
        "[dict(type='EMAHook',momentum=1e-4)]": [dict(type='EMAHook', momentum=1e-4)],
        '[dict(type=EMAHook, on=true), dict(b=[(1, -2)])]': [
            dict(type='EMAHook', on=True), dict(b=[(1, -2)])
        ],
        "dict(a=dict(type='mmdet.A'), b={'c': None})": dict(
            a=dict(type='mmdet.A'), b=dict(c=None)
        ),
        '[]': [],
        '1,2.5,x': [1, 2.5, 'x'],
        '[(1,2),(a,True)]': [(1, 2), ('a', True)],
        'data/dict(1)': 'data/dict(1)',
        '/my runs/x.pth': '/my runs/x.pth',
        "['traffic light', '1', 2]": ['traffic light', '1', 2],
        '[a b,c]': ['ab', 'c'],
        "'a','b'": ['a', 'b'],
    }.items(),
)  # fmt: skip
def test_config_options(text, value, toy_config, final_config):
    assert final_config(cli.train, toy_config(), '--cfg-options', f'new={text}', 'b=1').new == value


@pytest.mark.parametrize('option', ['a=f(b,c)', 'a=[1,2', 'a', "a=[dict(type='A'),g(1,2)]"])
def test_unreadable_config_options(option, toy_config, capsys):
    with pytest.raises(SystemExit):
        cli.train([str(toy_config()), '--cfg-options', option])
    assert f'cannot read {option!r}. Write KEY=VALUE' in capsys.readouterr().err


@pytest.mark.parametrize('section', ['dataloader', 'cfg', 'evaluator'])
@pytest.mark.parametrize('option', [[], ['--amp'], ['--tta'], ['--out', 'p.pkl'], ['--show']])
def test_without_a_test_set(section, option, toy_config):
    config = toy_config(changes=f'test_{section} = None')
    with pytest.raises(ValueError, match=rf'has no test_{section}: this command needs'):
        cli.test([str(config), 'x.pth', *option])


@pytest.mark.parametrize('section', ['train_dataloader', 'train_cfg', 'optim_wrapper', 'model'])
@pytest.mark.parametrize('option', [[], ['--amp'], ['--no-validate']])
def test_without_a_training_set(section, option, toy_config):
    with pytest.raises(ValueError, match=f'has no {section}: this command needs'):
        cli.train([str(toy_config(changes=f'{section} = None')), *option])


def test_training_shorter_than_its_warm_up(toy_config, tmp_path):
    schedules = [dict(type='LinearLR', end=2), dict(type='CosineAnnealingLR', begin=2)]
    changes = f"param_scheduler = {schedules}\ntrain_cfg['max_epochs'] = 1"
    with pytest.raises(ValueError, match=r'ends before it begins .*begin=2, end=1\).*train longer'):
        cli.train([str(toy_config(changes=changes)), '--work-dir', str(tmp_path / 'w')])


def test_old_config(tmp_path):
    (tmp_path / 'old.py').write_text('model = data = optimizer = runner = dict(a=1)')
    with pytest.raises(ValueError, match=r'has no train_dataloader, .* OpenMMLab 1\.x\?'):
        cli.train([str(tmp_path / 'old.py')])


def test_without_hooks(toy_config, final_config):
    cfg = final_config(cli.train, toy_config(changes='default_hooks = custom_hooks = None'))
    assert cfg.default_hooks.checkpoint.type == 'AtomicCheckpointHook'
    config = toy_config(changes='auto_scale_lr = default_hooks = None')
    with pytest.raises(ValueError, match='--auto-scale-lr needs'):
        cli.train([str(config), '--auto-scale-lr'])
    with pytest.raises(ValueError, match=r'need default_hooks\.visualization .*got None'):
        cli.test([str(config), 'x.pth', '--show'])


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


def test_weights_that_do_not_fit_are_a_warning_on_the_screen(toy_config, weights, capsys):
    """Mmengine prints it, and the quiet screen shows nothing that is printed."""
    state = torch.load(weights, weights_only=True)
    torch.save({'other' if key == 'head.bias' else key: x for key, x in state.items()}, weights)
    cli.test([str(toy_config()), str(weights), '--work-dir', str(weights.with_name('w'))])
    printed = capsys.readouterr()
    assert 'WARNING: The model and loaded state dict do not match exactly' in (
        printed.out + printed.err
    )


def test_out_must_be_a_pickle(toy_config, weights):
    with pytest.raises(
        ValueError, match=r"--out 'p\.json' must end in \.pkl .* --out-item metrics"
    ):
        cli.test([str(toy_config()), str(weights), '--out', 'p.json'])


def test_metrics_need_a_known_format(toy_config, weights):
    """Said before the evaluation."""
    options = ['--out', 'm.txt', '--out-item', 'metrics']
    with pytest.raises(ValueError, match=r"--out 'm\.txt' must end in \.json, \.yaml or \.pkl"):
        cli.test([str(toy_config()), str(weights), *options])


def test_out_folder_of_mmseg():
    cfg = Config(dict(default_scope='mmseg', test_evaluator=dict(type='IoUMetric')))
    assert isinstance(cli._prediction_writer(cfg, 'labels'), LabelMapsHook)


@pytest.mark.parametrize(
    ('hook', 'switch'),
    [
        ('VisualizationHook', 'enable'),
        ('mmdet.DetVisualizationHook', 'draw'),
        ('SegVisualizationHook', 'draw'),
    ],
)
def test_show_dir(hook, switch, toy_config, final_config):
    config = toy_config(changes=f"default_hooks['visualization'] = dict(type='{hook}')")
    cfg = final_config(cli.test, config, 'x.pth', '--show-dir', 'd')
    expected = {'type': hook, switch: True, 'interval': 1}
    assert cfg.default_hooks.visualization == dict(
        type='PicturesHook', hook=expected, out_dir='d', interval=1
    )
    cfg = final_config(cli.test, config, 'x.pth', '--show', '--interval', '7', '--wait-time', '3')
    shown = cfg.default_hooks.visualization
    assert (shown.show, shown.interval, shown.wait_time) == (True, 7, 3)
    with pytest.raises(ValueError, match='--interval must be at least 1, got 0'):
        cli.test([str(config), 'x.pth', '--show', '--interval', '0'])


class Paths:
    """A data set of images at the given paths."""

    def __init__(self, *paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def get_data_info(self, index):
        return dict(img_path=self.paths[index]) if self.paths[index] else {}


@pytest.mark.parametrize(
    ('paths', 'names'),
    [
        (['/d/val/a.jpg', '/d/val/b.png'], ['a.png', 'b.png']),
        (['/d/v/x/1.png', '/d/v/y/1.png', '/d/v/y/z/1.png'], ['x/1.png', 'y/1.png', 'y/z/1.png']),
        (['d/x/1.png', 'd/./y/../xy/1.png'], ['x/1.png', 'xy/1.png']),
        (['/d/1.jpg', '/d/1.png', '/d/2.png'], ['1.jpg.png', '1.png.png', '2.png']),
        (['/d/1.5.png'], ['1.5.png']),
        ([None, None], ['0.png', '1.png']),
    ],
)
def test_output_names(paths, names):
    name = OutputNames(Paths(*paths))
    samples = [dict(img_path=path) if path else {} for path in paths]
    assert [name(sample, number).as_posix() for number, sample in enumerate(samples)] == names


@pytest.mark.parametrize('inputs', ['keyword', 'positional'])
def test_pictures_of_the_same_name(inputs, tmp_path):
    """A hook and a visualizer with the two ways in which the libraries call theirs."""
    drawn = []

    class Drawer:
        def add_datasample(self, name, image, data_sample, out_file=None):
            drawn.append((image, Path(out_file).relative_to(tmp_path).as_posix()))

    class Library(Hook):
        def __init__(self, interval):
            assert interval == 1

        def after_test_iter(self, runner, batch_idx, data_batch, outputs):
            (image,), (sample,) = data_batch['inputs'], outputs
            if inputs == 'keyword':
                draw = runner.visualizer.add_datasample
                draw(name='0', image=image, data_sample=sample, out_file=None)
            else:
                runner.visualizer.add_datasample('0', image, data_sample=sample)

    hook = PicturesHook(dict(type=Library), str(tmp_path), interval=2)
    paths = [f'/d/{folder}/0.png' for folder in 'abcde']
    loader = SimpleNamespace(dataset=Paths(*paths))
    runner = SimpleNamespace(test_dataloader=loader, visualizer=Drawer())
    hook.before_test(runner)
    samples = [dict(img_path=path) for path in paths]
    hook.after_test_iter(runner, 0, dict(inputs=[0, 1, 2]), samples[:3])
    hook.after_test_iter(runner, 1, dict(inputs=[3, 4]), samples[3:])
    assert drawn == [(0, 'a/0.png'), (2, 'c/0.png'), (4, 'e/0.png')]


@pytest.mark.parametrize(('reduced', 'classes'), [(False, 2), (True, 256)])
def test_label_maps_of_the_same_name(reduced, classes, tmp_path):
    from mmengine.structures import BaseDataElement, PixelData

    paths = ['/d/a/0.jpg', '/d/b/0.jpg']
    runner = SimpleNamespace(test_dataloader=SimpleNamespace(dataset=Paths(*paths)))
    hook = LabelMapsHook(str(tmp_path))
    hook.before_test(runner)
    maps = torch.arange(2 * 12).reshape(2, 1, 3, 4) * (classes - 1) // 23
    for path, labels in zip(paths, maps, strict=True):
        sample = BaseDataElement(metainfo=dict(img_path=path, reduce_zero_label=reduced))
        sample.pred_sem_seg = PixelData(data=labels)
        hook.after_test_iter(runner, 0, {}, [sample])
    written = [np.asarray(Image.open(tmp_path / name)) for name in ('a/0.png', 'b/0.png')]
    np.testing.assert_array_equal(np.stack(written), maps[:, 0].numpy() + reduced)


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


def test_quiet_screen(toy_config, run, tmp_path):
    """Progress, results and places on the screen; configs, hooks and warnings in the log file."""
    changes = """
    train_cfg = dict(by_epoch=True, max_epochs=1)
    param_scheduler = None
    custom_hooks = [dict(type='Talk')]
    """
    config = toy_config(changes=changes)
    work_dir = tmp_path / 'w'
    lines = run('train.py', config, '--work-dir', work_dir).stdout.splitlines()
    (log,) = work_dir.glob('*/*.log')
    places = f'{config}. Checkpoints: {work_dir}. Log: {log}'
    kinds = [
        rf'Training {re.escape(places)}',
        r'WARNING: mind this',
        r'ERROR: broken',
        r'Epoch\(train\) \[1\]\[6/6\]  lr: 5.0000e-02  eta: 0:00:00  .* loss: \d.*',
        r'Saving checkpoint at 1 epochs',
        r'Epoch\(val\) \[1\]\[6/6\]    toy/likelihood: .*',
        r'The best checkpoint with .* is saved to best_toy_likelihood_epoch_1\.pth\.',
        rf'Trained {re.escape(places)}',
    ]
    assert len(lines) == len(kinds), '\n'.join(lines)
    for line, kind in zip(lines, kinds, strict=True):
        assert re.fullmatch(kind, line)
    written = log.read_text()
    hidden = 'Config:', 'Hooks will be', 'UserWarning: old', 'a print', 'this is deprecated'
    for text in (*lines[3:], *hidden, 'mind this'):
        assert text in written


def test_our_own_warnings_are_shown(capsys):
    """They are about the user's weights or speed."""
    handler = logging.StreamHandler(sys.stdout)
    logger = logging.Logger('quiet')
    logger.addHandler(handler)
    model = nn.Module()
    model.patch_embed = nn.ModuleDict(dict(projection=nn.Conv2d(5, 2, 4)))
    with QuietScreen():
        fit_channels(model, {'patch_embed.projection.weight': torch.ones(2, 3, 4, 4)})
        QuietScreen.attach(logger)
        fit_channels(model, {'patch_embed.projection.weight': torch.ones(2, 3, 4, 4)}, '')
        warnings.warn('old', stacklevel=1)
    (line,) = {*capsys.readouterr().out.splitlines()}
    assert re.fullmatch(r'WARNING: patch_embed.* is adapted to 5: train the model before .*', line)


def test_verbose(toy_config, capsys, tmp_path):
    config = toy_config(changes="custom_hooks = [dict(type='Talk')]\nparam_scheduler = None")
    options = ['--work-dir', str(tmp_path), '--no-validate', '--verbose']
    with pytest.warns(UserWarning, match='old'):
        cli.train([str(config), *options, '--cfg-options', 'train_cfg.max_epochs=1'])
    screen = capsys.readouterr().out
    for text in ('Config:', 'Hooks will be', 'a print', 'mind this', 'Epoch(train)'):
        assert text in screen


def test_a_config_is_formatted_once_and_an_index_read_once(monkeypatch):
    """mmengine formats a run's config three times, and reads all metafiles for each base."""
    from mmengine.config import config, utils

    calls = []
    monkeypatch.setattr(config, 'FormatCode', lambda text, **_: (calls.append(text) or text, 1))
    monkeypatch.setattr(utils, 'load', lambda path: calls.append(path) or {'path': path})
    patches.prepare_configs_once.__wrapped__()
    first, second = config.Config(dict(a=1)), config.Config(dict(a=2))
    texts = [first.pretty_text, first.pretty_text, second.pretty_text]
    assert texts[0] == texts[1] != texts[2]
    assert utils.load('x.yml') is utils.load('x.yml')
    if 'onedl-mmcv' in installed():  # whose mmengine formats in another way
        texts = []
    assert calls == [*texts[::2], 'x.yml']
