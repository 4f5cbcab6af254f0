"""vrwkv_seg: registration, weights from elsewhere, images of any size, heads and classes."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.apis import MMSegInferencer, inference_model, init_model
from mmseg.datasets import ADE20KDataset
from mmseg.models.decode_heads import Mask2FormerHead
from mmseg.registry import HOOKS, MODELS
from mmseg.structures import SegDataSample
from PIL import Image

import vrwkv_seg  # noqa: F401
from vrwkv.engine import VRWKVRunner

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / 'configs/segmentation/upernet_vrwkv-adapter-tiny_8xb2-160k_ade20k-512x512.py'
CLASSES = ADE20KDataset.METAINFO['classes']


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


@pytest.fixture(scope='module')
def golden():
    path = ROOT / 'tests/data/golden/seg_adapter_tiny.pt'
    return torch.load(path, weights_only=True)


@pytest.fixture
def cfg(golden):
    """The config of Tiny, with the backbone of the golden numbers and narrow heads."""
    cfg = Config.fromfile(TINY)
    cfg.model.backbone.update(golden['config'], norm_cfg=dict(type='BN'), init_cfg=None)
    cfg.model.decode_head.update(in_channels=[24] * 4, channels=16)
    cfg.model.auxiliary_head.update(in_channels=24, channels=8)
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.model.test_cfg.update(crop_size=(64, 64), stride=(42, 42))
    return cfg


def build(cfg):
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(cfg.model))
    model.init_weights()
    return model


def randomise(model):
    """Give every tensor values of its own, batch statistics too."""
    generator = torch.Generator().manual_seed(3)
    for value in model.state_dict().values():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            value.add_(noise.abs() * 0.1 if (value == 1).all() else noise * 0.1)
    return model


# --- weights ------------------------------------------------------------------------------------

# Of mmseg 0.x's UPerHead and FCNHead, as upstream's checkpoints have them.
CONVS = {
    'decode_head': [
        *(f'psp_modules.{i}.1' for i in range(4)),
        'bottleneck',
        *(f'{kind}_convs.{i}' for kind in ('lateral', 'fpn') for i in range(3)),
        'fpn_bottleneck',
    ],
    'auxiliary_head': ['convs.0'],
}
NORM = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
HEAD_NAMES = [
    f'{head}.{name}'
    for head, convs in CONVS.items()
    for name in (
        'conv_seg.weight',
        'conv_seg.bias',
        *(f'{c}.{n}' for c in convs for n in ('conv.weight', *(f'bn.{k}' for k in NORM))),
    )
]


@pytest.fixture
def upstream(cfg, golden, tmp_path):
    """Write a checkpoint as upstream's training does, and return its path and weights."""
    heads = randomise(build(cfg)).state_dict()
    state_dict = {f'backbone.{key}': value for key, value in golden['state_dict'].items()}
    state_dict |= {name: heads[name] for name in HEAD_NAMES}
    meta = dict(
        env_info='sys.platform: linux', seed=0, exp_name='upernet_vrwkv_adapter.py',
        mmseg_version='0.30.0+', config='model = dict()', CLASSES=CLASSES,
        PALETTE=ADE20KDataset.METAINFO['palette'], epoch=63, iter=160000, mmcv_version='1.7.0',
        time='Fri Mar  1 00:00:00 2024', fp16=dict(loss_scaler=dict(scale=512.0)),
    )  # fmt: skip
    optimizer = dict(state={0: dict(step=1, exp_avg=torch.zeros(2))}, param_groups=[dict(lr=0.1)])
    path = tmp_path / 'upstream.pth'
    torch.save(dict(meta=meta, state_dict=state_dict, optimizer=optimizer), path)
    return path, state_dict


def check_weights(model, state_dict):
    found = model.state_dict()
    assert set(found) == set(state_dict)
    for name, value in state_dict.items():
        assert torch.equal(found[name], value), name


def test_names_are_those_of_upstream(cfg, golden, upstream):
    _, state_dict = upstream
    model = MODELS.build(cfg.model)
    model.load_state_dict(state_dict, strict=True)
    check_weights(model, state_dict)
    # Through the whole model's backbone, in the model's evaluation mode: upstream's numbers.
    model.eval()
    for output, expected in zip(model.backbone(golden['input']), golden['outputs'], strict=True):
        # What two float32 implementations that sum in another order differ by.
        assert (output - expected).abs().max() < 2e-5 * expected.abs().max()


def test_init_model_and_inferencer_load_upstream(cfg, upstream, tmp_path):
    path, state_dict = upstream
    cfg.model.test_cfg.mode = 'whole'  # of 512 x 768 after resizing: many windows of 64
    config = tmp_path / 'config.py'
    cfg.dump(config)
    image = tmp_path / 'image.png'
    pixels = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)

    model = init_model(str(config), str(path), device='cpu')
    check_weights(model, state_dict)
    assert tuple(model.dataset_meta['classes']) == CLASSES
    first = inference_model(model, str(image)).pred_sem_seg.data[0].numpy()

    inferencer = MMSegInferencer(str(config), str(path), device='cpu')
    check_weights(inferencer.model, state_dict)
    second = inferencer(str(image), out_dir=str(tmp_path / 'out'))['predictions']
    np.testing.assert_array_equal(first, second)
    assert second.shape == (40, 60)
    assert second.max() < 150
    assert np.asarray(Image.open(tmp_path / 'out/pred/00000000_pred.png')).shape == (40, 60)


