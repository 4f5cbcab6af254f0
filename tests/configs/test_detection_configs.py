"""The detection configs against the paper's Table 3 and upstream's recipe."""

from functools import cache
from pathlib import Path

import pytest
import torch
from mmdet.datasets.transforms import PackDetInputs
from mmdet.registry import MODELS, TRANSFORMS
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

import vrwkv_det  # noqa: F401

CONFIGS = Path(__file__).resolve().parents[2] / 'configs/detection'
# Name: millions of parameters of the backbone in the paper's Table 3, width, drop path, and the
# layers with windows, where there is a ViT.
WINDOWS = [0, 1, 3, 4, 6, 7, 9, 10]
TABLE = {
    'vrwkv-adapter-tiny': (8.4, 192, 0.1, None),
    'vrwkv-adapter-small': (29.3, 384, 0.2, None),
    'vrwkv-adapter-base': (106.6, 768, 0.3, None),
    'vrwkv-adapter-large': (351.9, 1024, 0.4, None),
    'vit-adapter-tiny_window': (8.0, 192, 0.1, WINDOWS),
    'vit-adapter-tiny_global': (8.0, 192, 0.1, []),
    'vit-adapter-small_window': (27.5, 384, 0.2, WINDOWS),
    'vit-adapter-small_global': (27.5, 384, 0.2, []),
    'vit-adapter-base_window': (99.5, 768, 0.3, WINDOWS),
    'vit-adapter-base_global': (99.5, 768, 0.3, []),
    'vit-adapter-large_window': (327.0, 1024, 0.4, [i for i in range(24) if i % 6 < 5]),
}
PLAIN = 'vrwkv-tiny_simple'
COCO = [*TABLE, PLAIN]
SIX = dict(tiny=3, small=6, base=12)  # heads of 64 channels; not in the paper


@cache
def load(name):
    return Config.fromfile(path_of(name))


def path_of(name):
    separator = '-' if name == PLAIN else '_'
    return CONFIGS / f'mask-rcnn_{name}{separator}fpn_1x_coco.py'


def build(cfg, device='meta'):
    with DefaultScope.overwrite_default_scope('mmdet'), torch.device(device):
        return MODELS.build(cfg.model)


@pytest.fixture(scope='module')
def models():
    """Each config's model, without memory, built once."""
    built = {}

    def get(name):
        if name not in built:
            built[name] = build(load(name))
        return built[name]

    return get


@pytest.fixture(scope='module')
def mmdets():
    """Mask R-CNN with a ResNet, as mmdet ships it: config and model."""
    cfg = get_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    return cfg, build(cfg)


def test_every_config_is_tested():
    tested = {path_of(name).name for name in [*COCO, *(f'vrwkv6-adapter-{size}' for size in SIX)]}
    assert tested == {p.name for p in CONFIGS.glob('*_coco.py')}


@pytest.mark.parametrize('size', SIX)
def test_vrwkv6_has_vrwkvs_recipe(size):
    six, plain = (load(f'{kind}-adapter-{size}').to_dict() for kind in ('vrwkv6', 'vrwkv'))
    backbone, expected = six['model'].pop('backbone'), plain['model'].pop('backbone')
    expected |= dict(type='VRWKV6Adapter', num_heads=SIX[size])
    checkpoint = expected['init_cfg']['checkpoint']
    expected['init_cfg']['checkpoint'] = checkpoint.replace('vrwkv_', 'vrwkv6_')
    assert backbone == expected
    assert six == plain


@pytest.mark.parametrize('name', TABLE)
def test_parameters_of_the_backbone_are_table_3s(name, models):
    backbone = models(name).backbone
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    assert millions == pytest.approx(TABLE[name][0], abs=0.05)  # half a unit of the last digit


