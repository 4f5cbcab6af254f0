"""Parameters and FLOPs of the backbones in the paper's tables 3 and 4."""

import mmcv.ops.multi_scale_deform_attn as deform
import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from torch import nn

from vrwkv.analysis.flops import FLOP_HANDLERS
from vrwkv.backbones import ViTAdapter, VRWKV6Adapter, VRWKVAdapter

# The paper's 800x1333 is padded to multiples of 32.
SIZES = ((512, 512), (800, 1344))
PROBE = (64, 96)
# (window, window, global) x 4 and, for Large, (window x 5, global) x 4
WINDOWS = (0, 1, 3, 4, 6, 7, 9, 10)
WINDOWS_LARGE = tuple(i for i in range(24) if i % 6 != 5)

SIZE_ARGUMENTS = {
    'tiny': dict(embed_dims=192, depth=12, deform_num_heads=6),
    'small': dict(embed_dims=384, depth=12, deform_num_heads=6),
    'base': dict(embed_dims=768, depth=12, deform_num_heads=12, deform_ratio=0.5),
    'large': dict(embed_dims=1024, depth=24, deform_num_heads=16, deform_ratio=0.5),
}
VRWKV_ARGUMENTS = {
    'tiny': dict(init_values=1.0),
    'small': dict(init_values=1e-5, post_norm=True),
    'base': dict(init_values=1e-5, post_norm=True),
    'large': dict(init_values=1e-5, post_norm=True, key_norm=True, img_size=192),
}
VIT_ARGUMENTS = {
    'tiny': dict(init_values=1.0, num_heads=3),
    'small': dict(init_values=1.0, num_heads=6),
    'base': dict(init_values=1.0, num_heads=12),
    'large': dict(init_values=1.0, num_heads=16, img_size=384),
}
# size: millions of parameters, then 1e9 FLOPs at the two SIZES
VRWKV_TABLE = {
    'tiny': (8.4, 16.6, 67.9),
    'small': (29.3, 46.3, 189.9),
    'base': (106.6, 146.0, 599.0),
    'large': (351.9, 421.9, 1730.6),
}
# The same with global attention, then 1e9 FLOPs at the larger size with windows. The paper has no
# Large with global attention at that size.
VIT_TABLE = {
    'tiny': (8.0, 20.9, 147.1, 95.4),
    'small': (27.5, 54.0, 344.5, 241.2),
    'base': (99.5, 157.9, 893.3, 686.7),
    'large': (327.0, 446.8, None, 1799.3),
}


def build(cls, **kwargs):
    """Build a model with zeros for weights: no count depends on them, and it is quick."""
    with torch.device('meta'):
        model = cls(norm_cfg=dict(type='BN'), **kwargs)
    model = model.to_empty(device='cpu').eval()
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.zeros_(tensor)
    return model


def count(model, size):
    analyzer = FlopAnalyzer(model, torch.zeros(1, 3, *size)).set_op_handle(**FLOP_HANDLERS)
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return analyzer.by_operator()


def millions(model):
    return sum(p.numel() for p in model.parameters()) / 1e6


def paper(value):
    """The paper's number within 1.5 % or half a unit of its last digit."""
    return pytest.approx(value, rel=0.015, abs=0.05)


