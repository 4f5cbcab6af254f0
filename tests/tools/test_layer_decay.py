"""Layer-wise decay of the learning rate, against rates worked out by hand."""

import pytest
from mmengine.optim import build_optim_wrapper
from torch import nn

import vrwkv.engine  # noqa: F401
from vrwkv.backbones import VRWKV


class Model(nn.Module):
    """A backbone of three layers and a head, as in all three libraries."""

    def __init__(self):
        super().__init__()
        self.backbone = VRWKV(img_size=32, embed_dims=8, depth=3, out_indices=[2], init_values=1.0)
        self.head = nn.Linear(8, 2)


def groups(model, **paramwise_cfg):
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
            constructor='LayerDecayOptimWrapperConstructor',
            paramwise_cfg=paramwise_cfg,
        ),
    )
    return wrapper.optimizer.param_groups


def settings(model, **paramwise_cfg):
    names = {param: name for name, param in model.named_parameters()}
    return {
        names[param]: (group['lr'], group['weight_decay'])
        for group in groups(model, **paramwise_cfg)
        for param in group['params']
    }


def test_rates_and_weight_decay():
    found = settings(Model(), layer_decay_rate=0.5)
    expected = {
        'backbone.pos_embed': (0.0625, 0.05),  # depth 0 of 0 ... 4
        'backbone.patch_embed.projection.weight': (0.0625, 0.05),
        'backbone.patch_embed.projection.bias': (0.0625, 0.0),
        'backbone.layers.0.ln0.weight': (0.125, 0.0),
        'backbone.layers.0.att.key.weight': (0.125, 0.05),
        'backbone.layers.1.att.spatial_decay': (0.25, 0.0),  # 1-d
        'backbone.layers.1.gamma1': (0.25, 0.0),
        'backbone.layers.1.ffn.spatial_mix_k': (0.25, 0.05),  # of shape (1, 1, C)
        'backbone.layers.2.ffn.value.weight': (0.5, 0.05),
        'backbone.ln1.weight': (1.0, 0.0),
        'head.weight': (1.0, 0.05),
        'head.bias': (1.0, 0.0),
    }
    assert {name: found[name] for name in expected} == expected


def test_every_parameter_once_in_few_groups():
    model = Model()
    found = groups(model, layer_decay_rate=0.5)
    params = [param for group in found for param in group['params']]
    assert len(params) == len(set(params)) == len(list(model.parameters()))
    assert len(found) == 10  # five depths, with weight decay or without
    assert sum(len(g['params']) for g in found if g['weight_decay'] == 0.0) == sum(
        param.ndim == 1 for param in model.parameters()
    )


def test_paramwise_options_of_mmengine():
    found = settings(
        Model(), layer_decay_rate=0.5, flat_decay_mult=1.0, custom_keys=dict(head=dict(lr_mult=10))
    )
    assert found['backbone.layers.1.gamma1'] == (0.25, 0.05)
    assert found['head.weight'] == (10.0, 0.05)


def test_depths_of_another_librarys_backbone():
    from mmpretrain.models import VisionTransformer

    model = nn.Module()
    model.backbone = VisionTransformer(
        dict(embed_dims=8, num_layers=2, num_heads=2, feedforward_channels=8), img_size=32
    )
    found = settings(model, layer_decay_rate=0.5)
    assert found['backbone.cls_token'][0] == 0.125
    assert found['backbone.layers.0.attn.qkv.weight'][0] == 0.25
    assert found['backbone.layers.1.attn.qkv.weight'][0] == 0.5


def test_default_rate_and_weight_decay_of_the_optimizer():
    """AdamW's are 1e-3 and 1e-2."""
    wrapper = build_optim_wrapper(
        Model(),
        dict(
            optimizer=dict(type='AdamW'),
            constructor='LayerDecayOptimWrapperConstructor',
            paramwise_cfg=dict(layer_decay_rate=0.5, custom_keys=dict(head=dict(lr_mult=10))),
        ),
    )
    found = {(group['lr'], group['weight_decay']) for group in wrapper.optimizer.param_groups}
    layers = {(1e-3 * 0.5**power, decay) for power in range(1, 5) for decay in (0.0, 1e-2)}
    assert found == {*layers, (1e-3, 0.0), (1e-2, 1e-2)}  # the last norm, the head


def test_optimizer_without_a_rate():
    with pytest.raises(ValueError, match=r'this optimizer has none: set lr .*Adafactor'):
        build_optim_wrapper(
            Model(),
            dict(
                optimizer=dict(type='Adafactor', lr=None),
                constructor='LayerDecayOptimWrapperConstructor',
                paramwise_cfg=dict(layer_decay_rate=0.5),
            ),
        )


@pytest.mark.parametrize('rate', [None, 0, 1.5, '0.9'])
def test_wrong_rate(rate):
    with pytest.raises(ValueError, match=r'layer_decay_rate above 0 and at most 1.*got'):
        groups(Model(), layer_decay_rate=rate)


def test_backbone_without_depths():
    with pytest.raises(ValueError, match='no module of Linear has a get_layer_depth method'):
        groups(nn.Linear(2, 2), layer_decay_rate=0.9)
