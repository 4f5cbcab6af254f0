"""The adapter around VRWKV, against upstream's numbers and hand-computed cases."""

import math
import subprocess
import sys

import mmcv.ops.multi_scale_deform_attn as deform
import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict as mmengine_load_state_dict
from torch import nn

from vrwkv.backbones import VRWKV, VRWKVAdapter
from vrwkv.layers import adapter
from vrwkv.layers.adapter import ConvFFN, DeformableAttention, DeformableInputs
from vrwkv.mmcv_ops import installed

BN = dict(type='BN')
SMALL = dict(
    img_size=64,
    embed_dims=24,
    depth=4,
    init_values=1.0,
    conv_inplane=8,
    n_points=2,
    deform_num_heads=3,
)


def small(**kwargs):
    """Build an adapter whose injectors do something, so that everything has a gradient."""
    torch.manual_seed(0)
    return VRWKVAdapter(**(SMALL | dict(init_values_inject=0.5) | kwargs))


def images(height=32, width=64, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def run(model, x):
    """Return the outputs, and the gradients of a loss that every output enters."""
    outputs = model(x)
    sum(o.square().mean() for o in outputs).backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# --- upstream's numbers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'fuse'), [('det_adapter_tiny', 'last'), ('seg_adapter_tiny', 'stages')]
)
@pytest.mark.parametrize('with_cp', [False, True])
def test_equals_upstream(name, fuse, with_cp, golden):
    numbers = golden(name)
    model = VRWKVAdapter(**numbers.config, fuse=fuse, with_cp=with_cp).eval()
    model.load_state_dict(numbers.state_dict, strict=True)
    numbers.check(model(numbers.input), dict(model.named_parameters()))


# --- geometry -----------------------------------------------------------------------------------


def test_deformable_inputs_by_hand():
    geometry = DeformableInputs.build([(1, 2), (2, 1)], [(1, 2), (2, 3)], torch.zeros(()))
    # Pixel centres as fractions, x first.
    points = [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]
    assert geometry.reference_points.tolist() == [[[point] for point in points]]
    assert geometry.spatial_shapes == ((1, 2), (2, 3))
    assert geometry.sizes.tolist() == [[2, 1], [3, 2]]


def test_deformable_attention_is_that_of_mmcv():
    """Initial values to the bit, and results to a rounding of float32."""
    torch.manual_seed(0)
    theirs = deform.MultiScaleDeformableAttention(
        24, 3, 2, 4, dropout=0.0, batch_first=True, value_proj_ratio=0.5
    )
    torch.manual_seed(0)
    ours = DeformableAttention(24, 3, 2, 4, value_ratio=0.5)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other) and all(torch.equal(mine[n], other[n]) for n in mine)
    for linear in (ours.sampling_offsets, ours.attention_weights):
        nn.init.normal_(linear.weight)
    theirs.load_state_dict(ours.state_dict())
    query, value = torch.randn(2, 15, 24), torch.randn(2, 26, 24)
    shapes = [(4, 5), (2, 3)]
    geometry = DeformableInputs.build([(3, 5)], shapes, query)
    expected = theirs(
        query,
        value=value,
        identity=torch.zeros(()),
        reference_points=geometry.reference_points,
        spatial_shapes=torch.tensor(shapes),
    )
    torch.testing.assert_close(ours(query, value, geometry), expected, rtol=1e-5, atol=1e-6)


def test_strict_export():
    """tests/tools/test_export.py exports adapters for all sizes."""
    model = small(norm_cfg=BN, depth=1, interaction_indexes=[[0, 0]]).eval()
    x = images()
    program = torch.export.export(model, (x,), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))


