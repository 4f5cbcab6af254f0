"""Masked pre-training: encoder and decoder against upstream's numbers and against MAE's rules."""

import argparse
import math
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint, load_state_dict
from mmpretrain.models.selfsup.mae import MAE
from mmpretrain.registry import MODELS
from torch import nn

from vrwkv.backbones import VRWKV, VRWKV6
from vrwkv.weights import from_upstream_mae
from vrwkv_cls.mae import MAEVRWKV, FrozenVRWKV, MAEVRWKVDecoder

ROOT = Path(__file__).resolve().parents[2]
# float32 numbers of a dense float32 Bi-WKV.
TOLERANCE = 2e-5


def build(encoder=None, decoder=None, norm_pix=False):
    """Build mmpretrain's MAE around a small encoder and decoder."""
    layers = dict(init_values=0.1, post_norm=True, key_norm=True)
    default = dict(type='MAEVRWKV', img_size=64, embed_dims=24, depth=2, **layers)
    encoder = default | (encoder or {})
    decoder = dict(num_patches=16, embed_dims=24, **layers) | (decoder or {})
    decoder = dict(decoder_embed_dims=12, decoder_depth=2) | decoder
    model = dict(
        type='MAE',
        backbone=encoder,
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
    return torch.load(ROOT / 'tests/data/golden/mae.pt', weights_only=True)


@pytest.fixture
def as_upstream(golden):
    """Build the model of the golden file, with its weights."""
    shift = dict(shift_mode='single_shift', channel_gamma=None)
    encoder = dict(shuffle=True, pos_embed_twice=True, **shift)
    model = build(encoder, shift, norm_pix=True)
    model.load_state_dict(from_upstream_mae(golden['state_dict']), strict=True)
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
    expected = from_upstream_mae(golden['grads'])
    assert set(parameters) == set(expected)
    for name, gradient in expected.items():
        assert relative_error(parameters[name].grad, gradient) < TOLERANCE, name


def test_mmpretrain_runs_the_same_loss(golden, as_upstream, monkeypatch):
    assert type(as_upstream) is MAE
    monkeypatch.setattr(torch, 'rand', lambda *_, **__: golden['noise'])
    loss = as_upstream(golden['input'], mode='loss')['loss']
    assert relative_error(loss.reshape(1), golden['outputs'][0]) < TOLERANCE


def test_converter(golden, as_upstream, tmp_path, monkeypatch, load_script):
    """MAE's code saves the weights under 'model', and its command line beside them."""
    source, target = tmp_path / 'upstream.pth', tmp_path / 'converted.pth'
    checkpoint = dict(model=golden['state_dict'], args=argparse.Namespace(lr=0.1), epoch=7)
    torch.save(checkpoint, source)
    monkeypatch.setattr('sys.argv', ['converter', str(source), str(target)])
    load_script('tools/model_converters/convert_upstream.py').main()
    model = build(dict(shift_mode='single_shift'), dict(shift_mode='single_shift'))
    load_checkpoint(model, str(target), strict=True)
    for name, value in as_upstream.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_from_upstream_mae_refuses_another_model():
    with pytest.raises(ValueError, match=r"no 'blocks.0.att.spatial_decay' among the keys \['a'"):
        from_upstream_mae(dict(a=torch.zeros(1)))


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bare():
    """Build an encoder without layers and norm: what it returns are its kept tokens."""

    def make(**kwargs):
        encoder = MAEVRWKV(img_size=64, embed_dims=24, depth=1, final_norm=False, **kwargs)
        encoder.init_weights()
        encoder.layers = nn.ModuleList()
        return encoder

    return make


def test_kept_tokens_come_in_the_order_of_the_image(bare, images):
    encoder = bare()
    tokens, mask, ids_restore = encoder(images)
    assert mask.sum(1).tolist() == [12, 12, 12]
    expected, _ = encoder.embed(images)
    for i in range(3):
        # A boolean index keeps the order.
        assert torch.equal(tokens[i], expected[i][mask[i] == 0])
        restored = torch.cat([tokens[i], torch.full((12, 24), torch.nan)])[ids_restore[i]]
        assert torch.equal(restored[mask[i] == 0], tokens[i])
        assert restored[mask[i] == 1].isnan().all()


def test_shuffled_tokens_are_the_same_in_another_order(bare, images):
    encoder = bare(shuffle=True)
    torch.manual_seed(1)  # four tokens of an image may keep their order by chance
    tokens, mask, ids_restore = encoder(images)
    expected, _ = encoder.embed(images)
    in_order = [torch.equal(tokens[i], expected[i][mask[i] == 0]) for i in range(3)]
    assert not any(in_order)
    for i in range(3):
        restored = torch.cat([tokens[i], torch.full((12, 24), torch.nan)])[ids_restore[i]]
        assert torch.equal(restored[mask[i] == 0], expected[i][mask[i] == 0])


def test_masks_are_drawn_anew(bare, images):
    encoder = bare()
    masks = [encoder(images)[1] for _ in range(2)]
    assert not torch.equal(*masks)
    assert not torch.equal(masks[0][0], masks[0][1])


def test_encoder_runs_on_kept_patches_only(images):
    encoder = MAEVRWKV(img_size=64, embed_dims=24, depth=2).eval()
    shapes = []
    for layer in encoder.layers:
        layer.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    torch.manual_seed(0)
    latent, mask, _ = encoder(images)
    assert shapes == [(3, 4, 24)] * 2
    assert latent.shape == (3, 4, 24)
    # What the mask removes does not matter, and what it keeps does.
    pixels = mask.reshape(3, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    for changed, same in ((images + pixels, True), (images + 1 - pixels, False)):
        torch.manual_seed(0)
        assert torch.equal(encoder(changed)[0], latent) is same


@pytest.mark.parametrize('mask', [None, False])
def test_without_a_mask_it_is_a_vrwkv(images, mask):
    model = build()
    plain = VRWKV(64, **arguments(), shift_mode='double_shift')
    plain.load_state_dict(model.backbone.state_dict())
    (expected,) = plain(images)
    (found,) = model.backbone(images, mask=mask)
    assert torch.equal(found, expected)
    assert torch.equal(model(images, mode='tensor')[0], expected)


@pytest.mark.parametrize('shift_mode', ['double_shift', 'single_shift', 'none'])
def test_vrwkv6_is_trained_and_is_a_vrwkv6(images, shift_mode):
    model = build(dict(type='MAEVRWKV6', num_heads=3, shift_mode=shift_mode))
    model.init_weights()
    model(images, mode='loss')['loss'].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    plain = VRWKV6(64, **arguments(), num_heads=3, shift_mode=shift_mode)
    plain.load_state_dict(model.backbone.state_dict())
    assert torch.equal(model.backbone(images, mask=None)[0], plain(images)[0])


def arguments():
    return dict(embed_dims=24, depth=2, init_values=0.1, post_norm=True, key_norm=True)


def test_position_embedding_is_added_once_unless_told_otherwise(images):
    once, twice = MAEVRWKV(64, **arguments()), MAEVRWKV(64, pos_embed_twice=True, **arguments())
    once.init_weights()
    twice.load_state_dict(once.state_dict())
    projected, _ = once.patch_embed(images)
    torch.testing.assert_close(once.embed(images)[0], projected + once.pos_embed)
    torch.testing.assert_close(twice.embed(images)[0], projected + 2 * once.pos_embed)


@pytest.mark.parametrize(('given', 'expected'), [({}, 'double_shift')] + [
    (dict(shift_mode=mode), mode) for mode in ('single_shift', 'double_shift', 'none')
])  # fmt: skip
def test_shift(given, expected):
    model = build(given, given)
    for layer in (*model.backbone.layers, *model.neck.decoder_blocks):
        assert layer.att.shift.shift_mode == layer.ffn.shift.shift_mode == expected


def test_decoder_puts_mask_tokens_where_patches_are_missing():
    decoder = MAEVRWKVDecoder(num_patches=4, patch_size=1, embed_dims=8, decoder_embed_dims=8)
    decoder.init_weights()
    decoder.decoder_blocks = nn.ModuleList()
    x = torch.randn(1, 2, 8)
    # Patches 3 and 1 were kept, 0 and 2 removed.
    found = decoder(x, torch.tensor([[3, 1, 2, 0]]).argsort(1).argsort(1))
    a, b = decoder.decoder_embed(x)[0]
    token = decoder.mask_token[0, 0]
    order = {3: a, 1: b, 2: token, 0: token}
    tokens = torch.stack([order[i] for i in range(4)]) + decoder.decoder_pos_embed[0]
    torch.testing.assert_close(found[0], decoder.decoder_pred(decoder.ln2(tokens)))


def test_loss_is_the_mean_square_over_masked_pixels(images):
    model = build()
    model.init_weights()
    torch.manual_seed(0)
    loss = model(images, mode='loss')['loss']
    torch.manual_seed(0)
    latent, mask, ids_restore = model.backbone(images)
    predicted = model.neck(latent, ids_restore)
    errors = [
        # Pixels of a patch in row-major order, channels last.
        (predicted[b, i].reshape(16, 16, 3) - tile(images[b], i)).square()
        for b, i in mask.nonzero().tolist()
    ]
    assert len(errors) == 36
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def tile(image, index):
    row, column = 16 * (index // 4), 16 * (index % 4)
    return image[:, row : row + 16, column : column + 16].permute(1, 2, 0)


def test_initial_values():
    model = build(dict(img_size=48), dict(num_patches=9))
    model.init_weights()
    encoder, decoder = model.backbone, model.neck
    for pos_embed in (encoder.pos_embed, decoder.decoder_pos_embed):
        assert pos_embed.requires_grad
        quarter = pos_embed.shape[2] // 4
        for token in range(9):
            for i in range(quarter):
                angles = [place / 10000 ** (i / quarter) for place in divmod(token, 3)]
                expected = [f(angle) for angle in angles for f in (math.sin, math.cos)]
                found = pos_embed[0, token, i::quarter].tolist()
                assert found == pytest.approx(expected, abs=1e-6)  # float32
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 4 * 7 + 2
    kernel = encoder.patch_embed.projection.weight.flatten(1)
    for weight in (*(m.weight for m in linears), kernel):
        bound = math.sqrt(6 / sum(weight.shape))  # uniform in +-bound
        assert 0.95 * bound < weight.abs().max() <= bound
    assert not any(m.bias.any() for m in linears if m.bias is not None)
    assert 0 < decoder.mask_token.std() < 0.05
    # Those that VRWKV sets itself stay.
    assert encoder.layers[0].att.spatial_decay[0] == -5


def test_drop_path_rises_to_the_rate():
    model = build(dict(drop_path_rate=0.2, depth=3), dict(drop_path_rate=0.1, decoder_depth=3))
    for layers, rates in (
        (model.backbone.layers, [0, 0.1, 0.2]),
        (model.neck.decoder_blocks, [0, 0.05, 0.1]),
    ):
        assert [layer.drop_path.drop_prob for layer in layers] == pytest.approx(rates)


def test_trains_in_mixed_precision(images):
    model = build()
    model.init_weights()
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(images, mode='loss')['loss']
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('backbone', [VRWKV, FrozenVRWKV])
def test_fine_tuning_takes_all_weights_of_the_encoder(tmp_path, backbone):
    model = build()
    model.init_weights()
    path = tmp_path / 'mae.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    plain = backbone(64, **arguments(), init_cfg=init_cfg)
    assert plain.layers[0].att.shift.shift_mode == 'q_shift'
    plain.init_weights()
    expected = model.backbone.state_dict()
    assert plain.state_dict().keys() == expected.keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize('part', ['backbone', 'neck'])
def test_weights_that_init_cfg_names_are_not_overwritten(tmp_path, part):
    source = build()
    nn.init.constant_(next(source.get_submodule(part).parameters()), 7.0)
    path = tmp_path / 'mae.pth'
    torch.save(dict(state_dict=source.state_dict()), path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix=f'{part}.')
    model = build(**{dict(backbone='encoder', neck='decoder')[part]: dict(init_cfg=init_cfg)})
    model.init_weights()
    found = model.get_submodule(part).state_dict()
    for name, value in source.get_submodule(part).state_dict().items():
        assert torch.equal(found[name], value), name


def test_frozen_backbone_does_not_learn(images):
    backbone = FrozenVRWKV(64, **arguments(), drop_rate=0.5, drop_path_rate=0.5).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert torch.equal(backbone(images)[0], backbone(images)[0])


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        (dict(mask_ratio=1.0), ValueError, r'mask_ratio must lie in \[0, 1\), got 1.0'),
        (dict(mask_ratio=-0.1), ValueError, r'mask_ratio must lie in \[0, 1\), got -0.1'),
        (dict(mask_ratio=math.nan), ValueError, r'mask_ratio must lie in \[0, 1\), got nan'),
        (dict(mask_ratio='3/4'), TypeError, "mask_ratio must be a number, got '3/4'"),
        (dict(mask_ratio=0.95), ValueError, 'mask_ratio=0.95 keeps none of the 16 patches'),
        (dict(img_size=72), ValueError, 'img_size=72 is not a multiple of patch_size=16'),
        (dict(img_size=(64, 48)), TypeError, r'img_size must be an integer, got \(64, 48\)'),
        (dict(shift_mode='q_shift'), ValueError, 'shift_mode must be one of'),
    ],
)
def test_bad_encoder(kwargs, error, message):
    with pytest.raises(error, match=message):
        MAEVRWKV(**dict(img_size=64, embed_dims=24, depth=1) | kwargs)


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        (dict(num_patches=15), ValueError, 'num_patches must be a square, got 15'),
        (dict(decoder_depth=0), ValueError, 'decoder_depth must be at least 1, got 0'),
        (dict(drop_path_rate=2), ValueError, 'drop_path_rate must lie in'),
        (dict(shift_mode='q_shift'), ValueError, 'shift_mode must be one of'),
    ],
)
def test_bad_decoder(kwargs, error, message):
    with pytest.raises(error, match=message):
        MAEVRWKVDecoder(**dict(embed_dims=24, decoder_embed_dims=12) | kwargs)