@pytest.mark.parametrize('name', TABLE)
def test_model(name, models):
    """The sizes of which tests/models/test_adapter_flops.py counts the FLOPs of Table 3."""
    _, dims, drop_path, windows = TABLE[name]
    model, size = models(name), name.split('_')[0].rsplit('-')[-1]
    backbone = model.backbone
    large = size == 'large'
    assert backbone.embed_dims == dims
    assert backbone.depth == (24 if large else 12)
    assert backbone.drop_path_rate == drop_path
    run = 6 if large else 3
    assert backbone.interaction_indexes == tuple((i, i + run - 1) for i in range(0, 4 * run, run))
    assert backbone.fuse == 'last'
    attention = backbone.interactions[0].injector.attn
    heads, _, points = attention.samples
    assert (heads, points) == (dict(tiny=6, small=6, base=12, large=16)[size], 4)
    assert attention.value_proj.out_features == (dims if size in ('tiny', 'small') else dims // 2)
    assert backbone.spm.stem[0].out_channels == 64
    assert backbone.interactions[0].extractor.ffn.fc1.out_features == dims // 4
    assert isinstance(backbone.norm1, torch.nn.SyncBatchNorm)
    arguments = load(name).model.backbone
    if windows is None:
        assert backbone.img_size == ((192, 192) if large else (224, 224))
        post_norm, key_norm = size != 'tiny', large
        assert arguments.get('post_norm', False) == post_norm
        assert arguments.get('key_norm', False) == key_norm
        assert arguments.init_values == (1e-5 if post_norm else 1.0)
    else:
        assert backbone.img_size == ((384, 384) if large else (224, 224))
        assert arguments.init_values == 1.0
        sizes = [layer.attn.window_size for layer in backbone.layers]
        assert sizes == [14 if i in windows else None for i in range(len(sizes))]
        # Heads of 64 channels, as in every ViT of these sizes.
        assert backbone.layers[0].attn.num_heads == dims // 64


@pytest.mark.parametrize('name', COCO)
def test_neck_and_heads_are_mmdets(name, models, mmdets):
    model = models(name)
    reference, resnet = mmdets
    for part in ('rpn_head', 'roi_head'):
        assert [(k, v.shape) for k, v in getattr(model, part).state_dict().items()] == [
            (k, v.shape) for k, v in getattr(resnet, part).state_dict().items()
        ]
    cfg = load(name)
    for part in ('rpn_head', 'roi_head', 'train_cfg', 'test_cfg'):
        assert cfg.model[part] == reference.model[part]
    preprocessor = dict(reference.model.data_preprocessor)
    if 'vit-adapter-large' in name:  # mmpretrain's config of its weights has these
        preprocessor.update(mean=[127.5] * 3, std=[127.5] * 3)
    assert cfg.model.data_preprocessor == preprocessor
    assert cfg.model.data_preprocessor.pad_size_divisor == 32
    if name != PLAIN:
        assert type(model.neck).__name__ == 'FPN'
        assert [conv.conv.in_channels for conv in model.neck.lateral_convs] == 4 * [TABLE[name][1]]
    assert model.neck.num_outs == 5


@pytest.mark.parametrize('name', COCO)
def test_pretrained_weights(name):
    init = load(name).model.backbone.init_cfg
    assert init.type == 'Pretrained'
    assert init.prefix == 'backbone.'
    folder, _, file = init.checkpoint.rpartition('/')
    size = name.split('_')[0].rsplit('-')[-1]
    if 'vrwkv' in name:
        assert folder == 'https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main'
        assert file == (
            'vrwkv_l_in22k_192.pth' if size == 'large' else f'vrwkv_{size[0]}_in1k_224.pth'
        )
    else:
        assert folder.startswith('https://download.openmmlab.com/mmclassification/v0/')
        assert file.startswith('vit-large-p16_in21k' if size == 'large' else f'deit-{size}_pt-')


@pytest.mark.parametrize('name', COCO)
def test_optimizer(name, models):
    """As built: AdamW, rates that fall by layers, no decay of 1-d tensors, no clipping."""
    cfg = load(name)
    model = models(name)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(wrapper.optimizer) is torch.optim.AdamW
    assert not wrapper.clip_grad_kwargs
    lr, decay = (2e-4, 0.01) if 'tiny' in name else (1e-4, 0.05)
    depths = model.backbone.depth + 2
    settings = {
        id(p): (group['lr'], group['weight_decay'], group['betas'])
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }
    for key, parameter in model.named_parameters():
        depth = depths - 1
        if key.startswith(('backbone.patch_embed.', 'backbone.pos_embed')):
            depth = 0
        elif key.startswith('backbone.layers.'):
            depth = int(key.split('.')[2]) + 1
        expected = lr * 0.85 ** (depths - 1 - depth)
        flat = parameter.dim() == 1
        assert settings[id(parameter)] == (
            pytest.approx(expected, rel=1e-12),
            0 if flat else decay,
            (0.9, 0.999),
        ), key


@pytest.mark.parametrize('name', COCO)
def test_schedule_and_data(name):
    cfg = load(name)
    assert cfg.train_cfg.max_epochs == 12
    warmup, steps = cfg.param_scheduler
    assert (warmup.type, warmup.by_epoch, warmup.begin, warmup.end, warmup.start_factor) == (
        'LinearLR', False, 0, 500, 0.001
    )  # fmt: skip
    assert (steps.type, steps.by_epoch, steps.milestones, steps.gamma) == (
        'MultiStepLR', True, [8, 11], 0.1
    )  # fmt: skip
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 16
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.type == 'CheckedCocoDataset'
        resize = next(t for t in loader.dataset.pipeline if t.type == 'Resize')
        assert (resize.scale, resize.keep_ratio) == ((1333, 800), True)
    train = [t.type for t in cfg.train_dataloader.dataset.pipeline]
    assert train == [
        'LoadImageFromFile',
        'LoadAnnotations',
        'Resize',
        'RandomFlip',
        'PackDetInputs',
    ]
    assert cfg.train_dataloader.dataset.ann_file == 'annotations/instances_train2017.json'
    assert cfg.test_evaluator.metric == ['bbox', 'segm']


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_pipelines_build_and_work_is_kept(path):
    cfg = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope('mmdet'):
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            built = [TRANSFORMS.build(transform) for transform in loader.dataset.pipeline]
            assert isinstance(built[-1], PackDetInputs)
    assert cfg.custom_imports == dict(imports=['vrwkv_det'], allow_failed_imports=False)
    assert cfg.custom_hooks == [dict(type='NumClassCheckHook')]
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 3


def test_demo_needs_no_gpu_and_no_download():
    cfg = Config.fromfile(next(CONFIGS.glob('*_digit-scenes.py')))
    model = build(cfg)
    assert cfg.model.backbone.init_cfg is None
    assert not any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.modules())
    for part in (model.backbone, model.neck, model.roi_head.mask_head):
        assert any(isinstance(m, torch.nn.BatchNorm2d) for m in part.modules())