def test_conv_ffn_convolves_each_map_by_itself():
    """Against a convolution of each map alone, cut out by hand."""
    torch.manual_seed(0)
    ffn = ConvFFN(4, 3)
    grids = ((4, 6), (2, 3), (1, 1))
    maps = [torch.randn(2, h * w, 4) for h, w in grids]
    got = ffn(torch.cat(maps, dim=1), grids).split([24, 6, 1], dim=1)
    for tokens, (h, w), out in zip(maps, grids, got, strict=True):
        image = ffn.fc1(tokens).permute(0, 2, 1).reshape(2, 3, h, w)
        hidden = ffn.dwconv.dwconv(image).reshape(2, 3, h * w).permute(0, 2, 1)
        torch.testing.assert_close(out, ffn.fc2(nn.functional.gelu(hidden)))


@pytest.mark.parametrize(
    ('size', 'fuse'), [((32, 32), 'last'), ((32, 416), 'last'), ((416, 32), 'stages')]
)
def test_any_multiple_of_32(size, fuse):
    model = small(fuse=fuse, norm_cfg=BN)
    outputs, grads = run(model, images(*size))
    assert [o.shape for o in outputs] == [
        (2, 24, size[0] // s, size[1] // s) for s in (4, 8, 16, 32)
    ]
    assert all(o.isfinite().all() and o.is_contiguous() for o in outputs)
    assert [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()] == []


@pytest.mark.parametrize('size', [(48, 64), (64, 65), (500, 333), (16, 16)])
def test_other_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f'multiples of 32, got {size[0]} x {size[1]}: pad it'):
        small(norm_cfg=BN)(images(*size))


# --- the features that are added ----------------------------------------------------------------


def test_fuse_says_which_features_are_added():
    """Without norm layers, and with the spatial prior switched off, outputs are the features."""
    x = images()
    plain = VRWKV(img_size=64, embed_dims=24, depth=4, final_norm=False, out_indices=range(4))
    expected = plain(x)
    for fuse, picked in (('last', (3, 3, 3, 3)), ('stages', (0, 1, 2, 3)), (None, ())):
        model = small(
            init_values=None,
            init_values_inject=0.0,
            norm_cfg=BN,
            fuse=fuse or 'last',
            add_rwkv_feature=fuse is not None,
        ).eval()
        model.load_state_dict(plain.state_dict(), strict=False)
        nn.init.zeros_(model.level_embed)
        for module in (model.spm, model.up, model.interactions):
            for p in module.parameters():
                nn.init.zeros_(p)
        bn_scale = 1 / math.sqrt(1 + 1e-5)
        outputs = model(x)
        for i, output in enumerate(outputs):
            if fuse is None:
                assert not output.any()
                continue
            feature = nn.functional.interpolate(
                expected[picked[i]], size=output.shape[2:], mode='bilinear', align_corners=False
            )
            torch.testing.assert_close(output, feature * bn_scale, rtol=1e-5, atol=1e-5)


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(use_extra_extractor=False),
        dict(with_cffn=False),
        dict(add_rwkv_feature=False),
        dict(deform_ratio=0.5, cffn_ratio=0.5),
        dict(interaction_indexes=[[0, 0], [1, 3]]),
        dict(in_channels=4, key_norm=True, post_norm=True),
    ],
    ids=lambda kwargs: '-'.join(kwargs),
)
def test_every_parameter_gets_a_gradient(kwargs):
    model = small(norm_cfg=BN, **kwargs)
    x = torch.randn(2, kwargs.get('in_channels', 3), 32, 64)
    _, grads = run(model, x)
    missing = [name for name, grad in grads.items() if grad is None]
    # The last extractor reads the last layer's output, even where no output adds it.
    assert missing == []
    assert grads['patch_embed.projection.weight'].any()


def test_with_cp_recomputes_injectors_and_extractors(monkeypatch):
    calls = []
    attend = DeformableAttention.forward
    monkeypatch.setattr(
        DeformableAttention,
        'forward',
        lambda self, *args, **kwargs: calls.append(self) or attend(self, *args, **kwargs),
    )
    run(small(norm_cfg=BN, with_cp=True), images())
    # Four injectors, six extractors, each once more in the backward pass.
    assert len(calls) == 2 * 10