@pytest.mark.parametrize(('size', 'text'), [((72, 72), '72x72'), ((64, 80), '64x80')])
def test_images_of_another_size(size, text):
    model = build()
    with pytest.raises(ValueError, match=f'expected images of 64x64 pixels, got {text}'):
        model(torch.randn(1, 3, *size), mode='loss')


def test_encoder_and_decoder_of_different_grids(images):
    with pytest.raises(ValueError, match='num_patches=25, but the encoder has 16 patches'):
        build(decoder=dict(num_patches=25))(images, mode='loss')


def test_training_without_a_mask_is_refused(images):
    """The mean over no patch would be NaN."""
    model = build(dict(mask_ratio=0))
    assert model.backbone(images)[0].shape == (3, 16, 24)
    with pytest.raises(ValueError, match='the mask keeps every patch'):
        model.train()(images, mode='loss')


@pytest.mark.parametrize(
    ('other', 'message'),
    [
        (dict(decoder_depth=3), r'decoder_depth=3 \(here 2\)'),
        (dict(decoder_embed_dims=16), r'decoder_embed_dims=16 \(here 12\)'),
        (dict(num_patches=25), r'num_patches=25 \(here 16\)'),
        (dict(patch_size=8), r'decoder_pred.weight of shape \(192, 12\) \(here \(768, 12\)\)'),
    ],
)
@pytest.mark.parametrize('load', [load_state_dict, nn.Module.load_state_dict])
def test_checkpoint_of_another_decoder(other, message, load):
    weights = build(decoder=other).state_dict()
    # mmengine would only log it.
    with pytest.raises(RuntimeError, match=message):
        load(build(), weights, strict=False)


def test_checkpoint_without_a_decoder():
    weights = {k: v for k, v in build().state_dict().items() if k.startswith('backbone.')}
    with pytest.raises(
        RuntimeError, match=r'no weights of MAEVRWKVDecoder.*load the encoder alone'
    ):
        load_state_dict(build(), weights)
