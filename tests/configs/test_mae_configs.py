"""The configs of masked pre-training, fine-tuning and linear probing against their recipes."""

import functools
import math
from pathlib import Path

import mmpretrain.engine.optimizers  # noqa: F401  (layer decay and LARS)
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope
from mmpretrain.datasets.transforms import PackInputs
from mmpretrain.registry import MODELS, TRANSFORMS
from mmpretrain.structures import DataSample
from torch import nn

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'classification' / 'mae'
BASE = 'mae_vrwkv-base_8xb512-800e_in1k'
LARGE = 'mae_vrwkv-large_16xb256-800e_in1k'
NANO = 'mae_vrwkv-nano_1xb64-30e_digits'
BASE_TUNED = 'vrwkv-base_mae-pre_8xb128-100e_in1k'
LARGE_TUNED = 'vrwkv-large_mae-pre_16xb64-50e_in1k'
NANO_TUNED = 'vrwkv-nano_mae-pre_1xb50-100e_digits-100'
NANO_SCRATCH = 'vrwkv-nano_1xb50-100e_digits-100'
BASE_PROBE = 'vrwkv-base_mae-pre_8xb2048-linear-90e_in1k'
LARGE_PROBE = 'vrwkv-large_mae-pre_16xb1024-linear-90e_in1k'
# A pre-training, and what goes on from it.
PRETRAINED = {
    BASE_TUNED: BASE,
    BASE_PROBE: BASE,
    LARGE_TUNED: LARGE,
    LARGE_PROBE: LARGE,
    NANO_TUNED: NANO,
}
ALL = [BASE, LARGE, NANO, NANO_SCRATCH, *PRETRAINED]