def test_drop_path_rates():
    """Linear over the backbone's layers, the full rate in the extractors' networks."""
    model = small(drop_path_rate=0.3)
    assert [layer.drop_path.drop_prob for layer in model.layers] == pytest.approx(
        [0, 0.1, 0.2, 0.3]
    )
    extractors = [i.extractor for i in model.interactions]
    extractors += model.interactions[-1].extra_extractors
    assert [e.drop_path.drop_prob for e in extractors] == [0.3] * 6


@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, 4])
def test_frozen_stages(frozen_stages):
    model = small(norm_cfg=BN, frozen_stages=frozen_stages, drop_rate=0.1).train()
    frozen = set()
    if frozen_stages >= 0:
        frozen = {name for name, _ in model.named_parameters() if name.startswith('patch_embed.')}
        frozen.add('pos_embed')
    for i in range(frozen_stages):
        frozen |= {f'layers.{i}.{name}' for name, _ in model.layers[i].named_parameters()}
    run(model, images())
    assert {name for name, p in model.named_parameters() if p.grad is None} == frozen
    assert [layer.training for layer in model.layers] == [i >= frozen_stages for i in range(4)]
    assert model.drop_after_pos.training == (frozen_stages < 0)
    assert model.spm.training
    assert not model.eval().spm.training


def test_get_layer_depth():
    """The adapter's own parameters have the head's rate."""
    model = small()
    depths = {
        name: model.get_layer_depth('backbone.' + name, 'backbone.')
        for name, _ in model.named_parameters()
    }
    assert {total for _, total in depths.values()} == {6}
    assert {depth for name, (depth, _) in depths.items() if name.startswith('layers.2.')} == {3}
    assert depths['pos_embed'][0] == depths['patch_embed.projection.weight'][0] == 0
    own = ('level_embed', 'spm.', 'interactions.', 'up.', 'norm')
    assert {depth for name, (depth, _) in depths.items() if name.startswith(own)} == {5}


# --- norm layers --------------------------------------------------------------------------------


def test_sync_bn_is_the_default_and_trains_in_one_cpu_process():
    """It is batch norm there: outputs, gradients, running means and names are equal."""
    results = {}
    for norm in (None, BN):
        model = small(norm_cfg=norm)
        outputs, grads = run(model, images())
        results[norm is None] = (outputs, grads, model.state_dict())
        kind = nn.SyncBatchNorm if norm is None else nn.BatchNorm2d
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert len(norms) == 10
        assert all(isinstance(m, kind) for m in norms)
    assert list(results[True][2]) == list(results[False][2])
    for with_sync, without in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(with_sync, without, rtol=0, atol=0)


def test_group_norm():
    model = small(norm_cfg=dict(type='GN', num_groups=4))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    _, grads = run(model, images(batch=1))
    assert all(grad is not None for grad in grads.values())


def test_norm_cfg_can_freeze_the_norms():
    model = small(norm_cfg=dict(type='BN', requires_grad=False))
    assert not model.norm1.weight.requires_grad
    assert not model.spm.stem[1].weight.requires_grad


# --- precision ----------------------------------------------------------------------------------


def spy_on_sampling(monkeypatch):
    seen = []
    sample = adapter.ms_deform_attn

    def spy(value, shapes, locations, weights):
        seen.append((value.dtype, locations.dtype))
        return sample(value, shapes, locations, weights)

    monkeypatch.setattr(adapter, 'ms_deform_attn', spy)
    return seen


def test_mixed_precision_samples_in_float32(monkeypatch):
    """Rounded to bfloat16, neighbouring points of a map 256 wide would be the same."""
    seen = spy_on_sampling(monkeypatch)
    model = small(norm_cfg=BN)
    reference = model(images())
    with torch.autocast('cpu', torch.bfloat16):
        outputs, grads = run(model, images())
    assert set(seen) == {(torch.float32, torch.float32)}
    for output, expected in zip(outputs, reference, strict=True):
        assert (output.float() - expected).std() < 0.05 * expected.std()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_whole_model_in_another_dtype(dtype, monkeypatch):
    seen = spy_on_sampling(monkeypatch)
    model = small(norm_cfg=BN).to(dtype)
    assert {o.dtype for o in model(images().to(dtype))} == {dtype}
    sampled = torch.promote_types(dtype, torch.float32)
    assert set(seen) == {(sampled, sampled)}