def attention_by_hand(model, size, windows=True):
    """Two products of every query with every key of its window, or of the image."""
    total = 0
    height, width = size[0] // 16, size[1] // 16
    for layer in model.layers:
        window = layer.attn.window_size if windows else None
        if window is None:
            pairs = (height * width) ** 2
        else:
            pairs = -(-height // window) * -(-width // window) * window**4
        total += 2 * pairs * model.embed_dims
    return total


@pytest.mark.parametrize('name', VRWKV_TABLE)
def test_vrwkv_adapter(name):
    """All of it is proportional to the number of pixels, so a small image tells."""
    parameters, *flops = VRWKV_TABLE[name]
    model = build(VRWKVAdapter, **SIZE_ARGUMENTS[name], **VRWKV_ARGUMENTS[name])
    assert millions(model) == pytest.approx(parameters, abs=0.05)
    counts = count(model, PROBE)
    tokens = PROBE[0] * PROBE[1] // 256
    assert counts['bi_wkv'] == 29 * tokens * model.embed_dims * model.depth
    for size, expected in zip(SIZES, flops, strict=True):
        scale = size[0] * size[1] / (PROBE[0] * PROBE[1])
        assert sum(counts.values()) * scale / 1e9 == paper(expected), size


@pytest.mark.parametrize(
    ('name', 'parameters'), [('tiny', 9.89), ('small', 33.12), ('base', 117.81)]
)
def test_vrwkv6_adapter(name, parameters):
    """VRWKV's adapter, on a backbone with VRWKV6's additional products and scan."""
    heads = SIZE_ARGUMENTS[name]['embed_dims'] // 64
    arguments = {**SIZE_ARGUMENTS[name], **VRWKV_ARGUMENTS[name]}
    model = build(VRWKV6Adapter, num_heads=heads, **arguments)
    assert millions(model) == pytest.approx(parameters, abs=0.005)
    six, plain = count(model, PROBE), count(build(VRWKVAdapter, **arguments), PROBE)
    layers = PROBE[0] * PROBE[1] // 256 * model.embed_dims * model.depth
    # Per token and channel: state elements and element-wise work, low ranks, gate, group norm.
    assert six.pop('bi_wkv6_forward') == layers * (7 * 64 + 17)
    assert plain.pop('bi_wkv') == layers * 29
    difference = sum(six.values()) - sum(plain.values())
    assert difference == pytest.approx(layers * (320 + 128 + model.embed_dims), rel=0.02)


@pytest.mark.parametrize('name', VIT_TABLE)
def test_vit_adapter(name):
    """All but the attention is proportional to the number of pixels."""
    parameters, *flops, flops_windows = VIT_TABLE[name]
    model = build(
        ViTAdapter,
        **SIZE_ARGUMENTS[name],
        **VIT_ARGUMENTS[name],
        window_block_indexes=WINDOWS_LARGE if name == 'large' else WINDOWS,
    )
    assert millions(model) == pytest.approx(parameters, abs=0.05)
    counts = count(model, PROBE)
    attention = counts.pop('scaled_dot_product_attention')
    assert attention == attention_by_hand(model, PROBE)
    rows = [(size, value, False) for size, value in zip(SIZES, flops, strict=True)]
    for size, expected, windows in (*rows, (SIZES[1], flops_windows, True)):
        if expected is not None:
            rest = sum(counts.values()) * size[0] * size[1] / (PROBE[0] * PROBE[1])
            total = rest + attention_by_hand(model, size, windows)
            assert total / 1e9 == paper(expected), (size, windows)


def test_scaling_from_a_small_image_is_exact():
    """What the tests above rely on."""
    vit = build(ViTAdapter, **SIZE_ARGUMENTS['tiny'], num_heads=3, window_block_indexes=WINDOWS)
    vrwkv = build(VRWKVAdapter, **SIZE_ARGUMENTS['tiny'])
    large = (128, 288)
    scale = large[0] * large[1] / (PROBE[0] * PROBE[1])
    for model in (vit, vrwkv):
        small_counts, large_counts = count(model, PROBE), count(model, large)
        assert large_counts.pop('scaled_dot_product_attention', None) in (
            None,
            attention_by_hand(vit, large),
        )
        small_counts.pop('scaled_dot_product_attention', None)
        assert {op: flops * scale for op, flops in small_counts.items()} == large_counts


def test_the_gpu_kernel_of_deformable_attention_counts_as_the_cpu_path():
    """Traced with a stand-in of the kernel's name and signature that runs without a GPU."""

    class Stub(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, shapes, starts, locations, weights, im2col_step):
            return deform.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)

    Stub.__name__ = deform.MultiScaleDeformableAttnFunction.__name__
    shapes = torch.tensor([[2, 3], [1, 2]])

    class Model(nn.Module):
        def __init__(self, kernel):
            super().__init__()
            self.kernel = kernel

        def forward(self, value, locations, weights):
            if self.kernel:
                return Stub.apply(value, shapes, shapes[:, 0], locations, weights, 64)
            return deform.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)

    # 2 images, 8 values, 5 queries, 3 heads of 4 channels, 2 levels, 6 points
    inputs = (torch.rand(2, 8, 3, 4), torch.rand(2, 5, 3, 2, 6, 2), torch.rand(2, 5, 3, 2, 6))
    for kernel in (False, True):
        analyzer = FlopAnalyzer(Model(kernel), inputs).set_op_handle(**FLOP_HANDLERS)
        assert analyzer.unsupported_ops_warnings(False).total() == 4 * 2 * 5 * 3 * 4 * 2 * 6
