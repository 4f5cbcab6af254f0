"""The segmentation configs against the numbers of the paper and of upstream's recipes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS, TRANSFORMS
from mmseg.structures import SegDataSample
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs' / 'segmentation'
SIZES = ('tiny', 'small', 'base', 'large')
ADE20K = [f'upernet_{kind}-adapter-{size}' for kind in ('vrwkv', 'vit') for size in SIZES]
SIX = dict(tiny=3, small=6, base=12)  # heads of 64 channels; not in the paper
SUFFIX = '_8xb2-160k_ade20k-512x512'
DEMOS = sorted(p.stem for p in CONFIGS.glob('*.py') if not p.stem.endswith(SUFFIX))
RATES = dict(tiny=12e-5, small=6e-5, base=6e-5, large=6e-5)
LAYER_DECAY = dict(tiny=0.95, small=0.85, base=0.8, large=0.9)
DROP_PATH = dict(tiny=0.1, small=0.2, base=0.3, large=0.4)


def load(name):
    return Config.fromfile(CONFIGS / f'{name}{"" if name in DEMOS else SUFFIX}.py')


def build(cfg, device='meta'):
    with DefaultScope.overwrite_default_scope('mmseg'), torch.device(device):
        return MODELS.build(cfg.model)


@pytest.fixture
def paper(load_script):
    """The size arguments whose parameters and FLOPs are those of the paper's table 4."""
    return load_script('tests/models/test_adapter_flops.py')


def test_the_configs_are_those_of_the_paper():
    names = {path.stem for path in CONFIGS.glob('*.py')} - set(DEMOS)
    six = {f'upernet_vrwkv6-adapter-{size}' for size in SIX}
    assert names == {name + SUFFIX for name in {*ADE20K, *six}}
    assert DEMOS


@pytest.mark.parametrize('size', SIX)
def test_vrwkv6_has_vrwkvs_recipe(size):
    """But in float32, as upstream trains VRWKV6."""
    six, plain = (load(f'upernet_{kind}-adapter-{size}').to_dict() for kind in ('vrwkv6', 'vrwkv'))
    backbone, expected = six['model'].pop('backbone'), plain['model'].pop('backbone')
    expected |= dict(type='VRWKV6Adapter', num_heads=SIX[size])
    checkpoint = expected['init_cfg']['checkpoint']
    expected['init_cfg']['checkpoint'] = checkpoint.replace('vrwkv_', 'vrwkv6_')
    assert backbone == expected
    assert six['optim_wrapper'].pop('type') == 'OptimWrapper'
    del plain['optim_wrapper']['type']
    assert six == plain


