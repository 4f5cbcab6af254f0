"""Short trainings by the recipe for one's own images, and what happens to data that do not fit."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from mmengine.fileio import load
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from vrwkv.backbones import VRWKV
from vrwkv.engine import cli
from vrwkv_cls.checks import ClassCheckHook

ROOT = Path(__file__).resolve().parents[2]
CUSTOM = ROOT / 'configs/classification/vrwkv-tiny_in1k-pre_1xb64-50e_custom.py'
SMALL = dict(embed_dims=16, depth=2)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A file such as the released one, of a narrow model."""
    torch.manual_seed(0)
    backbone = VRWKV(img_size=224, **SMALL)
    backbone.init_weights()
    weights = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    weights |= {'head.fc.weight': torch.zeros(1000, 16), 'head.fc.bias': torch.zeros(1000)}
    path = tmp_path_factory.mktemp('weights') / 'vrwkv_t_in1k_224.pth'
    torch.save(dict(meta={}, state_dict=weights), path)
    return path


@pytest.fixture
def config(tmp_path, image_folder, weights):
    """Write the recipe with its two lines changed, narrow, and without a download."""

    def write(name, data_root=image_folder, num_classes=2, more=''):
        text = CUSTOM.read_text()
        for old, new in (
            ("data_root = 'data/my_images'", f'data_root = {str(data_root)!r}'),
            ('num_classes = 2', f'num_classes = {num_classes}'),
            ("'../_base_", f"'{ROOT}/configs/_base_"),
        ):
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / f'{tmp_path.name}-{name}.py'
        path.write_text(
            f"""{text}
model['backbone'].update({SMALL})
model['backbone']['init_cfg']['checkpoint'] = {str(weights)!r}
model['head']['in_channels'] = 16
loader = dict(batch_size=8, num_workers=0)
train_dataloader.update(loader)
val_dataloader.update(loader)
train_cfg['max_epochs'] = 1
param_scheduler = []
randomness = dict(seed=0)
sgd = dict(_delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
{more}
del loader, sgd
"""
        )
        return path

    return write


def train(config, *args):
    work_dir = config.with_suffix('')
    cli.train([str(config), '--work-dir', str(work_dir), *args])
    return work_dir


def read(path):
    return torch.load(path, weights_only=True)


def test_moving_average_accumulation_and_checkpointing(config):
    """Two half batches, recomputed, make the step of one batch; the average is the one by hand."""
    whole = train(
        config(
            'whole',
            more="""
optim_wrapper = sgd
custom_hooks = [dict(type='EMAHook', momentum=0.25)]
default_hooks['checkpoint'] = dict(by_epoch=False, interval=1, save_best=None)
""",
        ),
        '--no-validate',
    )
    halves = train(
        config(
            'halves',
            more="""
optim_wrapper = dict(**sgd, accumulative_counts=2)
model['backbone']['with_cp'] = True
train_dataloader['batch_size'] = 4
""",
        ),
        '--no-validate',
    )
    first, second = (read(whole / f'iter_{step}.pth') for step in (1, 2))
    # mmengine saves the average as the weights, and the weights beside it.
    averages = [checkpoint['state_dict'] for checkpoint in (first, second)]
    trained = [
        {
            name.removeprefix('module.'): value
            for name, value in checkpoint['ema_state_dict'].items()
            if name != 'steps'
        }
        for checkpoint in (first, second)
    ]
    assert set(trained[0]) == set(averages[0])
    start = {}
    for name, average in averages[1].items():
        assert torch.equal(averages[0][name], trained[0][name]), name  # it starts there
        expected = 0.75 * trained[0][name] + 0.25 * trained[1][name]
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)  # float32 rounding
        start[name] = (trained[0][name] - trained[1][name]).abs().max()
    assert max(start.values()) > 1e-3  # something was learnt
    accumulated = read(halves / 'epoch_1.pth')['state_dict']
    for name, value in trained[1].items():
        # The same images in another order of summation: float32 rounding of gradients of about 1.
        torch.testing.assert_close(accumulated[name], value, rtol=1e-4, atol=1e-5)


def test_all_of_it_in_mixed_precision_from_released_weights(config, weights):
    path = config(
        'amp',
        more="""
optim_wrapper.update(accumulative_counts=2)
optim_wrapper['optimizer']['lr'] = 0.0
model['backbone']['with_cp'] = True
custom_hooks = [dict(type='EMAHook')]
""",
    )
    work_dir = train(path, '--amp')
    trained = read(work_dir / 'epoch_1.pth')['state_dict']
    for name, value in read(weights)['state_dict'].items():
        if name.startswith('backbone.'):  # at a rate of 0 it stays as it was
            assert torch.equal(trained[name], value), name
    assert trained['head.fc.weight'].shape == (2, 16)
    assert 'CPUAmpOptimWrapper' in next(work_dir.glob('*.py')).read_text()
    assert 'accuracy/top1' in next(work_dir.glob('*/*.log')).read_text()