# --- initial values -----------------------------------------------------------------------------


def test_initial_values():
    torch.manual_seed(0)
    model = VRWKVAdapter(embed_dims=96, depth=4, conv_inplane=32, deform_num_heads=6)
    assert model.level_embed.std().item() == pytest.approx(1, rel=0.2)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not name.startswith('patch_embed'):
            fan_out = 9 if 'dwconv' in name else module.kernel_size[0] ** 2 * module.out_channels
            std = module.weight.std().item()
            assert std == pytest.approx(math.sqrt(2 / fan_out), rel=0.2), name
            assert module.bias is None or not module.bias.any()
    assert model.up.weight.std().item() == pytest.approx(math.sqrt(2 / (4 * 96)), rel=0.1)
    for interaction in model.interactions:
        assert not interaction.injector.gamma.any()
        for block in (interaction.injector, interaction.extractor):
            assert block.query_norm.eps == block.feat_norm.eps == 1e-6
            assert not block.attn.sampling_offsets.weight.any()
            assert not block.attn.attention_weights.weight.any()
    assert model.interactions[0].extractor.ffn.fc1.weight.std().item() == pytest.approx(
        0.02, rel=0.1
    )
    assert model.ln1 is None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.init_weights()  # mmengine's runner calls it: only what is random may change
    changed = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert changed == []


def test_init_values_inject():
    assert all((i.injector.gamma == 0.5).all() for i in small().interactions)


def test_default_interactions_are_four_equal_runs():
    assert small(depth=8).interaction_indexes == ((0, 1), (2, 3), (4, 5), (6, 7))


def test_starts_as_the_plain_backbone():
    """With injector scales of 0 the tokens go through VRWKV undisturbed."""
    torch.manual_seed(0)
    model = VRWKVAdapter(**SMALL, norm_cfg=BN).eval()
    seen = []
    model.layers[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    model(images())
    plain = VRWKV(
        **{k: SMALL[k] for k in ('img_size', 'embed_dims', 'depth', 'init_values')},
        final_norm=False,
    )
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}, strict=True
    )
    (expected,) = plain(images())
    torch.testing.assert_close(seen[0], expected.flatten(2).transpose(1, 2))


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda w: w.pop('interactions.1.extractor.attn.value_proj.bias'),
            r'lacks inter.* nothing',
        ),
        (
            lambda w: w.pop('layers.3.att.key.weight'),
            'lacks layers.3.att.key.weight, and has nothing',
        ),
        (lambda w: w.pop('norm4.running_var'), 'lacks norm4.running_var'),
        (
            lambda w: w.update({'ln1.weight': w['layers.0.ln0.weight']}),
            'nothing, and has ln1.weight',
        ),
    ],
)
def test_part_of_an_adapter_is_an_error(change, message):
    """mmengine would log what is missing, and go on."""
    weights = small().state_dict()
    change(weights)
    with pytest.raises(RuntimeError, match=f'does not fit this VRWKVAdapter: .*{message}'):
        mmengine_load_state_dict(small(), weights, strict=False)


def test_another_adapter_is_an_error():
    weights = small(use_extra_extractor=False).state_dict()
    with pytest.raises(
        RuntimeError, match=r'lacks interactions\.3\.extra_extractors.* more, and has'
    ):
        mmengine_load_state_dict(small(), weights, strict=False)
    with pytest.raises(RuntimeError, match=r'lacks nothing, and has interactions\.3\.extra_extrac'):
        mmengine_load_state_dict(small(use_extra_extractor=False), small().state_dict())


