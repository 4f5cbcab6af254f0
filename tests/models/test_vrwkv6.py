"""VRWKV6, against upstream's numbers and a float64 reference."""

import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from vrwkv.backbones import VRWKV, VRWKV6
from vrwkv.layers import SpatialMix6
from vrwkv.weights import CheckpointError

from .conftest import GOLDEN_DIR
from .vrwkv_reference import randomise, reference

# Two heads: one cannot tell the per-head shift and group norm from those over all channels.
SMALL = {'img_size': 32, 'patch_size': 8, 'embed_dims': 32, 'num_heads': 2, 'depth': 2}
VARIANTS = {
    'tiny': {},
    'small': {'post_norm': True, 'init_values': 1e-5},
    'key_norm': {'key_norm': True, 'init_values': 0.1, 'hidden_rate': 3},
    'mae': {'shift_mode': 'double_shift'},
    'rwkv': {'shift_mode': 'single_shift', 'num_heads': 4},
    'wide': {'shift_pixel': 2, 'shift_mode': 'q_shift', 'embed_dims': 48, 'num_heads': 1},
    'deep': {'depth': 3, 'out_indices': (0, 1, -1), 'interpolate_mode': 'bilinear'},
    'no_final_norm': {'final_norm': False},
    'no_shift': {'shift_pixel': 0},
}


# --- upstream's numbers -------------------------------------------------------------------------


def test_equals_upstream(golden):
    numbers = golden('vrwkv6_tiny')
    model = VRWKV6(**numbers.config)
    model.load_state_dict(numbers.state_dict, strict=True)
    numbers.check(model(numbers.input), dict(model.named_parameters()))


def test_spatial_mix_equals_upstream(golden):
    numbers = golden('vrwkv6_spatial_mix')
    config = numbers.config
    mix = SpatialMix6(
        config['n_embd'],
        config['n_layer'],
        config['layer_id'],
        num_heads=config['n_head'],
        key_norm=config['key_norm'],
    )
    mix.load_state_dict(numbers.state_dict, strict=True)
    x = numbers.input.requires_grad_()
    numbers.check([mix(x, (5, 7))], {'input': x, **dict(mix.named_parameters())})


def test_initial_values_equal_upstream():
    data = torch.load(GOLDEN_DIR / 'vrwkv6_init.pt', weights_only=True)
    model = VRWKV6(**data['config'])
    parameters = dict(model.named_parameters())
    for name, value in data['values'].items():
        torch.testing.assert_close(parameters.pop(name).data, value, rtol=1e-6, atol=1e-6)
    for name, value in parameters.items():
        if name.endswith(('_w1', '_w2')):
            assert 0.9e-4 < value.abs().max() <= 1e-4
            assert abs(value.mean()) < 5e-6


# --- a plain float64 reference ------------------------------------------------------------------


