"""Vision-RWKV in timm. timm's own tests of all models run by hand, see docs/pytorch.md."""

import importlib
import sys

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from timm.optim import create_optimizer_v2

import vrwkv
import vrwkv.timm
import vrwkv.timm.__main__
from vrwkv.variants import VARIANTS
from vrwkv.weights import CheckpointError

from .vrwkv_reference import randomise

TINY, TINY6, LARGE = 'vrwkv_tiny_patch16_224', 'vrwkv6_tiny_patch16_224', 'vrwkv_large_patch16_384'
SMALL = dict(embed_dims=24, depth=3, img_size=32)
each_family = pytest.mark.parametrize('name', [TINY, TINY6, LARGE])


def create(name=TINY, **kwargs):
    return timm.create_model(name, **SMALL | kwargs)


def images(channels=3):
    return torch.rand(2, channels, 48, 32, generator=torch.Generator().manual_seed(0))


def test_all_sizes_are_registered():
    names = timm.list_pretrained('vrwkv*')
    assert names == [
        'vrwkv6_base_patch16_224.in1k', 'vrwkv6_small_patch16_224.in1k',
        'vrwkv6_tiny_patch16_224.in1k', 'vrwkv_base_patch16_224.in1k',
        'vrwkv_large_patch16_192.in22k', 'vrwkv_large_patch16_384.in22k_ft_in1k',
        'vrwkv_small_patch16_224.in1k', 'vrwkv_tiny_patch16_224.in1k',
    ]  # fmt: skip
    files = {variant.file: variant for variant in VARIANTS.values()}
    for name in names:
        with torch.device('meta'):
            model = timm.create_model(name)
        cfg, variant = model.default_cfg, files.pop(model.default_cfg['hf_hub_filename'])
        assert model.config.items() >= variant.backbone.items()
        assert model.config['family'] == variant.family
        assert cfg['hf_hub_id'] == 'OpenGVLab/Vision-RWKV'
        assert (cfg['mean'], cfg['std']) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert cfg['input_size'] == (3, variant.input_size, variant.input_size)
        assert (cfg['crop_pct'], cfg['interpolation']) == (variant.crop, 'bicubic')
        assert cfg['num_classes'] == variant.num_classes
        parameters = dict(model.named_parameters())
        assert f'{cfg["first_conv"]}.weight' in parameters
        assert parameters[f'{cfg["classifier"]}.weight'] is model.get_classifier().weight


@each_family
def test_forward_in_parts(name):
    model = randomise(create(name, num_classes=5)).eval()
    features = model.forward_features(images())
    assert features.shape == (2, model.num_features, 3, 2) == (2, 24, 3, 2)
    hidden = model.forward_head(features, pre_logits=True)
    assert hidden.shape == (2, model.head_hidden_size) == (2, 3072 if name == LARGE else 24)
    scores = model(images())
    assert torch.equal(model.forward_head(features), scores)
    assert torch.equal(model.get_classifier()(hidden), scores)
    model.reset_classifier(0)
    assert torch.equal(model(images()), hidden)
    model.reset_classifier(7, 'max')
    assert model(images()).shape == (2, 7)
    assert (model.num_classes, model.global_pool) == (7, 'max')
    model.reset_classifier(0, '')
    assert model(images()).shape[2:] == (3, 2)


def test_new_classifier_keeps_dtype_and_mode():
    model = create().bfloat16().eval()
    model.reset_classifier(3)
    assert model.get_classifier().weight.dtype == torch.bfloat16
    assert not model.head.training


def test_global_pool_and_dropout():
    model = randomise(create(num_classes=0)).eval()
    maps = model.forward_features(images())
    pooled = {'avg': maps.mean((2, 3)), 'max': maps.amax((2, 3)), '': maps}
    pooled['avgmax'] = (pooled['avg'] + pooled['max']) / 2
    for name, expected in pooled.items():
        model.reset_classifier(0, name)
        assert torch.equal(model(images()), expected)
        assert create(num_classes=0, global_pool=name).global_pool == name
    model = create(drop_rate=0.3, pos_drop_rate=0.2, drop_path_rate=0.1)
    assert model.head_drop.p == 0.3
    assert model.backbone.drop_after_pos.p == 0.2
    assert [layer.drop_path.drop_prob for layer in model.backbone.layers] == [0, 0.05, 0.1]
    model = create(drop_rate=1.0)
    assert torch.equal(model.train()(images()), model.head.fc.bias.expand(2, -1))


