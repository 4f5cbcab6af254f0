"""Loading weights: resized position embeddings, and errors for weights that do not fit."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import ExponentialMovingAverage
from mmengine.runner.checkpoint import load_checkpoint
from mmengine.runner.checkpoint import load_state_dict as mmengine_load_state_dict
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from vrwkv import backbones
from vrwkv.backbones import VRWKV, ViT

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


def test_weights_of_another_family_are_named():
    vit = ViT(img_size=32, patch_size=8, embed_dims=12, depth=2).state_dict()
    with pytest.raises(RuntimeError, match='another model, a ViT'):
        VRWKV(**SMALL).load_state_dict(vit, strict=False)
    with pytest.raises(RuntimeError, match='another model, a VRWKV'):
        ViT(embed_dims=12).load_state_dict(VRWKV(**SMALL).state_dict(), strict=False)


# --- grids of as many tokens --------------------------------------------------------------------

every_backbone = pytest.mark.parametrize(
    'name', ['VRWKV', 'VRWKV6', 'ViT', 'VRWKVAdapter', 'VRWKV6Adapter', 'ViTAdapter']
)


def backbone(name, height, width):
    """A small backbone of that many patches, with a random position embedding."""
    arguments = dict(img_size=(16 * height, 16 * width), embed_dims=12, depth=4)
    if 'VRWKV6' in name:
        arguments |= dict(embed_dims=24, num_heads=1)
    if 'Adapter' in name:
        arguments |= dict(conv_inplane=4, deform_num_heads=3, norm_cfg=dict(type='BN'))
    model = getattr(backbones, name)(**arguments)
    nn.init.normal_(model.pos_embed)
    return model


def resized(model, target):
    """The position embedding on another grid; a ViT's first token is the class token's slot."""
    slot, grid = model.pos_embed.data.split([int(isinstance(model, ViT)), 16], dim=1)
    grid = grid.unflatten(1, model.patch_resolution).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=target, mode='bicubic', align_corners=False)
    return torch.cat([slot, grid.flatten(2).transpose(1, 2)], dim=1)


@every_backbone
@pytest.mark.parametrize(
    ('source', 'target'),
    [((4, 4), (2, 8)), ((2, 8), (4, 4)), ((2, 8), (8, 2)), ((2, 8), (3, 5)), ((2, 8), (2, 2))],
)
def test_grids_are_compared_and_not_counts(name, source, target):
    given, model = backbone(name, *source), backbone(name, *target)
    with warnings.catch_warnings():
        # Released weights record no grid, and weights of 4 x 4 look like them.
        warnings.simplefilter('ignore' if source == (4, 4) else 'error')
        model.load_state_dict(given.state_dict(), strict=True)
    assert torch.equal(model.pos_embed, resized(given, target))


@every_backbone
@every_way
def test_own_weights_of_a_grid_that_is_not_square_stay(load, name, path):
    given, model = backbone(name, 2, 8), backbone(name, 2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load(model, given.state_dict(), path)
    for key, value in model.named_parameters():
        assert torch.equal(value, given.get_parameter(key)), key


@pytest.mark.parametrize('wrapper', ['ema', 'parallel'])
def test_wrappers_keep_the_grid(wrapper, path):
    given, model = backbone('VRWKV', 2, 8), backbone('VRWKV', 2, 8)
    wrapped = nn.DataParallel(given)
    if wrapper == 'ema':
        wrapped = ExponentialMovingAverage(given, update_buffers=True)
        wrapped.update_parameters(given)
    torch.save(wrapped.state_dict(), path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_checkpoint(model, str(path), map_location='cpu')
    assert torch.equal(model.pos_embed, given.pos_embed)


def test_some_of_its_own_weights():
    """A state dict of a part of the model, such as of the trained parameters alone, loads."""
    given, model = randomise(VRWKV(**SMALL), seed=1), VRWKV(**SMALL)
    before = model.layers[0].att.key.weight.clone()
    part = {k: v for k, v in given.state_dict().items() if k.startswith('layers.1.')}
    model.load_state_dict(part, strict=False)
    assert torch.equal(model.layers[1].att.key.weight, given.layers[1].att.key.weight)
    assert torch.equal(model.layers[0].att.key.weight, before)
    other = VRWKV(**SMALL | {'embed_dims': 24}).state_dict()
    with pytest.raises(
        RuntimeError, match=r'embed_dims=24|of shape \(24'
    ):  # mmengine would only log it
        by_mmengine(model, {key: other[key] for key in part}, None)


def test_wrapped_layers():
    given, model = randomise(VRWKV(**SMALL), seed=1), VRWKV(**SMALL)
    for backbone_ in (given, model):
        backbone_.layers[0] = torch.compile(backbone_.layers[0])
    model.load_state_dict(given.state_dict())
    for key, value in model.named_parameters():
        assert torch.equal(value, given.get_parameter(key)), key


def test_distributed_checkpoints():
    given, model = (nn.Sequential(backbone('VRWKV', 2, 8)) for _ in range(2))
    set_model_state_dict(model, get_model_state_dict(given))
    assert torch.equal(model[0].pos_embed, given[0].pos_embed)


@every_backbone
def test_a_square_grid_is_not_recorded(name):
    """The names are upstream's, all of them."""
    model = backbone(name, 4, 4)
    buffers = dict(model.named_buffers())
    assert model.state_dict().keys() == dict(model.named_parameters()).keys() | buffers.keys()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        backbone(name, 4, 4).load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize('name', ['VRWKV', 'ViT'])
def test_a_grid_that_is_not_recorded_is_reported(name):
    """Taken to be square if it can be, and else to be the model's own."""
    given, model = backbone(name, 2, 8), backbone(name, 2, 8)
    weights = given.state_dict()
    del weights['pos_embed_grid']
    with pytest.warns(UserWarning, match=r"4 x 4; .*2 x 8\. .*'pos_embed_grid': torch\.tensor"):
        model.load_state_dict(weights)
    given.patch_resolution = (4, 4)
    assert torch.equal(model.pos_embed, resized(given, (2, 8)))

    given, model = backbone(name, 2, 6), backbone(name, 2, 6)
    weights = given.state_dict()
    del weights['pos_embed_grid']
    with pytest.warns(UserWarning, match='taken to be a grid of 2 x 6'):
        model.load_state_dict(weights)
    assert torch.equal(model.pos_embed, given.pos_embed)
    with pytest.raises(RuntimeError, match=r'pos_embed of shape.*\(4, 4\).*must be square'):
        backbone(name, 4, 4).load_state_dict(weights)
    weights['pos_embed_grid'] = torch.tensor([3, 5])
    with pytest.raises(RuntimeError, match=r'= \(3, 5\) is not the grid of 12 tokens'):
        backbone(name, 4, 4).load_state_dict(weights)


# --- strictness ---------------------------------------------------------------------------------


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