def test_deit_runs_through_the_same_tools(tmp_path, image_folder):
    """The recipe of mmpretrain that the paper compares with, narrow and on two classes."""
    path = tmp_path / f'{tmp_path.name}-deit.py'
    path.write_text(f"""
_base_ = [{str(ROOT / 'configs/classification/deit/deit-tiny_4xb256_in1k.py')!r}]
arch = dict(
    _delete_=True, embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=32)
model = dict(backbone=dict(arch=arch), head=dict(num_classes=2, in_channels=16))
data_preprocessor = dict(num_classes=2)
images = dict(_delete_=True, type='CustomDataset', data_root={str(image_folder)!r})
train_dataloader = dict(
    batch_size=8, num_workers=0,
    dataset=dict(**images, data_prefix='train', pipeline=_base_.train_pipeline))
val_dataloader = dict(
    num_workers=0, dataset=dict(**images, data_prefix='val', pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(topk=1)
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
param_scheduler = []  # its warm-up is longer
""")
    work_dir = train(path)
    out = tmp_path / 'metrics.json'
    arguments = {'--work-dir': work_dir / 'test', '--out': out, '--out-item': 'metrics'}
    options = [str(part) for pair in arguments.items() for part in pair]
    cli.test([str(path), str(work_dir / 'epoch_1.pth'), *options])
    assert set(load(out)) == {'accuracy/top1'}


# Data that do not fit.


def test_number_of_classes(config):
    with pytest.raises(
        ValueError, match=r'data set has 2 classes \(dark, light, \.\.\.\).*=5: set'
    ):
        train(config('five', num_classes=5))


def test_heads_and_preprocessor_disagree(config):
    with pytest.raises(ValueError, match=r'head has num_classes=2, but data_preprocessor .*=7'):
        train(config('seven', more="data_preprocessor['num_classes'] = 7"))


@pytest.fixture
def images(image_folder, tmp_path):
    """A copy of the folder, to spoil."""
    return Path(shutil.copytree(image_folder, tmp_path / 'images'))


def test_other_classes_in_the_validation_set(config, images):
    (images / 'val/light').rename(images / 'val/bright')
    with pytest.raises(ValueError, match=r"different classes \(\['bright', 'light'\]\)"):
        train(config('renamed', images))


@pytest.mark.parametrize(('split', 'label'), [('train', 2), ('train', -1), ('val', 2)])
def test_label_outside_the_classes(split, label, config, images):
    lines = [f'{path.parent.name}/{path.name} 0' for path in images.glob(f'{split}/*/*.png')]
    lines[3] = lines[3][:-1] + str(label)
    (images / 'list.txt').write_text('\n'.join(lines), encoding='utf-8-sig')
    more = f"{split}_dataloader['dataset']['ann_file'] = 'list.txt'"
    path = config('labels', images, more=more)
    with pytest.raises(ValueError, match=rf'\.png has the label \[{label}\].*go from 0 to 1'):
        train(path, *(['--no-validate'] if split == 'train' else []))


@pytest.mark.parametrize('step', ['train', 'val', 'test'])
@pytest.mark.parametrize(
    ('labels', 'problem'),
    [
        (dict(gt_label=[0, 1]), None),
        (dict(gt_label=[]), None),
        (dict(gt_score=[0.0, 1.0]), None),
        (dict(gt_label=[1, 2]), r'a\.png has the label \[1, 2\], but the model has num_classes=2'),
        (dict(gt_label=[-1, 1]), r'a\.png has the label \[-1, 1\].*labels go from 0 to 1'),
        (dict(gt_score=[0.0, 1.0, 0.0]), r'a\.png has scores of 3 classes'),
    ],
)
def test_several_labels(step, labels, problem, tmp_path):
    """Of a file in mmengine's format, with a byte order mark, in each of the three loops."""
    content = dict(metainfo=dict(classes=['a', 'b']), data_list=[dict(img_path='a.png', **labels)])
    (tmp_path / 'list.json').write_text(json.dumps(content), encoding='utf-8-sig')
    Image.new('RGB', (4, 4)).save(tmp_path / 'a.png')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = DATASETS.build(
            dict(
                type='MultiLabelDataset',
                data_root=str(tmp_path),
                ann_file='list.json',
                pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
            )
        )
    hook = ClassCheckHook()
    hook.num_classes = 2
    sample = dataset[0]['data_samples']
    for samples in ([sample], [[sample, sample]]):  # the latter with --tta
        with pytest.raises(ValueError, match=problem) if problem else nullcontext():
            getattr(hook, f'before_{step}_iter')(None, 0, dict(data_samples=samples))


def test_a_file_that_is_no_image(config, images):
    from mmpretrain import ImageClassificationInferencer

    spoilt = next(images.glob('train/*/*.png'))
    spoilt.write_text('no image')
    path = config('spoilt', images)
    with pytest.raises(AssertionError, match=f'failed to load image: .*{spoilt.name}'):
        train(path, '--no-validate')
    inferencer = ImageClassificationInferencer(str(path), pretrained=False)
    with pytest.raises(ValueError, match=f'Failed to read image .*{spoilt.name}'):
        inferencer(str(spoilt))
    Image.new('RGB', (40, 30)).save(spoilt)
    (result,) = inferencer(str(spoilt))
    assert result['pred_scores'].shape == (2,)
