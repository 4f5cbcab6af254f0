"""Masked pre-training: the encoder and decoder against upstream's numbers, and against MAE's rules."""

from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.runner import load_state_dict
from mmpretrain.models.selfsup.mae import MAE
from mmpretrain.registry import MODELS

from vrwkv.backbones import VRWKV
from vrwkv_cls.mae import MAEVRWKV, MAEVRWKVDecoder, from_upstream

GOLDEN = Path(__file__).resolve().parents[1] / 'data' / 'golden' / 'mae.pt'
# float32 numbers of a dense float32 Bi-WKV.
TOLERANCE = 1e-4


def build(encoder=None, decoder=None, norm_pix=False):
    """Build mmpretrain's MAE around a small encoder and decoder."""
    layers = dict(init_values=0.1, post_norm=True, key_norm=True)
    encoder = dict(img_size=64, embed_dims=24, depth=2, **layers) | (encoder or {})
    decoder = dict(num_patches=16, embed_dims=24, **layers) | (decoder or {})
    decoder = dict(decoder_embed_dims=12, decoder_depth=2) | decoder
    model = dict(
        type='MAE',
        backbone=dict(type='MAEVRWKV', **encoder),
        neck=dict(type='MAEVRWKVDecoder', **decoder),
        head=dict(
            type='MAEPretrainHead',
            norm_pix=norm_pix,
            loss=dict(type='PixelReconstructionLoss', criterion='L2'),
        ),
    )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(model)


@pytest.fixture(scope='module')
def golden():
    return torch.load(GOLDEN, weights_only=True)


@pytest.fixture
def as_upstream(golden):
    """Build the model of the golden file, with its weights."""
    shift = dict(shift_mode='single_shift', channel_gamma=None)
    encoder = dict(shuffle=True, pos_embed_twice=True, **shift)
    model = build(encoder, shift, norm_pix=True)
    model.load_state_dict(from_upstream(golden['state_dict']), strict=True)
    return model


def relative_error(value, expected):
    assert value.shape == expected.shape
    return ((value - expected).abs().max() / expected.abs().max()).item()


def test_loss_predictions_and_gradients_are_those_of_upstream(golden, as_upstream, monkeypatch):
    monkeypatch.setattr(torch, 'rand', lambda *_, **__: golden['noise'])
    model = as_upstream
    latent, mask, ids_restore = model.backbone(golden['input'])
    predictions = model.neck(latent, ids_restore)
    loss = model.head.loss(predictions, golden['input'], mask).reshape(1)
    assert torch.equal(mask, golden['mask'])
    expected_loss, expected_predictions = golden['outputs']
    assert relative_error(loss, expected_loss) < TOLERANCE
    assert relative_error(predictions, expected_predictions) < TOLERANCE
    sum(o.double().square().mean() + o.double().mean() for o in (loss, predictions)).backward()
    parameters = dict(model.named_parameters())
    expected = from_upstream(golden['grads'])
    assert set(parameters) == set(expected)
    for name, gradient in expected.items():
        assert relative_error(parameters[name].grad, gradient) < TOLERANCE, name


def test_mmpretrain_runs_the_same_loss(golden, as_upstream, monkeypatch):
    assert type(as_upstream) is MAE
    monkeypatch.setattr(torch, 'rand', lambda *_, **__: golden['noise'])
    loss = as_upstream(golden['input'], mode='loss')['loss']
    assert relative_error(loss.reshape(1), golden['outputs'][0]) < TOLERANCE
