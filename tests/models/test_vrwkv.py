"""The backbone, against upstream's numbers and a float64 reference."""

import re
import subprocess
import sys

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

import vrwkv.backbones.vrwkv
from vrwkv.backbones import VRWKV, ViT

from .vrwkv_reference import SMALL, randomise, reference

VARIANTS = {
    'tiny': {},
    'large': {'post_norm': True, 'key_norm': True, 'init_values': 1e-5},
    'mae': {'shift_mode': 'double_shift', 'key_norm': True, 'init_values': 0.1},
    'rwkv': {'shift_mode': 'single_shift', 'causal': True, 'post_norm': True},
    'no_shift': {'shift_mode': 'none', 'init_mode': 'local'},
    'wide': {'shift_pixel': 2, 'channel_gamma': 1 / 8, 'hidden_rate': 3, 'init_mode': 'global'},
    'deep': {'depth': 3, 'out_indices': (0, 1, -1), 'interpolate_mode': 'bilinear'},
    'no_final_norm': {'final_norm': False},
}


# --- upstream's numbers -------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['cls_tiny', 'cls_large'])
def test_equals_upstream(name, golden):
    numbers = golden(name)
    model = VRWKV(**numbers.config)
    model.load_state_dict(numbers.state_dict, strict=True)
    numbers.check(model(numbers.input), dict(model.named_parameters()))


def test_equals_upstream_classifier(golden):
    """Upstream's other codebase: average pooling and an MLP head, 13 layers."""
    numbers = golden('internimage_large')
    config = dict(numbers.config)
    hidden_dims, num_classes = config.pop('hidden_dims'), config.pop('num_classes')
    backbone = VRWKV(key_norm=config.pop('k_norm'), **config)
    head = nn.Sequential(
        nn.Linear(config['embed_dims'], hidden_dims), nn.Tanh(), nn.Linear(hidden_dims, num_classes)
    )
    model = nn.ModuleDict({'backbone': backbone, 'head': head})
    model.load_state_dict(numbers.state_dict, strict=True)
    (feature,) = backbone(numbers.input)
    numbers.check([head(feature.mean(dim=(2, 3)))], dict(model.named_parameters()))


# --- a plain float64 reference ------------------------------------------------------------------


@pytest.mark.parametrize('size', [(32, 32), (24, 56)])
@pytest.mark.parametrize('variant', VARIANTS)
def test_equals_reference(variant, size):
    """In float64; the non-square images need the position embedding resized."""
    config = SMALL | VARIANTS[variant]
    model = randomise(VRWKV(**config).double())
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    outputs = model(image)
    maps = reference(model.state_dict(), image, config)
    indices = config.get('out_indices', (-1,))
    assert len(outputs) == len(indices)
    for output, index in zip(outputs, indices, strict=True):
        assert output.dtype == torch.float64
        torch.testing.assert_close(output, maps[index], rtol=1e-9, atol=1e-10)


def test_non_square_img_size():
    config = SMALL | {'img_size': (16, 48)}
    model = randomise(VRWKV(**config).double())
    assert model.pos_embed.shape == (1, 2 * 6, 12)
    for size in ((16, 48), (48, 16)):
        image = torch.randn(1, 3, *size, dtype=torch.float64)
        (expected,) = reference(model.state_dict(), image, config)[-1:]
        torch.testing.assert_close(model(image)[0], expected, rtol=1e-9, atol=1e-10)


# --- sizes, outputs, gradients ------------------------------------------------------------------


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    """From the initial weights, not random ones: nothing may start out dead."""
    torch.manual_seed(0)
    model = VRWKV(**SMALL | VARIANTS[variant])
    outputs = model(torch.randn(2, 3, 32, 40))
    sum((o * torch.randn_like(o)).sum() for o in outputs).backward()
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        assert torch.isfinite(param.grad).all(), name
        assert param.grad.any(), name


def test_outputs_come_in_the_order_of_layers():
    model = VRWKV(**SMALL | {'depth': 3, 'out_indices': [-1, 0]}).eval()
    image = torch.randn(1, 3, 32, 32)
    first, last = model(image)
    assert first.is_contiguous() and last.is_contiguous()
    # Only the last one is normalised: zero mean and unit variance over channels.
    assert torch.allclose(last.mean(1), torch.zeros(1, 4, 4), atol=1e-5)
    tokens, resolution = model.embed(image)
    expected = model.layers[0](tokens, resolution)
    assert torch.equal(first, expected.transpose(1, 2).reshape(1, 12, 4, 4))


def test_pixels_beyond_the_last_patch_are_left_out():
    model = randomise(VRWKV(**SMALL))
    image = torch.randn(1, 3, 39, 47)
    assert torch.equal(model(image)[0], model(image[..., :32, :40])[0])


