"""The classification configs against the numbers of the paper and of upstream's recipes."""

import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmpretrain.datasets.transforms import PackInputs
from mmpretrain.registry import MODELS, TRANSFORMS
from mmpretrain.structures import DataSample
from torch import nn
from torch.utils.data import TensorDataset

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'classification'
TINY = 'vrwkv-tiny_8xb128_in1k'
SMALL = 'vrwkv-small_8xb128_in1k'
BASE = 'vrwkv-base_16xb64_in1k'
LARGE = 'vrwkv-large_in21k-pre_16xb64_in1k-384px'
IN22K = 'vrwkv-large_32xb128-90e_in21k-192px'
BAMBOO = 'vrwkv-large_32xb128-90e_bamboo47k-192px'
CUSTOM = 'vrwkv-tiny_in1k-pre_1xb64-50e_custom'
SIX = {size.replace('vrwkv', 'vrwkv6'): size for size in (TINY, SMALL, BASE)}
SCRATCH = [TINY, SMALL, BASE, *SIX]
IMAGENET = [*SCRATCH, LARGE]
ALL = sorted(path.stem for path in CONFIGS.glob('*.py'))


def load(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


def build(cfg, device='meta'):
    with DefaultScope.overwrite_default_scope('mmpretrain'), torch.device(device):
        return MODELS.build(cfg.model | dict(data_preprocessor=cfg.data_preprocessor))


def count_parameters(size, dim, depth, scale=False, key_norm=False, mid=None, classes=1000):
    """Count by hand, from the equations of the paper."""
    attention = 2 * dim + 3 * dim + 4 * dim**2 + key_norm * 2 * dim
    channel_mix = 2 * dim + 9 * dim**2 + key_norm * 2 * 4 * dim
    layer = attention + channel_mix + 4 * dim + scale * 2 * dim
    embedding = 16 * 16 * 3 * dim + dim + (size // 16) ** 2 * dim
    first_and_last_norm = 4 * dim
    head = (dim + 1) * classes if mid is None else (dim + 1) * mid + (mid + 1) * classes
    return embedding + depth * layer + first_and_last_norm + head


@pytest.mark.parametrize(
    ('name', 'counted', 'published'),
    [
        (TINY, count_parameters(224, 192, 12), '6.2'),
        (SMALL, count_parameters(224, 384, 12, scale=True), '23.8'),
        (BASE, 93_645_544, '93.7'),
        (LARGE, 334_881_768, '334.9'),
    ],
)
def test_parameter_count(name, counted, published):
    parameters = sum(p.numel() for p in build(load(name)).parameters())
    assert parameters == counted
    # The paper rounds up where it prints 93.7 for 93.65.
    assert parameters / 1e6 == pytest.approx(float(published), abs=0.1)


def test_count_by_hand_agrees_with_the_exact_numbers():
    assert count_parameters(224, 768, 12, scale=True) == 93_645_544
    assert count_parameters(192, 1024, 24, True, True, mid=3072) == 334_881_768


@pytest.mark.parametrize(('name', 'classes'), [(IN22K, 21_841), (BAMBOO, 47_338)])
def test_classes_of_the_pre_trainings(name, classes):
    model = build(load(name))
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == count_parameters(192, 1024, 24, True, True, mid=3072, classes=classes)
    assert model.data_preprocessor.num_classes == model.head.num_classes == classes


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        (TINY, dict(embed_dims=192, depth=12, img_size=224)),
        (SMALL, dict(embed_dims=384, depth=12, init_values=1, post_norm=True, drop_path_rate=0.3)),
        (
            BASE,
            dict(embed_dims=768, depth=12, init_values=1e-5, post_norm=True, drop_path_rate=0.5),
        ),
        (
            LARGE,
            dict(
                embed_dims=1024,
                depth=24,
                img_size=192,
                init_values=1e-5,
                post_norm=True,
                key_norm=True,
                drop_path_rate=0.1,
            ),
        ),
    ],
)
def test_backbone_arguments(name, expected):
    default = dict(img_size=224, patch_size=16, init_values=None, post_norm=False, key_norm=False)
    backbone = load(name).model.backbone
    for key, value in (default | dict(drop_path_rate=0) | expected).items():
        assert backbone.get(key, default.get(key, 0)) == value, key


