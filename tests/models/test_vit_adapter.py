"""The plain ViT and its adapter, against torch's own transformer layer and by hand."""

import pytest
import torch
from torch import nn

from vrwkv.backbones import ViT, ViTAdapter
from vrwkv.backbones.vit import Attention, ViTLayer

SMALL = dict(img_size=64, embed_dims=24, depth=4, num_heads=3, init_values=1.0)
ADAPTER = SMALL | dict(
    conv_inplane=8,
    n_points=2,
    deform_num_heads=3,
    init_values_inject=0.5,
    window_size=3,
    window_block_indexes=(0, 2),
    norm_cfg=dict(type='BN'),
)


def torch_layer(layer):
    """Torch's pre-norm layer with the same weights; layer scale folded into the projections."""
    dims = layer.ln1.normalized_shape[0]
    twin = nn.TransformerEncoderLayer(
        dims,
        layer.attn.num_heads,
        layer.ffn.layers[1].in_features,
        dropout=0,
        activation='gelu',
        layer_norm_eps=1e-6,
        batch_first=True,
        norm_first=True,
        dtype=torch.float64,
    )
    with torch.no_grad():
        for ours, theirs in ((layer.ln1, twin.norm1), (layer.ln2, twin.norm2)):
            theirs.load_state_dict(ours.state_dict())
        twin.self_attn.in_proj_weight.copy_(layer.attn.qkv.weight)
        twin.self_attn.in_proj_bias.copy_(layer.attn.qkv.bias)
        twin.linear1.load_state_dict(layer.ffn.layers[0][0].state_dict())
        for ours, theirs, gamma in (
            (layer.attn.proj, twin.self_attn.out_proj, layer.gamma1),
            (layer.ffn.layers[1], twin.linear2, layer.gamma2),
        ):
            theirs.weight.copy_(gamma[:, None] * ours.weight)
            theirs.bias.copy_(gamma * ours.bias)
    return twin


def random_layer(window_size=None):
    torch.manual_seed(0)
    layer = ViTLayer(24, 3, init_values=1.0, window_size=window_size).double()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def test_layer_equals_torchs():
    layer = random_layer()
    x = torch.randn(2, 15, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x, (3, 5)), torch_layer(layer)(x))


def test_window_attention_equals_torchs_layer_on_each_window():
    layer = random_layer(window_size=2)
    twin = torch_layer(layer)
    x = torch.randn(2, 24, 24, dtype=torch.float64)
    out = layer(x, (4, 6)).reshape(2, 4, 6, 24)
    image = x.reshape(2, 4, 6, 24)
    for top in (0, 2):
        for left in (0, 2, 4):
            window = image[:, top : top + 2, left : left + 2]
            expected = twin(window.reshape(2, 4, 24)).reshape(2, 2, 2, 24)
            torch.testing.assert_close(out[:, top : top + 2, left : left + 2], expected)


def test_window_attention_pads_with_zero_keys_and_values():
    """A 2x3 image in one window of 3x3: three keys and values are zero."""
    torch.manual_seed(0)
    attention = Attention(4, 1, window_size=3).double()
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    weights = (q @ k.transpose(1, 2) / 2).exp()
    expected = weights @ v / (weights.sum(-1, keepdim=True) + 3 * 1)
    torch.testing.assert_close(attention(x, (2, 3)), attention.proj(expected))


def test_vit_forward():
    model = ViT(**SMALL, window_size=2, window_block_indexes=[1])
    assert [layer.attn.window_size for layer in model.layers] == [None, 2, None, None]
    x = 1e-3 * torch.randn(2, 3, 48, 80)
    (out,) = model(x)
    assert out.shape == (2, 24, 3, 5)
    assert out.is_contiguous()
    model.ln1 = None
    (raw,) = model(x)
    expected = nn.functional.layer_norm(raw.movedim(1, -1), (24,), eps=1e-6).movedim(-1, 1)
    torch.testing.assert_close(out, expected)