def load(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


def build(cfg, device):
    with DefaultScope.overwrite_default_scope('mmpretrain'), torch.device(device):
        return MODELS.build(cfg.model | dict(data_preprocessor=cfg.data_preprocessor))


@functools.cache
def on_meta(name):
    """Build the model without its values, once: tests only look at it."""
    return build(load(name), 'meta')


def build_optimizer(name):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return build_optim_wrapper(on_meta(name), load(name).optim_wrapper).optimizer


def test_every_config_is_tested():
    assert sorted(ALL) == sorted(path.stem for path in CONFIGS.glob('*.py'))


@pytest.mark.parametrize('name', ALL)
def test_the_total_batch_in_the_name_is_the_one_of_the_rate(name):
    cfg = load(name)
    processes, batch = next(p for p in name.split('_') if 'xb' in p).split('-')[0].split('xb')
    assert cfg.train_dataloader.batch_size == int(batch)
    assert cfg.auto_scale_lr.base_batch_size == int(processes) * int(batch)


@pytest.mark.parametrize('name', ALL)
def test_the_epochs_in_the_name_are_those_of_the_training(name):
    assert f'-{load(name).train_cfg.max_epochs}e_' in name


@pytest.mark.parametrize(('name', 'dim', 'depth'), [(BASE, 768, 12), (LARGE, 1024, 24)])
def test_pretraining_model(name, dim, depth):
    cfg = load(name)
    assert cfg.auto_scale_lr.base_batch_size == 4096
    model = on_meta(name)
    assert type(model).__name__ == 'MAE'
    assert model.backbone.img_size == (224, 224)
    assert model.backbone.mask_ratio == 0.75
    assert not model.backbone.pos_embed_twice
    assert model.backbone.patch_embed.projection.kernel_size == (16, 16)
    assert not model.head.norm_pix
    assert isinstance(model.head.loss_module.penalty, nn.MSELoss)
    stacks = ((model.backbone.layers, dim, depth), (model.neck.decoder_blocks, 512, 8))
    for layers, width, length in stacks:
        assert len(layers) == length
        assert layers[-1].drop_path.drop_prob == 0.1
        for layer in layers:
            assert layer.post_norm
            assert layer.att.shift.shift_mode == 'double_shift'
            assert layer.att.key_norm.weight.shape == (width,)
            assert layer.ffn.key_norm.weight.shape == (4 * width,)
            assert layer.gamma1.shape == (width,)
    assert cfg.model.backbone.init_values == cfg.model.neck.init_values == 1e-5


@pytest.mark.parametrize('name', [BASE, LARGE])
def test_pretraining_optimizer(name):
    model, optimizer = on_meta(name), build_optimizer(name)
    assert type(optimizer) is torch.optim.AdamW
    groups = {id(p): g for g in optimizer.param_groups for p in g['params']}
    for key, parameter in model.named_parameters():
        group = groups[id(parameter)]
        assert group['lr'] == pytest.approx(1.5e-4 * 4096 / 256, rel=1e-12)
        assert group['betas'] == (0.9, 0.95)
        spared = parameter.dim() == 1 or key.endswith(('pos_embed', 'mask_token'))
        assert group['weight_decay'] == (0 if spared else 0.05), key


def rates(cfg, epochs, per_epoch):
    """Run the schedulers as the runner does, by iteration; return the rate at each."""
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedulers = []
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        for scheduler in cfg.param_scheduler:
            scheduler = dict(end=epochs) | scheduler
            assert scheduler.pop('by_epoch') and scheduler.pop('convert_to_iter_based')
            kind = PARAM_SCHEDULERS.get(scheduler.pop('type'))
            schedulers.append(
                kind.build_iter_from_epoch(optimizer=optimizer, epoch_length=per_epoch, **scheduler)
            )
    found = []
    for _ in range(epochs * per_epoch):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return found


@pytest.mark.parametrize(
    ('name', 'epochs', 'warmup', 'first', 'last'),
    [
        (BASE, 800, 10, 1e-9, 0),
        (LARGE, 800, 10, 1e-9, 0),
        (BASE_TUNED, 100, 5, 1e-4, 1e-6),
        (LARGE_TUNED, 50, 5, 1e-4, 1e-6),
        (BASE_PROBE, 90, 10, 1e-4, 0),
        (LARGE_PROBE, 90, 10, 1e-4, 0),
    ],
)
def test_rate_over_the_training(name, epochs, warmup, first, last):
    cfg = load(name)
    assert cfg.train_cfg.max_epochs == epochs
    found = rates(cfg, epochs, 4)
    ramp = 4 * warmup - 1
    for step in (0, 1, ramp):
        expected = first + (1 - first) * step / ramp
        assert found[step] == pytest.approx(expected, rel=1e-9)
    for step in (4 * warmup + 1, 2 * (warmup + epochs), 4 * epochs - 1):
        part = (step - 4 * warmup) / (4 * epochs - 4 * warmup)
        expected = last + (1 - last) * (1 + math.cos(math.pi * part)) / 2
        # mmengine multiplies its way from step to step.
        assert found[step] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize('name', PRETRAINED)
def test_weights_of_the_pretrained_encoder_are_those_of_the_backbone(name):
    """Nothing missing but the head, and nothing too much."""
    before, cfg = load(PRETRAINED[name]), load(name)
    shapes = [
        {key: value.shape for key, value in on_meta(n).backbone.state_dict().items()}
        for n in (PRETRAINED[name], name)
    ]
    assert shapes[0] == shapes[1]
    init_cfg = cfg.model.backbone.init_cfg
    epochs = before.train_cfg.max_epochs
    assert init_cfg.checkpoint == f'work_dirs/{PRETRAINED[name]}/epoch_{epochs}.pth'
    assert (init_cfg.type, init_cfg.prefix) == ('Pretrained', 'backbone.')
    backbone = on_meta(name).backbone
    assert backbone.layers[0].att.shift.shift_mode == 'q_shift'
    for key in ('post_norm', 'key_norm'):
        assert cfg.model.backbone.get(key, False) == before.model.backbone.get(key)


def test_the_comparison_differs_in_the_weights_only():
    scratch, tuned = load(NANO_SCRATCH), load(NANO_TUNED)
    del tuned.model.backbone['init_cfg']
    assert scratch.to_dict() == tuned.to_dict()
    assert scratch.train_dataloader.dataset.ann_file == 'digits-100-seed0.txt'
    assert not load(NANO).train_dataloader.dataset.with_label


@pytest.mark.parametrize(
    ('name', 'depth', 'rate', 'decay', 'drop_path'),
    [(BASE_TUNED, 12, 2e-3, 0.65, 0.1), (LARGE_TUNED, 24, 4e-3, 0.75, 0.2)],
)
def test_fine_tuning(name, depth, rate, decay, drop_path):
    cfg = load(name)
    assert cfg.auto_scale_lr.base_batch_size == 1024
    model = on_meta(name)
    assert model.backbone.layers[-1].drop_path.drop_prob == drop_path
    augments = model.data_preprocessor.batch_augments.augments
    assert [(type(a).__name__, a.alpha) for a in augments] == [('Mixup', 0.8), ('CutMix', 1.0)]
    assert cfg.optim_wrapper.clip_grad is None
    optimizer = build_optimizer(name)
    assert type(optimizer) is torch.optim.AdamW
    groups = {id(p): g for g in optimizer.param_groups for p in g['params']}
    for key, parameter in model.named_parameters():
        group = groups[id(parameter)]
        place = depth + 1
        if key.startswith(('backbone.patch_embed', 'backbone.pos_embed')):
            place = 0
        elif key.startswith('backbone.layers.'):
            place = int(key.split('.')[2]) + 1
        assert group['lr'] == pytest.approx(rate * decay ** (depth + 1 - place), rel=1e-9), key
        spared = parameter.dim() == 1 or key == 'backbone.pos_embed'
        assert group['weight_decay'] == (0 if spared else 0.05), key


@pytest.mark.parametrize(('name', 'dim'), [(BASE_PROBE, 768), (LARGE_PROBE, 1024)])
def test_linear_probing(name, dim):
    model = on_meta(name)
    learnt = {key: tuple(p.shape) for key, p in model.named_parameters() if p.requires_grad}
    assert learnt == {'head.fc.weight': (1000, dim), 'head.fc.bias': (1000,)}
    (norm,) = [m for m in model.neck.modules() if isinstance(m, nn.BatchNorm1d)]
    assert norm.num_features == dim and not norm.affine
    assert model.data_preprocessor.batch_augments is None
    assert type(model.head.loss_module).__name__ == 'CrossEntropyLoss'
    optimizer = build_optimizer(name)
    assert type(optimizer).__name__ == 'LARS'
    cfg = load(name)
    pipelines = (cfg[f'{split}_dataloader'].dataset.pipeline for split in ('train', 'test'))
    assert {t.interpolation for ts in pipelines for t in ts if 'scale' in t} == {'bicubic'}
    for group in optimizer.param_groups:
        assert (group['lr'], group['momentum'], group['weight_decay']) == (6.4, 0.9, 0)


@pytest.mark.parametrize('name', ALL)
def test_trains(name):
    """At reduced width and depth: a loss, and a gradient for every parameter that learns."""
    cfg = load(name)
    cfg.model.backbone.update(embed_dims=16, depth=2, drop_path_rate=0.0, init_cfg=None)
    if cfg.model.type == 'MAE':
        cfg.model.neck.update(
            embed_dims=16, decoder_embed_dims=16, decoder_depth=1, drop_path_rate=0.0
        )
    else:
        cfg.model.head.in_channels = 16
        if isinstance(cfg.model.neck, list):
            cfg.model.neck[1].input_features = 16
    torch.manual_seed(0)
    model = build(cfg, device='cpu').train()
    model.init_weights()
    side = cfg.model.backbone.img_size
    images = torch.randint(256, (2, 3, side, side), dtype=torch.uint8)
    samples = [DataSample().set_gt_label(label) for label in (3, 7)]
    data = model.data_preprocessor(dict(inputs=images, data_samples=samples), training=True)
    loss = model(**data, mode='loss')['loss']
    assert loss.isfinite()
    loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize('name', ALL)
def test_pipelines_build(name):
    cfg = load(name)
    loaders = (cfg.train_dataloader, cfg.get('val_dataloader'), cfg.get('test_dataloader'))
    assert (loaders[1] is None) == (cfg.model.type == 'MAE')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        for loader in filter(None, loaders):
            built = [TRANSFORMS.build(transform) for transform in loader.dataset.pipeline]
            assert isinstance(built[-1], PackInputs)


def test_pretraining_crops():
    for name in (BASE, LARGE):
        crop = load(name).train_dataloader.dataset.pipeline[1]
        assert (crop.type, crop.scale, crop.crop_ratio_range) == (
            'RandomResizedCrop', 224, (0.2, 1.0),
        )  # fmt: skip