def test_empty_batch():
    assert VRWKV(**SMALL)(torch.zeros(0, 3, 32, 40))[0].shape == (0, 12, 4, 5)


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize('depth', [1, 4])
def test_drop_path_rises_linearly(depth):
    model = VRWKV(**SMALL | {'depth': depth, 'drop_path_rate': 0.3})
    rates = [layer.drop_path.drop_prob for layer in model.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3] if depth == 4 else [0.0])


def test_dropped_layer_passes_its_input_on():
    model = VRWKV(**SMALL | {'drop_path_rate': 1.0, 'final_norm': False, 'out_indices': (0, 1)})
    first, second = model(torch.randn(2, 3, 32, 32))
    assert torch.equal(first, second)
    first, second = model.eval()(torch.randn(2, 3, 32, 32))
    assert not torch.equal(first, second)


def test_drop_rate_acts_on_embedded_tokens():
    model = randomise(VRWKV(**SMALL | {'drop_rate': 1.0}))
    image = torch.randn(1, 3, 32, 32)
    assert not model.embed(image)[0].any()
    assert model.eval().embed(image)[0].all()


@pytest.mark.parametrize('frozen', [False, True])
def test_checkpointing_changes_no_gradient(frozen):
    """Random drop path must repeat in the recomputation, and frozen inputs must not matter."""
    image = torch.randn(3, 3, 32, 40)
    grads = []
    for with_cp in (False, True):
        model = randomise(VRWKV(**SMALL | {'with_cp': with_cp, 'drop_path_rate': 0.5}))
        if frozen:
            model.patch_embed.requires_grad_(False)
            model.pos_embed.requires_grad_(False)
        saved = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            (out,) = model(image)
        out.square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        grads[-1]['count'] = torch.tensor(len(saved))
    plain, recomputed = grads
    assert recomputed.pop('count') < plain.pop('count') / 2
    assert plain.keys() == recomputed.keys()
    for name, grad in plain.items():
        assert torch.equal(grad, recomputed[name]), name


@pytest.mark.parametrize('mode', ['none', 'single_shift'])
@pytest.mark.parametrize('causal', [True, False])
def test_causal_hides_the_future(mode, causal):
    model = randomise(VRWKV(**SMALL | {'causal': causal, 'shift_mode': mode}).double()).eval()
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    changed = image.clone()
    changed[..., 16:, :] = torch.randn(1, 3, 16, 32)
    before, after = model(image)[0], model(changed)[0]
    assert torch.equal(before[:, :, :2], after[:, :, :2]) is causal
    # ... while the past reaches the future.
    changed = image.clone()
    changed[..., :8, :8] = 0
    assert (model(changed)[0][:, :, -1, -1] != before[:, :, -1, -1]).any()


@pytest.mark.parametrize('variant', ['tiny', 'large', 'mae', 'rwkv', 'deep'])
def test_compiles_into_one_graph(variant):
    """Without graph breaks, forward and backward, the checkpointed layers too."""
    torch._dynamo.reset()
    options = {'depth': 1, 'with_cp': variant == 'tiny'} | VARIANTS[variant]
    model = randomise(VRWKV(**SMALL | options))
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    image = torch.randn(2, 3, 32, 40)
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        outputs = run(image)
        sum(o.square().sum() for o in outputs).backward()
        grads.append([o.detach() for o in outputs] + [p.grad for p in model.parameters()])
    for eager, traced in zip(*grads, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-4 * eager.abs().max())


@pytest.mark.parametrize('variant', ['tiny', 'large', 'mae'])
def test_autocast(variant):
    model = randomise(VRWKV(**SMALL | VARIANTS[variant]))
    image = torch.randn(2, 3, 32, 40)
    (expected,) = model(image)
    with torch.autocast('cpu', torch.bfloat16):
        (out,) = model(image)
    # bfloat16 has 8 bits: a few of their half-units after two layers.
    assert ((out - expected).abs().max() / expected.abs().max()).item() < 0.05
    out.float().square().sum().backward()
    for name, param in model.named_parameters():
        assert param.grad.dtype == torch.float32, name
        assert torch.isfinite(param.grad).all(), name


def test_init_leaves_ready_weights():
    """A model works as built; mmengine's ``init_weights`` adds only what ``init_cfg`` asks for."""
    model = VRWKV(**SMALL)
    assert not model.pos_embed.any()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_get_layer_depth():
    model = VRWKV(**SMALL | {'depth': 3})
    expected = {'pos_embed': 0, 'patch_embed.projection.weight': 0, 'ln1.bias': 4}
    expected |= {
        'layers.0.ln0.weight': 1,
        'layers.2.att.key.weight': 3,
        'layers.1.ffn.key.weight': 2,
    }
    for name, depth in expected.items():
        assert model.get_layer_depth(name) == (depth, 5)
        assert model.get_layer_depth('backbone.' + name, prefix='backbone.') == (depth, 5)
    # Names outside the prefix are of what follows the backbone, whatever they look like.
    for name in ('head.fc.weight', 'head.layers.0.weight', 'pos_embed'):
        assert model.get_layer_depth(name, prefix='backbone.') == (4, 5)