@pytest.mark.parametrize('name', ADE20K)
def test_backbone(name, paper):
    size = name.rpartition('-')[2]
    own = paper.VIT_ARGUMENTS if 'vit-' in name else paper.VRWKV_ARGUMENTS
    arguments = dict(
        patch_size=16, conv_inplane=64, n_points=4, cffn_ratio=0.25, deform_ratio=1.0, img_size=224
    )
    arguments |= paper.SIZE_ARGUMENTS[size] | own[size]
    backbone = load(name).model.backbone
    assert backbone.type == ('ViTAdapter' if 'vit-' in name else 'VRWKVAdapter')
    for key, value in arguments.items():
        assert backbone[key] == value, key
    # Nothing else that changes FLOPs: all attention is global, all norms are as by default.
    assert set(backbone) - set(arguments) == {
        'type', 'drop_path_rate', 'interaction_indexes', 'fuse', 'init_cfg',
    }  # fmt: skip
    assert backbone.drop_path_rate == DROP_PATH[size]
    assert backbone.fuse == 'stages'
    depth = 24 if size == 'large' else 12
    runs = [[i, i + depth // 4 - 1] for i in range(0, depth, depth // 4)]
    assert backbone.interaction_indexes == runs


@pytest.mark.parametrize('name', ADE20K)
def test_heads(name):
    cfg = load(name)
    model = build(cfg)
    width = cfg.model.backbone.embed_dims
    decode, auxiliary = model.decode_head, model.auxiliary_head
    assert decode.in_channels == [width] * 4
    assert (decode.channels, decode.num_classes, decode.dropout_ratio) == (512, 150, 0.1)
    assert decode.loss_decode.loss_weight == 1.0
    assert (auxiliary.in_channels, auxiliary.in_index, auxiliary.channels) == (width, 2, 256)
    assert (auxiliary.num_classes, auxiliary.loss_decode.loss_weight) == (150, 0.4)
    norms = {type(m.bn).__name__ for m in decode.modules() if hasattr(m, 'bn')}
    assert norms == {'SyncBatchNorm'}
    assert model.test_cfg == dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
    assert model.data_preprocessor.size == (512, 512)
    assert model.data_preprocessor.test_cfg == dict(size_divisor=32)
    mean, std = (
        ([127.5] * 3, [127.5] * 3)
        if name == 'upernet_vit-adapter-large'
        else ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    )
    assert cfg.model.data_preprocessor.mean == mean
    assert cfg.model.data_preprocessor.std == std


@pytest.mark.parametrize('name', ADE20K)
def test_optimizer(name):
    """The rate of each parameter, counted by hand from its depth."""
    cfg = load(name)
    size = name.rpartition('-')[2]
    assert cfg.optim_wrapper.pop('type') == 'AmpOptimWrapper'
    model = build(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    assert type(wrapper.optimizer) is torch.optim.AdamW
    groups = {id(p): group for group in wrapper.optimizer.param_groups for p in group['params']}
    depth = 24 if size == 'large' else 12
    for parameter_name, parameter in model.named_parameters():
        group = groups.pop(id(parameter))
        part, _, rest = parameter_name.partition('.')
        distance = 0
        if part == 'backbone':
            if rest == 'pos_embed' or rest.startswith('patch_embed'):
                distance = depth + 1
            elif rest.startswith('layers.'):
                distance = depth - int(rest.split('.')[1])
        expected = RATES[size] * LAYER_DECAY[size] ** distance
        assert group['lr'] == pytest.approx(expected, rel=1e-9), parameter_name
        decays = parameter.ndim > 1
        assert group['weight_decay'] == (0.01 if decays else 0), parameter_name
        assert group['betas'] == (0.9, 0.999)
    assert not groups


@pytest.mark.parametrize('name', ADE20K)
def test_schedule(name):
    cfg = load(name)
    assert cfg.train_cfg.type == 'IterBasedTrainLoop'
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (160000, 16000)
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr == dict(base_batch_size=16)
    assert cfg.default_hooks.checkpoint.save_best == 'mIoU'

    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedulers = [
        # As the runner does, which ends a schedule with the training.
        PARAM_SCHEDULERS.build({'optimizer': optimizer, 'end': 160_000, **scheduler})
        for scheduler in cfg.param_scheduler
    ]
    rates = []
    for _ in range(3001):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    # Linear from 1e-6 of the rate, then linear to 0 at the last iteration, in float64 step by step.
    assert rates[0] == pytest.approx(1e-6)
    assert rates[750] == pytest.approx(1e-6 + (1 - 1e-6) * 750 / 1499, rel=1e-9)
    assert rates[1500] == pytest.approx(1, rel=1e-9)
    assert rates[3000] == pytest.approx(1 - 1500 / 158499, rel=1e-9)


def sizes_after(pipeline, height, width):
    """Run the geometry of a pipeline on an image."""
    results = dict(img=np.zeros((height, width, 3), np.uint8), seg_fields=[])
    results['img_shape'] = (height, width)
    for transform in pipeline:
        if 'Resize' in transform['type']:
            results = TRANSFORMS.build(transform)(results)
    return results['img'].shape[:2]


@pytest.mark.parametrize('name', ADE20K)
def test_data(name):
    cfg = load(name)
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.type == 'CheckedADE20KDataset'
        assert dataset.data_root == 'data/ade/ADEChallengeData2016'
        folder = 'training' if split == 'train' else 'validation'
        assert dataset.data_prefix.img_path == f'images/{folder}'
        assert dataset.data_prefix.seg_map_path == f'annotations/{folder}'
    assert cfg.val_evaluator == dict(type='IoUMetric', iou_metrics=['mIoU'], _scope_='mmseg')

    train = {transform['type']: transform for transform in cfg.train_dataloader.dataset.pipeline}
    assert list(train) == [
        'LoadImageFromFile', 'LoadAnnotations', 'RandomResize', 'RandomCrop', 'RandomFlip',
        'PhotoMetricDistortion', 'PackSegInputs',
    ]  # fmt: skip
    assert train['RandomResize']['scale'] == (2048, 512)
    assert train['RandomResize']['ratio_range'] == (0.5, 2.0)
    assert train['RandomCrop'] == dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75)
    assert train['RandomFlip']['prob'] == 0.5

    # The inferencers drop LoadAnnotations by its name.
    for pipeline in (cfg.val_dataloader, cfg.test_dataloader, cfg):
        pipeline = pipeline.test_pipeline if pipeline is cfg else pipeline.dataset.pipeline
        assert [transform['type'] for transform in pipeline] == [
            'LoadImageFromFile', 'Resize', 'ResizeToMultiple', 'LoadAnnotations', 'PackSegInputs',
        ]  # fmt: skip
        # The short side becomes 512, if the long one stays within 2048; each is rounded up to 32.
        assert sizes_after(pipeline, 512, 683) == (512, 704)
        assert sizes_after(pipeline, 768, 512) == (768, 512)
        assert sizes_after(pipeline, 300, 450) == (512, 768)
        assert sizes_after(pipeline, 200, 1000) == (416, 2048)


def test_multi_scale_and_flip():
    cfg = load('upernet_vrwkv-adapter-tiny')
    assert cfg.tta_model.type == 'SegTTAModel'
    scales, multiple, flips, *_ = cfg.tta_pipeline[1].transforms
    shapes = [sizes_after([scale, *multiple], 300, 450) for scale in scales]
    assert shapes == [(256, 384), (384, 576), (512, 768), (640, 960), (768, 1152), (896, 1344)]
    assert [flip['prob'] for flip in flips] == [0.0, 1.0]


CHECKPOINTS = {
    'upernet_vrwkv-adapter-tiny': 'Vision-RWKV/resolve/main/vrwkv_t_in1k_224.pth',
    'upernet_vrwkv-adapter-small': 'Vision-RWKV/resolve/main/vrwkv_s_in1k_224.pth',
    'upernet_vrwkv-adapter-base': 'Vision-RWKV/resolve/main/vrwkv_b_in1k_224.pth',
    'upernet_vrwkv-adapter-large': 'Vision-RWKV/resolve/main/vrwkv_l_in22k_192.pth',
    'upernet_vit-adapter-tiny': 'deit/deit-tiny_pt-4xb256_in1k_20220218-13b382a0.pth',
    'upernet_vit-adapter-small': 'deit/deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth',
    'upernet_vit-adapter-base': 'deit/deit-base_pt-16xb64_in1k_20220216-db63c16c.pth',
    'upernet_vit-adapter-large': 'vit-large-p16_in21k-pre-3rdparty_ft-64xb64_in1k-384_20210928-b20ba619.pth',  # noqa: E501
}


@pytest.mark.parametrize('name', ADE20K)
def test_pretrained_weights(name):
    cfg = load(name)
    assert cfg.model.pretrained is None
    init_cfg = cfg.model.backbone.init_cfg
    assert (init_cfg.type, init_cfg.prefix) == ('Pretrained', 'backbone.')
    assert init_cfg.checkpoint.endswith(CHECKPOINTS[name])


@pytest.mark.parametrize('name', [*ADE20K, *DEMOS])
def test_trains_and_predicts(name):
    """At reduced width and depth: a gradient for every parameter, a prediction for every pixel."""
    cfg = load(name)
    cfg.model.backbone.update(
        embed_dims=24, depth=4, interaction_indexes=None, deform_num_heads=3, conv_inplane=8,
        init_cfg=None, drop_path_rate=0.0,
    )  # fmt: skip
    if 'num_heads' in cfg.model.backbone:
        cfg.model.backbone.num_heads = 3
    cfg.model.decode_head.update(in_channels=[24] * 4, channels=16)
    cfg.model.auxiliary_head.update(in_channels=24, channels=16)
    cfg.model.data_preprocessor.size = (64, 96)
    cfg.model.test_cfg.update(crop_size=(64, 64), stride=(42, 42))
    torch.manual_seed(0)
    model = build(cfg, device='cpu')
    model.init_weights()
    classes = cfg.model.decode_head.num_classes
    # No padding: mmseg's class weights cannot deal with ignored pixels.
    sample = SegDataSample(metainfo=dict(ori_shape=(64, 96), img_shape=(64, 96)))
    sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, 64, 96)))
    bands = cfg.model.backbone.get('in_channels', 3)
    image = torch.randint(256, (bands, 64, 96), dtype=torch.uint8)
    batch = dict(inputs=[image] * 2, data_samples=[sample, sample.clone()])
    data = model.data_preprocessor(batch, training=True)
    losses = model(**data, mode='loss')
    sum(value for key, value in losses.items() if 'loss' in key).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    model.eval()
    sample.set_metainfo(dict(ori_shape=(60, 90), img_shape=(60, 90)))
    batch = dict(inputs=[image[:, :60, :90]], data_samples=[sample])
    prediction = model.test_step(batch)[0]
    assert prediction.pred_sem_seg.data.shape == (1, 60, 90)
    assert prediction.seg_logits.data.shape == (classes, 60, 90)
