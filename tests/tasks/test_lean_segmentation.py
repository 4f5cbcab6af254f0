"""UperNet with less memory gives what mmseg's gives."""

import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from vrwkv.analysis.models import load_model
from vrwkv_seg import lean

CONFIG = 'configs/segmentation/upernet_vrwkv-adapter-nano_1xb8-1k_digit-scenes-96x96.py'


@pytest.fixture(scope='module')
def models(repository):
    """The same weights in mmseg's classes and in ours; 11 classes."""
    cfg = Config.fromfile(repository / CONFIG)
    torch.manual_seed(0)
    ours = cfg.copy()
    usual = load_model(cfg)
    for module in usual.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.normal_(module.bias)
    torch.nn.init.normal_(usual.decode_head.conv_seg.weight)
    ours.model.type, ours.model.decode_head.type = 'LeanEncoderDecoder', 'LeanUPerHead'
    ours = load_model(ours)
    ours.load_state_dict(usual.state_dict())
    return usual, ours


@pytest.mark.parametrize('size', [(256, 160), (288, 96)])
def test_logits_equal_mmsegs(models, size):
    """Strips of 32 rows: the last one whole, and a rest."""
    usual, ours = models
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = usual.extract_feat(images)
        expected = usual.decode_head(list(features))
        found = ours.decode_head(list(features))
    assert found.shape == expected.shape
    # Rows are interpolated after columns here and together in PyTorch: a few roundings.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_a_head_that_predicts_by_itself_is_left_to_mmseg(models, monkeypatch):
    ours = models[1]
    channels = ours.decode_head.in_channels
    head = dict(
        type='EncHead', in_channels=channels, in_index=list(range(len(channels))), channels=8,
        num_codes=4, num_classes=11, norm_cfg=dict(type='BN'),
    )  # fmt: skip
    monkeypatch.setitem(ours._modules, 'decode_head', MODELS.build(head).eval())
    with torch.no_grad():
        meta = dict(ori_shape=(64, 96), img_shape=(64, 96), pad_shape=(64, 96))
        (sample,) = ours.predict(torch.randn(1, 3, 64, 96), [SegDataSample(metainfo=meta)])
    assert sample.pred_sem_seg.data.shape == (1, 64, 96)


@pytest.mark.parametrize('group', [4, 5, 16])  # the last group has 3, 1 and 11 classes
def test_label_maps_equal_mmsegs(models, monkeypatch, group):
    monkeypatch.setattr(lean, 'CLASSES', group)
    usual, ours = models
    monkeypatch.setitem(ours._modules, 'decode_head', usual.decode_head)  # logits of equal bits
    images = torch.randn(1, 3, 128, 96, generator=torch.Generator().manual_seed(0))
    meta = dict(
        ori_shape=(100, 61), img_shape=(128, 80), pad_shape=(128, 96),
        padding_size=[0, 16, 0, 0], flip=True, flip_direction='horizontal',
    )  # fmt: skip
    with torch.no_grad():
        expected, found = (
            model.predict(images, [SegDataSample(metainfo=meta)])[0] for model in (usual, ours)
        )
    assert len(expected.pred_sem_seg.data.unique()) >= 3
    assert torch.equal(found.pred_sem_seg.data, expected.pred_sem_seg.data)
    assert 'seg_logits' not in found