def test_part_of_a_classifier_is_an_error():
    weights = VRWKV(img_size=64, embed_dims=24, depth=4).state_dict()
    small().load_state_dict(weights, strict=False)  # without layer scale
    del weights['layers.2.ffn.value.weight']
    with pytest.raises(RuntimeError, match=r'lacks layers\.2\.ffn\.value\.weight, and has nothing'):
        mmengine_load_state_dict(small(), weights, strict=False)


def test_pretrain_size_is_img_size():
    assert small(img_size=64, pretrain_size=64).pos_embed.shape[1] == 16
    config = {k: v for k, v in SMALL.items() if k != 'img_size'}
    assert VRWKVAdapter(**config, pretrain_size=(96, 64)).pos_embed.shape[1] == 24
    with pytest.raises(ValueError, match=r'name the same size.*got 224 and 64: give one'):
        small(pretrain_size=224)


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'indexes',
    [
        [[0, 1], [1, 3]],  # overlap
        [[0, 0], [2, 3]],  # layer 1 left out
        [[0, 2]],  # layer 3 left out
        [[1, 3]],  # layer 0 left out
        [[2, 3], [0, 1]],  # unordered
        [[0, 4]],  # beyond the depth
        [[0, 3], [4, 3]],  # empty
        [[0, 1, 3]],
        [],
    ],
    ids=str,
)
def test_interaction_indexes_are_checked(indexes):
    with pytest.raises(ValueError, match='hold each of the layers 0 to 3 once, in order, got'):
        small(interaction_indexes=indexes)


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        (dict(deform_num_heads=5), ValueError, 'must divide embed_dims=24.*got 5'),
        (dict(deform_num_heads=8, deform_ratio=0.5), ValueError, 'and the 12 channels.*got 8'),
        (dict(deform_num_heads=0), ValueError, 'deform_num_heads must be at least 1'),
        (dict(fuse='stage'), ValueError, "fuse must be one of.*Did you mean 'stages'"),
        (
            dict(fuse='stages', interaction_indexes=[[0, 3]]),
            ValueError,
            'needs four interaction_indexes, got 1',
        ),
        (dict(depth=5), ValueError, '5 does not divide into four equal.*give interaction_indexes'),
        (dict(patch_size=8), ValueError, 'patch_size must be 16, got 8'),
        (dict(out_indices=(0, 1)), TypeError, 'no out_indices'),
        (dict(final_norm=True), TypeError, 'no final_norm'),
        (dict(frozen_stages=5), ValueError, 'at most the depth, 4, got 5'),
        (dict(frozen_stages=-2), ValueError, 'frozen_stages must be at least -1'),
        (dict(cffn_ratio=0.01), ValueError, 'at least one hidden channel of embed_dims=24'),
        (dict(conv_inplane=0), ValueError, 'conv_inplane must be at least 1'),
        (dict(n_points=0), ValueError, 'n_points must be at least 1'),
    ],
    ids=lambda value: '-'.join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        small(**kwargs)


def test_without_mmcv_the_error_says_what_to_install():
    """Everything else must import without mmcv."""
    code = (
        'import sys\n'
        'class Missing:\n'
        '    def find_spec(name, *args):\n'
        '        if name == "mmcv":\n'
        '            raise ModuleNotFoundError(name, name=name)\n'
        'sys.meta_path.insert(0, Missing)\n'
        'from vrwkv.backbones import *\n'
        'import vrwkv.layers.adapter, vrwkv.analysis\n'
        'VRWKV(depth=1), ViT(depth=1)\n'
        'try:\n'
        '    from vrwkv.backbones import VRWKVAdapter\n'
        'except ImportError as error:\n'
        '    print(error)\n'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "the adapter needs the package 'mmcv', which is not installed" in result.stdout
    remedy = 'onedl-mmengine' if 'onedl-mmcv' in installed() else "-e '.[detection]'"
    assert f'pip install {remedy}' in result.stdout
