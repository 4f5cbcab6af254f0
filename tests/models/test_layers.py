"""The layers, against loops per token and values computed by hand."""

import math
import re

import pytest
import torch
import torch.nn.functional as F

from vrwkv import backbones
from vrwkv.layers import (
    ChannelMix,
    DropPath,
    PatchEmbed,
    SpatialMix,
    TokenShift,
    pieces,
    resize_pos_embed,
    vrwkv_layer,
)


def shifted(shift, x, resolution=None):
    """A mix of 0 leaves the neighbour alone."""
    (out,) = shift(x, (torch.zeros(1, 1, x.shape[2]),), resolution)
    return out


@pytest.mark.parametrize('mode', ['single_shift', 'double_shift'])
def test_one_dimensional_shifts_need_no_grid(mode):
    x = torch.randn(1, 7, 8)
    shift = TokenShift(8, mode)
    assert torch.equal(shifted(shift, x), shifted(shift, x, (7, 1)))


def test_double_shift_is_q_shift_on_one_row():
    """Fine-tuning turns from one to the other: a row of tokens must mean the same to both."""
    x = torch.randn(2, 9, 10)
    double = shifted(TokenShift(10, 'double_shift'), x)
    quad = shifted(TokenShift(10, 'q_shift'), x, (1, 9))
    assert torch.equal(double[..., :5], quad[..., :5])
    assert torch.equal(double[..., 5:], x[..., 5:])


def test_single_shift_ignores_channel_gamma():
    x = torch.randn(1, 4, 3)
    out = shifted(TokenShift(3, 'single_shift', channel_gamma=None), x)
    assert torch.equal(out[:, 1:], x[:, :-1])
    assert not out[:, 0].any()


def test_mix_weighs_token_and_neighbour():
    x = torch.tensor([[[1.0, 10.0], [2.0, 20.0]]])
    mix = torch.tensor([[[0.25, 1.0]]])
    (out,) = TokenShift(2, 'single_shift')(x, (mix,))
    # Channel 0 takes a quarter of itself and three quarters of the one before; channel 1 itself.
    assert out.tolist() == [[[0.25, 10.0], [1.25, 20.0]]]


@pytest.mark.parametrize('arguments', [{'shift_mode': 'none'}, {'shift_pixel': 0}])
def test_no_shift_has_no_mixes(arguments):
    layer = vrwkv_layer(8, depth=2, layer_id=0, **arguments)
    assert not [name for name, _ in layer.named_parameters() if 'spatial_mix' in name]
    # Every token then goes through the channel mix alone.
    x = torch.randn(1, 6, 8)
    assert torch.allclose(layer.ffn(x)[:, 3:4], layer.ffn(x[:, 3:4]))


def fancy(depth, layer_id, channels):
    """Compute the initial values by the design's formulas, in plain Python."""
    r = layer_id / (depth - 1) if depth > 1 else 0.0
    s = 1 - layer_id / depth
    x = [c / channels for c in range(channels)]
    ramp = [c / (channels - 1) if channels > 1 else 0.0 for c in range(channels)]
    return {
        'att.spatial_decay': [-5 + 8 * c ** (0.7 + 1.3 * r) for c in ramp],
        'att.spatial_first': [math.log(0.3) + 0.5 * ((c + 1) % 3 - 1) for c in range(channels)],
        'att.spatial_mix_k': [c**s for c in x],
        'att.spatial_mix_v': [c**s + 0.3 * r for c in x],
        'att.spatial_mix_r': [c ** (s / 2) for c in x],
        'ffn.spatial_mix_k': [c**s for c in x],
        'ffn.spatial_mix_r': [c**s for c in x],
    }


@pytest.mark.parametrize(
    ('depth', 'layer_id', 'channels'), [(3, 0, 8), (3, 1, 8), (3, 2, 8), (1, 0, 8), (12, 7, 1)]
)
def test_fancy_init_equals_formulas(depth, layer_id, channels):
    layer = vrwkv_layer(channels, depth, layer_id, shift_mode='single_shift')
    params = dict(layer.named_parameters())
    for name, values in fancy(depth, layer_id, channels).items():
        torch.testing.assert_close(params[name].flatten(), torch.tensor(values))