@pytest.mark.parametrize(('name', 'plain'), SIX.items())
def test_vrwkv6_is_trained_as_vrwkv(name, plain):
    """Upstream's configs differ in the type, the heads and the layer scale of Small."""
    six, plain = load(name), load(plain)
    backbone = plain.model.backbone | dict(
        type='VRWKV6', num_heads=plain.model.head.in_channels // 64
    )
    if 'small' in name:
        backbone.init_values = 1e-5
    assert six.model.pop('backbone') == backbone
    del plain.model['backbone']
    assert six.to_dict() == plain.to_dict()


@pytest.mark.parametrize('name', ALL)
def test_the_total_batch_in_the_name_is_the_one_of_the_rate(name):
    cfg = load(name)
    part = next(part for part in name.split('_') if 'xb' in part)
    processes, batch = part.partition('-')[0].split('xb')
    assert cfg.train_dataloader.batch_size == int(batch)
    assert cfg.auto_scale_lr.base_batch_size == int(processes) * int(batch)


@pytest.mark.parametrize('name', ALL)
def test_weight_decay_spares_norms_and_biases_only(name):
    cfg = load(name)
    model = build(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decay = {
        id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']
    }
    spared = set()
    for module_name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            is_spared = isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or key == 'bias'
            assert decay[id(parameter)] == (0 if is_spared else 0.05), f'{module_name}.{key}'
            if is_spared:
                spared.add(key)
    assert spared == {'weight', 'bias'}


@pytest.mark.parametrize('name', IMAGENET)
def test_optimizer(name):
    cfg = load(name)
    optimizer = build_optim_wrapper(build(cfg), cfg.optim_wrapper)
    assert type(optimizer.optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        # 5e-6 per 512 images for the fine-tuning of Large, 5e-4 for the others.
        assert group['lr'] == pytest.approx(1e-5 if name == LARGE else 1e-3, rel=1e-12)
        assert group['betas'] == (0.9, 0.999)
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=1.0 if name == LARGE else 5.0)


class _Recorder(BaseModel):
    """A model of one parameter, so that a schedule can be run instead of read."""

    def __init__(self):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(()))

    def forward(self, *_, **__):
        return dict(loss=self.parameter * 0)