def runner(cfg, work_dir, **kwargs):
    """A runner without data."""
    return VRWKVRunner(
        model=copy.deepcopy(cfg.model), work_dir=str(work_dir), default_scope='mmseg',
        experiment_name=work_dir.parent.name, log_level='INFO', **kwargs,
    )  # fmt: skip


def test_load_from_loads_upstream(cfg, upstream, tmp_path):
    path, state_dict = upstream
    run = runner(cfg, tmp_path / 'work', load_from=str(path))
    run.load_or_resume()
    check_weights(run.model, state_dict)
    log = next((tmp_path / 'work').rglob('*.log')).read_text()
    assert 'Load checkpoint from' in log
    assert 'do not match' not in log


# --- any size -----------------------------------------------------------------------------------


def predict(model, height, width, **kwargs):
    generator = torch.Generator().manual_seed(height + width)
    image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
    sample = SegDataSample(metainfo=dict(ori_shape=(height, width), img_shape=(height, width)))
    with torch.no_grad():
        return model.test_step(dict(inputs=[image], data_samples=[sample]))[0]


@pytest.mark.parametrize('mode', ['whole', 'slide'])
@pytest.mark.parametrize('size', [(64, 64), (40, 60), (200, 64), (64, 300), (33, 97), (20, 20)])
def test_trained_at_one_size_and_tested_at_another(cfg, mode, size):
    """Also where the adapter needs the image to be filled up to multiples of 32."""
    model = randomise(build(cfg)).eval()
    model.test_cfg.mode = mode
    prediction = predict(model, *size)
    assert prediction.pred_sem_seg.data.shape == (1, *size)
    assert prediction.seg_logits.data.shape == (150, *size)
    assert prediction.seg_logits.data.isfinite().all()


def test_a_whole_image_of_2048_by_1024(cfg):
    """Without slide. At the width and depth of the tests."""
    cfg.model.decode_head.num_classes = 5
    model = randomise(build(cfg)).eval()
    model.test_cfg.mode = 'whole'
    prediction = predict(model, 1024, 2048)
    assert prediction.pred_sem_seg.data.shape == (1, 1024, 2048)
    assert len(prediction.pred_sem_seg.data.unique()) > 1


def test_slide_averages_windows(cfg):
    """By hand: two windows of 64 x 64 at 0 and 32 on an image of 64 x 96, whose middle both see."""
    model = randomise(build(cfg)).eval()
    sample = predict(model, 64, 96)
    image = torch.randint(
        256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(160)
    )
    mean, std = model.data_preprocessor.mean, model.data_preprocessor.std
    x = ((image[[2, 1, 0]].float() - mean) / std)[None]
    metas = [dict(img_shape=torch.Size((64, 64)))]
    with torch.no_grad():
        left, right = (model.encode_decode(x[..., s : s + 64], metas)[0] for s in (0, 32))
    expected = torch.cat(
        [left[..., :32], (left[..., 32:] + right[..., :32]) / 2, right[..., 32:]], dim=2
    )
    # The same convolutions, on the same values.
    torch.testing.assert_close(sample.seg_logits.data, expected, rtol=1e-5, atol=1e-5)


def test_plain_vrwkv_as_a_backbone(cfg):
    """With mmseg's neck for plain ViTs, without the adapter."""
    cfg.model.backbone = dict(
        type='VRWKV', img_size=64, embed_dims=24, depth=4, out_indices=[0, 1, 2, 3]
    )
    cfg.model.neck = dict(
        type='MultiLevelNeck', in_channels=[24] * 4, out_channels=24, scales=[4, 2, 1, 0.5]
    )
    prediction = predict(build(cfg).eval(), 64, 96)
    assert prediction.pred_sem_seg.data.shape == (1, 64, 96)


# --- classes ------------------------------------------------------------------------------------


class Loader:
    def __init__(self, classes):
        self.dataset = self
        self.metainfo = dict(classes=classes)


@pytest.mark.parametrize('step', ['train', 'val', 'test'])
def test_heads_and_data_of_different_classes(cfg, step):
    cfg.model.decode_head.num_classes = 3
    cfg.model.auxiliary_head.num_classes = 4
    hook = HOOKS.build(dict(type='NumClassCheckHook'))
    run = type('Run', (), dict(model=build(cfg)))()
    for classes, message in (
        ('abc', r'num_classes=4 in its auxiliary_head, but the Loader has 3 classes \(a, b, c\)'),
        ('abcdef', r'num_classes=3 in its decode_head.* \(a, b, c, d, e, \.\.\.\)'),
    ):
        setattr(run, f'{step}_dataloader', Loader(tuple(classes)))
        with pytest.raises(ValueError, match=message):
            getattr(hook, f'before_{step}')(run)
    run.model.auxiliary_head.num_classes = 3
    for classes in (tuple('abc'), None):
        setattr(run, f'{step}_dataloader', Loader(classes))
        getattr(hook, f'before_{step}')(run)
    # mmdet's head, whose index 5 would mean "no object".
    run.model.decode_head = Mask2FormerHead.__new__(Mask2FormerHead)
    torch.nn.Module.__init__(run.model.decode_head)
    run.model.decode_head.num_classes = 5
    setattr(run, f'{step}_dataloader', Loader(tuple('abcdefg')))
    with pytest.raises(ValueError, match='num_classes=5 in its decode_head'):
        getattr(hook, f'before_{step}')(run)