@each_family
def test_intermediates(name):
    model = randomise(create(name)).eval()
    last, maps = model.forward_intermediates(images())
    assert torch.equal(last, model.forward_features(images()))
    assert [value.shape for value in maps] == [(2, 24, 3, 2)] * 3
    with torch.no_grad():
        tokens = [
            model.forward_intermediates(
                images(), [0, -1], norm=True, output_fmt='NLC', intermediates_only=True
            )[-1],
            model.backbone.ln1(maps[-1].flatten(2).transpose(1, 2)),
        ]
    assert torch.allclose(*tokens, atol=1e-6)  # the norm sums over other strides
    assert torch.equal(tokens[0].mT.unflatten(2, (3, 2)), last)
    two = model.forward_intermediates(images(), 2, stop_early=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(two, maps[1:], strict=True))
    _, early = model.forward_intermediates(images(), [0], stop_early=True)
    assert torch.equal(early[0], maps[0])


@each_family
def test_features_only(name):
    whole = randomise(create(name)).eval()
    model = create(name, features_only=True, out_indices=(0, -2)).eval()
    assert model.feature_info.channels() == [24, 24]
    assert model.feature_info.reduction() == [16, 16]
    assert model.feature_info.module_name() == ['backbone.layers.0', 'backbone.layers.1']
    # The last layer, the norm layer and the head are gone.
    assert len(model.model.backbone.layers) == 2
    assert not [key for key in model.state_dict() if 'ln1' in key and 'layers' not in key]
    assert not list(model.model.head.parameters())
    weights = whole.state_dict()
    model.model.load_state_dict({key: weights[key] for key in model.model.state_dict()})
    _, expected = whole.forward_intermediates(images(), [0, 1])
    assert all(torch.equal(a, b) for a, b in zip(model(images()), expected, strict=True))
    assert len(create(name, features_only=True)(images())) == 3


def test_pruned_model_is_whole():
    model = randomise(create()).eval()
    expected = model.forward_intermediates(images(), [1], norm=True, intermediates_only=True)[0]
    assert model.prune_intermediate_layers([1]) == [1]
    assert torch.equal(model(images()), expected)


