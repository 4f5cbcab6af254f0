"""Loading weights: resized position embeddings, and errors for weights that do not fit."""

import pytest
import torch
import torch.nn.functional as F
from mmengine.runner.checkpoint import load_checkpoint
from mmengine.runner.checkpoint import load_state_dict as mmengine_load_state_dict
from torch import nn

from vrwkv.backbones import VRWKV

from .vrwkv_reference import SMALL, randomise


def by_torch(model, state_dict, _):
    model.load_state_dict(state_dict, strict=False)


def by_mmengine(model, state_dict, _):
    mmengine_load_state_dict(model, state_dict, strict=False)


def by_checkpoint(model, state_dict, path):
    torch.save({'state_dict': state_dict, 'meta': {}}, path)
    load_checkpoint(model, str(path), map_location='cpu')


def by_init_cfg(model, state_dict, path):
    prefixed = {f'backbone.{key}': value for key, value in state_dict.items()}
    torch.save({'state_dict': prefixed | {'head.fc.weight': torch.zeros(1)}}, path)
    model.init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    model.init_weights()


def inside_another(model, state_dict, _):
    state_dict = {f'backbone.{key}': value for key, value in state_dict.items()}
    nn.ModuleDict({'backbone': model, 'head': nn.Linear(2, 2)}).load_state_dict(
        state_dict, strict=False
    )


every_way = pytest.mark.parametrize(
    'load', [by_torch, by_mmengine, by_checkpoint, by_init_cfg, inside_another]
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'weights.pth'


@every_way
def test_loads_and_resizes(load, path):
    source = randomise(VRWKV(**SMALL), seed=1)
    model = VRWKV(**SMALL | {'img_size': (24, 56)})
    state_dict = source.state_dict()
    grid = source.pos_embed.data.reshape(1, 4, 4, 12).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(3, 7), mode='bicubic', align_corners=False)
    load(model, state_dict, path)
    assert torch.equal(model.pos_embed, grid.permute(0, 2, 3, 1).reshape(1, 21, 12))
    for name, value in model.named_parameters():
        if name != 'pos_embed':
            assert torch.equal(value, state_dict[name]), name
    # The caller's own dictionary is left alone.
    assert state_dict['pos_embed'].shape == (1, 16, 12)


@every_way
def test_another_model_is_an_error(load, path):
    """A ViT shares names, and even shapes, with VRWKV, so something would be loaded."""
    own = VRWKV(**SMALL).state_dict()
    vit = {key: value for key, value in own.items() if '.att.' not in key and '.ffn.' not in key}
    vit |= {'cls_token': torch.zeros(1, 1, 12), 'layers.0.attn.qkv.weight': torch.zeros(36, 12)}
    assert len(vit) > 10
    with pytest.raises(RuntimeError, match=r'no weights of VRWKV.*another model') as caught:
        load(VRWKV(**SMALL), vit, path)
    assert 'layers.0.att.spatial_decay' in str(caught.value)


@pytest.mark.parametrize('load', [by_torch, by_mmengine, inside_another])
def test_nothing_is_an_error(load):
    with pytest.raises(RuntimeError, match='no weights of VRWKV'):
        load(VRWKV(**SMALL), {}, None)


def test_forgotten_prefix_is_named(path):
    state_dict = {f'backbone.{k}': v for k, v in VRWKV(**SMALL).state_dict().items()}
    torch.save(state_dict, path)
    model = VRWKV(**SMALL, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    with pytest.raises(RuntimeError, match=r"under 'backbone\.'.*prefix='backbone\.'"):
        model.init_weights()


@every_way
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'embed_dims': 16}, r'embed_dims=16 \(here 12\)'),
        ({'depth': 3}, r'depth=3 \(here 2\)'),
        ({'depth': 1, 'hidden_rate': 2}, r'depth=1 \(here 2\), hidden_rate=2\.0 \(here 4\.0\)'),
        ({'patch_size': 4, 'img_size': 16}, r'patch_size=4 \(here 8\)'),
        ({'in_channels': 1}, r'in_channels=1 \(here 3\)'),
    ],
)
def test_other_arguments_are_an_error(load, arguments, message, path):
    state_dict = VRWKV(**SMALL | arguments).state_dict()
    with pytest.raises(RuntimeError, match=f'of a VRWKV with {message}.*build the model with'):
        load(VRWKV(**SMALL), state_dict, path)


def test_other_shape_is_an_error():
    state_dict = VRWKV(**SMALL).state_dict()
    state_dict['ln1.weight'] = torch.zeros(5)
    with pytest.raises(RuntimeError, match=r'ln1\.weight of shape \(5,\) \(here \(12,\)\)'):
        VRWKV(**SMALL).load_state_dict(state_dict, strict=False)


def test_only_a_square_grid_is_resized():
    state_dict = VRWKV(**SMALL | {'img_size': (16, 48)}).state_dict()
    with pytest.raises(RuntimeError, match=r'pos_embed of shape \(1, 12, 12\).*\(4, 4\).*square'):
        VRWKV(**SMALL).load_state_dict(state_dict)
    # The same grid needs no resizing.
    VRWKV(**SMALL | {'img_size': (16, 48)}).load_state_dict(state_dict)


def test_weights_without_layer_scale_fit_a_model_with_it():
    """Tiny is trained without layer scale, and fine-tuned for detection with one of 1."""
    state_dict = randomise(VRWKV(**SMALL)).state_dict()
    model = VRWKV(**SMALL | {'init_values': 1.0})
    missing, unexpected = model.load_state_dict(state_dict, strict=False)
    assert not unexpected
    assert {key.split('.')[-1] for key in missing} == {'gamma1', 'gamma2'}
    plain = VRWKV(**SMALL)
    plain.load_state_dict(state_dict)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(image)[0], plain(image)[0])


def test_strict_loading_still_names_missing_keys():
    state_dict = VRWKV(**SMALL).state_dict()
    del state_dict['layers.1.ffn.key.weight']
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*layers\.1\.ffn\.key\.weight'):
        VRWKV(**SMALL).load_state_dict(state_dict)