@pytest.mark.parametrize(
    ('name', 'epochs', 'warmup', 'top'),
    [
        (TINY, 300, 20, 1e-3),
        (SMALL, 300, 20, 1e-3),
        (BASE, 300, 20, 1e-3),
        (LARGE, 20, 2, 1e-5),
        (IN22K, 90, 5, 1e-3),
        (BAMBOO, 90, 5, 1e-3),
        (CUSTOM, 50, 5, 2e-4),
    ],
)
def test_rate_over_the_training(name, epochs, warmup, top, tmp_path):
    iterations = 5
    cfg = load(name)
    runner = Runner(
        model=_Recorder(),
        work_dir=str(tmp_path),
        train_dataloader=dict(
            dataset=TensorDataset(torch.zeros(iterations)),
            batch_size=1,
            sampler=dict(type=DefaultSampler),
            num_workers=0,
        ),
        optim_wrapper=dict(optimizer=cfg.optim_wrapper.optimizer),
        param_scheduler=cfg.param_scheduler,
        train_cfg=dict(by_epoch=True, max_epochs=cfg.train_cfg.max_epochs),
        default_hooks=dict(logger=None, checkpoint=None),
        log_level='ERROR',
        experiment_name=f'{name}-{tmp_path.name}',
    )
    rates = []
    # Read before each iteration changes it.
    runner.model.register_forward_pre_hook(
        lambda *_: rates.append(runner.optim_wrapper.get_lr()['lr'][0])
    )
    runner.train()

    assert len(rates) == epochs * iterations
    # float64, but mmengine multiplies its way from step to step.
    approx = dict(rel=1e-9)
    assert rates[0] == pytest.approx(1e-3 * top, **approx)
    steps = warmup * iterations - 1
    for step in (1, iterations, steps):
        expected = top * (1e-3 + (1 - 1e-3) * step / steps)
        assert rates[step] == pytest.approx(expected, **approx)
    for epoch in (warmup, (warmup + epochs) // 2, epochs - 1):
        cosine = (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2
        expected = top * (1e-2 + (1 - 1e-2) * cosine)
        assert rates[epoch * iterations] == pytest.approx(expected, **approx)
        assert rates[(epoch + 1) * iterations - 1] == rates[epoch * iterations]


@pytest.mark.parametrize('name', [IN22K, BAMBOO])
def test_pre_training_data(name):
    cfg = load(name)
    assert cfg.val_cfg is None
    dataset = cfg.train_dataloader.dataset
    assert dataset.type == ('ImageNet21k' if name == IN22K else 'CustomDataset')
    train, test = (
        transforms(loader.dataset.pipeline)
        for loader in (cfg.train_dataloader, cfg.test_dataloader)
    )
    assert train['RandomResizedCrop']['scale'] == test['CenterCrop']['crop_size'] == 192


def test_the_fine_tuning_of_large_starts_from_the_converted_head():
    assert load(LARGE).load_from == 'work_dirs/vrwkv-large_32xb128-90e_in21k-192px/in1k.pth'


@pytest.mark.parametrize(
    ('name', 'counted', 'published'),
    [
        # By hand: patches and class token, 12 layers of 12 dim^2 + 13 dim, last norm, head.
        *(
            (name, 768 * d + d + 198 * d + 12 * (12 * d**2 + 13 * d) + 2 * d + (d + 1) * 1000, m)
            for name, d, m in [
                ('deit-tiny_4xb256_in1k', 192, 5.7),
                ('deit-small_4xb256_in1k', 384, 22.1),
                ('deit-base_16xb64_in1k', 768, 86.6),
            ]
        )
    ],
)
def test_deit(name, counted, published):
    """The rows that the paper compares with are mmpretrain's own."""
    cfg = load(f'deit/{name}')
    assert cfg.train_cfg.max_epochs == 300
    assert cfg.auto_scale_lr.base_batch_size == 1024
    parameters = sum(p.numel() for p in build(cfg).parameters())
    assert parameters == counted
    assert parameters / 1e6 == pytest.approx(published, abs=0.06)


def transforms(pipeline):
    return {transform['type']: transform for transform in pipeline}


@pytest.mark.parametrize('name', IMAGENET)
def test_augmentation(name):
    cfg = load(name)
    size = 384 if name == LARGE else 224
    train = transforms(cfg.train_dataloader.dataset.pipeline)
    expected = ['LoadImageFromFile', 'RandomResizedCrop', 'RandomFlip', 'PackInputs']
    if name != LARGE:
        expected[3:3] = ['RandAugment', 'RandomErasing']
        assert train['RandAugment']['policies'] == 'timm_increasing'
        assert train['RandAugment']['num_policies'] == 2
        assert train['RandAugment']['magnitude_level'] == 9
        assert train['RandAugment']['magnitude_std'] == 0.5
        assert train['RandomErasing']['erase_prob'] == 0.25
    assert list(train) == expected
    assert train['RandomResizedCrop']['scale'] == size
    assert train['RandomResizedCrop']['interpolation'] == 'bicubic'

    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        test = transforms(loader.dataset.pipeline)
        assert list(test) == ['LoadImageFromFile', 'ResizeEdge', 'CenterCrop', 'PackInputs']
        assert test['ResizeEdge']['scale'] == (384 if name == LARGE else 256)
        assert test['ResizeEdge']['edge'] == 'short'
        assert test['ResizeEdge']['interpolation'] == 'bicubic'
        assert test['CenterCrop']['crop_size'] == size


@pytest.mark.parametrize(
    ('name', 'expected', 'probabilities'),
    [
        (TINY, None, None),
        (SMALL, [('Mixup', 0.8), ('CutMix', 1.0)], None),  # evenly
        (BASE, [('Mixup', 0.8), ('CutMix', 1.0)], None),
        (LARGE, [('Mixup', 0.8), ('NoneType', None)], [0.5, 0.5]),
    ],
)
def test_batch_augmentation(name, expected, probabilities):
    cfg = load(name)
    build(cfg)
    augment = build(cfg).data_preprocessor.batch_augments  # a second build sees an intact config
    if expected is None:
        assert augment is None
    else:
        found = [(type(a).__name__, getattr(a, 'alpha', None)) for a in augment.augments]
        assert found == expected
        assert augment.probs == probabilities


@pytest.mark.parametrize('name', IMAGENET)
def test_label_smoothing(name):
    torch.manual_seed(0)
    logits, target = torch.randn(2, 1000, dtype=torch.float64), torch.tensor([3, 7])
    log_probability = logits.log_softmax(1)
    of_target = log_probability[[0, 1], target]
    expected = -(0.9 * of_target + 0.1 * log_probability.mean(1)).mean()
    torch.testing.assert_close(build(load(name)).head.loss_module(logits, target), expected)


def test_large_keeps_a_moving_average_of_its_weights():
    assert load(LARGE).custom_hooks == [dict(type='EMAHook', momentum=1e-4)]


def test_large_head():
    layers = build(load(LARGE)).head.layers
    assert [type(layer.act) for layer in layers] == [nn.Tanh, type(None)]
    assert [tuple(layer.fc.weight.shape) for layer in layers] == [(3072, 1024), (1000, 3072)]


@pytest.mark.parametrize('name', ALL)
def test_trains_and_predicts(name):
    """At reduced width and depth: a loss, a gradient for every parameter, a prediction."""
    cfg = load(name)
    cfg.model.backbone.update(embed_dims=16, depth=2, init_cfg=None)
    if 'num_heads' in cfg.model.backbone:
        cfg.model.backbone.num_heads = 2
    cfg.model.head.in_channels = 16
    if 'mid_channels' in cfg.model.head:
        cfg.model.head.mid_channels = [24]
    torch.manual_seed(0)
    model = build(cfg, device='cpu')
    model.init_weights()
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    samples = [DataSample().set_gt_label(label) for label in (0, 1)]
    data = model.data_preprocessor(dict(inputs=list(images), data_samples=samples), training=True)
    model.train()
    for layer in model.backbone.layers:
        layer.drop_path.drop_prob = 0.0
    loss = model(**data, mode='loss')['loss']
    # A fresh head knows nothing.
    assert loss.item() == pytest.approx(math.log(cfg.model.head.num_classes), rel=0.02)
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    model.eval()
    data = model.data_preprocessor(dict(inputs=list(images), data_samples=samples))
    for sample in model(**data, mode='predict'):
        assert sample.pred_score.shape == (cfg.model.head.num_classes,)
        torch.testing.assert_close(sample.pred_score.sum(), torch.tensor(1.0))


@pytest.mark.parametrize('name', ALL)
def test_pipelines_build(name):
    cfg = load(name)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        for split in ('train', 'val', 'test'):
            if (loader := cfg.get(f'{split}_dataloader')) is None:  # ImageNet-22K has no val
                continue
            built = [TRANSFORMS.build(transform) for transform in loader.dataset.pipeline]
            assert isinstance(built[-1], PackInputs)