@each_family
def test_checkpointing_changes_no_gradient(name):
    model = randomise(create(name, num_classes=2))
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert all(layer.with_cp == enable for layer in model.backbone.layers)
        model.zero_grad()
        model(images()).square().sum().backward()
        grads.append([value.grad for value in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_groups_of_parameters():
    model = create()
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    named = {id(value): name for name, value in model.named_parameters()}
    decayed = {
        named[id(value)]
        for group in create_optimizer_v2(model, 'sgd', weight_decay=0.1).param_groups
        for value in group['params']
        if group['weight_decay']
    }
    assert 'backbone.pos_embed' not in decayed
    assert {'backbone.layers.0.att.key.weight', 'head.fc.weight'} <= decayed
    scales = {
        named[id(value)]: group['lr_scale']
        for group in create_optimizer_v2(model, 'sgd', layer_decay=0.5).param_groups
        for value in group['params']
    }
    parameters = {
        'backbone.pos_embed': 0.5**4,
        'backbone.patch_embed.projection.bias': 0.5**4,
        'backbone.layers.0.ln0.weight': 0.5**3,
        'backbone.layers.2.att.key.weight': 0.5,
        'backbone.ln1.weight': 0.5,
        'head.fc.weight': 1,
    }
    assert len(scales) == len(named)
    assert {name: scales[name] for name in parameters} == parameters


@each_family
def test_symbolic_trace(name):
    model = randomise(create(name)).eval()
    traced = create_feature_extractor(model, ['head_drop'])
    expected = model.forward_features(images()).mean((2, 3))
    assert torch.equal(traced(images())['head_drop'], expected)


# --- weights ------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path):
    """A model, and a file of its weights as mmcls writes it, log histories included."""
    model = randomise(vrwkv.create_model('vrwkv-tiny', num_classes=1000, **SMALL)).eval()
    meta = dict(epoch=300, CLASSES=['a', 'b'])
    torch.save(dict(state_dict=model.state_dict(), meta=meta), tmp_path / 'released.pth')
    return model, dict(pretrained=True, pretrained_cfg_overlay=dict(file=tmp_path / 'released.pth'))


def test_pretrained(released):
    model, arguments = released
    assert torch.equal(create(**arguments)(images()), model(images()))
    features = model.forward_features(images())
    other = create(**arguments, num_classes=5)
    assert torch.equal(other.forward_features(images()), features)
    assert other(images()).shape == (2, 5)
    assert torch.equal(create(**arguments, num_classes=0)(images()), features.mean((2, 3)))
    only = create(**arguments, features_only=True, out_indices=[-1])
    assert torch.equal(only(images())[0], model.forward_intermediates(images(), 1)[1][0])
    grey = create(**arguments, in_chans=1).eval()
    expected = model(images(1).expand(-1, 3, -1, -1))
    assert torch.allclose(grey(images(1)), expected, atol=1e-5)  # sums in another order
    large = create(**arguments | dict(img_size=(48, 32)))
    assert large.backbone.pos_embed.shape == (1, 6, 24)
    assert torch.allclose(large(images()), model(images()), atol=1e-5)  # both interpolate once


def test_upstreams_large(golden, tmp_path):
    data = golden('internimage_large')
    torch.save({'model': data.state_dict}, tmp_path / 'large.pth')
    model = timm.create_model(
        LARGE,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=tmp_path / 'large.pth', num_classes=11),
        hidden_dims=24, embed_dims=12, depth=13, img_size=64, init_values=0.1,
    )  # fmt: skip
    error = (model(data.input) - data.outputs[0]).abs().max() / data.outputs[0].abs().max()
    assert error < 2e-5  # as of the golden files


def test_dtype_and_device(released):
    model, arguments = released
    half = create(**arguments, dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        assert torch.equal(half.state_dict()[name], value.bfloat16())
    assert all(value.is_meta for value in create(device='meta').parameters())


@pytest.mark.parametrize('key', [None, 'state_dict', 'model', 'module', 'model_ema'])
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.'])
def test_forms_of_checkpoints(key, prefix):
    model = create()
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    found = vrwkv.timm.checkpoint_filter_fn({key: weights} if key else weights, model)
    assert found.keys() == model.state_dict().keys()


def test_layer_of_a_classifier():
    with pytest.raises(
        ValueError, match=r'out_indices=\(0,\): for maps of layers use features_only'
    ):
        create(out_indices=(0,))


def test_weights_of_another_model(released):
    with pytest.raises(CheckpointError, match='another model, a VRWKV: build a VRWKV'):
        create(TINY6, **released[1])
    with pytest.raises(CheckpointError, match=r'with depth=3 \(here 2\): build the model'):
        create(**released[1] | dict(depth=2))


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize('indices', [[3], [-4], 0, 4, []])
def test_layers_out_of_range(indices):
    with pytest.raises(ValueError, match=r'has 3 layers, so indices must .* \[-3, 2\], got'):
        create().forward_intermediates(images(), indices)


def test_old_or_missing_timm(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(timm, '__version__', '0.9.16')
        with pytest.raises(ImportError, match=r'needs timm 1\.\S+ or newer, but timm 0\.9\.16 is'):
            importlib.reload(vrwkv.timm)
        patch.setitem(sys.modules, 'timm', None)
        with pytest.raises(ImportError, match=r'needs the package timm, .*: pip install timm'):
            importlib.reload(vrwkv.timm)
    importlib.reload(vrwkv.timm)


def test_scripts_have_the_models(tmp_path, monkeypatch, capsys):
    script = tmp_path / 'script.py'
    script.write_text('import sys, beside, timm\nprint(sys.argv[1:], timm.is_model(sys.argv[1]))\n')
    (tmp_path / 'beside.py').touch()
    monkeypatch.setattr(sys, 'path', ['', *sys.path])
    monkeypatch.setattr(sys, 'argv', ['-m', str(script), TINY])
    vrwkv.timm.__main__.main()
    assert capsys.readouterr().out == f"['{TINY}'] True\n"
    monkeypatch.setattr(sys, 'argv', ['-m'])
    with pytest.raises(SystemExit, match=r'usage: python -m vrwkv\.timm SCRIPT'):
        vrwkv.timm.__main__.main()