def test_torch_alone_is_enough():
    """Without mmengine and mmcv the models run, load and save; ``init_cfg`` has a clear error."""
    code = """
import sys
sys.modules.update(dict.fromkeys(['mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg', 'numpy']))
import torch
import vrwkv.backbones.vrwkv
from vrwkv.backbones import VRWKV, ViT
for cls in (VRWKV, ViT):
    model = cls(img_size=32, depth=1)
    model(torch.zeros(1, 3, 32, 48))[0].sum().backward()
    cls(img_size=64, depth=1).load_state_dict(model.state_dict())
    try:
        cls(depth=1, init_cfg=dict(type='Pretrained', checkpoint='a.pth'))
    except ImportError as error:
        print(error)
"""
    process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("'a.pth'} needs mmengine, which is not installed") == 2


def test_base_is_mmengines_where_it_is_installed():
    assert issubclass(VRWKV, BaseModule)
    assert issubclass(ViT, BaseModule)
    assert not issubclass(vrwkv.backbones.vrwkv.VRWKV, BaseModule)


def test_models_by_name_import_no_openmmlab():
    code = (
        'import sys, vrwkv, vrwkv.backbones as b; vrwkv.create_model("vrwkv-tiny", depth=1); '
        'sys.exit(not {"mmcv", "mmengine"}.isdisjoint(sys.modules) or hasattr(b, "VRWKW"))'
    )
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'shift_mode': 'quad_shift'}, ValueError, "shift_mode .*Did you mean 'q_shift'"),
        ({'init_mode': 'random'}, ValueError, "init_mode .*'fancy', 'local', 'global', got 'ran"),
        ({'interpolate_mode': 'cubic'}, ValueError, "interpolate_mode .*Did you mean 'bicubic'"),
        ({'out_indices': 2}, ValueError, r'out_indices .*\[-2, 1\] for depth=2, got 2'),
        ({'out_indices': (0, -3)}, ValueError, 'out_indices .*got -3'),
        ({'out_indices': (1, -1)}, ValueError, r'out_indices .*once, got \(1, -1\)'),
        ({'out_indices': ()}, ValueError, 'out_indices .*at least one'),
        ({'out_indices': 1.0}, TypeError, 'out_indices .*integers, got 1.0'),
        ({'depth': -1}, ValueError, 'depth must be at least 1, got -1'),
        ({'depth': 2.0}, TypeError, 'depth must be an integer, got 2.0'),
        ({'embed_dims': 3}, ValueError, 'embed_dims=3 is too small'),
        ({'embed_dims': 0}, ValueError, 'embed_dims must be at least 1, got 0'),
        ({'hidden_rate': -4}, ValueError, 'hidden_rate .*got -4'),
        ({'drop_rate': 1.1}, ValueError, r'drop_rate must lie in \[0, 1\], got 1.1'),
        ({'drop_path_rate': -0.1}, ValueError, r'drop_path_rate must lie in \[0, 1\], got -0.1'),
        ({'drop_path_rate': float('nan')}, ValueError, 'drop_path_rate .*got nan'),
        ({'img_size': 7}, ValueError, 'img_size=7 is smaller than patch_size=8'),
        ({'img_size': (32, 4)}, ValueError, r'img_size=\(32, 4\) is smaller'),
        ({'img_size': (32, 32, 32)}, ValueError, r'img_size .*\(height, width\), got \(32, 32, 32'),
        ({'img_size': 32.5}, TypeError, 'img_size must be an integer, got 32.5'),
        ({'patch_size': 0}, ValueError, 'patch_size must be at least 1, got 0'),
        ({'in_channels': '3'}, TypeError, "in_channels must be an integer, got '3'"),
        ({'channel_gamma': 0.5}, ValueError, 'channel_gamma .*got 0.5'),
        ({'shift_pixel': -2}, ValueError, 'shift_pixel .*got -2'),
        ({'init_values': [1]}, TypeError, r'init_values must be a number, got \[1\]'),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error) as caught:
        VRWKV(**SMALL | arguments)
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ('image', 'error', 'message'),
    [
        (torch.zeros(3, 32, 32), ValueError, r'\(B, 3, H, W\), got \(3, 32, 32\)'),
        (torch.zeros(1, 4, 32, 32), ValueError, r'\(B, 3, H, W\), got \(1, 4, 32, 32\)'),
        (torch.zeros(1, 3, 32, 7), ValueError, '8 pixels.*height 32 and width 7'),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, 'floating-point .*torch.uint8'),
    ],
)
def test_bad_images_are_named(image, error, message):
    with pytest.raises(error) as caught:
        VRWKV(**SMALL)(image)
    assert re.search(message, str(caught.value)), str(caught.value)