def test_fancy_init_equals_values_by_hand():
    """Layer 1 of 3 and 4 channels: r = 1/2, s = 2/3."""
    att = SpatialMix(4, depth=3, layer_id=1)
    # (c/3)^1.35 is 0, 0.226927, 0.578464, 1.
    expected = torch.tensor([-5.0, -3.18458, -0.37229, 3.0])
    torch.testing.assert_close(att.spatial_decay.data, expected, rtol=0, atol=2e-5)
    # log 0.3 is -1.20397; (c+1) mod 3 is 1, 2, 0, 1.
    expected = torch.tensor([-1.20397, -0.70397, -1.70397, -1.20397])
    torch.testing.assert_close(att.spatial_first.data, expected, rtol=0, atol=1e-5)
    # (c/4)^(2/3) is 0, 0.39685, 0.62996, 0.82548.
    expected = torch.tensor([0.15, 0.54685, 0.77996, 0.97548])
    torch.testing.assert_close(att.spatial_mix_v.data.flatten(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ('init_mode', 'decay', 'first', 'mix'), [('local', 1, 1, 1), ('global', 0, 0, 0.5)]
)
def test_constant_inits(init_mode, decay, first, mix):
    layer = vrwkv_layer(8, depth=2, layer_id=1, init_mode=init_mode)
    for name, value in layer.named_parameters():
        if name.endswith('spatial_decay'):
            assert (value == decay).all()
        elif name.endswith('spatial_first'):
            assert (value == first).all()
        elif 'spatial_mix' in name:
            assert (value == mix).all()


@pytest.mark.parametrize('init_mode', ['fancy', 'local', 'global'])
def test_linears_start_normal_002(init_mode):
    torch.manual_seed(0)
    layer = vrwkv_layer(64, depth=2, layer_id=0, init_mode=init_mode)
    linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(linears) == {f'att.{name}' for name in ('key', 'value', 'receptance', 'output')} | {
        f'ffn.{name}' for name in ('key', 'value', 'receptance')
    }
    for linear in linears.values():
        assert linear.bias is None
        # 4096 values: the deviation's own standard error is 1.1 %, the mean's 3e-4.
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.06)
        assert abs(linear.weight.mean().item()) < 1.5e-3


def test_layer_scale_starts_at_init_values():
    layer = vrwkv_layer(8, depth=2, layer_id=0, init_values=1e-5)
    assert (layer.gamma1 == 1e-5).all()
    assert (layer.gamma2 == 1e-5).all()
    assert vrwkv_layer(8, depth=2, layer_id=0).gamma1 is None


def test_drop_path_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    out = drop(torch.ones(4000, 3, 2))
    kept = out[:, 0, 0] != 0
    assert (out == torch.where(kept, 1 / 0.75, 0.0)[:, None, None]).all()
    # 4000 draws with probability 0.75: four standard errors are 0.027.
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.027)
    x = torch.randn(5, 3, 2)
    assert torch.equal(drop.eval()(x), x)


def test_drop_path_of_everything_is_zero():
    assert not DropPath(1.0)(torch.ones(4, 3)).any()


@pytest.mark.parametrize('mode', ['bicubic', 'bilinear'])
@pytest.mark.parametrize('target', [(4, 7), (2, 2), (9, 3)])
def test_resize_pos_embed_equals_interpolate(mode, target):
    pos = torch.randn(1, 12, 5, dtype=torch.float64)
    image = pos.reshape(1, 3, 4, 5).permute(0, 3, 1, 2)
    expected = F.interpolate(image, size=target, mode=mode, align_corners=False)
    out = resize_pos_embed(pos, (3, 4), target, mode)
    assert torch.equal(out, expected.permute(0, 2, 3, 1).reshape(1, -1, 5))


def test_resize_pos_embed_keeps_equal_grid_and_dtype():
    pos = torch.randn(1, 12, 5, dtype=torch.bfloat16)
    assert resize_pos_embed(pos, (3, 4), (3, 4)) is pos
    out = resize_pos_embed(pos, (3, 4), (6, 6))
    assert out.dtype == torch.bfloat16
    # The interpolation itself is done in float32, so only the result is rounded.
    assert torch.equal(out, resize_pos_embed(pos.float(), (3, 4), (6, 6)).bfloat16())