@pytest.mark.parametrize('size', [(32, 32), (24, 56), (8, 8)])
@pytest.mark.parametrize('variant', VARIANTS)
def test_equals_reference(variant, size):
    config = SMALL | VARIANTS[variant]
    model = randomise(VRWKV6(**config).double())
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    outputs = model(image)
    maps = reference(model.state_dict(), image, config)
    for output, index in zip(outputs, config.get('out_indices', (-1,)), strict=True):
        torch.testing.assert_close(output, maps[index], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('mode', ['q_shift', 'q_shift_multihead'])
def test_a_distance_of_0_is_no_shift(mode):
    """The parameters stay, as upstream's do, and have no effect."""
    models = [
        VRWKV6(**SMALL | arguments).double()
        for arguments in ({'shift_mode': mode, 'shift_pixel': 0}, {'shift_mode': 'none'})
    ]
    assert models[0].state_dict().keys() == VRWKV6(**SMALL).state_dict().keys()
    randomise(models[0])
    models[1].load_state_dict(models[0].state_dict())
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    (first,), (second,) = (model(image) for model in models)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    first.square().sum().backward()
    for name, parameter in models[0].named_parameters():
        unused = '_maa' in name or 'spatial_mix' in name
        assert bool(parameter.grad.any()) is not unused, name


def test_a_token_sees_the_one_before_and_the_one_after_it():
    """Beyond the shift: at a distance of two."""
    mix = randomise(SpatialMix6(32, 2, 0, num_heads=2))
    x = torch.randn(1, 9, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(mix(x, (1, 9))[0, 4].sum(), x)
    assert grad.any(2).all()


# --- sizes, gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('config', 'expected'),
    [
        ({}, 7_641_256),
        ({'embed_dims': 384, 'num_heads': 6, 'init_values': 1e-5, 'post_norm': True}, 27_677_032),
        ({'embed_dims': 768, 'num_heads': 12, 'init_values': 1e-5, 'post_norm': True}, 104_898_280),
    ],
    ids=['tiny', 'small', 'base'],
)
def test_parameter_counts(config, expected):
    """As upstream's, with the classifier's head."""
    with torch.device('meta'):
        model = VRWKV6(**config)
    head = (model.embed_dims + 1) * 1000
    assert sum(p.numel() for p in model.parameters()) + head == expected


@pytest.mark.parametrize('variant', [name for name in VARIANTS if name != 'no_shift'])
def test_every_parameter_gets_a_gradient(variant):
    """From the initial weights, on more tokens than upstream's kernel can train with."""
    torch.manual_seed(0)
    model = VRWKV6(**SMALL | VARIANTS[variant])
    outputs = model(torch.randn(1, 3, 136, 136))
    sum((o * torch.randn_like(o)).sum() for o in outputs).backward()
    for name, param in model.named_parameters():
        assert torch.isfinite(param.grad).all(), name
        assert param.grad.any(), name


def test_autocast():
    torch.manual_seed(0)
    model = randomise(VRWKV6(**SMALL))
    image = torch.randn(2, 3, 32, 40)
    (expected,) = model(image)
    with torch.autocast('cpu', torch.bfloat16):
        (out,) = model(image)
    # bfloat16 has 8 bits: a few of their half-units, 0.002, after two layers. 0.012 was measured.
    assert ((out - expected).norm() / expected.norm()).item() < 0.02
    out.float().square().sum().backward()
    for name, param in model.named_parameters():
        assert param.grad.dtype == torch.float32, name
        assert torch.isfinite(param.grad).all(), name


def test_compiles_into_one_graph_for_all_sizes():
    torch._dynamo.reset()
    model = randomise(VRWKV6(**SMALL | {'depth': 1}))
    counter = CompileCounterWithBackend('eager')
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for size in ((32, 40), (48, 32)):
        image = torch.randn(2, 3, *size)
        grads = []
        for run in (model, compiled):
            model.zero_grad()
            (out,) = run(image)
            out.square().mean().backward()
            grads.append([out.detach(), *(p.grad for p in model.parameters())])
        for eager, traced in zip(*grads, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-4 * eager.abs().max())
    assert counter.frame_count == 1


def test_export_with_dynamic_height_and_width():
    model = randomise(VRWKV6(**SMALL | {'depth': 1})).eval()
    sides = {n: torch.export.Dim(name, min=16, max=4096) for n, name in ((2, 'h'), (3, 'w'))}
    program = torch.export.export(model, (torch.randn(1, 3, 48, 40),), dynamic_shapes=(sides,))
    image = torch.randn(1, 3, 32, 56)
    torch.testing.assert_close(program.module()(image), model(image), rtol=1e-4, atol=1e-5)


# --- loading ------------------------------------------------------------------------------------


@pytest.mark.parametrize('strict', [True, False])
def test_weights_of_the_other_family_are_named(strict):
    config = {**SMALL}
    six, weights = VRWKV6(**config), VRWKV6(**config).state_dict()
    del config['num_heads']
    plain = VRWKV(**config)
    with pytest.raises(CheckpointError, match=r'another model, a VRWKV6: build a VRWKV6 instead'):
        plain.load_state_dict(weights, strict=strict)
    with pytest.raises(CheckpointError, match=r'another model, a VRWKV: build a VRWKV instead'):
        six.load_state_dict(plain.state_dict(), strict=strict)


def test_other_heads_are_named():
    weights = VRWKV6(**SMALL | {'num_heads': 4}).state_dict()
    with pytest.raises(CheckpointError, match=r'of a VRWKV6 with num_heads=4 \(here 2\): build'):
        VRWKV6(**SMALL).load_state_dict(weights, strict=False)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        ({'num_heads': 3}, ValueError, 'num_heads must divide embed_dims=32, got 3'),
        ({'num_heads': 0}, ValueError, 'num_heads must be at least 1, got 0'),
        ({'num_heads': 2.0}, TypeError, 'num_heads must be an integer, got 2.0'),
        ({'num_heads': 8}, ValueError, 'num_heads .*multiple of 8, got 8 heads of 4 channels'),
        ({'embed_dims': 144}, ValueError, 'num_heads .*at most 64 .*got 2 heads of 72'),
        ({'init_mode': 'local'}, ValueError, "init_mode must be one of 'fancy', got 'local'"),
        ({'shift_mode': 'quad_shift'}, ValueError, "shift_mode .*Did you mean 'q_shift'"),
        ({'with_cls_token': True}, TypeError, 'with_cls_token'),
        ({'channel_gamma': 1 / 4}, TypeError, 'channel_gamma'),
        ({'causal': True}, TypeError, 'causal'),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error) as caught:
        VRWKV6(**SMALL | arguments)
    assert re.search(message, str(caught.value)), str(caught.value)


def test_q_shift_needs_a_grid():
    mix = SpatialMix6(32, 2, 0, num_heads=2)
    with pytest.raises(ValueError, match=r'needs .*resolution'):
        mix(torch.zeros(1, 6, 32))
    with pytest.raises(ValueError, match=r'\(2, 2\) has 4 tokens'):
        mix(torch.zeros(1, 6, 32), (2, 2))