def test_drop_path_rises_linearly():
    model = ViT(**SMALL, drop_path_rate=0.3)
    rates = [layer.drop_path.drop_prob for layer in model.layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


def test_position_embedding_skips_the_class_token_slot():
    model = ViT(**SMALL)
    nn.init.zeros_(model.patch_embed.projection.weight)
    nn.init.zeros_(model.patch_embed.projection.bias)
    tokens, resolution = model.embed(torch.randn(1, 3, 64, 64))
    assert resolution == (4, 4)
    assert tokens.equal(model.pos_embed[:, 1:])


@pytest.mark.parametrize(('size', 'fuse'), [((64, 96), 'last'), ((32, 256), 'stages')])
def test_adapter_trains(size, fuse):
    torch.manual_seed(0)
    model = ViTAdapter(**ADAPTER, fuse=fuse, drop_path_rate=0.1)
    outputs = model(torch.randn(2, 3, *size))
    assert [o.shape for o in outputs] == [
        (2, 24, size[0] // s, size[1] // s) for s in (4, 8, 16, 32)
    ]
    sum(o.square().mean() for o in outputs).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    # The class token's slot is there for the weights' sake only.
    assert not model.pos_embed.grad[:, 0].any()
    assert model.pos_embed.grad[:, 1:].any()


def test_with_cp_recomputes_and_gives_the_same_numbers():
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = ViTAdapter(**ADAPTER, with_cp=with_cp, drop_path_rate=0.5)
        calls = []
        for layer in model.layers:
            layer.attn.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        outputs = model(torch.randn(2, 3, 64, 64))
        sum(o.square().mean() for o in outputs).backward()
        assert len(calls) == (8 if with_cp else 4)
        results.append((outputs, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_layer_depth_and_freezing():
    model = ViTAdapter(**ADAPTER, frozen_stages=1)
    assert model.get_layer_depth('backbone.layers.2.attn.qkv.weight', 'backbone.') == (3, 6)
    assert model.get_layer_depth('backbone.pos_embed', 'backbone.') == (0, 6)
    assert model.get_layer_depth('backbone.level_embed', 'backbone.') == (5, 6)
    assert not any(p.requires_grad for p in model.layers[0].parameters())
    assert all(p.requires_grad for p in model.layers[1].parameters())


def test_loads_mmpretrain_weights():
    """Of another image size, with a class token, and under mmpretrain's names."""
    from mmpretrain.models import VisionTransformer

    torch.manual_seed(0)
    theirs = VisionTransformer(
        arch=dict(embed_dims=24, num_layers=4, num_heads=3, feedforward_channels=96),
        img_size=96,
        patch_size=16,
    )
    theirs.init_weights()
    model = ViT(**SMALL)
    keys = model.load_state_dict(theirs.state_dict(), strict=False)
    assert keys.unexpected_keys == ['cls_token']
    assert all('gamma' in key for key in keys.missing_keys)
    grid = theirs.pos_embed[:, 1:].reshape(1, 6, 6, 24).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(4, 4), mode='bicubic', align_corners=False)
    torch.testing.assert_close(model.pos_embed[:, 1:], grid.flatten(2).transpose(1, 2))
    assert model.pos_embed[:, :1].equal(theirs.pos_embed[:, :1])
    x = torch.randn(2, 9, 24)
    torch.testing.assert_close(model.layers[1](x, (3, 3)), theirs.layers[1](x))


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        (dict(num_heads=5), ValueError, 'num_heads must divide embed_dims=24, got 5'),
        (dict(window_block_indexes=[4]), ValueError, r'must lie in \[0, 3\] for depth=4'),
        (dict(window_size=0), ValueError, 'window_size must be at least 1'),
        (dict(drop_path_rate=2), ValueError, 'drop_path_rate must lie in'),
        (dict(mlp_ratio=0), ValueError, 'mlp_ratio must leave at least one hidden channel'),
    ],
)
def test_wrong_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        ViT(**(SMALL | kwargs))


@pytest.mark.parametrize(
    ('other', 'message'),
    [
        (dict(embed_dims=48), r'of a ViT with embed_dims=48 \(here 24\)'),
        (dict(depth=3), r'of a ViT with depth=3 \(here 4\)'),
        (dict(mlp_ratio=2), r'of a ViT with mlp_ratio=2\.0 \(here 4\.0\)'),
        (None, r"no weights of ViT in the state dict: there is no 'layers\.0\.attn\.qkv"),
    ],
)
def test_refuses_another_models_weights(other, message):
    state_dict = ViT(**(SMALL | other)).state_dict() if other else {'fc.weight': 1}
    with pytest.raises(RuntimeError, match=message):
        ViT(**SMALL).load_state_dict(state_dict, strict=False)