def test_patch_embed_is_row_major():
    embed = PatchEmbed(in_channels=1, embed_dims=1, patch_size=2)
    torch.nn.init.constant_(embed.projection.weight, 0.25)
    torch.nn.init.zeros_(embed.projection.bias)
    image = torch.tensor([[0, 1, 2], [3, 4, 5]]).float().repeat_interleave(2, 0)
    tokens, resolution = embed(image.repeat_interleave(2, 1)[None, None])
    assert resolution == (2, 3)
    assert tokens.flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ('build', 'error', 'message'),
    [
        (lambda: TokenShift(8, 'qshift'), ValueError, "shift_mode.*'q_shift'.*'qshift'.*Did you"),
        (lambda: TokenShift(8, None), ValueError, "shift_mode must be one of 'none', .*got None"),
        (lambda: TokenShift(8, shift_pixel=-1), ValueError, 'shift_pixel .*at least 0, got -1'),
        (lambda: TokenShift(8, shift_pixel=0.5), TypeError, 'shift_pixel .*integer, got 0.5'),
        (lambda: TokenShift(3), ValueError, 'embed_dims=3 is too small .*at least .* = 4'),
        (lambda: TokenShift(3, 'double_shift'), ValueError, 'embed_dims=3 is too small'),
        (lambda: TokenShift(8, channel_gamma=0.3), ValueError, r'channel_gamma .*\(0, 1/4\].*0.3'),
        (lambda: TokenShift(8, channel_gamma=0), ValueError, r'channel_gamma .*\(0, 1/4\], got 0'),
        (lambda: TokenShift(8, channel_gamma=None), TypeError, 'channel_gamma .*number, got None'),
        (
            lambda: TokenShift(8, num_heads=3),
            ValueError,
            'num_heads must divide embed_dims=8, got 3',
        ),
        (lambda: TokenShift(8, num_heads=4), ValueError, 'embed_dims=2 is too small'),
        (lambda: DropPath(1.5), ValueError, r'drop_prob .*\[0, 1\], got 1.5'),
        (lambda: DropPath('a'), TypeError, "drop_prob .*number, got 'a'"),
        (lambda: SpatialMix(8, 2, 0, init_mode='fanzy'), ValueError, "init_mode.*mean 'fancy'"),
        (lambda: ChannelMix(8, 2, 0, hidden_rate=0), ValueError, 'hidden_rate .*got 0'),
        (lambda: ChannelMix(8, 2, 0, hidden_rate='4'), TypeError, "hidden_rate .*got '4'"),
        (lambda: vrwkv_layer(8, 2, 0, init_values='1'), TypeError, "init_values .*got '1'"),
        (
            lambda: resize_pos_embed(torch.zeros(1, 11, 3), (3, 4), (6, 6)),
            ValueError,
            r'pos_embed .*\(1, 3 \* 4, C\).*got \(1, 11, 3\)',
        ),
        (
            lambda: vrwkv_layer(8, 2, 0)(torch.zeros(1, 4, 8)),
            ValueError,
            "shift_mode='q_shift' needs .*resolution.*got None.*'double_shift'",
        ),
        (
            lambda: vrwkv_layer(8, 2, 0)(torch.zeros(1, 4, 8), (2, 3)),
            ValueError,
            r'\(2, 3\).*6 tokens.*T = 4',
        ),
    ],
)
def test_bad_arguments_are_named(build, error, message):
    with pytest.raises(error) as caught:
        build()
    assert re.search(message, str(caught.value)), str(caught.value)


# --- inference in pieces ------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments',
    [
        dict(kind='VRWKV'),
        dict(kind='VRWKV', key_norm=True, post_norm=True, init_values=0.5),
        dict(kind='VRWKV', shift_pixel=2),
        dict(kind='VRWKV', shift_mode='double_shift', shift_pixel=3),
        dict(kind='VRWKV6', num_heads=2, key_norm=True),
    ],
)
def test_pieces_of_tokens_change_nothing(arguments, monkeypatch):
    """Two images of 18 x 7 patches, in strips of rows and the rows around them for the shift."""
    arguments = dict(arguments)
    torch.manual_seed(0)
    model = getattr(backbones, arguments.pop('kind'))(
        img_size=32, patch_size=4, embed_dims=32, depth=2, **arguments
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    images = torch.randn(2, 3, 74, 29)
    expected = model(images)[0]  # with gradients: all tokens at once
    sizes = []
    monkeypatch.setattr(pieces, 'CPU_TOKENS', 8)
    for module in (model.patch_embed.projection, model.layers[1].ffn.key):
        module.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[1:]))
    with torch.no_grad():
        found = model(images)[0]
    step = arguments.get('shift_pixel', 1)
    if arguments.get('shift_mode') == 'double_shift':  # a token is a row
        ffn = [(12, 32)] * 10 + [(6, 32)]
    else:
        ffn = [(min(4 * step, 18 - top) * 7, 32) for top in range(0, 18, 4 * step)]
    assert sizes == [(3, 4, 29)] * 18 + 2 * ffn
    # Products of matrices of other sizes may sum in another order: a few roundings.
    assert torch.allclose(found, expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_pieces_of_several_images_change_nothing(monkeypatch):
    """Five images of 16 tokens, two in a piece."""
    model = backbones.VRWKV(img_size=32, patch_size=8, embed_dims=16, depth=1).eval()
    images = torch.randn(5, 3, 32, 32)
    expected = model(images)[0]
    monkeypatch.setattr(pieces, 'CPU_TOKENS', 40)
    with torch.no_grad():
        found = model(images)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * expected.abs().max().item())
